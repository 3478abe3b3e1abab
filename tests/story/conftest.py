"""Runs the command line as a user does, in processes of its own; one finished run on Kafka that many tests read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kat_stream.log import open_log
from kat_stream.runs import targets_file
from tests.conftest_kafka import kafka_bootstrap
from tests.waiting import wait_for
from topics import TrainStep

__all__ = ["kafka_bootstrap"]
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "kat_stream" / "demo" / "demo.toml"
SMALL = {
    "run.steps": "2",
    "sampler.groups_per_step": "3",
    "sampler.group_size": "4",
    "data.held_out": "'mend:held-out?count=8&seed=0'",
    "data.train": "'mend:train?count=50&seed=0'",
    "trainer.checkpoint_every": "1",
}
ENDLESS = 1_000_000
"""Steps of a run that a test stops itself, when it has seen what it wanted: no machine is too fast for it."""
STEPS, EVERY, BOUND = 5, 2, 2
"""Of the run that was struck: its steps, those between two checkpoints, and its bound of staleness."""


def settings(directory: Path, **changes: str) -> list[str]:
    """`--set` arguments of a run of seconds, in a directory of its own."""
    table = {**SMALL, "run.directory": f"'{directory}'", **{key.replace("__", "."): v for key, v in changes.items()}}
    return [word for key, value in table.items() for word in ("--set", f"{key}={value}")]


def kat(*arguments: str | Path, deadline_s: float = 240) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    command = [sys.executable, "-m", "kat_stream.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, cwd=ROOT)


def start(*arguments: str | Path, out: Path) -> subprocess.Popen[bytes]:
    """A command in the background, in a session of its own."""
    command = [sys.executable, "-m", "kat_stream.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=out.open("wb"),
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        start_new_session=True,
    )


def wait_for_word(word: str, process: subprocess.Popen[bytes], out: Path, deadline_s: float = 400.0) -> None:
    """Until a command that was started with `out` has said `word`; fails at once if it ended without.

    If it takes too long, what was said is printed, and what each of its threads does.
    """

    def said() -> bool:
        ended = process.poll()  # before the look at what it said: it may say the word and end
        if word in out.read_text():
            return True
        assert ended is None, f"ended with {ended} without {word!r}: {out.read_text()[-4000:]}"
        return False

    try:
        wait_for(said, repr(word), deadline_s)
    except (AssertionError, TimeoutError):
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
            process.wait(30)
        print(out.read_text()[-8000:])
        raise


def end(process: subprocess.Popen[bytes]) -> None:
    """No process outlives its test."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def live(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What the services that live now say of themselves."""
    found = {}
    for path in (run_dir / "services").glob("*.json"):
        with suppress(FileNotFoundError):  # it has ended since it was listed
            found[path.stem] = json.loads(path.read_text())
    return found


def steps_of(bootstrap: str, run: str) -> list[TrainStep]:
    """Every step of a run by now, also those of an abandoned lineage."""

    async def read() -> list[TrainStep]:
        log = open_log(f"kafka:{bootstrap}")
        await log.start()
        try:
            async with log.follow(("train.steps",)) as follower:
                records = [delivered.record() async for delivered in follower.catch_up()]
        finally:
            await log.close()
        return [record for record in records if isinstance(record, TrainStep) and record.run == run]

    return anyio.run(read)


@pytest.fixture(scope="session")
def struck(kafka_bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run on Kafka, one process a service and two gateways, that was struck on its way.

    A third rollout worker came and went, the first was killed, and so was the trainer after a step that no checkpoint
    holds.
    """
    directory = tmp_path_factory.mktemp("struck")
    changes = {"log__url": f"'kafka:{kafka_bootstrap}'", "run__name": "struck", "run__steps": str(STEPS)}
    changes |= {"trainer__checkpoint_every": str(EVERY), "trainer__threads": "1", "sampler__staleness": str(BOUND)}
    changes |= {"gateway__more": "[[0, 0]]"}
    run_dir, out = directory / "struck", directory / "out.txt"
    process, third = start("run", DEMO, *settings(directory, **changes), out=out), None
    try:
        wait_for(lambda: len(live(run_dir)) >= 12, "every service", 400)
        _every_service_answers_metrics(run_dir)
        third = start("serve", "rollout", "--run", run_dir, "--member", "rollout-3", out=directory / "third.txt")
        wait_for(lambda: "rollout-3" in live(run_dir), "the third worker", 400)
        wait_for(lambda: _owned(kafka_bootstrap, "struck.rollout", "rollout-3") > 0, "partitions for it", 400)
        wait_for_word(f"step 1/{STEPS}", process, out)
        os.kill(live(run_dir)["rollout-1"]["pid"], signal.SIGKILL)
        third.send_signal(signal.SIGTERM)
        shown = kat("tail", "trajectories", "--run", run_dir, "-n", "3")
        assert (shown.returncode, len(shown.stdout.strip().splitlines())) == (0, 3), shown.stdout + shown.stderr
        wait_for(lambda: _max_step(kafka_bootstrap) > EVERY, "a step beyond a checkpoint", 400)
        os.kill(live(run_dir)["trainer"]["pid"], signal.SIGKILL)
        assert third.wait(120) == 0, (directory / "third.txt").read_text()[-4000:]
        assert process.wait(600) == 0, out.read_text()
        yield run_dir
    finally:
        end(process)
        if third is not None:
            end(third)


def _max_step(bootstrap: str) -> int:
    return max((step.step for step in steps_of(bootstrap, "struck")), default=0)


def _owned(bootstrap: str, group: str, member: str) -> int:
    """How many partitions a member of a group has."""

    async def ask() -> int:
        log = open_log(f"kafka:{bootstrap}")
        await log.start()
        try:
            found = {entry.name: entry.members for entry in await log.groups()}
        finally:
            await log.close()
        return sum(len(owns) for name, owns in found.get(group, {}).items() if name.startswith(member))

    return anyio.run(ask)


def _every_service_answers_metrics(run_dir: Path) -> None:
    services = live(run_dir)
    pairs = {"gateway", "gateway-2", "rollout-1", "rollout-2"}
    assert set(services) >= pairs | {"trainer", "engine", "packer", "verifier-1", "sampler"}
    wait_for(lambda: len(_targets(run_dir)) == len(services) + 1, "a target for each, and the engine's own", 120)
    found: set[str] = set()
    for address in _targets(run_dir):
        wait_for(partial(_scrape, address, found), f"metrics at {address}", 120)
    assert {"kat_policy_version", "kat_rollouts", "kat_train_steps", "sglang:generation_tokens"} <= found


def _targets(run_dir: Path) -> set[str]:
    return {address for entry in json.loads(targets_file(run_dir).read_text()) for address in entry["targets"]}


def _scrape(address: str, found: set[str]) -> bool:
    """Add the names that an address exports; False while nobody listens there, as an engine that still loads."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
            found |= {family.name for family in text_string_to_metric_families(answer.read().decode())}
    except OSError:
        return False
    return True
