"""The chaos account finds what it must find: each kind of fault is planted once in records that are right otherwise."""

from collections import Counter

import msgspec

from kat_stream.log import Delivered
from kat_stream.log.base import Position
from kat_stream.log.message import seal
from kat_stream.observe.ledger import Ledger
from tests.chaos.account import Account, Verdict
from tests.unit.records import request, trajectory, turn
from topics import DeadLetter, GroupMember, PackedBatch, PolicyVersion, Record, TrainStep, partition_of

GROUPS = tuple(f"r-t{index:06d}" for index in range(4))
SAMPLED_BY = dict(zip(GROUPS, ("a.0", "a.1", "b.1", "b.2"), strict=True))


def version(lineage: str, number: int, parent: tuple[str, int] = ("", -1)) -> PolicyVersion:
    left, at = parent
    return PolicyVersion(
        run="r", model="m", lineage=lineage, number=number, path="", checksum="", parent_lineage=left, parent_number=at
    )


def batch(group: str, fate: str = "packed") -> PackedBatch:
    members = tuple(
        GroupMember(rollout_id=f"{group}-{sample}", fate=fate, oldest_version=SAMPLED_BY[group]) for sample in range(2)
    )
    return PackedBatch(run="r", group_id=group, task_id="t", members=members)


def step(lineage: str, number: int, done: int, *, groups: tuple[str, ...] = (), at: float = 0.0) -> TrainStep:
    """Step `number` took `groups` (by default the one of its number); `done` groups are behind the positions then."""
    groups = groups or (GROUPS[number - 1],)
    positions = Counter(str(partition_of(batch(group))) for group in GROUPS[:done])
    trained = tuple(f"{group}-{sample}" for group in groups for sample in range(2))
    return TrainStep(
        run="r",
        lineage=lineage,
        step=number,
        metrics={},
        groups=groups,
        trained=trained,
        positions=dict(positions),
        unix_s=at,
    )


def story() -> list[Record]:
    """Four groups of two. Lineage a makes steps 1 and 2 and dies with 2 in no checkpoint; b makes 2, 3 and 4."""
    records: list[Record] = []
    for group in GROUPS:
        requests = [request(group, sample) for sample in range(2)]
        records += requests
        records += [trajectory(asked, turn(asked, [1], [2, 3], version=SAMPLED_BY[group])) for asked in requests]
        records.append(batch(group))
    records += [version("a", 0), step("a", 1, 1, at=1), version("a", 1), step("a", 2, 2, at=2), version("a", 2)]
    fork = ("a", 1)
    records.append(version("b", 1, fork))
    for number in (2, 3, 4):
        records += [step("b", number, number, at=number + 5), version("b", number, fork)]
    return records


def judged(records: list[Record]) -> Verdict:
    offsets: Counter[tuple[str, int]] = Counter()
    messages, ledger = [], Ledger()
    for record in records:
        sealed = seal(record)
        place = (sealed.topic, partition_of(record))
        messages.append(Delivered(Position(*place, offsets[place]), sealed.key, sealed.value, sealed.headers, 0))
        offsets[place] += 1
        ledger.apply(record)
    account = Account.of(messages)
    return account.judge(set(account.asked), ledger.fates())


def replaced(old: Record, new: Record) -> list[Record]:
    records = story()
    records[records.index(old)] = new
    return records


def test_a_right_story_has_no_problem() -> None:
    assert judged(story()).problems() == []


def test_a_rollout_without_an_end_is_lost() -> None:
    verdict = judged([record for record in story() if record != batch(GROUPS[3])][:-2])
    assert verdict.lost == [f"{GROUPS[3]}-0", f"{GROUPS[3]}-1"]


def test_a_group_in_two_surviving_steps_is_trained_twice() -> None:
    verdict = judged(replaced(step("b", 4, 4, at=9), step("b", 4, 4, groups=(GROUPS[2], GROUPS[3]), at=9)))
    assert verdict.twice == [f"{GROUPS[2]}-0", f"{GROUPS[2]}-1"]
    assert verdict.skipped == [f"{GROUPS[2]} (in 2 steps)"]


def test_the_same_step_of_an_abandoned_lineage_is_not_twice() -> None:
    assert judged(story()).twice == []


def test_a_group_before_the_positions_that_no_step_took_is_skipped() -> None:
    verdict = judged(replaced(step("b", 3, 3, at=8), step("b", 3, 3, groups=(GROUPS[3],), at=8)))
    assert f"{GROUPS[2]} (in 0 steps)" in verdict.skipped


def test_a_packed_member_that_its_step_forgot_is_skipped() -> None:
    whole = step("b", 3, 3, at=8)
    verdict = judged(replaced(whole, msgspec.structs.replace(whole, trained=whole.trained[:1])))
    assert verdict.skipped == [f"{GROUPS[2]}-1"]


def test_a_token_of_an_abandoned_version_is_too_old() -> None:
    asked = request(GROUPS[2], 1)
    honest = trajectory(asked, turn(asked, [1], [2, 3], version="b.1"))
    verdict = judged(replaced(honest, trajectory(asked, turn(asked, [1], [2, 3], version="a.2"))))
    assert verdict.too_old == [f"{GROUPS[2]}-1 (step b.3: ['a.2'])"]


def test_a_token_older_than_the_bound_is_too_old() -> None:
    asked = request(GROUPS[3], 0)
    honest = trajectory(asked, turn(asked, [1], [2, 3], version="b.2"))
    verdict = judged(replaced(honest, trajectory(asked, turn(asked, [1], [2, 3], version="a.0"))))
    assert verdict.too_old == [f"{GROUPS[3]}-0 (step b.4: ['a.0'])"]


def test_a_group_that_was_packed_twice_is_named() -> None:
    assert judged([*story(), batch(GROUPS[0])]).packed_twice == [GROUPS[0]]


def test_a_step_that_is_missing_in_the_line_is_named() -> None:
    assert judged([record for record in story() if record != step("b", 3, 3, at=8)]).missing_steps == ["3"]


def test_a_dead_letter_is_named() -> None:
    letter = DeadLetter(
        run="r", stage="r.trainer", topic="batches", partition=1, offset=7, error_type="E", message="broken", value=b""
    )
    assert judged([*story(), letter]).dead_letters == ["r.trainer batches[1]@7: broken"]


def test_a_ledger_that_says_something_else_is_named() -> None:
    account = Account(asked={"x"})
    assert account.judge({"x"}, {}).ledger == [
        "0 rollouts in the ledger, 1 were asked for",
        "x is in flight, not unknown",
    ]
