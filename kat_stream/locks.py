"""A file that one process at a time holds. Invariant: the kernel lets go of it when that process ends, however."""

from __future__ import annotations

import fcntl


def try_lock(descriptor: int) -> bool:
    """Whether the open file is ours now, until it is closed; False if another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
