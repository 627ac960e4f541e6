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
    """Let the heap keep freed memory instead of returning it to the system, if the C library is glibc.

    By default glibc returns it after each step, and the system clears every page again in the next one. Blocks above
    32 MiB are returned as before, so that the most memory that a run needs stays the same. Nothing is changed if one of
    glibc's own variables is set: ``MALLOC_TRIM_THRESHOLD_=131072`` is glibc's default.
    """
    if _is_glibc() and not any(name in os.environ for name in _VARIABLES):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)


def return_freed_memory() -> None:
    """Return the heap's freed memory to the system, if the C library is glibc: much, after a large CSV was read."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
