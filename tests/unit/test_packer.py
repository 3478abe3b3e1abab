"""The packer closes each group once, whatever the order and the repetition of its messages, and after any restart."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Literal

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.packer import OpenGroup, PackerHandler
from kat_stream.errors import DataError
from kat_stream.log.base import Delivered, Position
from kat_stream.log.message import seal
from kat_stream.log.outcome import Emit, Hold
from kat_stream.rl.group import GroupRules
from kat_stream.rl.incomplete import GRACE_S
from kat_stream.rl.scores import ScoreRules
from kat_stream.versions import Versions
from tests.unit.records import RUN, request, reward, trajectory, turn
from topics import (
    GroupClosed,
    LedgerEntry,
    PackedBatch,
    PolicyVersion,
    Record,
    RolloutRequest,
    Score,
    encode,
    header_of,
    partition_of,
)
from topics.record import ints

RULES = GroupRules(staleness=2, budget_tokens=256)
ROLLOUT_S = 600.0
GROUPS = [f"{RUN}-t{number:06d}" for number in range(3)]
PARTITIONS = {partition_of(trajectory(request(group))) for group in GROUPS}


def messages_of(group: str) -> list[Record]:
    found: list[Record] = []
    for sample in range(3):
        asked = request(group, sample, 3)
        found += [trajectory(asked, turn(asked, [1, 2], [5 + sample])), reward(asked, float(sample % 2))]
    return found


def delivered(record: Record, offset: int) -> Delivered:
    topic = "trajectories" if type(record).__name__ == "Trajectory" else "rewards"
    position = Position(topic, partition_of(record), offset)
    return Delivered(position, None, encode(record), {"record": header_of(type(record)).encode()}, 0)


def handler(closed: Sequence[str] = ()) -> PackerHandler:
    """One that took over its partitions after these groups were closed."""
    versions = Versions(RUN)
    versions.take(PolicyVersion(run=RUN, model="m", lineage="a", number=0, path="", checksum=""))
    made = PackerHandler(RUN, versions, RULES, rollout_s=ROLLOUT_S)
    records = [GroupClosed(run=RUN, group_id=group) for group in closed]
    for partition in PARTITIONS:
        made.assigned(partition, [delivered(record, 0) for record in records if partition_of(record) == partition])
    return made


async def feed(made: PackerHandler, stream: list[Delivered]) -> tuple[list[PackedBatch], set[Position]]:
    batches: list[PackedBatch] = []
    done: set[Position] = set()
    for message in stream:
        outcome = await made.handle(message)
        if isinstance(outcome, Emit):
            done |= {message.position, *outcome.done}
            batches += [record for record in outcome.records if isinstance(record, PackedBatch)]
        else:
            assert isinstance(outcome, Hold)
    return batches, done


@given(seed=st.integers(0, 2**32), crash=st.integers(0, 40))
@settings(max_examples=80)
def test_each_group_once_in_any_order_with_repeats_and_a_restart(seed: int, crash: int) -> None:
    chance = random.Random(seed)
    records = [record for group in GROUPS for record in messages_of(group)]
    records += chance.sample(records, 6)
    chance.shuffle(records)
    stream = [delivered(record, offset) for offset, record in enumerate(records)]
    first, done = anyio.run(feed, handler(), stream[:crash])
    again = [message for message in stream if message.position not in done]
    second, _ = anyio.run(feed, handler([batch.group_id for batch in first]), again)
    assert sorted(batch.group_id for batch in first + second) == GROUPS
    assert all(len(batch.members) == 3 for batch in first + second)


def test_a_group_waits_for_the_last_reward_and_then_names_every_held_message() -> None:
    stream = [delivered(record, offset) for offset, record in enumerate(messages_of(GROUPS[0]))]
    batches, done = anyio.run(feed, handler(), stream[:-1])
    assert (batches, done) == ([], set())
    batches, done = anyio.run(feed, handler(), stream)
    assert len(batches) == 1
    assert done == {message.position for message in stream}


def large(group: str) -> list[Record]:
    """A group whose batch is larger than its topic allows, though each of its records is not."""
    found: list[Record] = []
    for sample in range(2):
        asked = request(group, sample, 2)
        found += [trajectory(asked, turn(asked, [1, 2], [5 + sample] * 400_000)), reward(asked, float(sample))]
    return found


@pytest.mark.parametrize("waits_for_scores", [False, True])
def test_a_group_whose_batch_is_too_large_is_closed_and_its_members_are_filtered(waits_for_scores: bool) -> None:
    made = handler()
    if waits_for_scores:
        made.rules = replace(RULES, scores=ScoreRules(repeats=True, required=False))
    stream = [delivered(record, offset) for offset, record in enumerate(large(GROUPS[0]))]
    batches, done = anyio.run(feed, made, stream)
    if waits_for_scores:
        assert batches == []
        listen(made, made.wait_s + 1)
        closed = late(made)
        assert closed is not None
        batches = [record for record in closed.records if isinstance(record, PackedBatch)]
        done = set(closed.done)
    (batch,) = batches
    seal(batch)
    assert batch.rows == () and done == {message.position for message in stream}
    for member in batch.members:
        assert member.fate == "filtered" and member.reason.startswith("too_large: batches: ")
    assert anyio.run(feed, made, stream)[0] == []


def lives() -> list[Record]:
    """A rollout that ran twice, with what was said of each life: the first one failed, the second is right."""
    asked = request(GROUPS[0], 0, 2)
    first = trajectory(asked, turn(asked, [1, 2], [50], name="first"), life="first")
    second = trajectory(asked, turn(asked, [1, 2], [60], name="second"), life="second")
    return [first, second, reward(asked, 0.0, life="first"), reward(asked, 1.0, life="second")]


def packed(stream: Sequence[Record]) -> tuple[set[int], float | None]:
    """The sampled tokens and the score of the rollout that ran twice; what of it comes late closes nothing."""
    other = request(GROUPS[0], 1, 2)
    records = [trajectory(other, turn(other, [1, 2], [7])), reward(other, 0.5), *stream]
    batches, _ = anyio.run(feed, handler(), [delivered(record, offset) for offset, record in enumerate(records)])
    (batch,) = batches
    assert [member.fate for member in batch.members] == ["packed", "packed"]
    return {id_ for row in batch.rows for id_ in ints(row.ids)} & {50, 60}, batch.members[0].reward


@pytest.mark.parametrize("stream", list(permutations(lives())), ids=lambda _: "")
def test_a_rollout_that_ran_twice_is_packed_with_the_reward_of_its_own_life(stream: Sequence[Record]) -> None:
    assert packed(stream) in [({50}, 0.0), ({60}, 1.0)]


@pytest.mark.parametrize("stream", list(permutations([*lives()[:2], lives()[3]])), ids=lambda _: "")
def test_a_life_whose_reward_was_lost_does_not_hold_the_group(stream: Sequence[Record]) -> None:
    """Its worker graded in place, and was killed between trajectory and reward."""
    assert packed(stream) == ({60}, 1.0)


def test_a_reward_of_an_earlier_build_goes_to_the_first_life() -> None:
    first, second = lives()[:2]
    assert packed([first, second, reward(request(GROUPS[0], 0, 2), 1.0)]) == ({50}, 1.0)


def test_what_was_said_first_of_a_life_counts() -> None:
    """A score of another kind is another thing to say."""
    asked, group = request(GROUPS[0]), OpenGroup(heard_s=0.0, written_s=0.0)
    first = trajectory(asked, turn(asked, [1, 2], [50]))
    good, bad = reward(asked, 1.0), reward(asked, 0.0)
    repeats, teacher = (score(asked, kind, "first") for kind in ("repeats", "teacher"))
    for record in (first, trajectory(asked, turn(asked, [1, 2], [60])), good, bad, repeats, teacher):
        group.take(record)
    group.take(score(asked, "repeats", "again"))
    (member,) = group.members()
    assert member is first and member.own(group.rewards) is good
    assert member.own(group.scores) == [repeats, teacher]


def score(asked: RolloutRequest, kind: Literal["repeats", "teacher"], scorer: str) -> Score:
    return Score(
        run=RUN,
        group_id=asked.group_id,
        rollout_id=asked.rollout_id,
        scorer=scorer,
        version="a.0",
        turn_ids=(),
        repeats=1,
        logprobs=b"",
        kind=kind,
    )


@pytest.mark.parametrize("outcome", ["infra_error", "cancelled"])
def test_a_rollout_that_was_never_graded_does_not_hold_its_group(outcome: str) -> None:
    good, bad = request(GROUPS[0], 0, 2), request(GROUPS[0], 1, 2)
    records = [trajectory(good, turn(good, [1], [2])), reward(good, 1.0), trajectory(bad, outcome=outcome)]
    stream = [delivered(record, offset) for offset, record in enumerate(records)]
    batches, _ = anyio.run(feed, handler(), stream)
    expected = "failed" if outcome == "infra_error" else outcome
    assert [member.fate for member in batches[0].members] == ["filtered", expected]


def test_an_evaluation_ends_with_its_reward_and_is_never_packed() -> None:
    asked = request(f"{RUN}-e00000-0000", 0, 1, purpose="eval")
    made = handler()
    assert isinstance(anyio.run(made.handle, delivered(trajectory(asked), 0)), Emit)
    outcome = anyio.run(made.handle, delivered(reward(asked, 1.0), 1))
    assert isinstance(outcome, Emit)
    assert [(type(r), r.state) for r in outcome.records if isinstance(r, LedgerEntry)] == [(LedgerEntry, "evaluated")]


def at(record: Record, offset: int, log_s: float) -> Delivered:
    return replace(delivered(record, offset), timestamp_ms=int(log_s * 1000))


def late(made: PackerHandler) -> Emit | None:
    return made.late(partition_of(trajectory(request(GROUPS[0]))))


def listen(made: PackerHandler, seconds: float) -> None:
    """So much time is spent listening, in which nothing comes."""
    for time in made.time.values():
        time.listened_s += seconds
        time.log_s += seconds


LONG_S = ROLLOUT_S + GRACE_S


def test_a_group_that_misses_members_is_closed_long_after_it_was_heard_of_and_not_before() -> None:
    made = handler()
    first = [at(record, offset, 1000.0) for offset, record in enumerate(messages_of(GROUPS[0])[:3])]
    assert anyio.run(feed, made, first) == ([], set())
    listen(made, LONG_S - 1)
    assert late(made) is None
    listen(made, 2)
    closed = late(made)
    assert closed is not None
    batch, *entries, word = closed.records
    assert isinstance(batch, PackedBatch) and batch.rows == ()
    assert word == GroupClosed(run=RUN, group_id=GROUPS[0])
    expected = [(f"{GROUPS[0]}-{sample}", "failed", "incomplete") for sample in range(3)]
    assert [(m.rollout_id, m.fate, m.reason) for m in batch.members] == expected
    assert [(e.rollout_id, e.state, e.reason) for e in entries if isinstance(e, LedgerEntry)] == expected
    assert set(closed.done) == {message.position for message in first}
    rest = [at(record, 10 + offset, 1000.0 + LONG_S) for offset, record in enumerate(messages_of(GROUPS[0]))]
    batches, done = anyio.run(feed, made, rest)
    assert (batches, len(done)) == ([], 6)


def test_a_group_of_which_all_came_after_its_deadline_is_closed_too() -> None:
    asked = msgspec.structs.replace(request(GROUPS[0], 0, 3), deadline_unix_s=500.0)
    made = handler()
    anyio.run(feed, made, [at(trajectory(asked, outcome="time_limit"), 0, 1000.0)])
    listen(made, LONG_S + 1)
    closed = late(made)
    assert closed is not None and isinstance(closed.records[0], PackedBatch)


def test_rewards_of_no_rollout_are_passed_over_and_do_not_close_a_group_that_comes_yet() -> None:
    made = handler()
    orphan = at(reward(request(GROUPS[0], 7, 9), 1.0), 0, 1000.0)
    assert anyio.run(feed, made, [orphan]) == ([], set())
    listen(made, LONG_S + 1)
    closed = late(made)
    assert closed is not None
    assert (closed.records, closed.done) == ((), (orphan.position,))
    stream = [at(record, 1 + offset, 1000.0) for offset, record in enumerate(messages_of(GROUPS[0]))]
    batches, _ = anyio.run(feed, made, stream)
    assert [batch.group_id for batch in batches] == [GROUPS[0]]


def test_only_this_run_s_closed_groups_are_its_own() -> None:
    made = handler()
    own, other = GroupClosed(run=RUN, group_id="g"), GroupClosed(run="other", group_id="g")
    broken = replace(delivered(own, 0), key=b"g", value=b"\xc1")
    nameless = replace(broken, key=None)
    found = [made.mine(one) for one in (delivered(own, 0), delivered(other, 0), broken, nameless)]
    assert found == [True, False, True, False]


def test_what_no_group_of_this_run_can_hold_is_passed_over_or_refused() -> None:
    made, record = handler(), messages_of(GROUPS[0])[0]
    assert anyio.run(feed, made, [delivered(msgspec.structs.replace(record, run="other"), 0)])[0] == []
    nobodys = delivered(msgspec.structs.replace(record, rollout_id=""), 1)
    with pytest.raises(DataError, match="rollout_id is empty"):
        anyio.run(made.handle, nobodys)
    misplaced = delivered(record, 2)
    misplaced = replace(misplaced, position=misplaced.position._replace(partition=misplaced.position.partition + 1))
    with pytest.raises(DataError, match="belongs on partition"):
        anyio.run(made.handle, misplaced)
    assert not any(made.open.values())


def test_a_partition_that_is_lost_is_forgotten() -> None:
    """Else its open groups would count as held for as long as the process lives."""
    made = handler()
    anyio.run(feed, made, [delivered(messages_of(GROUPS[0])[0], 0)])
    partition = partition_of(messages_of(GROUPS[0])[0])
    made.revoked(partition)
    assert partition not in made.open | made.closed | made.time
