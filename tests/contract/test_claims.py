"""Claim-check on both logs: readers see whole values, the log holds references, a store that is away is waited for."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Sequence
from pathlib import Path

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_stream.errors import BlobError, BlobUnavailable, ConfigError, DataError, DecodeError
from kat_stream.gateway.limits import Limits
from kat_stream.log import Delivered, Emit, Log, MemoryLog, Message, Outcome, open_log, run_transform, run_work
from kat_stream.log.blobs import BlobRef, BlobStore
from kat_stream.log.claims import ClaimCheckedLog
from kat_stream.log.kafka import KafkaLog
from kat_stream.log.kafka_producer import COMMIT_S
from kat_stream.log.message import seal
from kat_stream.log.sweeper import ON_ITS_WAY_S, survey, sweep
from tests.contract.conftest import BARE, CLAIMED_OVER, TOPICS, Connect
from tests.contract.log_records import everything, groups_on_one_partition, reward, until_written
from tests.waiting import until
from topics import DeadLetter, Reward

pytestmark = pytest.mark.anyio
DAY_S = 86400.0
on_both = pytest.mark.parametrize("connect", BARE, indirect=True)


def large(number: int, group: str = "g", size: int = 5000) -> Reward:
    evidence = random.Random(number).randbytes(size // 2).hex()
    return msgspec.structs.replace(reward(number, group), evidence=evidence)


def ref_of(record: Reward) -> BlobRef:
    return BlobRef.of(seal(record).value)


@pytest.fixture
async def pair(connect: Connect, tmp_path: Path) -> tuple[Log, Log, Path]:
    """A claim-checked log with a store of its own, the same log without it, and the store's directory."""
    bare = await connect()
    root = tmp_path / "store"
    return ClaimCheckedLog(bare, BlobStore(f"file:{root}"), 1000), bare, root


@on_both
async def test_readers_see_the_value_and_the_log_holds_a_reference(pair: tuple[Log, Log, Path]) -> None:
    log, bare, _ = pair
    records = [large(number, f"g{number % 3}") for number in range(8)] + [reward(99)]
    await log.publish(*records)
    got = await everything(log, "rewards")
    assert sorted(d.record().score for d in got) == [*range(8), 99]  # type: ignore[attr-defined]
    assert {d.value for d in got} == {seal(record).value for record in records}
    assert all(set(d.headers) == {"record", "traceparent"} for d in got)
    for delivered in await everything(bare, "rewards"):
        if "blob" in delivered.headers:
            assert delivered.value == b"" and delivered.headers["record"] == b"Reward/1"
            with pytest.raises(DecodeError, match="in a store that this reader was not given"):
                delivered.record()
    refs = {d.headers["blob"].decode() for d in await everything(bare, "rewards") if "blob" in d.headers}
    assert refs == {str(ref_of(record)) for record in records[:-1]}


@on_both
async def test_order_is_kept_where_large_and_small_alternate(pair: tuple[Log, Log, Path]) -> None:
    log, _, _ = pair
    await log.publish(*[large(n) if n % 2 else reward(n) for n in range(40)])
    assert [d.record().score for d in await everything(log, "rewards")] == list(range(40))  # type: ignore[attr-defined]


@on_both
async def test_a_record_over_the_topics_limit_is_a_data_error_with_a_store_too(pair: tuple[Log, Log, Path]) -> None:
    log, _, root = pair
    with pytest.raises(DataError, match="the topic takes"):
        await log.publish(large(0, size=50 << 20))
    assert not root.exists()


@on_both
async def test_a_follower_waits_for_a_store_that_is_away_and_loses_nothing(pair: tuple[Log, Log, Path]) -> None:
    log, _, root = pair
    await log.publish(*[large(number) for number in range(5)])
    root.rename(root.with_name("away"))
    got: list[float] = []
    async with log.follow(["rewards"]) as follower:
        for _ in range(3):
            assert await follower.poll(0.2) == []
        assert not await follower.caught_up()
        root.with_name("away").rename(root)
        with anyio.fail_after(20):
            while len(got) < 5:
                got += [d.record().score for d in await follower.poll(0.2)]  # type: ignore[attr-defined]
    assert got == list(range(5))


@on_both
async def test_nothing_is_published_while_the_store_cannot_be_written(pair: tuple[Log, Log, Path]) -> None:
    log, bare, root = pair
    root.write_text("in the way")
    with pytest.raises(BlobUnavailable):
        await log.publish(reward(0), large(1))
    assert await everything(bare, "rewards") == []
    root.unlink()
    await log.publish(reward(0), large(1))
    assert len(await everything(log, "rewards")) == 2


class Collect:
    """A transform and a work handler in one: reads every record."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def assigned(self, partition: int, replay: Sequence[Delivered]) -> None:
        for delivered in replay:
            delivered.record()

    def revoked(self, partition: int) -> None:
        self.scores.append(-1.0)

    async def handle(self, delivered: Delivered) -> Outcome:
        self.scores.append(delivered.record().score)  # type: ignore[attr-defined]
        return Emit()


async def _stage(way: str, log: Log, made: Collect, stopping: anyio.Event) -> None:
    if way == "work":
        await run_work(log, ["rewards"], group="s", member="m", handler=made.handle, stopping=stopping)
    else:
        await run_transform(log, ["rewards"], group="s", member="m", handler=made, stopping=stopping)


class Watched(BlobStore):
    """Counts how often it was away."""

    away = 0

    async def get_all(self, refs: Sequence[BlobRef]) -> list[bytes | BlobError]:
        try:
            return await super().get_all(refs)
        except BlobUnavailable:
            self.away += 1
            raise


@on_both
@pytest.mark.parametrize("way", ["work", "transform"])
async def test_a_stage_waits_for_the_store_and_buries_what_is_gone_or_wrong(
    pair: tuple[Log, Log, Path], way: str
) -> None:
    _, bare, root = pair
    store = Watched(f"file:{root}")
    log = ClaimCheckedLog(bare, store, 1000)
    records = [large(number) for number in range(6)]
    await log.publish(*records)
    wrong, gone = ref_of(records[1]), ref_of(records[3])
    (root / wrong.sha256[:2] / wrong.sha256).write_bytes(b"x" * wrong.size)
    (root / gone.sha256[:2] / gone.sha256).unlink()
    root.rename(root.with_name("away"))
    made, stopping = Collect(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_stage, way, log, made, stopping)
        await until(lambda: store.away >= 2, "a stage that tries again")
        assert made.scores == [] and await everything(bare, "dead.letters") == []
        root.with_name("away").rename(root)
        await until(lambda: len(made.scores) == 4, "reading what is there")
        await until_written(log, "dead.letters", 2)
        stopping.set()
    assert sorted(score for score in made.scores if score >= 0) == [0, 2, 4, 5]
    letters = [d.record() for d in await everything(log, "dead.letters")]
    kept = {dict(letter.headers)["blob"].decode() for letter in letters}  # type: ignore[attr-defined]
    assert kept == {str(wrong), str(gone)}
    assert {letter.error_type for letter in letters} == {"DecodeError"}  # type: ignore[attr-defined]


@on_both
async def test_a_dead_letter_with_a_reference_is_read_again_once_the_blob_is_back(pair: tuple[Log, Log, Path]) -> None:
    log, bare, root = pair
    record = large(0)
    await log.publish(record)
    lost = root / ref_of(record).sha256[:2] / ref_of(record).sha256
    lost.rename(root / "aside")
    (unresolved,) = await everything(log, "rewards")
    with pytest.raises(DecodeError, match=f"no {ref_of(record)}"):
        unresolved.record()
    (root / "aside").rename(lost)
    number = unresolved.position.partition
    await log.append(Message("rewards", number, unresolved.key, unresolved.value, unresolved.headers))
    assert [d.record() for d in await everything(log, "rewards")] == [record, record]


@on_both
@pytest.mark.parametrize("header", [b"", b"blob:", b"blob:00:1", b"\xff\xfe", b"blob:" + b"0" * 64 + b":-5"])
async def test_a_header_that_is_no_reference_is_bad_input(pair: tuple[Log, Log, Path], header: bytes) -> None:
    log, bare, _ = pair
    await bare.append(Message("rewards", 0, b"k", b"", {"record": b"Reward/1", "blob": header}))
    await bare.append(Message("rewards", 0, b"k", seal(reward(1)).value, {"record": b"Reward/1"}))
    bad, good = await everything(log, "rewards")
    assert good.record() == reward(1)
    with pytest.raises(DecodeError, match="refers to no blob"):
        bad.record()


@on_both
async def test_a_reference_to_more_than_a_topic_takes_is_not_fetched(pair: tuple[Log, Log, Path]) -> None:
    log, bare, _ = pair
    huge = f"blob:{'0' * 64}:{10**11}".encode()
    await bare.append(Message("rewards", 0, b"k", b"", {"record": b"Reward/1", "blob": huge}))
    (delivered,) = await everything(log, "rewards")
    with pytest.raises(DecodeError, match="the topic takes"):
        delivered.record()


def test_open_log_checks_claims_only_where_a_store_is_given(tmp_path: Path) -> None:
    assert isinstance(open_log("memory:"), MemoryLog)
    assert isinstance(open_log("memory:", blobs=f"file:{tmp_path}"), ClaimCheckedLog)
    with pytest.raises(ConfigError, match=r"blobs\.url"):
        open_log("memory:", blobs="nothing:x")


# The sweeper.


def aged(root: Path, days: float) -> None:
    """Every blob is that much older."""
    for path in root.rglob("*"):
        if path.is_file():
            past = path.stat().st_mtime - days * DAY_S
            os.utime(path, (past, past))


@on_both
async def test_a_sweep_removes_what_nothing_refers_to_and_nothing_else(pair: tuple[Log, Log, Path]) -> None:
    log, bare, root = pair
    store = BlobStore(f"file:{root}")
    kept = large(0)
    orphan, artifact, inner, archived = [await store.put(os.urandom(50)) for _ in range(4)]
    await log.publish(kept, msgspec.structs.replace(reward(1), evidence=f"see {artifact}"))
    await log.publish(msgspec.structs.replace(large(2), evidence=f"{inner} " + "x" * 3000))
    letter = {"stage": "s", "topic": "rewards", "partition": 0, "offset": 0, "error_type": "E", "message": "m"}
    buried = await store.put(os.urandom(50))
    claim = (("blob", str(buried).encode()),)
    await log.publish(DeadLetter(run="r", value=b"", headers=claim, **letter))  # type: ignore[arg-type]
    in_archive = Delivered((await everything(bare, "rewards"))[0].position, None, str(archived).encode(), {}, 0)
    aged(root, 2)
    young = await store.put(b"young")
    found = await survey(store, bare, [in_archive], DAY_S)
    assert [blob.sha256 for blob in found.garbage] == [orphan.sha256]
    assert await sweep(store, found, bare, wait_s=0.0) == list(found.garbage)
    left = {blob.sha256 for blob in await store.stored()}
    assert left >= {ref.sha256 for ref in (artifact, inner, archived, buried, young, ref_of(kept))}
    with pytest.raises(ConfigError, match="at least 15 minutes"):
        await survey(store, bare, [], 60)


class Slow(MemoryLog):
    """A log to which nothing comes before it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.through = anyio.Event()

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        await self.through.wait()
        await super().append(*messages, deadline_s=deadline_s)


async def test_a_clock_that_jumps_takes_nothing_whose_record_is_on_its_way(tmp_path: Path) -> None:
    """Nor what was nobody's when the sweep looked and is published again."""
    bare, store = Slow(), BlobStore(f"file:{tmp_path}")
    log = ClaimCheckedLog(bare, store, CLAIMED_OVER)
    await log.apply_topics(TOPICS)
    await store.put(seal(large(1)).value)
    whole = BlobRef.of(seal(large(0)).value).sha256  # before that it lies there under another name

    async def stored() -> bool:
        return whole in [blob.sha256 for blob in await store.stored()]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(log.publish, large(0))
        await until(stored, "the blob")
        aged(tmp_path, 2)
        found = await survey(store, bare, [], DAY_S)
        assert len(found.garbage) == 2
        bare.through.set()
    await log.publish(large(1))
    assert await sweep(store, found, bare, wait_s=0.0) == []
    assert [d.record() for d in await everything(log, "rewards")] == [large(0), large(1)]


def test_a_sweep_waits_longer_than_anything_can_be_on_its_way() -> None:
    waits = [inspect.signature(KafkaLog.append).parameters["deadline_s"].default, COMMIT_S, Limits().publish_s]
    assert max(waits) < ON_ITS_WAY_S


ACTIONS = st.lists(
    st.sampled_from(["put", "publish", "age", "survey", "sweep", "killed sweep"]), min_size=5, max_size=40
)


@given(actions=ACTIONS, seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_no_interleaving_of_puts_publishes_and_sweeps_loses_a_referenced_blob(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str], seed: int
) -> None:
    """A survey and its sweep are two actions, with others between them; values repeat, so blobs are put again."""
    root, chance = tmp_path_factory.mktemp("sweeps") / "blobs", random.Random(seed)

    async def interleaved() -> None:
        bare, store = MemoryLog(), BlobStore(f"file:{root}")
        log = ClaimCheckedLog(bare, store, CLAIMED_OVER)
        await log.apply_topics(TOPICS)
        group = groups_on_one_partition(1)[0]
        found = None
        published: set[int] = set()
        for action in actions:
            number = chance.randrange(6)
            if action == "put":
                await store.put(seal(large(number, group, 300)).value)
            elif action == "publish":
                await log.publish(large(number, group, 300))
                published.add(number)
            elif action == "age":
                aged(root, 2)
            elif action == "survey":
                found = await survey(store, bare, [], DAY_S)
            elif action == "sweep" and found is not None:
                await sweep(store, found, bare, wait_s=0.0)
                found = None
            elif action == "killed sweep" and found is not None:
                for blob in found.garbage:
                    await store.set_aside(blob)
                found = None
            got = await everything(log, "rewards")
            assert {d.record().score for d in got} == published  # type: ignore[attr-defined]
        for _ in range(2):  # the first puts back what a killed one had set aside
            aged(root, 2)
            await sweep(store, await survey(store, bare, [], DAY_S), bare, wait_s=0.0)
        left = {blob.sha256 for blob in await store.stored()}
        assert left == {ref_of(large(number, group, 300)).sha256 for number in published}

    anyio.run(interleaved)
