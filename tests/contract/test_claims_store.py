"""The blob store, in a directory and on a real S3 server: by content, whole or not there, verified, typed errors."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import pytest

from kat_stream.errors import BlobError, BlobUnavailable, ConfigError
from kat_stream.log import MemoryLog
from kat_stream.log.blobs import ASIDE, BlobRef, BlobStore, references
from kat_stream.log.claims import ClaimCheckedLog
from kat_stream.log.message import seal
from kat_stream.log.sweeper import survey, sweep
from kat_stream.ports import choose_port
from tests.conftest_kafka import need_java
from tests.contract import s3_server
from tests.contract.log_records import everything, reward
from tests.waiting import until
from topics import CATALOGUE

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """(folder with the server's data, port)."""
    need_java()
    folder, port = tmp_path_factory.mktemp("s3"), choose_port()
    with s3_server.running(folder, port):
        yield folder / "data" / s3_server.BUCKET, port


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[BlobStore, Path]:
    """A store and the directory in which its blobs are files."""
    if request.param == "file":
        return BlobStore(f"file:{tmp_path}/blobs"), tmp_path / "blobs"
    data, port = request.getfixturevalue("s3")
    for name, value in s3_server.environment(port).items():
        monkeypatch.setenv(name, value)
    prefix = sha256(str(tmp_path).encode()).hexdigest()[:12]
    return BlobStore(f"s3://{s3_server.BUCKET}/{prefix}"), data / prefix


def lies_at(root: Path, ref: BlobRef) -> Path:
    return root / ref.sha256[:2] / ref.sha256


def aged(root: Path, ref: BlobRef) -> float:
    """It was put an hour ago: when that was."""
    hour_ago = time.time() - 3600
    os.utime(lies_at(root, ref), (hour_ago, hour_ago))
    return hour_ago


@pytest.mark.parametrize("size", [1, 1000, 1_000_000, 12 << 20])
async def test_what_was_put_is_got_under_the_hash_of_its_bytes(place: tuple[BlobStore, Path], size: int) -> None:
    store, root = place
    data = os.urandom(size)
    ref = await store.put(data)
    assert (ref.sha256, ref.size) == (sha256(data).hexdigest(), size)
    assert await store.get(ref) == data
    assert await store.put(data) == ref
    assert [(blob.sha256, blob.size) for blob in await store.stored()] == [(ref.sha256, size)]
    assert lies_at(root, ref).read_bytes() == data


async def test_many_values_come_back_in_their_order_and_a_missing_one_stands_in_its_place(
    place: tuple[BlobStore, Path],
) -> None:
    store, root = place
    values = [os.urandom(1 + number) for number in range(19)]
    refs = await store.put_all(values)
    assert refs == [BlobRef.of(value) for value in values]
    lies_at(root, refs[7]).unlink()
    found = await store.get_all(refs)
    assert isinstance(found[7], BlobError) and str(refs[7]) in str(found[7])
    assert [*found[:7], *found[8:]] == [*values[:7], *values[8:]]
    assert await store.put_all([]) == await store.get_all([]) == []


async def test_wrong_bytes_a_wrong_size_and_a_missing_blob_are_typed(place: tuple[BlobStore, Path]) -> None:
    store, root = place
    ref = await store.put(b"good bytes")
    for wrong in (b"bad! bytes", b"good bytes and more", b"good"):
        lies_at(root, ref).write_bytes(wrong)
        with pytest.raises(BlobError, match=ref.sha256) as error:
            await store.get(ref)
        assert not error.value.retriable
    lies_at(root, ref).unlink()
    with pytest.raises(BlobError, match=f"no {ref}"):
        await store.get(ref)


async def test_a_place_without_a_store_is_an_outage_not_a_missing_blob(place: tuple[BlobStore, Path]) -> None:
    store, root = place
    ref = await store.put(b"bytes")
    root.rename(root.with_name(f"{root.name}-away"))
    with pytest.raises(BlobUnavailable) as error:
        await store.get(ref)
    assert error.value.retriable
    root.with_name(f"{root.name}-away").rename(root)
    assert await store.get(ref) == b"bytes"


async def test_only_what_was_not_put_again_is_set_aside_and_removed(place: tuple[BlobStore, Path]) -> None:
    store, root = place
    ref = await store.put(b"old")
    hour_ago = aged(root, ref)
    (old,) = await store.stored()
    await store.put(b"old")
    assert not await store.set_aside(old)
    os.utime(lies_at(root, ref), (hour_ago - 3600, hour_ago - 3600))  # a clock has jumped meanwhile
    assert not await store.set_aside(old)
    os.utime(lies_at(root, ref), (hour_ago, hour_ago))
    assert await store.set_aside(old)
    assert await store.stored() == []
    assert await store.remove(old)
    assert not await store.remove(old) and not await store.set_aside(old)


async def test_what_is_set_aside_is_handed_out_and_comes_back_young(place: tuple[BlobStore, Path]) -> None:
    """So it is when a sweep is killed."""
    store, root = place
    ref = await store.put(b"bytes")
    hour_ago = aged(root, ref)
    (old,) = await store.stored()
    assert await store.set_aside(old)
    assert await store.get(ref) == b"bytes"
    await store.put_back()
    (back,) = await store.stored()
    assert (back.sha256, back.size) == (ref.sha256, ref.size) and back.modified_unix_s > hour_ago + 1800
    assert await store.get(ref) == b"bytes" and not lies_at(root, ref).with_suffix(".aside").exists()


class PutMeanwhile(BlobStore):
    """Another process does something between the last look at a blob and its removal."""

    meanwhile: Callable[[], Coroutine[Any, Any, object]]

    def _move(self, path: str, target: str) -> None:
        if target.endswith(ASIDE):
            anyio.from_thread.run(self.meanwhile)
        super()._move(path, target)


async def test_a_value_published_again_at_the_moment_of_its_removal_is_kept(place: tuple[BlobStore, Path]) -> None:
    store, root = place
    bare = MemoryLog()
    log = ClaimCheckedLog(bare, store, 0)
    await log.apply_topics(CATALOGUE)
    ref = await store.put(seal(reward(0)).value)
    aged(root, ref)
    found = await survey(store, bare, [], 1800.0)
    sweeping = PutMeanwhile(store.url)
    sweeping.meanwhile = partial(log.publish, reward(0))
    assert [blob.sha256 for blob in found.garbage] == [ref.sha256]
    assert await sweep(sweeping, found, bare, wait_s=0.0) == []
    assert [one.record() for one in await everything(log, "rewards")] == [reward(0)]
    assert [blob.sha256 for blob in await store.stored()] == [ref.sha256]


async def test_in_a_directory_also_what_is_named_only_later_is_kept(tmp_path: Path) -> None:
    store = BlobStore(f"file:{tmp_path}/blobs")
    ref = await store.put(b"an artifact")
    aged(tmp_path / "blobs", ref)
    sweeping = PutMeanwhile(store.url)
    sweeping.meanwhile = partial(store.put, b"an artifact")
    assert await sweep(sweeping, await survey(store, None, [], 1800.0), None) == []
    assert await store.get(ref) == b"an artifact"


async def test_concurrent_puts_of_one_value_leave_one_whole_blob(place: tuple[BlobStore, Path]) -> None:
    store, root = place
    data = os.urandom(200_000)
    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(store.put, data)
    assert [path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "kat-blobs"] == [data]


def _files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("room_for", [0, 11])
async def test_a_full_disk_is_an_outage_and_gets_no_fuller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_for: int
) -> None:
    """Of several values some may be there then, whole, and nothing else."""
    store = BlobStore(f"file:{tmp_path}/blobs")
    await store.put(b"while there was room")
    before = _files(tmp_path)
    syncs = itertools.count()

    def full(_: int) -> None:
        if next(syncs) >= room_for:
            raise OSError(errno.ENOSPC, "No space left on device")

    def left() -> set[Path]:
        return _files(tmp_path) - before

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BlobUnavailable, match="No space left"):
            await store.put_all([b"%d" % number for number in range(40)])
        # A thread of the failed call may still be at work.
        await until(lambda: not any(path.suffix for path in left()), "no file that is half written")
    assert len(left()) <= room_for and all(sha256(path.read_bytes()).hexdigest() == path.name for path in left())


async def test_a_blob_has_its_name_only_once_all_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[str, int] = {}
    named: list[int | None] = []
    sync, rename = os.fsync, os.replace

    def noted_sync(file: int) -> None:
        sync(file)
        synced[str(Path(f"/proc/self/fd/{file}").readlink())] = os.fstat(file).st_size

    def noted_rename(path: str, target: str) -> None:
        named.append(synced.get(path))
        rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    await BlobStore(f"file:{tmp_path}/blobs").put_all([os.urandom(100) for _ in range(40)])
    assert set(named) == {0, 100} and named.count(100) == 40


async def test_an_s3_server_that_is_away_or_refuses_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment(choose_port()).items():
        monkeypatch.setenv(name, value)
    store = BlobStore("s3://bucket/prefix", deadline_s=3)
    with pytest.raises(BlobUnavailable, match="s3://bucket/prefix"), anyio.fail_after(30):
        await store.put(b"bytes")


async def test_wrong_credentials_are_an_outage_too(s3: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**s3_server.environment(s3[1]), "AWS_SECRET_ACCESS_KEY": "wrong"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BlobUnavailable):
        await BlobStore(f"s3://{s3_server.BUCKET}/x").put(b"bytes")


def test_an_address_that_nothing_serves_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"blobs\.url"):
        BlobStore("gopher://x/y")


def test_references_are_found_in_any_bytes_and_nothing_else_parses() -> None:
    one, two = BlobRef.of(b"1"), BlobRef.of(b"22")
    assert references(b"\x81 " + str(one).encode() + b"\xff" + str(two).encode() + b" blob:12:3") == {one, two}
    assert BlobRef.parse(str(one).encode()) == one
    for text in (b"", b"blob:12:3", f"{one}x".encode(), f"blob:{one.sha256}:-1".encode(), f"{one}{'9' * 13}".encode()):
        with pytest.raises(BlobError):
            BlobRef.parse(text)
