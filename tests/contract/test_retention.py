"""The archive and the log of one run on a real broker: trimmed in the middle, and the account stays exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
import pytest

from consumers.archiver import Archiver
from kat_stream.cli import main
from kat_stream.config import Config, dump
from kat_stream.log import Committed, TopicPartition, open_log
from kat_stream.log.kafka import KafkaLog
from kat_stream.observe.sources import open_source
from kat_stream.retention import TRIMMED
from kat_stream.service import Context
from tests import observe_kit as fab
from tests.contract.log_records import nothing
from tests.observe_kit import FabricatedRun
from topics import CATALOGUE

pytestmark = pytest.mark.kafka
RUN = "demo"


@pytest.fixture
def url(kafka_bootstrap: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A prefix of its own: this test removes messages and counts offsets from 0."""
    monkeypatch.setattr(open_log, "__kwdefaults__", {**open_log.__kwdefaults__, "prefix": f"{request.node.name}."})
    return f"kafka:{kafka_bootstrap}"


@pytest.fixture
def run_dir(url: str, tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / RUN
    directory.mkdir(parents=True)
    config = Config()
    on_kafka = msgspec.structs.replace(
        config,
        run=msgspec.structs.replace(config.run, name=RUN),
        log=msgspec.structs.replace(config.log, url=url),
        archiver=msgspec.structs.replace(config.archiver, flush_s=0.2),
    )
    (directory / "config.toml").write_text(dump(on_kafka))
    return directory


async def archived_up_to_now(log: KafkaLog, run_dir: Path) -> None:
    """One life of the archiver: it drains what is on the log when it is asked to stop."""
    from kat_stream.runs import load_run

    ctx = Context(config=load_run(run_dir), run=RUN, run_dir=run_dir, log=log, member="archiver")
    ctx.stopping.set()
    with anyio.fail_after(60):
        await Archiver().run(ctx)


def with_log(url: str, work: Callable[[KafkaLog], object]) -> None:
    async def go() -> None:
        log = open_log(url)
        assert isinstance(log, KafkaLog)
        await log.start()
        try:
            await work(log)  # type: ignore[misc]
        finally:
            await log.close()

    anyio.run(go)


def part_of(run: FabricatedRun, steps: range) -> list[fab.Record]:
    return [record for record, _ in run.records[steps.start : steps.stop]]


def test_trim_resume_and_an_exact_account(url: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fab.small()
    half = len(run.records) // 2
    batches: dict[int, int] = {}

    async def first_half(log: KafkaLog) -> None:
        await log.apply_topics(CATALOGUE)
        await log.publish(*part_of(run, range(half)))
        await archived_up_to_now(log, run_dir)
        ends = await log.end_offsets("trajectories")
        member = await log.join(["trajectories"], group=f"{RUN}.packer", member="one", on_revoked=nothing)
        with anyio.fail_after(60):
            while not member.assigned:
                await member.poll(limit=1, timeout_s=0.2)
        await member.commit({TopicPartition("trajectories", n): Committed(max(0, end - 1)) for n, end in ends.items()})
        await member.leave()
        batches.update(await log.end_offsets("batches"))

    with_log(url, first_half)
    checkpoint = run_dir / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    oldest = {str(number): max(0, end - 1) for number, end in batches.items()}
    (checkpoint / "state.json").write_text(json.dumps({"positions": oldest}))

    assert main(["topics", "trim", str(run_dir), "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert main(["topics", "trim", str(run_dir)]) == 0
    done = capsys.readouterr().out
    assert words(done) == words(planned), "a dry run says what is done"
    assert "group demo.packer" in done and "checkpoint step-000001 of demo" in done

    async def second_half(log: KafkaLog) -> None:
        begins = await log.beginning_offsets("turns")
        assert sum(begins.values()) > 0, "something was removed"
        assert (await log.beginning_offsets("rewards")) == dict.fromkeys(begins, 0)
        start = {("batches", int(number)): offset for number, offset in oldest.items()}
        async with log.follow(("batches",), start=start) as follower:  # type: ignore[arg-type]
            kept = [one async for one in follower.catch_up(30)]
        assert len(kept) == sum(end > 0 for end in batches.values()), "the oldest checkpoint finds what it needs"
        await log.publish(*part_of(run, range(half, len(run.records))))

    with_log(url, second_half)
    assert main(["ledger", str(run_dir)]) == 0
    assert "the account closes: 20 = 20" in capsys.readouterr().out
    messages = anyio.run(positions, run_dir)
    assert len(messages) == len(set(messages)) == len(run.records)
    assert main(["trace", "demo-t000001-1", "--run", str(run_dir)]) == 0
    assert capsys.readouterr().out.endswith("fate: trained in step 1\n")

    with_log(url, lambda log: archived_up_to_now(log, run_dir))
    assert anyio.run(positions, run_dir) == messages


def test_a_view_goes_on_where_what_it_reads_is_trimmed(url: str, run_dir: Path) -> None:
    run = fab.small()
    half = len(run.records) // 2

    async def read(log: KafkaLog) -> None:
        await log.apply_topics(CATALOGUE)
        await log.publish(*part_of(run, range(half)))
        await archived_up_to_now(log, run_dir)
        await log.publish(*part_of(run, range(half, len(run.records))))
        before = await positions(run_dir)
        got: list[object] = []
        async with open_source(run_dir) as source:
            async for one in source.messages():
                if not got:
                    await archived_up_to_now(log, run_dir)
                    for topic in TRIMMED:
                        await log.delete_before(topic, await log.end_offsets(topic))
                got.append(one.position)
        assert len(got) == len(before) == len(run.records) and set(got) == set(before)

    with_log(url, read)


async def positions(run_dir: Path) -> list[object]:
    async with open_source(run_dir) as source:
        return sorted([one.position async for one in source.messages()])


def words(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()[1:]]
