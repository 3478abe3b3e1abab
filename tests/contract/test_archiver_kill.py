"""A real archiver process on a real broker, killed thrice while records come: the archive equals the topics."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import anyio
import msgspec
import pytest

from kat_stream.archive import read_archive
from kat_stream.config import Config, dump
from kat_stream.log import Delivered, open_log
from tests.contract.kafka_kit import own_broker
from tests.contract.log_records import everything, reward
from tests.waiting import until
from topics import CATALOGUE

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]
KILLS, EACH, WAIT_S = 3, 40, 90.0
TOPICS = tuple(topic.name for topic in CATALOGUE)


@pytest.fixture(scope="module")
def url(kafka_bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker of its own: a service knows no other prefix than the default one."""
    with own_broker(tmp_path_factory.mktemp("archiver")) as bootstrap:
        assert bootstrap != kafka_bootstrap
        yield f"kafka:{bootstrap}"


def made_run(directory: Path, url: str) -> Path:
    config = Config()
    config = msgspec.structs.replace(
        config,
        run=msgspec.structs.replace(config.run, name="r"),
        log=msgspec.structs.replace(config.log, url=url),
        archiver=msgspec.structs.replace(config.archiver, flush_s=0.1),
    )
    directory.mkdir()
    (directory / "config.toml").write_text(dump(config))
    return directory


def archiver(run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kat_stream.cli", "serve", "archiver", "--run", str(run_dir)]
    with (run_dir / "archiver.log").open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def parts(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "archive").rglob("part-*.parquet")}


def archived(run_dir: Path) -> int:
    return sum(1 for _ in read_archive(run_dir / "archive", TOPICS))


def by_position(messages: list[Delivered]) -> dict[object, tuple[bytes | None, bytes]]:
    assert len({message.position for message in messages}) == len(messages)
    return {message.position: (message.key, message.value) for message in messages}


async def killed_while_writing(run_dir: Path) -> None:
    """One life: it writes at least one new file, then it is gone."""
    before, process = parts(run_dir), archiver(run_dir)
    try:
        await until(lambda: parts(run_dir) - before or process.poll() is not None, "a new file", WAIT_S)
        assert process.poll() is None, (run_dir / "archiver.log").read_text()
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.anyio
async def test_the_archive_equals_the_topics_after_kills(url: str, tmp_path: Path) -> None:
    run_dir, log = made_run(tmp_path / "r", url), open_log(url)
    await log.start()
    await log.apply_topics(CATALOGUE)
    for life in range(KILLS):
        group = uuid.uuid4().hex[:6]
        await log.publish(*[reward(life * EACH + number, f"{group}{number % 7}") for number in range(EACH)])
        await killed_while_writing(run_dir)
    await log.publish(*[reward(number, f"last{number % 7}") for number in range(EACH)])
    last = archiver(run_dir)
    try:
        await until(lambda: archived(run_dir) == (KILLS + 1) * EACH, "everything in the archive", WAIT_S)
        last.terminate()
        assert await anyio.to_thread.run_sync(last.wait, 60) == 0
    finally:
        last.kill()
    there = await everything(log, *TOPICS)
    assert len(there) == (KILLS + 1) * EACH
    assert by_position(list(read_archive(run_dir / "archive", TOPICS))) == by_position(there)
    await log.close()
