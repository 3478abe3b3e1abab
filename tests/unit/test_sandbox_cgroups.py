"""Control groups: the directories and values of both versions, over plain directories; and names of owners."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kat_stream.env.sandboxes.cgroups import Hierarchy, limits
from kat_stream.env.sandboxes.owners import is_orphan, new_name


def version_1(root: Path) -> str:
    names = ("memory", "pids", "cpu,cpuacct", "freezer")
    for name in names:
        (root / name).mkdir()
    rows = [f"cgroup {root / name} cgroup rw,relatime,{name} 0 0" for name in names]
    return "\n".join(["proc /proc proc rw 0 0", *rows])


def version_2(root: Path, controllers: str = "cpuset cpu io memory pids") -> str:
    (root / "kat-stream").mkdir()
    (root / "cgroup.controllers").write_text(controllers)
    return f"cgroup2 {root} cgroup2 rw,nsdelegate 0 0\n"


def test_version_1_is_preferred_where_its_controllers_are(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    mounts = version_2(tmp_path / "new", "hugetlb") + version_1(tmp_path / "old")
    found = Hierarchy.detect(mounts)
    assert found is not None and found.version == 1
    assert [parent.parent.name for parent in found.parents] == ["memory", "pids", "cpu,cpuacct", "freezer"]


def test_version_2_hands_its_controllers_down(tmp_path: Path) -> None:
    found = Hierarchy.detect(version_2(tmp_path))
    assert found is not None and found.version == 2
    for directory in (tmp_path, tmp_path / "kat-stream"):
        assert (directory / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_without_controllers_there_is_no_hierarchy(tmp_path: Path) -> None:
    assert Hierarchy.detect(version_2(tmp_path, "hugetlb")) is None
    assert Hierarchy.detect("proc /proc proc rw 0 0") is None


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, {"memory.limit_in_bytes": "33554432", "memory.memsw.limit_in_bytes": "33554432", "pids.max": "9",
             "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
        (2, {"memory.max": "33554432", "memory.swap.max": "0", "pids.max": "9", "cpu.max": "50000 100000"}),
    ],
)  # fmt: skip
def test_limits_are_in_the_units_of_the_kernel(version: int, expected: dict[str, str]) -> None:
    found = limits(version, memory_mb=32, pids=9, cpus=0.5)
    assert dict(found) == expected
    # The kernel refuses memory+swap below memory.
    assert [name for name, _ in found][0] in ("memory.limit_in_bytes", "memory.max")


def test_a_limit_that_this_kernel_lacks_is_passed_over(tmp_path: Path) -> None:
    hierarchy = Hierarchy(2, [tmp_path])
    group = hierarchy.create("1-2-3", memory_mb=32, pids=9, cpus=0.5)
    assert hierarchy.find() == ["1-2-3"]
    (tmp_path / "1-2-3" / "pids.max").write_text("max")
    group.write("pids.max", "7")
    group.write("memory.swap.max", "0")
    assert [(path.name, path.read_text()) for path in (tmp_path / "1-2-3").iterdir()] == [("pids.max", "7")]


def test_a_group_is_made_once_and_removed(tmp_path: Path) -> None:
    hierarchy = Hierarchy(1, [tmp_path])
    group = hierarchy.create("1-2-3", memory_mb=32, pids=9, cpus=0.5)
    assert group.join_files == (tmp_path / "1-2-3" / "tasks",) and group.processes() == set()
    assert group.remove() and group.remove()
    assert hierarchy.find() == []


def test_a_name_tells_whether_its_owner_lives() -> None:
    assert not is_orphan(new_name())
    assert new_name() != new_name()
    with subprocess.Popen(["/bin/sleep", "0"]) as process:
        process.wait()
    assert is_orphan(f"{process.pid}-1-0")
    # The number was given to another process since.
    assert is_orphan(f"{os.getpid()}-1-0")
    assert not is_orphan("mount") and not is_orphan("1-2")


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_share_of_a_cpu_is_one_that_the_kernel_takes(version: int) -> None:
    values = dict(limits(version, memory_mb=1, pids=1, cpus=0.001))
    assert {"cpu.cfs_quota_us": "1000", "cpu.max": "1000 100000"}.items() & values.items()
