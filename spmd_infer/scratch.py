"""Scratch memory of programs on a CPU, kept from one call to the next.

Programs take their temporaries from malloc in every call, and so does the library that computes convolutions on CPU.
The GNU C library hands large pieces back to the system as soon as they are freed, and the system clears all of them,
page by page, for the next call: of a small CNN's 116 ms of processor time for a batch of 256 that was half, of
EfficientNet-Lite0's 396 ms for 32 images a quarter.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h

KEPT_BYTES = 512 * 1024 * 1024
"""Free memory at the end of an arena that is kept, not returned."""

_FROM_HEAP_BYTES = 256 * 1024 * 1024  # larger pieces are mapped each by itself, and given back


@cache
def keep_scratch() -> bool:
    """Make malloc keep up to 512 MiB of what is freed; done once in a process.

    Returns:
        Whether it was done: not where the C library is another, nor where the user has set malloc up
        (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).
    """
    chosen = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    if not sys.platform.startswith("linux") or chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Setting either one turns off malloc's own adjustment of both.
    kept = library.mallopt(_MMAP_THRESHOLD, _FROM_HEAP_BYTES) and library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
    return bool(kept)
