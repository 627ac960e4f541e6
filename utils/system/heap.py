"""Decide when glibc returns freed memory to the system."""

import ctypes
import os
import platform

# glibc's names for these limits in malloc.h, and the environment variables that set them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

_LARGEST_TRIM = 2**31 - 1  # mallopt takes an int
_LARGEST_FROM_HEAP = 32 * 2**20  # the most that glibc accepts


def keep_freed_memory() -> None:
    """Let the heap keep memory that is freed from now on, if the C library is glibc.

    By default glibc returns it to the system after each training step, which clears every page again for the next one.
    The most memory that a run needs hardly changes: what was freed before, such as that for reading a CSV or loading an
    LLM, is returned now, and blocks above 32 MiB always are. Nothing is changed if one of glibc's own variables is set;
    ``MALLOC_TRIM_THRESHOLD_=131072`` is glibc's default.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
