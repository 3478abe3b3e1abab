"""A trainer killed between publishing and its checkpoint: nothing twice, nothing skipped, every step can be remade."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from kat_stream.log import open_log
from kat_stream.observe.lineages import surviving
from kat_stream.rl.staleness import age, forks_of
from tests.story.conftest import DEMO, end, kat, settings, start, wait_for
from topics import CATALOGUE, PackedBatch, PolicyVersion, Record, TrainStep, Trajectory

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]
STEPS, EVERY, BOUND = 7, 3, 2


async def _read(bootstrap: str, topics: tuple[str, ...]) -> list[Record]:
    log = open_log(f"kafka:{bootstrap}")
    await log.start()
    try:
        async with log.follow(topics) as follower:
            found = [delivered.record() async for delivered in follower.catch_up()]
    finally:
        await log.close()
    return [record for record in found if record.run == "travel"]


async def _ends(bootstrap: str) -> dict[str, dict[int, int]]:
    log = open_log(f"kafka:{bootstrap}")
    await log.start()
    try:
        return {topic.name: await log.end_offsets(topic.name) for topic in CATALOGUE}
    finally:
        await log.close()


def steps_of(bootstrap: str) -> list[TrainStep]:
    return [r for r in anyio.run(_read, bootstrap, ("train.steps",)) if isinstance(r, TrainStep)]


@pytest.fixture(scope="module")
def run_dir(kafka_bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run on Kafka whose trainer was killed after a step that no checkpoint holds."""
    directory = tmp_path_factory.mktemp("runs")
    changes = {"log__url": f"'kafka:{kafka_bootstrap}'", "run__name": "travel", "run__steps": str(STEPS)}
    changes |= {"trainer__checkpoint_every": str(EVERY), "trainer__threads": "1", "sampler__staleness": str(BOUND)}
    found, out = directory / "travel", directory / "out.txt"
    process = start("run", DEMO, *settings(directory, **changes), out=out)
    try:
        wait_for("the trainer", lambda: (found / "services" / "trainer.json").exists(), 180)
        pid = json.loads((found / "services" / "trainer.json").read_text())["pid"]
        wait_for("a step beyond a checkpoint", lambda: max_step(kafka_bootstrap) > EVERY, 240)
        os.kill(pid, signal.SIGKILL)
        assert process.wait(300) == 0, out.read_text()
        yield found
    finally:
        end(process)


def max_step(bootstrap: str) -> int:
    return max((step.step for step in steps_of(bootstrap)), default=0)


def test_nothing_twice_nothing_skipped_and_the_bound_holds(kafka_bootstrap: str, run_dir: Path) -> None:
    records = anyio.run(_read, kafka_bootstrap, ("train.steps", "batches", "trajectories", "policy.versions"))
    steps = [record for record in records if isinstance(record, TrainStep)]
    forks = forks_of(record for record in records if isinstance(record, PolicyVersion))
    assert len({step.lineage for step in steps}) == 2
    count = surviving(steps)
    assert [step.step for step in count] == list(range(1, STEPS + 1))
    batches = {record.group_id: record for record in records if isinstance(record, PackedBatch)}
    packed = [m.rollout_id for batch in batches.values() for m in batch.members if m.fate == "packed"]
    assert sorted(r for step in count for r in (*step.trained, *step.stale)) == sorted(packed)
    told = {record.rollout_id: record for record in records if isinstance(record, Trajectory)}
    for step in count:
        spans = [s for r in step.trained for t in told[r].turns if t.trainable for s in t.spans if s.end > s.start]
        ages = [age(span.version, step.version, forks) for span in spans]
        assert all(steps_behind is not None and steps_behind <= BOUND for steps_behind in ages)


def test_a_step_is_remade_to_the_bit_and_twice_alike(run_dir: Path, tmp_path: Path) -> None:
    first = kat("replay", run_dir, "--step", STEPS, "--out", tmp_path / "out")
    again = kat("replay", run_dir, "--step", STEPS)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.splitlines()[:-1] == again.stdout.splitlines()
    assert first.stdout.count("equal to the bit") == 4
    assert "as published" in first.stdout
    assert json.loads((tmp_path / "out" / "step.json").read_text())["recorded"]["step"] == STEPS
    other = kat("replay", run_dir, "--step", STEPS, "--set", "trainer.level=token", "--set", "trainer.clip_high=0.01")
    assert other.returncode == 0, other.stdout + other.stderr
    assert "rebuilt to the bit" in other.stdout


def test_the_archive_remakes_the_same_step(run_dir: Path, tmp_path: Path) -> None:
    live = kat("replay", run_dir, "--step", STEPS)
    config = run_dir / "config.toml"
    before = config.read_text()
    config.write_text(re.sub(r"kafka:127.0.0.1:\d+", "kafka:127.0.0.1:9", before))
    try:
        archived = kat("replay", run_dir, "--step", STEPS)
    finally:
        config.write_text(before)
    assert archived.returncode == 0, archived.stdout + archived.stderr
    assert "archive" in archived.stdout
    assert archived.stdout.splitlines()[1:] == live.stdout.splitlines()[1:]


def test_a_shadow_trains_on_the_same_batches_and_touches_nothing(kafka_bootstrap: str, run_dir: Path) -> None:
    ends, files = anyio.run(_ends, kafka_bootstrap), snapshot(run_dir)
    same = kat("shadow", run_dir, "--name", "same")
    other = kat("shadow", run_dir, "--name", "token", "--set", "trainer.level=token", "--seed", "1")
    assert (same.returncode, other.returncode) == (0, 0), same.stderr + other.stderr
    assert (anyio.run(_ends, kafka_bootstrap), snapshot(run_dir)) == (ends, files)
    recorded = {step.step: step for step in surviving(steps_of(kafka_bootstrap))}
    made = [json.loads(line) for line in (folder(run_dir, "same") / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in made] == list(range(1, STEPS + 1))
    assert [step["metrics"].get("loss") for step in made] == [
        recorded[number].metrics.get("loss") for number in range(1, STEPS + 1)
    ]
    assert (folder(run_dir, "token") / "plot.png").stat().st_size > 0
    again = kat("shadow", run_dir, "--name", "same")
    assert f"{STEPS} steps" in again.stdout
    refused = kat("shadow", run_dir, "--name", "same", "--seed", "7")
    assert refused.returncode == 2
    assert "choose another --name" in refused.stderr


def folder(run_dir: Path, name: str) -> Path:
    return run_dir.with_name(f"{run_dir.name}.shadow-{name}")


def snapshot(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
