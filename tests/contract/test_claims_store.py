"""The blob store, in a directory and on a real S3 server: by content, whole or not there, verified, typed errors."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import anyio
import pytest

from kat_stream.errors import BlobError, BlobUnavailable, ConfigError
from kat_stream.log.blobs import BlobRef, BlobStore, references
from kat_stream.ports import choose_port
from tests.conftest_kafka import need_java
from tests.contract import s3_server

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


async def test_only_what_was_not_put_again_is_removed(place: tuple[BlobStore, Path]) -> None:
    store, root = place
    ref = await store.put(b"old")
    hour_ago = time.time() - 3600
    os.utime(lies_at(root, ref), (hour_ago, hour_ago))
    (old,) = await store.stored()
    await store.put(b"old")
    assert not await store.remove(old)
    os.utime(lies_at(root, ref), (hour_ago - 3600, hour_ago - 3600))  # a clock has jumped meanwhile
    assert not await store.remove(old)
    os.utime(lies_at(root, ref), (hour_ago, hour_ago))
    assert await store.remove(old)
    assert not await store.remove(old)
    assert await store.stored() == []


async def test_concurrent_puts_of_one_value_leave_one_whole_blob(place: tuple[BlobStore, Path]) -> None:
    store, root = place
    data = os.urandom(200_000)
    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(store.put, data)
    assert [path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "kat-blobs"] == [data]


def _files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


async def test_a_full_disk_is_an_outage_and_gets_no_fuller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(f"file:{tmp_path}/blobs")
    await store.put(b"while there was room")
    before = _files(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BlobUnavailable, match="No space left"):
            await store.put(b"when there was none")
    assert _files(tmp_path) == before


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
