"""Which blobs nothing refers to any more, and their removal.

Invariant: a blob goes only if it was older than the grace period when it was listed, no message between the beginning
and the end of any topic names it (in a header, or anywhere in the bytes of a record), no archived message does, and it
has not been put again since. A store serves one log: references on another log are not seen.
A clock that jumps makes everything look old, also what was put a moment ago and whose record is still on its way; and a
blob may be put again between the last look at it and its removal. So what is to go is set aside first, where readers
still find it. After ON_ITS_WAY_S the news on the topics are read, and what they name goes back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import anyio

from kat_stream.errors import ConfigError
from kat_stream.log.base import Delivered, Log, Start
from kat_stream.log.blobs import BlobRef, BlobStore, StoredBlob, references

SHORTEST_GRACE_S = 900.0
"""Between a blob and the record that names it lies a publish, and a broker that is away may write it much later."""
ON_ITS_WAY_S = 60.0
"""Longer than a publish or a transaction waits for its acknowledgement; one that is tried again puts the blob again."""
READ_S = 600.0
"""Longest time to read the topics."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a store holds and what of it may go."""

    blobs: tuple[StoredBlob, ...]
    named: frozenset[str]
    """Hashes that a record or an archive refers to."""
    garbage: tuple[StoredBlob, ...]
    read_to: Mapping[tuple[str, int], int]
    """Up to where the topics were read; empty without a log."""


async def survey(store: BlobStore, log: Log | None, archived: Iterable[Delivered], grace_s: float) -> Survey:
    """List first, then read what refers: a blob that is referred to meanwhile was put again.

    The archive is read last: what retention has removed before the topics were read is in it.

    `log`: the log itself, not its claim-checked view; None if it is gone. ConfigError for too short a grace period.
    LogUnavailable, BlobUnavailable: nothing is known, nothing may go.
    """
    if grace_s < SHORTEST_GRACE_S:
        raise ConfigError(f"--grace: at least {SHORTEST_GRACE_S / 60:g} minutes, records may still be on their way")
    not_after = time.time() - grace_s
    blobs = await store.stored()
    named: set[str] = set()
    read_to: Mapping[tuple[str, int], int] = {}
    if log is not None:
        named, read_to = await _on_topics(log, "earliest")
    named |= {ref.sha256 for delivered in archived for ref in named_by(delivered)}
    garbage = tuple(blob for blob in blobs if blob.sha256 not in named and blob.modified_unix_s <= not_after)
    return Survey(tuple(blobs), frozenset(named), garbage, read_to)


async def sweep(store: BlobStore, found: Survey, log: Log | None, *, wait_s: float = ON_ITS_WAY_S) -> list[StoredBlob]:
    """Remove the garbage, after what was on its way has had `wait_s` to arrive; those that were really removed.

    One that is killed leaves blobs aside: the next puts them back. `log`: as for the survey. LogError, LogUnavailable:
    the news cannot be read, nothing was removed.
    """
    named: set[str] = set()
    try:
        aside = [blob for blob in found.garbage if await store.set_aside(blob)]
        if aside and log is not None:
            await anyio.sleep(wait_s)
            named, _ = await _on_topics(log, found.read_to)
        return [blob for blob in aside if blob.sha256 not in named and await store.remove(blob)]
    finally:
        await store.put_back()


def named_by(delivered: Delivered) -> set[BlobRef]:
    """What a message refers to: by its headers, or by a reference inside its record (a dead letter holds headers)."""
    named = references(delivered.value)
    for text in delivered.headers.values():
        named |= references(text)
    return named


async def _on_topics(log: Log, start: Start) -> tuple[set[str], Mapping[tuple[str, int], int]]:
    """Hashes that messages from `start` on name, and up to where was read."""
    named: set[str] = set()
    async with log.follow(sorted(await log.topics()), start=start) as follower:
        async for delivered in follower.catch_up(READ_S):
            named |= {ref.sha256 for ref in named_by(delivered)}
        return named, {(topic, number): offset for (topic, number), offset in follower.position().items()}
