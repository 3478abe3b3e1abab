"""The versions of a run as its readers see them: the log's order decides, what is not the run's is passed over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import anyio
import pytest

from kat_stream.errors import DeadlineExceeded
from kat_stream.log import MemoryLog
from kat_stream.log.message import seal
from kat_stream.versions import Versions
from tests.unit.records import RUN
from topics import CATALOGUE, PolicyVersion

pytestmark = pytest.mark.anyio


def version(lineage: str, number: int, run: str = RUN, **parent: object) -> PolicyVersion:
    return PolicyVersion(run=run, model="m", lineage=lineage, number=number, path="", checksum="", **parent)  # type: ignore[arg-type]


async def test_the_last_on_the_log_is_the_newest_and_what_is_not_ours_is_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log, versions = MemoryLog(), Versions(RUN)
    await log.apply_topics(CATALOGUE)
    assert versions.root == ("", -1)
    await log.publish(version("a", 9), version("b", 3, parent_lineage="a", parent_number=7))
    await log.publish(version("c", 10, run="other"), version("", 11))
    await log.append(replace(seal(version("d", 12)), value=b"\xc1"))
    await versions.load(log)
    assert (versions.head, versions.forks, versions.root) == ("b.3", {"b": ("a", 7)}, ("a", 0))
    assert caplog.text.count("passed over") == 2


@pytest.mark.parametrize("wait", [lambda v: v.first(60), lambda v: v.newer_than(None, 60)], ids=["first", "newer"])
async def test_who_waits_for_a_version_goes_on_when_it_comes(wait: Callable[[Versions], Awaitable[object]]) -> None:
    versions = Versions(RUN)

    async def comes() -> None:
        await anyio.wait_all_tasks_blocked()
        versions.take(version("a", 0))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(comes)
        await wait(versions)
        assert versions.head == "a.0"


async def test_a_first_version_that_never_comes_is_named() -> None:
    with pytest.raises(DeadlineExceeded, match="the first policy version from the trainer"):
        await Versions(RUN).first(0.0)
