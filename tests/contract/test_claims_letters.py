"""A large value through a retry, a tier, dead.letters and back, on a real broker with a store: whole at the end, and no
sweep on the way takes what it still needs, also when the messages that named it first have expired.
"""

from __future__ import annotations

import argparse
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import msgspec
import pytest

from kat_stream.cli.common import broker_log
from kat_stream.config import load
from kat_stream.log import Delivered, Emit, Log, Message, Outcome, Retry, dead_letters, open_log, run_work
from kat_stream.log.blobs import BlobStore
from kat_stream.log.claims import ClaimCheckedLog
from kat_stream.log.retries import TIERS
from kat_stream.log.sweeper import survey, sweep
from kat_stream.runs import blobs_url, create_run
from tests.contract.conftest import TOPICS
from tests.contract.log_records import everything, reward, until_committed
from tests.contract.test_claims import DAY_S, aged
from topics import Reward

pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(180)]
LARGE = msgspec.structs.replace(reward(1), evidence=random.Random(1).randbytes(50_000).hex())


class Claimed:
    """A log with a store, the same log without it, and what an operator does to both."""

    def __init__(self, url: str, prefix: str, root: Path) -> None:
        self.bare, self.root, self.store = open_log(url, prefix=prefix), root, BlobStore(f"file:{root}")
        self.log: Log = ClaimCheckedLog(self.bare, self.store, 1000)

    async def sweep(self) -> int:
        """Everything is old, and a sweep removes what nothing names: how many blobs are left."""
        aged(self.root, 2)
        await sweep(self.store, await survey(self.store, self.bare, [], DAY_S), self.bare, wait_s=0.0)
        return len(await self.store.stored())

    async def expire(self, *topics: str) -> None:
        """Retention removes all messages of these topics."""
        for topic in topics:
            await self.bare.delete_before(topic, await self.bare.end_offsets(topic))  # type: ignore[attr-defined]

    async def life(self, handler: object) -> None:
        """A life of the stage, until it has finished everything."""
        stopping = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_work, self.log, handler, stopping)
            await until_committed(self.log, "s", "rewards", *TIERS)
            stopping.set()


async def _work(log: Log, handler: object, stopping: anyio.Event) -> None:
    await run_work(log, ["rewards"], group="s", member="m", handler=handler, stopping=stopping, max_attempts=2)  # type: ignore[arg-type]


@pytest.fixture
async def claimed(kafka_bootstrap: str, tmp_path: Path) -> AsyncIterator[Claimed]:
    made = Claimed(f"kafka:{kafka_bootstrap}", f"c{uuid.uuid4().hex[:8]}.", tmp_path / "store")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(made.log.close)
        await made.log.start()
        await made.log.apply_topics(TOPICS)
        yield made


async def test_a_large_value_goes_through_a_tier_and_dead_letters_and_comes_back_whole(
    claimed: Claimed, first_tier_s: float
) -> None:
    seen: list[tuple[bytes, Reward, int]] = []

    async def never(delivered: Delivered) -> Outcome:
        seen.append((delivered.headers.get("attempt", b"1"), _reward(delivered), await claimed.sweep()))
        return Retry(first_tier_s, "not today")

    await claimed.log.publish(LARGE)
    await claimed.life(never)
    assert [(attempt, record == LARGE) for attempt, record, _ in seen] == [(b"1", True), (b"2", True)]
    assert [left for *_, left in seen] == [1, 2]  # the value; and the deferred message, which holds it
    await claimed.expire("rewards", *TIERS)
    assert await claimed.sweep() == 1  # the letter, which holds it
    (letter,) = [letter async for letter in dead_letters.replay(claimed.log, lambda _: True)]
    assert letter.original().record() == LARGE
    assert await claimed.sweep() == 2
    await claimed.expire("dead.letters")
    assert await claimed.sweep() == 1

    async def mended(delivered: Delivered) -> Outcome:
        seen.append((delivered.headers["attempt"], _reward(delivered), await claimed.sweep()))
        return Emit()

    await claimed.life(mended)
    assert seen[2:] == [(b"1", LARGE, 1)]
    (back,) = await everything(claimed.log, "rewards")
    assert back.headers["replayed"] == b"0" and back.record() == LARGE


def _reward(delivered: Delivered) -> Reward:
    record = delivered.record()
    assert isinstance(record, Reward)
    return record


async def test_a_letter_whose_store_was_not_given_is_named_and_not_passed_over_in_silence(
    claimed: Claimed, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(delivered: Delivered) -> Outcome:
        delivered.record()
        raise AssertionError

    bad = random.Random(2).randbytes(5000)
    await claimed.log.append(Message("rewards", 3, b"k", bad, {"record": b"Reward/1"}))
    await claimed.life(broken)
    assert [letter async for letter in dead_letters.pending(claimed.bare, lambda _: True)] == []
    assert "dead.letters[0]@0" in caplog.text and "a store that this reader was not given" in caplog.text
    (letter,) = [letter async for letter in dead_letters.pending(claimed.log, lambda _: True)]
    assert letter.record.value == bad


def test_a_command_that_puts_back_the_letters_of_a_run_has_its_store(tmp_path: Path) -> None:
    changes = ["log.url='kafka:127.0.0.1:1'", f"run.directory='{tmp_path}'", "run.name=r"]
    config, run_dir = create_run(load(None, changes))
    for address in ("", "kafka:127.0.0.1:2"):
        asked = argparse.Namespace(run=str(run_dir), log=address, config=None, set=[])
        log = broker_log(asked, values=True)
        assert isinstance(log, ClaimCheckedLog)
        assert log._claims._store.url == blobs_url(config, run_dir)
