"""The schedule never runs further ahead than staleness permits, and it always ends."""

import random
from dataclasses import replace
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from kat_stream.curriculum import Groups, Progress, Schedule
from topics import Environment, Sampling, Task, VerifierSpec

TASKS = [
    Task(
        run="r",
        task_id=f"t{number}",
        dataset="d",
        environment=Environment(files="d#t"),
        instruction="mend",
        verifier=VerifierSpec(name="v"),
    )
    for number in range(5)
]
SCHEDULE = Schedule(
    run="r",
    seed=3,
    steps=6,
    group_size=2,
    groups_per_step=3,
    staleness=1,
    sampling=Sampling(),
    eval_before=True,
    eval_after=True,
    eval_every=2,
    eval_tasks=2,
)


@given(staleness=st.integers(0, 4), per_step=st.integers(1, 5), steps=st.integers(1, 8), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_staleness_is_bounded_and_the_run_ends(staleness: int, per_step: int, steps: int, seed: int) -> None:
    coin = random.Random(seed)
    schedule = replace(SCHEDULE, staleness=staleness, groups_per_step=per_step, steps=steps)
    progress = Progress()
    for _ in range(1000):
        if schedule.finished(progress):
            break
        number = schedule.due_round(progress)
        if number is not None:
            progress.eval_asked[number] = {r.rollout_id for r in schedule.evaluation(number, TASKS, 0.0)}
        blocked = any(schedule.blocks_training(n, progress) for n in progress.eval_asked)
        if not blocked and progress.train_groups < schedule.admissible_groups(progress.version):
            assert progress.eval_asked[0] <= progress.eval_settled, "training waits for the evaluation before it"
            progress.train_groups += 1
        if progress.train_groups:
            assert (progress.train_groups - 1) // per_step - progress.version <= staleness
        if coin.random() < 0.5 and (progress.version < 0 or progress.train_groups >= (progress.version + 1) * per_step):
            progress.version += 1
        if coin.random() < 0.5:
            progress.eval_settled |= {r for asked in progress.eval_asked.values() for r in asked}
    assert schedule.finished(progress)
    assert progress.train_groups == steps * per_step
    assert {0, steps} <= set(progress.eval_asked)


@given(staleness=st.integers(0, 4), per_step=st.integers(1, 5), steps=st.integers(1, 8), seed=st.integers(0, 2**32))
@settings(max_examples=100)
def test_no_group_is_trained_twice_whatever_is_interrupted(
    staleness: int, per_step: int, steps: int, seed: int
) -> None:
    """Groups end in any order; at an interruption the log is lost, and the last checkpoint says what was trained."""
    coin = random.Random(seed)
    schedule = replace(SCHEDULE, staleness=staleness, groups_per_step=per_step, steps=steps)
    progress, asked, trained = Progress(version=0), list[int](), list[int]()
    saved = Progress(version=0), list[int]()
    for _ in range(10_000):
        if progress.version == steps:
            break
        if progress.admitted() < schedule.admissible_groups(progress.version):
            asked.append(progress.next_group())
            progress.train_groups = asked[-1] + 1
        coin.shuffle(asked)
        if len(asked) >= per_step and coin.random() < 0.3:
            step, asked = asked[:per_step], asked[per_step:]
            trained += step
            progress.version, progress.trained = progress.version + 1, progress.trained.added(step)
            if coin.random() < 0.5:
                saved = replace(progress, train_groups=0), list(trained)
        if coin.random() < 0.03:
            progress, asked, trained = replace(saved[0]), [], list(saved[1])
    assert sorted(trained) == list(range(steps * per_step))


@given(st.lists(st.lists(st.integers(-1, 30), max_size=4), max_size=12), st.integers(0, 35))
def test_groups_are_a_set_of_numbers(additions: list[list[int]], number: int) -> None:
    groups, expected = Groups(), set[int]()
    for numbers in additions:
        groups, expected = groups.added(numbers), expected | {n for n in numbers if n >= 0}
    assert {*range(groups.below), *groups.beyond} == expected and groups.below not in groups.beyond
    assert groups.free(number) == next(n for n in count(number) if n not in expected)
    assert groups.union(number) == len(expected | set(range(number)))


def test_asking_twice_gives_the_same_requests() -> None:
    assert SCHEDULE.group(4, TASKS, 1.0) == SCHEDULE.group(4, TASKS, 1.0)
    assert list(SCHEDULE.evaluation(2, TASKS, 1.0)) == list(SCHEDULE.evaluation(2, TASKS, 1.0))


def test_an_epoch_visits_every_task_once_in_an_order_of_its_own() -> None:
    epochs = [[SCHEDULE.group(e * 5 + i, TASKS, 0.0)[0].task.task_id for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == [task.task_id for task in TASKS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_no_second_first_evaluation_after_a_resume() -> None:
    assert SCHEDULE.due_round(Progress(version=0)) == 0
    assert SCHEDULE.due_round(Progress(version=1)) is None
    assert replace(SCHEDULE, eval_every=0).due_round(Progress(version=4)) is None
    assert SCHEDULE.due_round(Progress(version=6)) == 6
