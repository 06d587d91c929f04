"""Memory that a training step on a CPU frees, kept for the next step.

XLA:CPU allocates the temporary arrays of a program as one block, and frees it when the program ends. The C library
gives a block of more than 32 MiB back to the operating system at once, so that every step would get new pages, which
the kernel fills with zeros one by one at the first touch: a quarter of the processor time of a step of a small model.
PyTorch allocates array by array, most of them smaller than that.

A thread of XLA's that allocates more than 64 MiB at once gets new pages all the same, because glibc gives such threads
heaps of that size. The heap of the main thread has no limit: so programs have to run there.
"""

import ctypes
import functools
import os
from collections.abc import Callable

import jax

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of malloc.h of glibc
_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
_TUNABLES_OF_THE_USER = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold", "glibc.malloc.mmap_max")


def run_in_the_calling_thread() -> None:
    """Makes XLA:CPU run programs of one device in the thread that calls them, where all freed blocks can be kept.

    To be called before JAX uses a device: later it changes nothing. Nor does it where freed memory is not kept.

    Calls then return when the program has ended, so that Python does not work meanwhile: the trainer takes 2 to 3 %
    longer for steps of 40 ms that need less than 64 MiB. One that needs 600 MiB takes 13 % less (docs/performance.md).
    """
    if _mallopt() is not None:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


@functools.cache
def keep_freed_memory() -> bool:
    """Makes the C library keep the memory that this process frees, in blocks of less than 2 GiB, for its next blocks.

    The process then stays as large as it was at its largest. Where the environment says itself when memory is returned
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, MALLOC_MMAP_MAX_, or these in GLIBC_TUNABLES), nothing is changed.

    Returns:
        Whether it was done: only glibc (Linux) is known to have the two settings.
    """
    mallopt = _mallopt()
    # Blocks of less than 2 GiB come from the heap, whose free end stays (-1: no limit).
    return mallopt is not None and all([mallopt(_MMAP_THRESHOLD, 2**31 - 1), mallopt(_TRIM_THRESHOLD, -1)])


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function that sets how memory is kept; None without glibc, or if the environment has such settings."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in _OF_THE_USER) or any(name in tunables for name in _TUNABLES_OF_THE_USER):
        return None
    try:
        library = ctypes.CDLL(None)
        return library.mallopt if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError, AttributeError):  # Windows; a program without a dynamic C library
        return None
