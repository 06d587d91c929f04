"""Memory that is freed is not given back, so that it has no page faults when it is allocated again."""

import ctypes
import os
import subprocess
import sys

import pytest

from garrulax.train.freed_memory import keep_freed_memory

SIZE = 64 << 20


def test_a_block_that_was_freed_has_its_pages_when_it_is_allocated_again():
    resource = pytest.importorskip("resource")
    if not keep_freed_memory():
        pytest.skip("not glibc, or the environment sets how it allocates")
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def faults_of_a_block():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = library.malloc(SIZE)
        library.memset(block, 1, SIZE)
        library.free(block)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of_a_block()
    assert faults_of_a_block() < SIZE // resource.getpagesize() // 16


PROGRAM = """
import resource
import jax, jax.numpy as jnp
from garrulax.train.freed_memory import keep_freed_memory, run_in_the_calling_thread
run_in_the_calling_thread()
assert keep_freed_memory()
x = jnp.ones((4096, 8192))
f = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y[::-1] + x, x).sum())  # temporary arrays of 128 MiB
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sorted(faults() for _ in range(9))[4])  # the heap may grow again where a block is freed late
"""


def test_a_program_with_much_temporary_memory_touches_no_new_pages():
    if not keep_freed_memory():
        pytest.skip("not glibc, or the environment sets how it allocates")
    one_device = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=one_device, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
