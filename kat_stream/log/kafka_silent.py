"""Nodes of a cluster that stand still: their connections stay open, and nothing answers.

aiokafka 0.14 would wait 40 s for such a node, again for each request, one after the other, while the connections to all
other nodes wait behind these; and each client learns it anew. Invariant: a request's patience with a node is REQUEST_S,
and no client of this process asks a node that did not answer one of them until another node said that it is there.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaConnectionError, NodeNotReadyError, RequestTimedOutError
from aiokafka.protocol.group import JoinGroupRequest, SyncGroupRequest

REQUEST_S = 7.0
"""Longer than it takes until others lead what a node led (kafka_real.md 5.2: up to 6.4 s where it is fenced after 3 s),
as others too cannot answer before that. Shorter by a factor than our deadlines (CONNECT_S, ASK_S, COMMIT_S): if they
ended first, aiokafka would keep the connection and ask there again."""
MEMBERS_S = 40.0
"""For the requests that a node answers when all members of a group have come: their silence is not the node's."""
MEMBERS = (JoinGroupRequest, SyncGroupRequest)
_SILENT: dict[str, float] = {}
"""Addresses at which a request found no answer, and when (monotonic) the last one was given up."""


def wary[T: (AIOKafkaAdminClient, AIOKafkaConsumer, AIOKafkaProducer)](user: T) -> T:
    """Let its requests give up a node that stands still.

    Not by request_timeout_ms: that is also how long a producer waits for room, and how long all answers to a question
    about offsets may take together. These waits end at our own deadlines. aiokafka makes its client itself, so that
    client is given its class here.
    """
    client: Any = user.client if isinstance(user, AIOKafkaProducer) else user._client
    client.__class__ = _WaryClient
    client._request_timeout_ms = int(REQUEST_S * 1000)
    client._told_at = 0.0
    client._connecting = defaultdict(asyncio.Lock)
    return user


class _WaryClient(AIOKafkaClient):  # type: ignore[misc]
    _bootstrap_servers: str
    _told_at: float
    """When (monotonic) another node last began to tell this client who is there."""
    _connecting: defaultdict[object, asyncio.Lock]
    """By node: those who wait profit by the first one's failure, and no other node's connection waits behind it."""

    @property
    def _get_conn_lock(self) -> nullcontext[None]:
        return nullcontext()

    async def bootstrap(self) -> None:
        servers = self._bootstrap_servers.split(",")
        random.shuffle(servers)
        for server in sorted(servers, key=lambda server: _SILENT.get(server, 0.0)):
            self._bootstrap_servers, began = server, time.monotonic()
            try:
                await super().bootstrap()
            except KafkaConnectionError:
                _SILENT[server] = time.monotonic()
            else:
                self._told_at = began
                return
        raise KafkaConnectionError(f"Unable to bootstrap from {servers}")

    async def _metadata_update(self, cluster_metadata: object, topics: object) -> bool:
        began = time.monotonic()
        updated: bool = await super()._metadata_update(cluster_metadata, topics)
        if updated:
            self._told_at = began
        return updated

    async def _get_conn(self, node_id: object, **options: Any) -> Any:
        async with self._connecting[node_id]:
            if self._silent(node_id) and not all(self._silent(other.nodeId) for other in self.cluster.brokers()):
                self.force_metadata_update()
                return None
            connection = await super()._get_conn(node_id, **options)
            if connection is None:
                _SILENT[self._address(node_id)] = time.monotonic()
            return connection

    async def send(self, node_id: object, request: object, **options: Any) -> Any:
        if isinstance(request, MEMBERS):
            return await self._wait_for_members(node_id, request, **options)
        try:
            return await super().send(node_id, request, **options)
        except RequestTimedOutError:
            _SILENT[self._address(node_id)] = time.monotonic()
            raise

    async def _wait_for_members(self, node_id: object, request: object, **options: Any) -> Any:
        connection = await self._get_conn(node_id, **options)
        if connection is None:
            raise NodeNotReadyError(f"node {node_id} does not answer")
        connection._request_timeout = MEMBERS_S
        try:
            return await super().send(node_id, request, **options)
        finally:
            connection._request_timeout = REQUEST_S

    def _silent(self, node_id: object) -> bool:
        """Whether it was not among those who are there, or did not answer since this client was told so."""
        address = self._address(node_id)
        return not address or _SILENT.get(address, 0.0) > self._told_at

    def _address(self, node_id: object) -> str:
        """Empty for a node that the metadata do not name (any more): aiokafka would go on with a connection it has."""
        known = self.cluster.broker_metadata(node_id)
        return f"{known.host}:{known.port}" if known is not None else ""
