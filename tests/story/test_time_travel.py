"""A trainer killed between publishing and its checkpoint: nothing twice, nothing skipped, every step can be remade."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import start_blocking_portal

from kat_stream.log import open_log
from kat_stream.observe.lineages import surviving
from kat_stream.rl.staleness import age, forks_of
from kat_stream.runs import registered
from tests.story.conftest import BOUND, STEPS, end, kat, start, steps_of, wait_for_word
from topics import CATALOGUE, PackedBatch, PolicyVersion, Record, TrainStep, Trajectory

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1500)]


async def _read(bootstrap: str, topics: tuple[str, ...]) -> list[Record]:
    log = open_log(f"kafka:{bootstrap}")
    await log.start()
    try:
        async with log.follow(topics) as follower:
            found = [delivered.record() async for delivered in follower.catch_up()]
    finally:
        await log.close()
    return [record for record in found if record.run == "struck"]


async def _ends(bootstrap: str) -> dict[str, dict[int, int]]:
    log = open_log(f"kafka:{bootstrap}")
    await log.start()
    try:
        return {topic.name: await log.end_offsets(topic.name) for topic in CATALOGUE}
    finally:
        await log.close()


@pytest.fixture(scope="module")
def remade(struck: Path) -> str:
    """What `replay` of the last step says, from the live log."""
    done = kat("replay", struck, "--step", STEPS, deadline_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_twice_nothing_skipped_and_the_bound_holds(kafka_bootstrap: str, struck: Path) -> None:
    records = anyio.run(_read, kafka_bootstrap, ("train.steps", "batches", "trajectories", "policy.versions"))
    steps = [record for record in records if isinstance(record, TrainStep)]
    forks = forks_of(record for record in records if isinstance(record, PolicyVersion))
    assert len({step.lineage for step in steps}) == 2
    count = surviving(steps)
    assert [step.step for step in count] == list(range(1, STEPS + 1))
    batches = {record.group_id: record for record in records if isinstance(record, PackedBatch)}
    packed = [m.rollout_id for batch in batches.values() for m in batch.members if m.fate == "packed"]
    assert sorted(r for step in count for r in (*step.trained, *step.stale)) == sorted(packed)
    told: dict[str, Trajectory] = {}
    for record in records:
        if isinstance(record, Trajectory):
            told.setdefault(record.rollout_id, record)  # a killed worker's rollout may be told twice: the first counts
    for step in count:
        spans = [s for r in step.trained for t in told[r].turns if t.trainable for s in t.spans if s.end > s.start]
        ages = {span.version: age(span.version, step.version, forks) for span in spans}
        assert all(behind is not None and behind <= BOUND for behind in ages.values()), (step.version, ages, forks)


def test_a_step_is_remade_to_the_bit_and_twice_alike(struck: Path, remade: str, tmp_path: Path) -> None:
    first = kat("replay", struck, "--step", STEPS, "--out", tmp_path / "out")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.splitlines()[:-1] == remade.splitlines()
    assert first.stdout.count("equal to the bit") == 4
    assert "as published" in first.stdout
    assert json.loads((tmp_path / "out" / "step.json").read_text())["recorded"]["step"] == STEPS
    other = kat("replay", struck, "--step", STEPS, "--set", "trainer.level=token", "--set", "trainer.clip_high=0.01")
    assert other.returncode == 0, other.stdout + other.stderr
    assert "rebuilt to the bit" in other.stdout


def test_the_archive_remakes_the_same_step(struck: Path, remade: str) -> None:
    config = struck / "config.toml"
    before = config.read_text()
    config.write_text(re.sub(r"kafka:127.0.0.1:\d+", "kafka:127.0.0.1:9", before))
    try:
        archived = kat("replay", struck, "--step", STEPS)
    finally:
        config.write_text(before)
    assert archived.returncode == 0, archived.stdout + archived.stderr
    assert "archive" in archived.stdout
    assert "reading the archive alone" in archived.stderr
    assert archived.stdout.splitlines()[1:] == remade.splitlines()[1:]


def test_a_shadow_trains_on_the_same_batches_and_touches_nothing(kafka_bootstrap: str, struck: Path) -> None:
    ends, files = anyio.run(_ends, kafka_bootstrap), snapshot(struck)
    same = kat("shadow", struck, "--name", "same")
    other = kat("shadow", struck, "--name", "token", "--set", "trainer.level=token", "--seed", "1")
    assert (same.returncode, other.returncode) == (0, 0), same.stderr + other.stderr
    assert (anyio.run(_ends, kafka_bootstrap), snapshot(struck)) == (ends, files)
    recorded = {step.step: step for step in surviving(steps_of(kafka_bootstrap, "struck"))}
    made = [json.loads(line) for line in (folder(struck, "same") / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in made] == list(range(1, STEPS + 1))
    assert [step["metrics"].get("loss") for step in made] == [
        recorded[number].metrics.get("loss") for number in range(1, STEPS + 1)
    ]
    assert (folder(struck, "token") / "plot.png").stat().st_size > 0
    again = kat("shadow", struck, "--name", "same")
    assert f"{STEPS} steps" in again.stdout
    refused = kat("shadow", struck, "--name", "same", "--seed", "7")
    assert refused.returncode == 2
    assert "choose another --name" in refused.stderr


def test_a_shadow_of_a_living_run_waits_for_a_log_that_is_away(
    kafka_bootstrap: str, struck: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.txt"
    with socket.socket() as away, registered(struck, "sampler", "http://127.0.0.1:9100/metrics"):
        away.bind(("127.0.0.1", 0))
        url = f"kafka:127.0.0.1:{away.getsockname()[1]}"
        shadow = start("shadow", struck, "--name", "patient", "--log", url, out=out)
        try:
            wait_for_word("trying again", shadow, out)
            assert "step 1:" not in out.read_text()
            away.listen()
            host, _, port = kafka_bootstrap.rpartition(":")
            with forwarding(away, (host, int(port))):
                assert shadow.wait(300) == 0, out.read_text()
        finally:
            end(shadow)
    assert f"step {STEPS}:" in out.read_text()


@contextmanager
def forwarding(listening: socket.socket, to: tuple[str, int]) -> Iterator[None]:
    """A way to a broker: what connects there is carried on."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*to)
        await asyncio.gather(carry(reader, back), carry(there, writer))

    with start_blocking_portal() as portal:
        server = portal.call(partial(asyncio.start_server, accept, sock=listening))
        try:
            yield
        finally:
            portal.call(server.close)


def folder(run_dir: Path, name: str) -> Path:
    return run_dir.with_name(f"{run_dir.name}.shadow-{name}")


def snapshot(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
