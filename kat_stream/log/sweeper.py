"""Which blobs nothing refers to any more, and their removal.

Invariant: a blob goes only if it was older than the grace period before the log was read, no message between the
beginning and the end of any topic names it (in a header, or anywhere in the bytes of a record), no archived message
does, and it has not been put again since. A store serves one log: references on another log are not seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from kat_stream.errors import ConfigError
from kat_stream.log.base import Delivered, Log
from kat_stream.log.blobs import BlobRef, BlobStore, StoredBlob, references

SHORTEST_GRACE_S = 900.0
"""Between a blob and the record that names it lies a publish, and a broker that is away may write it much later."""
READ_S = 600.0
"""Longest time to read the topics."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a store holds and what of it may go."""

    blobs: tuple[StoredBlob, ...]
    named: frozenset[str]
    """Hashes that a record or an archive refers to."""
    garbage: tuple[StoredBlob, ...]
    not_after_unix_s: float
    """The grace period, as a point in time."""


async def survey(store: BlobStore, log: Log | None, archived: Iterable[Delivered], grace_s: float) -> Survey:
    """List first, then read what refers: a blob that is referred to meanwhile was put again and is young.

    `log`: the log itself, not its claim-checked view; None if it is gone. ConfigError for too short a grace period.
    LogUnavailable, BlobUnavailable: nothing is known, nothing may go.
    """
    if grace_s < SHORTEST_GRACE_S:
        raise ConfigError(f"--grace: at least {SHORTEST_GRACE_S / 60:g} minutes, records may still be on their way")
    not_after = time.time() - grace_s
    blobs = await store.stored()
    named = {ref.sha256 for delivered in archived for ref in named_by(delivered)}
    if log is not None:
        named |= await _on_topics(log)
    garbage = tuple(blob for blob in blobs if blob.sha256 not in named and blob.modified_unix_s <= not_after)
    return Survey(tuple(blobs), frozenset(named), garbage, not_after)


async def sweep(store: BlobStore, found: Survey) -> list[StoredBlob]:
    """Remove the garbage; those that were really removed."""
    return [blob for blob in found.garbage if await store.remove(blob, not_after_unix_s=found.not_after_unix_s)]


def named_by(delivered: Delivered) -> set[BlobRef]:
    """What a message refers to: by its headers, or by a reference inside its record (a dead letter holds headers)."""
    named = references(delivered.value)
    for text in delivered.headers.values():
        named |= references(text)
    return named


async def _on_topics(log: Log) -> set[str]:
    named: set[str] = set()
    async with log.follow(sorted(await log.topics())) as follower:
        async for delivered in follower.catch_up(READ_S):
            named |= {ref.sha256 for ref in named_by(delivered)}
    return named
