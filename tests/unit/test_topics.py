"""The contract: bytes of every shipped version decode for ever, and a group never leaves its partition."""

import json
from pathlib import Path

import msgspec
import pytest

from tests.unit.records import RUN, TASK, request, reward, trajectory, turn
from topics import (
    CATALOGUE,
    DeadLetter,
    Deferred,
    GroupClosed,
    GroupMember,
    LedgerEntry,
    PackedBatch,
    PackedRow,
    PolicyVersion,
    Record,
    Score,
    TrainStep,
    decode_any,
    encode,
    header_of,
    parse_version,
    partition_of,
    topic_of,
)
from topics.record import floats, ints, pack_floats, pack_ints

GOLDEN = Path(__file__).with_name("golden_records.json")
ASKED = request()
ROW = PackedRow(
    **{name: pack_ints([1, 2]) for name in PackedRow.__struct_fields__ if not name.endswith(("_logprobs", "_experts"))}
)
SCORE = Score(run=RUN, group_id="g", rollout_id="g-0", scorer="t", version="a.1", turn_ids=(), repeats=0, logprobs=b"")
SAMPLES: tuple[Record, ...] = (
    TASK,
    ASKED,
    turn(ASKED, [1, 2, 3], [4, 5]),
    trajectory(ASKED, turn(ASKED, [1, 2, 3], [4, 5]), patch=b"\x00diff", log="done"),
    reward(ASKED, 0.5, components={"passed": 0.5}),
    Score(run=RUN, group_id="g", rollout_id="g-0", scorer="t", version="a.1", turn_ids=("x",), repeats=1, logprobs=b""),
    PackedBatch(
        run=RUN, group_id="g", task_id="t", members=(GroupMember(rollout_id="g-0", fate="packed"),), rows=(ROW,)
    ),
    PolicyVersion(
        run=RUN, model="m", lineage="a", number=3, path="/w", checksum="c", parent_lineage="b", parent_number=1
    ),
    TrainStep(
        run=RUN, lineage="a", step=3, metrics={"loss": 0.25}, groups=("g",), trained=("g-0",), positions={"0": 7}
    ),
    GroupClosed(run=RUN, group_id="g"),
    LedgerEntry(run=RUN, group_id="g", rollout_id="g-0", state="failed", reason="SandboxUnavailable", stage="rollout"),
    DeadLetter(run=RUN, stage="s", topic="turns", partition=1, offset=2, error_type="E", message="m", value=b"\xff"),
    Deferred(
        run=RUN,
        stage="s",
        topic="turns",
        partition=1,
        offset=2,
        attempt=2,
        reason="r",
        timestamp_ms=3,
        value=b"\xff",
        headers=(("record", b"Turn/1"),),
    ),
)
GROWN: dict[str, Record] = {
    "TrainStep/1 with batches": TrainStep(
        run=RUN,
        lineage="a",
        step=3,
        metrics={"loss": 0.25},
        groups=("g",),
        trained=("g-0",),
        positions={"0": 7},
        batches=((0, 6),),
        version="a.2",
        checkpoint="a.1",
        seed=5,
        threads=1,
        batch_sha256="b",
        learner_sha256="l",
    ),
    "Score/1 with kind": msgspec.structs.replace(SCORE, kind="teacher", reason="unmapped", identical=True),
    "PackedBatch/1 with scores": PackedBatch(
        run=RUN,
        group_id="g",
        task_id="t",
        members=(),
        rows=(
            msgspec.structs.replace(
                ROW, scored_logprobs=pack_floats([-0.5, -1.0]), teacher_logprobs=pack_floats([-0.25, -2.0])
            ),
        ),
    ),
    "PackedBatch/1 with routed_experts": PackedBatch(
        run=RUN,
        group_id="g",
        task_id="t",
        members=(),
        rows=(msgspec.structs.replace(ROW, routed_experts=b"\x01\x00\xff\xff"),),
    ),
    "Turn/1 with routed_experts": msgspec.structs.replace(
        turn(ASKED, [1, 2, 3], [4, 5]), routed_experts=b"\x01\x00\x02\x00\x03\x00\x04\x00"
    ),
    "Trajectory/1 with life": trajectory(ASKED, turn(ASKED, [1, 2, 3], [4, 5]), life="l"),
    "Reward/1 with life": reward(ASKED, 0.5, life="l"),
    "Score/1 with life": msgspec.structs.replace(SCORE, life="l"),
    "DeadLetter/1 with left_out": DeadLetter(
        run=RUN,
        stage="s",
        topic="turns",
        partition=1,
        offset=2,
        error_type="E",
        message="m",
        value=b"",
        left_out=50_000_000,
    ),
    "Turn/1 with claim": msgspec.structs.replace(
        turn(ASKED, [1, 2, 3], [4, 5]),
        claim="c",
        after="t",
        prompt_chars=9,
        prompt_hash=b"h",
        request=b"r",
        matched_stop="END",
    ),
}
"""Records that had grown by a field when they were shipped: the header, and since which field."""


def test_every_topic_has_a_golden_record() -> None:
    assert {type(sample) for sample in SAMPLES} == {topic.record for topic in CATALOGUE}
    assert json.loads(GOLDEN.read_text()).keys() == {header_of(type(sample)) for sample in SAMPLES} | GROWN.keys()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_bytes_of_a_shipped_version_decode_for_ever(sample: Record) -> None:
    header = header_of(type(sample))
    assert decode_any(header, bytes.fromhex(json.loads(GOLDEN.read_text())[header])) == sample
    assert decode_any(header, encode(sample)) == sample


@pytest.mark.parametrize("name", GROWN)
def test_bytes_of_a_record_that_has_grown_decode_for_ever(name: str) -> None:
    header = name.partition(" ")[0]
    assert decode_any(header, bytes.fromhex(json.loads(GOLDEN.read_text())[name])) == GROWN[name]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_reader_ignores_fields_that_a_later_version_adds(sample: Record) -> None:
    later = {**msgspec.msgpack.decode(encode(sample)), "added_later": [1, 2]}
    assert decode_any(header_of(type(sample)), msgspec.msgpack.encode(later)) == sample


def test_all_records_of_a_group_share_a_partition() -> None:
    for number in range(50):
        asked = request(f"r-t{number:06d}")
        records = [asked, turn(asked, [1], [2]), trajectory(asked), reward(asked, 1.0)]
        records += [LedgerEntry(run=RUN, group_id=asked.group_id, rollout_id=asked.rollout_id, state="finished")]
        assert len({partition_of(record) for record in records}) == 1
    assert len({topic_of(record).partitions for record in records}) == 1


def test_token_arrays_are_little_endian() -> None:
    assert pack_ints([1, -2]) == b"\x01\0\0\0\xfe\xff\xff\xff"
    assert list(ints(pack_ints([7, 2**31 - 1]))) == [7, 2**31 - 1]
    assert list(floats(pack_floats([-0.5]))) == [-0.5]


@pytest.mark.parametrize("bad", ["", "a", "a.", ".1", "a.b"])
def test_what_is_no_version_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="not a policy version"):
        parse_version(bad)
