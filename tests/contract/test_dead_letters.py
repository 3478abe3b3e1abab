"""Dead letters on a real broker through the command line: shown, put back once, and handled by the stage again."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterator

import anyio
import pytest

from kat_stream.cli import main
from kat_stream.errors import FencedError
from kat_stream.log import Delivered, Emit, Log, MemoryLog, Message, Outcome, Reject, open_log, run_work
from kat_stream.log.dead_letters import pending, replay
from tests.contract.conftest import TOPICS
from tests.contract.kafka_kit import own_broker
from tests.contract.log_records import entry, everything, reward, until_committed
from topics import CATALOGUE, DeadLetter, Reward, encode

ALL = [*TOPICS, *(topic for topic in CATALOGUE if topic not in TOPICS)]
Handler = Callable[[Delivered], Outcome]


async def handle_all(log: Log, stage: str, decide: Handler) -> None:
    """A life of the stage, until it has read everything."""
    stopping = anyio.Event()

    async def handle(delivered: Delivered) -> Outcome:
        return decide(delivered)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run_work(log, ["rewards"], group=stage, member="m", handler=handle, stopping=stopping))
        await until_committed(log, stage, "rewards")
        stopping.set()


def broken(delivered: Delivered) -> Outcome:
    record = delivered.record()
    assert isinstance(record, Reward)
    return Reject("this build knows no odd scores") if record.score % 2 else Emit()


def mended(delivered: Delivered) -> Outcome:
    record = delivered.record()
    assert isinstance(record, Reward)
    return Emit(entry(record.group_id, f"{int(record.score)}", delivered.headers.get("replayed", b"").decode()))


@pytest.fixture(scope="module")
def url(kafka_bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker of its own: the command line knows no other prefix than the default one, which other tests use too."""
    with own_broker(tmp_path_factory.mktemp("letters")) as bootstrap:
        assert bootstrap != kafka_bootstrap
        url = f"kafka:{bootstrap}"
        anyio.run(with_log, url, nothing)
        yield url


@pytest.fixture
def stage() -> str:
    return f"s{uuid.uuid4().hex[:6]}"


async def with_log(url: str, work: Callable[[Log], Awaitable[None]]) -> None:
    log = open_log(url)
    await log.start()
    try:
        await log.apply_topics(ALL)
        await work(log)
    finally:
        await log.close()


async def nothing(_log: Log) -> None:
    """For a log that only has to have its topics."""


def put_back_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if "rewards" in line]


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_letters_are_shown_put_back_once_and_handled(url: str, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def break_some(log: Log) -> None:
        await log.publish(*[reward(number, stage) for number in range(4)])
        bad = Message("rewards", 3, b"k", b"\xc1 not msgpack", {"record": b"Reward/1"})
        await log.append(bad)
        await handle_all(log, stage, broken)

    anyio.run(with_log, url, break_some)
    common = ["--log", url]
    assert main(["dead-letters", "list", *common]) == 0
    letters = [line for line in capsys.readouterr().out.splitlines() if f"{stage}:" in line]
    assert len(letters) == 3
    undecodable = next(line for line in letters if "DecodeError" in line)
    ident = next(word for word in undecodable.split() if "/" in word).split("/")[1]
    assert main(["dead-letters", "show", ident, *common]) == 0
    shown = capsys.readouterr().out
    assert "c1 20 6e 6f 74" in shown and "header    record: Reward/1" in shown and "DecodeError" in shown

    only = ["--stage", stage, "--error", "Reject", "--since", "1h", *common]
    assert main(["dead-letters", "replay", "--dry-run", *only]) == 0
    assert capsys.readouterr().out.endswith("2 would be put back\n")
    assert main(["dead-letters", "replay", *only]) == 0
    said = capsys.readouterr().out
    assert said.endswith("2 put back\n") and len(put_back_lines(said)) == 2
    assert main(["dead-letters", "replay", *only]) == 0
    assert capsys.readouterr().out == "0 put back\n"

    async def mend(log: Log) -> None:
        await handle_all(log, stage, mended)
        records = [d.record() for d in await everything(log, "ledger")]
        done = [(r.rollout_id, r.reason != "") for r in records if getattr(r, "group_id", "") == stage]  # type: ignore[attr-defined]
        assert sorted(done) == [("1", True), ("3", True)]

    anyio.run(with_log, url, mend)


def test_what_is_asked_wrongly_is_said(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dead-letters", "replay", "--since", "soon", "--log", url]) == 2
    assert "argument --since: 'soon' is no time" in capsys.readouterr().err
    assert main(["dead-letters", "show", "999999", "--log", url]) == 2
    assert "no dead letter 999999" in capsys.readouterr().err


def letter(number: int) -> DeadLetter:
    return DeadLetter(
        run="r",
        stage="s",
        topic="rewards",
        partition=2,
        offset=number,
        error_type="E",
        message="m",
        value=encode(reward(number)),
        headers=(("record", b"Reward/1"),),
    )


def test_two_replays_at_the_same_time_put_back_each_letter_once() -> None:
    async def scenario() -> None:
        log = MemoryLog()
        await log.apply_topics(CATALOGUE)
        await log.publish(*[letter(number) for number in range(6)])
        slow = replay(log, lambda found: True)
        assert (await anext(slow)).number == 0
        quick = [found.number async for found in replay(log, lambda found: True)]
        assert quick == [1, 2, 3, 4, 5]
        with pytest.raises(FencedError):
            await anext(slow)
        assert [found async for found in pending(log, lambda found: True)] == []
        back = await everything(log, "rewards")
        assert [d.record().score for d in back] == [0, 1, 2, 3, 4, 5]  # type: ignore[attr-defined]
        assert {d.position.partition for d in back} == {2}
        assert [d.headers["replayed"] for d in back] == [str(n).encode() for n in range(6)]

    anyio.run(scenario)
