"""Processes on the host's side: who descends from whom, killing, and waiting without blocking the loop.

Owns no process. Invariant: nothing here blocks. Places are texts: Python 3.12 keeps every part of every Path for ever,
and process ids are ever new ones.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from typing import Any


def descendants(pid: int) -> set[int]:
    """Living children of all generations, as far as they stand still. Source: proc(5), task/[tid]/children."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        children = {child for child in _children(waiting.pop()) if child not in found and _lives(child)}
        found |= children
        waiting += children
    return found


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    with suppress(FileNotFoundError, ProcessLookupError), os.scandir(f"/proc/{pid}/task") as tasks:
        for task in tasks:
            found.update(map(int, _read(f"{task.path}/children").split()))
    return found


def _lives(pid: int) -> bool:
    """False for a zombie too: it only waits for its parent to ask."""
    try:
        state = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in b"ZX"


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 - see above
        return file.read()


def marked(variable: str) -> set[int]:
    """Processes of this user whose environment at start held `NAME=value`, wherever they have moved since."""
    mark = b"\0" + variable.encode() + b"\0"
    found: set[int] = set()
    with os.scandir("/proc") as entries:
        for entry in entries:
            # Gone in the meantime, or somebody else's.
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if entry.name.isdecimal() and mark in b"\0" + _read(f"{entry.path}/environ"):
                    found.add(int(entry.name))
    return found


def kill_all(pids: Iterable[int]) -> None:
    """SIGKILL to each that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def ended(process: subprocess.Popen[bytes], deadline_s: float) -> bool:
    """Whether our own child ended (and was reaped) before the deadline."""
    if process.poll() is not None:
        return True
    loop = asyncio.get_running_loop()
    handle = os.pidfd_open(process.pid)
    end = asyncio.Event()
    loop.add_reader(handle, end.set)
    try:
        await asyncio.wait_for(end.wait(), deadline_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(handle)
        os.close(handle)
    return process.poll() is not None


async def first_of(answer: asyncio.Future[Any], full: asyncio.Event, timeout_s: float) -> None:
    """Wait for the answer, for too much output, or for the time to run out; cancels neither."""
    too_much = asyncio.ensure_future(full.wait())
    try:
        await asyncio.wait({answer, too_much}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        too_much.cancel()
