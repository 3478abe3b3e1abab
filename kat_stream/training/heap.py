"""The C library's heap under a learner on a CPU: what a step frees stays with the process, for the next step.

By default glibc gives large blocks back to the kernel and gets them again as zeroed pages: a row of 7,700 tokens took
54,000 page faults a step, 8 to 15 % of its time (BENCHMARKS.md, trees). Invariant: speed and the resident size of an
idle learner are all that change.
"""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""mallopt(3). One arena: those of further threads are unmapped whole, whatever the thresholds are."""
_MOST = 2**31 - 1


@cache
def keep_freed() -> bool:
    """Once a process; whether the C library has such settings."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    for name, value in ((_TRIM_THRESHOLD, _MOST), (_MMAP_THRESHOLD, _MOST), (_ARENA_MAX, 1)):
        mallopt(ctypes.c_int(name), ctypes.c_int(value))
    return True
