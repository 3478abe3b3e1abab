"""The groups of recorded steps, where a run went on with a new in-memory log."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kat_stream.archive import ArchiveWriter
from kat_stream.errors import DataError
from kat_stream.log.base import Delivered, Position
from kat_stream.log.message import seal
from kat_stream.observe.sources import ArchiveSource
from kat_stream.replay.groups import groups_of
from tests import observe_kit as fab
from topics import GroupMember, TrainStep

pytestmark = pytest.mark.anyio
PLACE = (3, 0)


def archive_group(directory: Path, log_id: str, group: str, timestamp_ms: int) -> None:
    """The group at PLACE of a log."""
    member = GroupMember(rollout_id=f"{group}-0", fate="filtered", reason="equal_rewards")
    sealed = seal(fab.batch(group, [member]))
    writer = ArchiveWriter(directory, run=fab.RUN, log_id=log_id)
    position = Position("batches", *PLACE)
    writer.add(Delivered(position, sealed.key, sealed.value, dict(sealed.headers), timestamp_ms))
    writer.flush()


def step_of(number: int, group: str, timestamp_ms: int) -> TrainStep:
    made = fab.step(number, [group], [], unix_s=timestamp_ms / 1000)
    return msgspec.structs.replace(made, batches=(PLACE,))


async def test_two_steps_whose_groups_lie_at_one_place_of_two_logs_have_their_own(tmp_path: Path) -> None:
    first, second = "demo-t000001", "demo-t000009"
    archive_group(tmp_path, "before", first, fab.START_MS)
    archive_group(tmp_path, "after the resume", second, fab.START_MS + 60_000)
    steps = [step_of(1, first, fab.START_MS + 1000), step_of(2, second, fab.START_MS + 61_000)]
    found = await groups_of(ArchiveSource(tmp_path, fab.RUN), steps)
    assert [[group.group_id for group in groups] for groups in found] == [[first], [second]]


async def test_a_group_that_is_gone_is_named(tmp_path: Path) -> None:
    archive_group(tmp_path, "before", "demo-t000001", fab.START_MS)
    gone = step_of(2, "demo-t000009", fab.START_MS + 61_000)
    with pytest.raises(DataError, match=r"step 2: group demo-t000009 is gone: .* has no batches\[3\]@0"):
        await groups_of(ArchiveSource(tmp_path, fab.RUN), [gone])
