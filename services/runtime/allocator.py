"""How the C library's allocator treats memory, where it is glibc's; elsewhere nothing happens here."""

from __future__ import annotations

import contextlib
import ctypes

# Of glibc's malloc.h, and the largest values that any version takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST_TRIM, _MMAP = 2**31 - 1, (2**30, 2**25)


def share_one_arena() -> None:
    """Has all threads allocate from one arena. To be called before the first other thread does.

    Arenas of other threads than the first are of 64 MiB each. Whatever they can they give back at once, if told to keep
    it they give nothing back ever, and a thread that ends leaves its arena to the next.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def keep_freed() -> None:
    """Has the allocator keep what is freed, for what comes next. For a process that computes on a processor.

    Every batch takes and frees the same tensors. Given back to the system, their pages would be asked for and zeroed
    anew in every layer. ``give_back`` gives everything back all the same, of one arena.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _MOST_TRIM)
        any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP)


def give_back() -> None:
    """Gives what is free back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
