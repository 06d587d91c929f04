"""Memory that is freed is not given back, so that it has no page faults when it is allocated again."""

import ctypes

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
