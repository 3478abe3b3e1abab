"""Memory of keys and values: the slot pool, the prefix caches that share it, and the dense rows decoding reads.

Owns every slot. Invariant (`audit`): free slots + slots of prefix caches + private slots of running requests = all
slots, each exactly once. Rows [0, n) of the dense store are exactly the decoding requests, without holes; each is as
long as the longest, so the scheduler asks `room` before there are more or longer ones, and no store is bigger.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kat_stream.engines.embedded.radix import RadixCache
from kat_stream.engines.embedded.request import Request

Ints = NDArray[np.int64]

FIRST = 8, 256
"""Rows of the dense store and tokens in each, at first."""
DENSE_POOLS = 8
"""Tokens that the dense store may have room for, in sizes of the pool."""


class KvStore:
    """`pool` float [layers,2,slots,groups,dim]; `dense` float [layers,2,rows,groups,cap,dim], copied to grow."""

    def __init__(self, layers: int, slots: int, groups: int, dim: int, dtype: torch.dtype) -> None:
        self.total = slots
        self.pool = torch.zeros(layers, 2, slots, groups, dim, dtype=dtype)
        self.dense = torch.zeros(layers, 2, FIRST[0], groups, FIRST[1], dim, dtype=dtype)
        self.cache = RadixCache()
        self.retired: list[RadixCache] = []
        self.rows: list[Request] = []
        self.evicted = 0
        self.routes: NDArray[np.uint16] | None = None
        """uint16[slots, W], if they are recorded: experts of the token whose keys and values a slot holds."""
        self._free = list(range(slots - 1, -1, -1))
        self._most = max(DENSE_POOLS * slots, FIRST[0] * FIRST[1])

    def record(self, width: int) -> None:
        """Keep the routed experts of every slot, too, `width` numbers each."""
        self.routes = np.zeros((self.total, width), np.uint16)

    @property
    def available(self) -> int:
        """Slots that can be had without retracting a request."""
        return len(self._free) + self.cache.evictable

    @property
    def used(self) -> int:
        """Slots that running requests hold or lock."""
        return self.total - self.available

    def attach(self, request: Request) -> None:
        """Give a request the longest cached prefix of its tokens, locked; at least one token is left to compute."""
        slots, node = self.cache.match(request.tokens()[: request.cacheable()])
        self.cache.lock(node)
        request.cache, request.node = self.cache, node
        request.slots = slots.tolist()
        request.shared = request.computed = len(request.slots)

    def allocate(self, request: Request, count: int) -> bool:
        """Give a request `count` more private slots, evicting cached prefixes; False if that many cannot be had."""
        if len(self._free) < count and not self._evict(count - len(self._free)):
            return False
        request.slots.extend(self._free[-count:])
        del self._free[-count:]
        return True

    def _evict(self, count: int) -> bool:
        if self.cache.evictable < count:
            return False
        # Evicting walks the whole tree: take some more than needed, so that it does not happen at every step.
        freed = self.cache.evict(max(count, self.total // 64))
        self.evicted += len(freed)
        self._free.extend(freed)
        return len(freed) >= count

    def share(self, request: Request) -> None:
        """Put what a request has computed into the prefix cache, and read the common copy from now on."""
        cache = request.cache
        if cache is not self.cache:
            return
        tokens = request.tokens()[: request.computed]
        slots = np.array(request.slots, np.int64)
        self._free.extend(cache.insert(tokens, slots[: request.computed]).tolist())
        held, node = cache.match(tokens)
        cache.lock(node)
        cache.unlock(request.node)
        request.node, request.shared = node, request.computed
        request.slots[: request.computed] = held.tolist()

    def detach(self, request: Request) -> None:
        """Take everything back from a request; what it computed stays in the prefix cache if that is still current."""
        self.leave_row(request)
        if request.cache is None:
            return
        if request.computed > request.shared:
            self.share(request)
        self._free.extend(request.slots[request.shared :])
        request.cache.unlock(request.node)
        self._reclaim(request.cache)
        request.cache, request.node, request.slots, request.shared, request.computed = None, None, [], 0, 0

    def note_routes(self, request: Request) -> None:
        """Hand a request the routed experts of its computed tokens, before `detach` takes its slots."""
        if self.routes is not None and request.body.return_routed_experts:
            request.note_routes(self.routes[request.slots[request.routed : request.computed]])

    def flush(self) -> None:
        """Forget all prefixes. Those that frozen requests still read stay in memory, unseen, until these end."""
        stale, self.cache = self.cache, RadixCache()
        self.retired.append(stale)
        self._reclaim(stale)

    def _reclaim(self, cache: RadixCache) -> None:
        if cache is self.cache:
            return
        self._free.extend(cache.evict(cache.evictable))
        if cache.root.locks == 0:
            self.retired.remove(cache)

    def join_row(self, request: Request) -> None:
        """Copy a request's computed keys and values into the next dense row: [computed] tokens."""
        row, length = len(self.rows), request.computed
        self._grow(row + 1, max(length, self._longest()) + 1)
        request.row = row
        self.rows.append(request)
        if length:
            gathered = self.pool.index_select(2, torch.tensor(request.slots[:length]))
            self.dense[:, :, row, :, :length] = gathered.transpose(2, 3)

    def leave_row(self, request: Request) -> None:
        """Free a request's row; the last row moves into the hole."""
        row = request.row
        if row < 0:
            return
        last = self.rows.pop()
        if last is not request:
            self.dense[:, :, row, :, : last.computed] = self.dense[:, :, last.row, :, : last.computed]
            self.rows[row], last.row = last, row
        request.row = -1
        if not self.rows and self.dense.shape[2] * self.dense.shape[4] > max(self.total, FIRST[0] * FIRST[1]):
            self._shape(*FIRST)

    def room(self, rows: int, length: int) -> bool:
        """Whether the dense store may have so many rows of so many tokens. One row of the whole pool always may."""
        return _doubled(1, rows) * _doubled(FIRST[1], length) <= self._most

    def reserve_rows(self) -> None:
        """Make room in every row for one more token."""
        if self.rows:
            self._grow(len(self.rows), self._longest() + 1)

    def _longest(self) -> int:
        return max((request.computed for request in self.rows), default=0)

    def _grow(self, rows: int, length: int) -> None:
        have, cap = self.dense.shape[2], self.dense.shape[4]
        if rows <= have and length <= cap:
            return
        if _doubled(have, rows) * _doubled(cap, length) <= self._most:
            self._shape(_doubled(have, rows), _doubled(cap, length))
        else:  # what earlier requests needed, more rows or longer ones, is given back for what these need
            self._shape(_doubled(1, rows), _doubled(FIRST[1], length))

    def _shape(self, rows: int, cap: int) -> None:
        """Another dense store, with the rows in use."""
        layers, two, _, groups, known, dim = self.dense.shape
        used, known = len(self.rows), min(known, cap)
        shaped = self.dense.new_zeros(layers, two, rows, groups, cap, dim)
        shaped[:, :, :used, :, :known] = self.dense[:, :, :used, :, :known]
        self.dense = shaped

    def audit(self, requests: list[Request]) -> None:
        """Raise AssertionError unless every slot is owned exactly once and the locks are those of `requests`."""
        owned = list(self._free)
        for cache in (self.cache, *self.retired):
            stack = [cache.root]
            while stack:
                node = stack.pop()
                owned.extend(node.slots.tolist())
                stack.extend(node.children.values())
        for request in requests:
            owned.extend(request.slots[request.shared :])
        assert sorted(owned) == list(range(self.total)), f"{len(owned)} owners of {self.total} slots"
        locks = sum(cache.root.locks for cache in (self.cache, *self.retired))
        holders = sum(request.cache is not None for request in requests)
        assert locks == holders, f"{locks} locks, {holders} requests"
        assert [request.row for request in self.rows] == list(range(len(self.rows)))


def _doubled(size: int, least: int) -> int:
    """`size`, doubled until it is at least `least`."""
    while size < least:
        size *= 2
    return size
