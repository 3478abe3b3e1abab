"""Limits that hold for a whole sandbox: one control group each, in version 1 or version 2 hierarchies.

Owns the directories `kat-stream/<id>`. Invariant: a group is removed only when it is empty, and a group that
outlived its owner is found again by its name. Source: Linux admin-guide/cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PARENT = "kat-stream"
_V1 = ("memory", "pids", "cpu", "freezer")
_V2 = ("memory", "pids", "cpu")
_PERIOD_US = 100_000
_LEAST_QUOTA_US = 1_000  # the kernel refuses less
_POLL_S = 0.001


class Hierarchy:
    """Where groups are made; `detect` finds it or says that there is none."""

    def __init__(self, version: int, parents: Sequence[Path]) -> None:
        self.version = version
        self.parents = tuple(parents)

    @staticmethod
    def detect(mounts: str | None = None) -> Hierarchy | None:
        """The hierarchies mounted here (`mounts` in the form of /proc/mounts) if this process may use them."""
        rows = [line.split() for line in (Path("/proc/mounts").read_text() if mounts is None else mounts).splitlines()]
        for find in (_detect_v1, _detect_v2):
            if (found := find(rows)) is not None:
                return found
        return None

    def create(self, name: str, *, memory_mb: int, pids: int, cpus: float) -> Cgroup:
        """A group with its limits set and nobody in it; OSError if the kernel refuses."""
        group = Cgroup(self.version, [parent / name for parent in self.parents])
        try:
            for directory in group.directories:
                directory.mkdir()
            for file, value in limits(self.version, memory_mb=memory_mb, pids=pids, cpus=cpus):
                group.write(file, value)
        except OSError:
            group.remove()
            raise
        return group

    def find(self) -> list[str]:
        """Names of all groups that exist, also those of other owners."""
        return sorted({entry.name for parent in self.parents for entry in parent.iterdir() if entry.is_dir()})

    def open(self, name: str) -> Cgroup:
        """An existing group."""
        return Cgroup(self.version, [parent / name for parent in self.parents])


class Cgroup:
    """One sandbox's group."""

    def __init__(self, version: int, directories: Sequence[Path]) -> None:
        self._version = version
        self.directories = tuple(directories)

    @property
    def join_files(self) -> tuple[Path, ...]:
        """Files into which a process writes 0 to become a member."""
        # v1 `tasks` moves one thread and so needs no global lock, which costs up to 20 ms on a busy kernel.
        return tuple(d / ("tasks" if self._version == 1 else "cgroup.procs") for d in self.directories)

    def write(self, file: str, value: str) -> None:
        """Set a limit in the directory that has it; limits this kernel lacks (swap) are passed over."""
        for directory in self.directories:
            if (directory / file).exists():
                (directory / file).write_text(value)

    def processes(self) -> set[int]:
        """Host process ids of the members; the first directory is joined first, so it has them all."""
        with suppress(FileNotFoundError):
            return set(map(int, (self.directories[0] / "cgroup.procs").read_text().split()))
        return set()

    def peak_memory_bytes(self) -> int:
        """The most memory its members held at once, page cache included; 0 where the kernel does not say."""
        for directory in self.directories:
            for file in ("memory.max_usage_in_bytes", "memory.peak"):
                if (directory / file).exists():
                    return int((directory / file).read_text())
        return 0

    async def freeze(self, deadline_s: float = 1.0) -> None:
        """Stop all members, so that they can be listed without a race; gives up quietly at the deadline."""
        self._set_frozen(True)
        end = time.monotonic() + deadline_s
        while not self._frozen() and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)

    def thaw(self) -> None:
        self._set_frozen(False)

    def kill(self) -> None:
        """SIGKILL to every member there is now."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def remove(self) -> bool:
        """Whether the group is gone; it stays while a member is still dying."""
        gone = True
        for directory in self.directories:
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                gone = False
        return gone

    async def empty_and_remove(self, deadline_s: float = 2.0) -> bool:
        """Kill what is left inside and remove the group; False if it does not empty in time."""
        end = time.monotonic() + deadline_s
        while not (gone := self.remove()) and time.monotonic() < end:
            self.kill()
            with suppress(FileNotFoundError):
                self.thaw()  # its owner may have died while it was frozen, and nobody frozen can die
            await asyncio.sleep(_POLL_S)
        return gone

    def _set_frozen(self, frozen: bool) -> None:
        if self._version == 1:
            self.write("freezer.state", "FROZEN" if frozen else "THAWED")
        else:
            self.write("cgroup.freeze", str(int(frozen)))

    def _frozen(self) -> bool:
        name, text = ("freezer.state", "FROZEN") if self._version == 1 else ("cgroup.events", "frozen 1")
        return any(text in (d / name).read_text() for d in self.directories if (d / name).exists())


def limits(version: int, *, memory_mb: int, pids: int, cpus: float) -> list[tuple[str, str]]:
    """Files and values; the order matters: v1 wants memory before memory+swap."""
    memory, quota = str(memory_mb << 20), max(int(cpus * _PERIOD_US), _LEAST_QUOTA_US)
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        cpu = [("cpu.cfs_period_us", str(_PERIOD_US)), ("cpu.cfs_quota_us", str(quota))]
        return [*((name, memory) for name in names), ("pids.max", str(pids)), *cpu]
    rest = [("pids.max", str(pids)), ("cpu.max", f"{quota} {_PERIOD_US}")]
    return [("memory.max", memory), ("memory.swap.max", "0"), *rest]


def _detect_v1(rows: list[list[str]]) -> Hierarchy | None:
    mounted = {option: Path(row[1]) for row in rows if row[2] == "cgroup" for option in row[3].split(",")}
    if not all(name in mounted for name in _V1):
        return None
    # Two controllers may share one mount.
    parents = list(dict.fromkeys(mounted[name] / PARENT for name in _V1))
    return Hierarchy(1, parents) if all(map(_usable, parents)) else None


def _detect_v2(rows: list[list[str]]) -> Hierarchy | None:
    roots = [Path(row[1]) for row in rows if row[2] == "cgroup2"]
    if not roots or not set(_V2) <= set((roots[0] / "cgroup.controllers").read_text().split()):
        return None
    parent = roots[0] / PARENT
    return Hierarchy(2, [parent]) if _usable(parent) and _delegate(roots[0]) and _delegate(parent) else None


def _usable(parent: Path) -> bool:
    try:
        parent.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(parent, os.W_OK)


def _delegate(directory: Path) -> bool:
    """Hand the controllers down to the children; refused in a group that has processes of its own."""
    try:
        (directory / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _V2))
    except OSError:
        return False
    return True
