"""Scores joined to turns: which tokens they hold for, what does not fit, and what the packer then does."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.packer import PackerHandler, score_rules
from kat_stream.config import Config, ScorerSection, dump, load
from kat_stream.engines.scoring import paths_of
from kat_stream.errors import BatchError, ConfigError, DataError
from kat_stream.log.outcome import Emit, Hold
from kat_stream.rl.group import GroupRules
from kat_stream.rl.scores import ScoreRules, is_scored, with_scores
from kat_stream.trees import TrainBatch, TurnTokens, from_arrays
from kat_stream.trees.wire import arrays_of
from tests.unit.records import RUN, request, reward, trajectory, turn
from tests.unit.test_packer import delivered as _delivered
from tests.unit.test_packer import handler as plain_handler
from topics import PackedBatch, Record, Score, VersionSpan, partition_of

GROUP = f"{RUN}-t000000"
RULES = ScoreRules(repeats=True, teacher=True)
IDS = st.sampled_from([1, 2, 255, 256])
VALUES = np.array([[-1.0, -2.0, -3.0], [-2.0, -2.0, -1.0]], np.float32)


def tokens(*spans: VersionSpan, name: str = "x", prompt: tuple[int, ...] = (1, 2)) -> TurnTokens:
    sampled = np.array([5, 6, 7], np.int32)
    return TurnTokens(name, np.array(prompt, np.int32), sampled, np.full(3, -0.5, np.float32), spans)


def score(values: np.ndarray = VALUES, *names: str, rollout: str = f"{GROUP}-0", **fields: object) -> Score:
    return Score(
        run=RUN,
        group_id=GROUP,
        rollout_id=rollout,
        scorer="engines",
        turn_ids=names or ("x",),
        repeats=len(values),
        logprobs=values.astype("<f4").tobytes(),
        **{"version": "a.0", **fields},  # type: ignore[arg-type]
    )


def nothing(rollout: str, kind: str, reason: str) -> Score:
    return replace_score(score(rollout=rollout), kind=kind, turn_ids=(), repeats=0, logprobs=b"", reason=reason)


def replace_score(one: Score, **fields: object) -> Score:
    return Score(**{name: getattr(one, name) for name in one.__struct_fields__} | fields)


def test_a_token_keeps_a_score_only_of_the_version_that_sampled_it() -> None:
    mixed = tokens(VersionSpan("a.0", 0, 2), VersionSpan("a.1", 2, 3))
    (joined,) = with_scores([mixed], [score(version="a.0")], RULES)
    np.testing.assert_array_equal(joined.scored_logprobs, np.array([-1.5, -2.0, np.nan], np.float32))
    (other,) = with_scores([mixed], [score(version="b.0")], RULES)
    assert other.scored_logprobs is not None and np.isnan(other.scored_logprobs).all()
    assert not is_scored([other], replace(RULES, teacher=False))


def test_a_teacher_may_be_of_any_version_and_its_absence_is_nan() -> None:
    turns = [tokens(VersionSpan("a.0", 0, 3)), tokens(VersionSpan("a.0", 0, 3), name="y", prompt=(9,))]
    joined = with_scores(turns, [score(VALUES[:1], "y", kind="teacher", version="expert")], RULES)
    assert joined[0].teacher_logprobs is not None and np.isnan(joined[0].teacher_logprobs).all()
    np.testing.assert_array_equal(joined[1].teacher_logprobs, VALUES[0])
    assert [turn.scored_logprobs for turn in joined] == [None, None]


def test_one_turn_with_a_score_of_each_kind_that_is_wanted_is_enough() -> None:
    turns = [tokens(VersionSpan("a.0", 0, 3), name=name) for name in "xy"]
    only_teacher, only_repeats = ScoreRules(teacher=True), ScoreRules(repeats=True)
    taught, repeated = score(VALUES[:1], "y", kind="teacher"), score(VALUES, "y")
    assert is_scored(with_scores(turns, [taught], only_teacher), only_teacher)
    assert is_scored(with_scores(turns, [repeated], only_repeats), only_repeats)
    assert is_scored(with_scores(turns, [taught, repeated], RULES), RULES)
    for wrong, rules in ((repeated, only_teacher), (taught, only_repeats), (taught, RULES), (repeated, RULES)):
        assert not is_scored(with_scores(turns, [wrong], rules), rules)


@pytest.mark.parametrize(
    "bad",
    [score(VALUES[:, :2]), score(VALUES, "z"), score(np.array([[np.nan, -1, -1]])), replace_score(score(), repeats=5)],
    ids=["tokens", "turn", "nan", "repeats"],
)
def test_a_score_that_does_not_fit_is_refused(bad: Score) -> None:
    with pytest.raises(DataError):
        with_scores([tokens(VersionSpan("a.0", 0, 3))], [bad], RULES)


def test_a_chain_is_one_prefill_and_a_fork_another() -> None:
    root = tokens()
    child = tokens(name="y", prompt=(1, 2, 5, 6, 7, 8))
    fork = tokens(name="z", prompt=(1, 2, 5, 9))
    paths = paths_of([root, child, fork])
    assert [(path.start, path.turns) for path in paths] == [(2, (0, 1)), (4, (2,))]
    assert paths[0].ids.tolist() == [1, 2, 5, 6, 7, 8, 5, 6, 7]


def _int32(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)


@given(st.lists(st.tuples(st.lists(IDS, min_size=1, max_size=5), st.lists(IDS, min_size=1, max_size=3)), max_size=12))
def test_each_turn_is_scored_by_one_prefill_that_begins_with_it_and_no_prefill_is_more(
    asked: list[tuple[list[int], list[int]]],
) -> None:
    turns = [TurnTokens("t", _int32(p), _int32(s), np.zeros(len(s), np.float32)) for p, s in asked]
    full = [tuple(prompt + sampled) for prompt, sampled in asked]
    paths = paths_of(turns)
    assert sorted(i for path in paths for i in path.turns) == list(range(len(turns)))
    for path in paths:
        assert all(tuple(path.ids[: len(full[i])].tolist()) == full[i] for i in path.turns)
        assert path.start == min(len(asked[i][0]) for i in path.turns)
    ends = {one for one in full if not any(len(other) > len(one) and other[: len(one)] == one for other in full)}
    assert sorted(tuple(path.ids.tolist()) for path in paths) == sorted(ends)
    assert [path.turns for path in paths] == sorted(path.turns for path in paths)


def test_prefills_of_a_trajectory_whose_every_turn_forks_take_little_more_room_than_their_ids() -> None:
    prompts = [np.arange(1000 + 500 * n, dtype=np.int32) for n in range(50)]
    turns = [TurnTokens("t", ids, np.array([90_000 + len(ids)], np.int32), np.zeros(1, np.float32)) for ids in prompts]
    tracemalloc.start()
    try:
        paths = paths_of(turns)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(paths) == len(turns) and peak < 1.5 * sum(ids.nbytes for ids in prompts)


# -- the packer


def scored_handler(wait_s: float = 1000.0, *, required: bool = False) -> PackerHandler:
    made = PackerHandler(RUN, plain_handler().versions, group_rules(required), wait_s=wait_s)
    made.assigned(partition_of(score()), [])
    return made


def group_rules(required: bool) -> GroupRules:
    return GroupRules(staleness=2, budget_tokens=256, scores=replace(RULES, required=required))


def members() -> list[Record]:
    found: list[Record] = []
    for sample in range(2):
        asked = request(GROUP, sample, 2)
        found += [trajectory(asked, turn(asked, [1, 2], [5, 6, 7 + sample])), reward(asked, float(sample))]
    return found


def scores(sample: int) -> list[Record]:
    rollout = f"{GROUP}-{sample}"
    return [
        score(VALUES, f"{rollout}x", rollout=rollout),
        score(VALUES[:1], f"{rollout}x", rollout=rollout, kind="teacher", version="expert"),
    ]


def feed(made: PackerHandler, records: list[Record]) -> list[Emit | Hold]:
    async def each() -> list[Emit | Hold]:
        return [await made.handle(_delivered(record, n)) for n, record in enumerate(records)]  # type: ignore[misc]

    return anyio.run(each)


def train_batch(packed: PackedBatch) -> TrainBatch:
    return from_arrays(
        [arrays_of(row) for row in packed.rows], [m.rollout_id for m in packed.members if m.fate == "packed"]
    )


def packed_of(outcome: Emit | Hold | None) -> PackedBatch:
    assert isinstance(outcome, Emit)
    batch = outcome.records[0]
    assert isinstance(batch, PackedBatch)
    return batch


def test_a_group_waits_for_its_scores_and_carries_them_to_the_learner() -> None:
    records = [*members(), *scores(0), *scores(1)]
    outcomes = feed(scored_handler(), records)
    assert all(isinstance(outcome, Hold) for outcome in outcomes[:-1])
    batch = train_batch(packed_of(outcomes[-1]))
    mean = VALUES.mean(0)
    np.testing.assert_allclose(batch.behaviour, np.concatenate([mean, mean]), rtol=1e-6)
    assert batch.teacher_logprobs is not None
    np.testing.assert_array_equal(batch.teacher_logprobs, np.concatenate([VALUES[0], VALUES[0]]))
    assert (batch.logprobs == np.float32(-0.5)).all(), "what was sampled stays beside it"


def test_a_rollout_that_ran_twice_is_joined_to_the_scores_of_the_life_that_counts() -> None:
    """The first life has scores, and will never have a reward."""
    asked = request(GROUP, 0, 2)
    lost, counts = (trajectory(asked, turn(asked, [1, 2], [5, 6, 7], name=life), life=life) for life in ("a", "b"))
    said = [
        score(VALUES[:1], life, kind=kind, life=life, version="a.0")
        for life in ("a", "b")
        for kind in ("repeats", "teacher")
    ]
    records = [lost, *said[:2], counts, reward(asked, 0.0, life="b"), *members()[2:], *scores(1)]
    made = scored_handler(required=True)
    assert all(isinstance(outcome, Hold) for outcome in feed(made, records)), "scores of the second are missing"
    packed = packed_of(feed(made, said[2:])[-1])
    assert [(member.fate, member.reason) for member in packed.members] == [("packed", "")] * 2


@pytest.mark.parametrize("required", [False, True])
def test_a_group_whose_scores_do_not_come_goes_on_at_its_deadline(required: bool) -> None:
    made = scored_handler(required=required)
    assert isinstance(feed(made, [*members(), *scores(0)])[-1], Hold)
    partition = partition_of(score())
    assert made.late(partition) is None
    made.wait_s = 0.0
    outcome = made.late(partition)
    packed = packed_of(outcome)
    assert isinstance(outcome, Emit) and len(outcome.done) == 6
    assert made.late(partition) is None
    if required:
        assert {m.reason for m in packed.members} == {"alone", "no_score: none came in time"}
    else:
        batch = train_batch(packed)
        assert batch.scored_logprobs is not None and np.isnan(batch.scored_logprobs).sum() == 3


def test_a_score_without_log_probs_is_an_answer_and_its_reason_is_kept() -> None:
    refused = [nothing(f"{GROUP}-{n}", kind, "other_version") for n in range(2) for kind in ("repeats", "teacher")]
    packed = packed_of(feed(scored_handler(required=True), [*members(), *refused])[-1])
    assert [member.reason for member in packed.members] == ["no_score: other_version, other_version"] * 2


def test_a_failed_rollout_is_not_waited_for() -> None:
    bad = trajectory(request(GROUP, 1, 2), outcome="infra_error")
    packed = packed_of(feed(scored_handler(), [*members()[:2], bad, *scores(0)])[-1])
    assert [member.fate for member in packed.members] == ["filtered", "failed"]


def test_optional_arrays_of_another_length_are_refused() -> None:
    batch = packed_of(feed(scored_handler(), [*members(), *scores(0), *scores(1)])[-1])
    row = arrays_of(batch.rows[0])
    with pytest.raises(BatchError, match="row 0: scored_logprobs has 5 entries, expected 6"):
        from_arrays([{**row, "scored_logprobs": row["scored_logprobs"][:5]}], ["a", "b"])


# -- configuration

TEACHER = 'scorer.teachers=[{name="t", url="http://h:1", model="demo", scores={"mend/shell"=0.5}}]'


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.distillation_coefficient=1.0"], "needs scorer.enabled and scorer.teachers"),
        (["scorer.enabled=true", "scorer.repeats=0"], "nothing to score"),
        (["trainer.ranks=0"], r"trainer\.ranks is 0, expected at least 1"),
        (["scorer.enabled=true", TEACHER.replace("mend/shell", "mend")], "is not DATASET/SCAFFOLD"),
        (["scorer.enabled=true", TEACHER.replace("url", "ulr")], "unknown key `scorer.teachers.ulr`"),
    ],
)
def test_a_scorer_that_means_nothing_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, overrides)


def test_the_configuration_survives_its_dump(tmp_path: Path) -> None:
    config = load(None, ["scorer.enabled=true", TEACHER, "trainer.distillation_coefficient=0.5"])
    path = tmp_path / "config.toml"
    path.write_text(dump(config))
    assert load(path) == config
    assert score_rules(config.scorer) == ScoreRules(repeats=True, teacher=True)
    assert score_rules(Config(scorer=ScorerSection()).scorer).kinds == frozenset()
