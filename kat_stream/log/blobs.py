"""Values by content: a store of blobs in a directory or in S3, through fsspec.

    <url>/<first two hex digits>/<sha256>        a blob; <url>/kat-blobs says that this is a store
Invariants: a blob is whole or not there, its name is the hash of its bytes, and `get` hands out nothing else. Putting
twice is putting once, and makes the blob young again, so that a sweep keeps what was just referred to. What a sweep has
set aside (`<sha256>.aside`) is still handed out.
fsspec's calls block, so each runs in a worker thread, and every call has a deadline. S3's address and keys come from
where every S3 client takes them: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ~/.aws.
"""

from __future__ import annotations

import itertools
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from hashlib import sha256
from itertools import batched
from typing import Any, BinaryIO, Self

import anyio
import fsspec
from fsspec.implementations.local import LocalFileSystem

from kat_stream.errors import BlobError, BlobUnavailable, ConfigError, DeadlineExceeded, KatError

DEADLINE_S = 30.0
AT_ONCE = 8
"""Worker threads of one process that use a store at the same time."""
LOCAL_AT_ONCE = 2
"""For the values of one call in a directory: a thread takes several, as the way to one costs a part of a write."""
SYNCED_TOGETHER = 16
"""Files of a thread that are open at once: while one is synced the disk takes the next ones."""
MARKER = "kat-blobs"
"""Tells a store in which a blob is missing from a place where there is no store: not mounted, another bucket."""
ASIDE = ".aside"
_REFERENCE = re.compile(rb"blob:([0-9a-f]{64}):([0-9]{1,12})(?![0-9])")
_S3_CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"max_attempts": 2},
    # Checksums in trailers are new, and many S3 servers refuse them; we check the hash ourselves.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


@dataclass(frozen=True, slots=True)
class BlobRef:
    """What refers to a blob: its hash and size. As text `blob:<sha256>:<bytes>`, in headers and inside records."""

    sha256: str
    size: int

    def __str__(self) -> str:
        return f"blob:{self.sha256}:{self.size}"

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(sha256(data).hexdigest(), len(data))

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """BlobError for anything but one reference."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise BlobError(f"{text[:100]!r} refers to no blob")
        return cls(match[1].decode(), int(match[2]))


def references(data: bytes) -> set[BlobRef]:
    """Every reference in these bytes, whatever record they are."""
    if data.rfind(b"blob:") < 0:  # twenty times as fast as the pattern, and so it is with nearly all records
        return set()
    return {BlobRef(match[1].decode(), int(match[2])) for match in _REFERENCE.finditer(data)}


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob as the store lists it."""

    sha256: str
    size: int
    modified_unix_s: float
    """When it was put last, by the store's clock."""


class BlobStore:
    """Blobs at an fsspec URL: `file:DIRECTORY` or `s3://BUCKET/PREFIX`. ConfigError if nothing serves the URL."""

    def __init__(self, url: str, *, deadline_s: float = DEADLINE_S) -> None:
        self.url = url
        self._deadline_s = deadline_s
        self._fs, self._root = _open(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._marked = False
        self._slots = anyio.CapacityLimiter(AT_ONCE)
        self._names = map(f"{uuid.uuid4().hex}-{{}}".format, itertools.count())
        """Of files that are written now."""

    async def put(self, data: bytes) -> BlobRef:
        """Store the bytes; they are there when this returns. BlobUnavailable: they may be there."""
        return (await self.put_all([data]))[0]

    async def put_all(self, values: Sequence[bytes]) -> list[BlobRef]:
        """As `put` for each: a thread takes several."""
        return await self._each(f"putting {sum(map(len, values))} bytes", self._put_some, values)

    async def get(self, ref: BlobRef) -> bytes:
        """The bytes. BlobError: other bytes, or none in a store that answers. BlobUnavailable: the store does not."""
        (found,) = await self.get_all([ref])
        if isinstance(found, BlobError):
            raise found
        return found

    async def get_all(self, refs: Sequence[BlobRef]) -> list[bytes | BlobError]:
        """As `get` for each, but what is wrong with one value stands in its place."""
        return await self._each(f"getting {', '.join(map(str, refs[:3]))}", self._get_some, refs)

    async def stored(self) -> list[StoredBlob]:
        """Every blob, in the order of names."""
        return await self._call("listing", self._list)

    async def set_aside(self, blob: StoredBlob) -> bool:
        """Out of the list, not out of reach: False if it has been put again since it was listed, or is gone."""
        return await self._call(f"setting aside {blob.sha256}", partial(self._set_aside, blob))

    async def remove(self, blob: StoredBlob) -> bool:
        """Remove what was set aside: False if it was put again at that very moment, which only a directory tells."""
        return await self._call(f"removing {blob.sha256}", partial(self._remove, blob))

    async def put_back(self) -> None:
        """All that is set aside is where it was, and young."""
        await self._call("putting back", self._put_back)

    async def _each[A, B](self, what: str, step: Callable[[Sequence[A]], list[B]], items: Sequence[A]) -> list[B]:
        """All items, shared out to threads, results in order; the first error is raised as itself."""
        lanes = min(len(items), LOCAL_AT_ONCE if self._local else AT_ONCE)
        results: dict[int, list[B]] = {}
        failures: list[BlobUnavailable] = []

        async def one(lane: int) -> None:
            try:
                results[lane] = await self._call(what, partial(step, items[lane::lanes]))
            except BlobUnavailable as error:
                failures.append(error)
                tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for lane in range(lanes):
                tasks.start_soon(one, lane)
        if failures:
            raise failures[0]
        return [results[at % lanes][at // lanes] for at in range(len(items))]

    async def _call[T](self, what: str, work: Callable[[], T]) -> T:
        try:
            with anyio.fail_after(self._deadline_s):
                return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._slots)
        except TimeoutError:
            error = DeadlineExceeded(what, self._deadline_s)
            raise BlobUnavailable(f"{self.url}: {error}") from error
        except KatError:
            raise
        except Exception as error:  # a store's client library has errors of its own: all say that it did not work
            raise BlobUnavailable(f"{self.url}: {what}: {type(error).__name__}: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name}"

    def _put_some(self, values: Sequence[bytes]) -> list[BlobRef]:
        refs = [BlobRef.of(data) for data in values]
        if not self._marked:
            self._write([(f"{self._root}/{MARKER}", b"")])
            self._marked = True
        for some in batched(zip(refs, values, strict=True), SYNCED_TOGETHER):
            self._write([(self._path(ref.sha256), data) for ref, data in some])
        return refs

    def _write(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Each whole or not at all: an object store does that by itself, in a directory a rename does."""
        if not self._local:
            for path, data in files:
                self._fs.pipe_file(path, data)
            return
        temporaries = [f"{path}.{next(self._names)}.tmp" for path, _ in files]
        try:
            with ExitStack() as until_synced:
                opened = [until_synced.enter_context(self._create(temporary)) for temporary in temporaries]
                for file, (_, data) in zip(opened, files, strict=True):
                    file.write(data)
                    file.flush()
                for file in opened:
                    os.fsync(file.fileno())
            for temporary, (path, _) in zip(temporaries, files, strict=True):
                os.replace(temporary, path)  # noqa: PTH105 - fsspec's paths are text
        except OSError:  # a full disk stays full if every attempt leaves a file
            for temporary in temporaries:
                with suppress(OSError):
                    os.unlink(temporary)  # noqa: PTH108 - fsspec's paths are text
            raise

    def _create(self, path: str) -> BinaryIO:
        try:
            return open(path, "wb")  # noqa: PTH123 - fsspec's paths are text
        except FileNotFoundError:  # the first blob of its folder
            self._fs.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH120 - fsspec's paths are text
            return open(path, "wb")  # noqa: PTH123 - fsspec's paths are text

    def _get_some(self, refs: Sequence[BlobRef]) -> list[bytes | BlobError]:
        return [self._get(ref) for ref in refs]

    def _get(self, ref: BlobRef) -> bytes | BlobError:
        try:
            data = self._find(self._path(ref.sha256), ref.size + 1)
        except FileNotFoundError:
            if not self._fs.exists(f"{self._root}/{MARKER}"):
                raise
            return BlobError(f"{self.url}: no {ref}")
        return data if BlobRef.of(data) == ref else BlobError(f"{self.url}: what lies there is not {ref}")

    def _find(self, path: str, most: int) -> bytes:
        for place in (path, path + ASIDE):
            with suppress(FileNotFoundError):
                return self._read(place, most)
        return self._read(path, most)  # put back between the two looks

    def _read(self, path: str, most: int) -> bytes:
        if self._local:
            with open(path, "rb") as file:  # noqa: PTH123 - fsspec's paths are text
                return file.read(most)
        data: bytes = self._fs.cat_file(path, start=0, end=most)
        return data

    def _list(self) -> list[StoredBlob]:
        found = self._fs.find(self._root, detail=True) if self._fs.exists(f"{self._root}/{MARKER}") else {}
        blobs = [
            StoredBlob(path.rpartition("/")[2], info["size"], _modified(info))
            for path, info in found.items()
            if not path.endswith((MARKER, ASIDE))
        ]
        return sorted(blobs, key=lambda blob: blob.sha256)

    def _set_aside(self, blob: StoredBlob) -> bool:
        path = self._path(blob.sha256)
        try:
            if _modified(self._fs.info(path)) != blob.modified_unix_s:
                return False
            self._move(path, path + ASIDE)
        except FileNotFoundError:
            return False
        return True

    def _remove(self, blob: StoredBlob) -> bool:
        path = self._path(blob.sha256) + ASIDE
        try:
            modified = _modified(self._fs.info(path))  # S3 does not say that what it removes is not there
            if self._local and modified != blob.modified_unix_s:
                return False
            self._fs.rm_file(path)
        except FileNotFoundError:
            return False
        return True

    def _put_back(self) -> None:
        for path in self._fs.find(self._root):
            if path.endswith(ASIDE):
                with suppress(FileNotFoundError):
                    if self._local:
                        os.utime(path)  # it may replace a young one
                    self._move(path, path.removesuffix(ASIDE))

    def _move(self, path: str, target: str) -> None:
        if self._local:
            os.replace(path, target)  # noqa: PTH105 - fsspec's paths are text
        else:
            self._fs.cp_file(path, target)
            self._fs.rm_file(path)


def _open(url: str) -> tuple[Any, str]:
    protocol = url.partition(":")[0]
    if protocol != "file" and "://" not in url:
        raise ConfigError(f"blobs.url: {url!r} is neither file:DIRECTORY nor s3://BUCKET/PREFIX")
    try:
        fs, root = fsspec.url_to_fs(url) if protocol == "file" else _remote(url, protocol, _environment())
    except ImportError as error:
        raise ConfigError(f"blobs.url: for {url} install kat-stream[s3] ({error})") from error
    except ValueError as error:
        raise ConfigError(f"blobs.url: {url!r} is neither file:DIRECTORY nor s3://BUCKET/PREFIX: {error}") from error
    return fs, root.rstrip("/")


@cache
def _remote(url: str, protocol: str, environment: tuple[tuple[str, str], ...]) -> tuple[Any, str]:
    """A client of a store, kept for as long as the process lives.

    s3fs closes a client that is thrown away on whatever event loop runs at that moment, which breaks that loop's tasks.
    fsspec's own cache does not see that the environment, with address and keys, is another.
    """
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol == "s3":
        options["config_kwargs"] = _S3_CLIENT
    fs, root = fsspec.url_to_fs(url, **options)
    return fs, root


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def _modified(info: dict[str, Any]) -> float:
    """Unix seconds, whole ones of an object store; one that does not say when has only young blobs."""
    when = info.get("mtime") or info.get("LastModified")
    if isinstance(when, datetime):
        return float(int(when.timestamp()))  # a listing may say milliseconds where a single look does not
    return float(when) if when else time.time()
