"""Traps of groups on a real Kafka, each closed, named by its point (kafka_kit.py): who holds a place, and who not."""

from __future__ import annotations

import time

import anyio
import pytest

from kat_stream.errors import FencedError, LogError
from kat_stream.log import (
    Committed,
    TopicPartition,
)
from kat_stream.log.base import Log
from kat_stream.log.message import seal
from kat_stream.log.tracker import METADATA_LIMIT, Tracker, decode_runs, output_of, with_output
from tests.contract.kafka_kit import GROUP, PLACE, WAIT_S, Place, ids, owned, place, polled
from tests.contract.log_records import entry, reward
from tests.waiting import until

__all__ = ["place"]
pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(240)]
COUNT = 8


async def test_1_3_a_hand_over_longer_than_the_session_commits_and_1_7_owns_nothing_meanwhile(place: Place) -> None:
    """aiokafka's own rebalance timeout is the session: the slow member would be out, and its commit refused."""
    log = await place.client(session_timeout_ms=1500)
    await log.publish(*[reward(number, GROUP) for number in range(COUNT)])
    seen: list[object] = []

    async def finishes_slowly(partitions: frozenset[TopicPartition]) -> None:
        if partitions:
            seen.append(a.assigned)
            await anyio.sleep(3.0)  # work in hand, twice as long as the session
            await a.commit({PLACE: Committed(3)})

    a = await log.join(["rewards"], group="z", member="a", on_revoked=finishes_slowly)
    assert len(await polled(a, 3)) == 3
    b = await place.member(await place.client(), "rewards")
    await owned(a, b, each=6)
    assert seen == [None]
    assert await log.committed("z") == {PLACE: 3}
    await a.poll(limit=1, timeout_s=0.1)  # a failed hand-over would be raised here
    await a.leave()


async def test_1_5_two_holders_of_a_static_id_do_not_flap_for_ever(place: Place) -> None:
    """Each takes the other's place, again and again, until one of them stops and names the reason."""
    said: list[str] = []

    async def live(log: Log, tasks: anyio.abc.TaskGroup) -> None:
        try:
            member = await place.member(log, "rewards", name="pod-0")
            while True:
                await member.poll(limit=1, timeout_s=0.1)
        except LogError as error:
            said.append(str(error))
            tasks.cancel_scope.cancel()

    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(live, await place.client(static_member=True, session_timeout_ms=10_000), tasks)
    assert "static member pod-0" in said[0]


async def test_1_8_a_first_join_is_one_generation(place: Place) -> None:
    """Two assignors would make it two."""
    log = await place.client()
    await log.publish(reward(0, GROUP))
    member = await place.member(log, "rewards")
    await polled(member, 1)
    assert member.holder.generation == 1  # type: ignore[attr-defined]


async def test_1_9_a_member_whose_loop_was_blocked_for_longer_than_its_session_is_told_and_comes_back(
    place: Place,
) -> None:
    log = await place.client(session_timeout_ms=1000)
    await log.publish(*[reward(number, GROUP) for number in range(COUNT)])
    a = await place.member(log, "rewards")
    await polled(a, 5)
    time.sleep(3.0)  # noqa: ASYNC251  nothing of this process runs, also no heartbeat
    with pytest.raises(FencedError):
        await a.commit({PLACE: Committed(5)})
    await a.poll(limit=1, timeout_s=0.1)
    await owned(a, each=12)
    assert await log.committed("z") == {}


async def test_2_3_a_member_that_left_its_group_moves_no_place_although_the_group_is_empty(place: Place) -> None:
    """Kafka takes a commit without a member from anybody while a group has none."""
    log_a, log_b = await place.client(max_poll_interval_ms=1000), await place.client()
    await log_b.publish(*[reward(number, GROUP) for number in range(COUNT)])
    a = await place.member(log_a, "rewards")
    assert len(await polled(a, 5)) == 5

    async def empty() -> bool:
        return not any(group.members for group in await log_b.groups())

    await until(empty, "the idle member gone")
    b = await place.member(log_b, "rewards")
    await polled(b, COUNT)
    await b.commit({PLACE: Committed(COUNT)})
    await b.leave()
    await until(empty, "the group empty again")
    with pytest.raises(FencedError, match="left"):
        await a.commit({PLACE: Committed(5)})
    writer = await log_a.writer("sole", group="z")
    with pytest.raises(FencedError):
        await writer.commit([seal(entry("g", "zombie"))], {PLACE: Committed(5)})
    await writer.close()
    assert await log_b.committed("z") == {PLACE: COUNT} and await ids(log_b) == []


async def test_2_5_the_longest_metadata_that_we_write_is_taken_and_read_back_whole(place: Place) -> None:
    log = await place.client()
    tracker = Tracker(Committed(0))
    for offset in range(0, 40_000, 2):
        tracker.take(offset)
        tracker.take(offset + 1)
        tracker.finish(offset + 1)
    longest = with_output(tracker.commit(), 10**12)
    assert METADATA_LIMIT - 10 < len(longest.metadata) < 4096
    await log.publish(reward(0, GROUP))
    member = await place.member(log, "rewards")
    await polled(member, 1)
    await member.commit({PLACE: longest})
    found = (await log.commits("z"))[PLACE]
    assert found == longest and output_of(found) == 10**12 and len(decode_runs(found)) > 700
