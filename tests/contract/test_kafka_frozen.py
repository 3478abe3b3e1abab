"""One of three brokers stands still for longer than its session, its connections open: what it led and coordinated, the
others do; stages that run and stages that start go on without it, nothing is lost, and nothing is done twice.
"""

from __future__ import annotations

import uuid
from collections import Counter
from functools import partial

import anyio
import pytest

from kat_stream.log import Delivered, Emit, Outcome, broker, run_transform, run_work
from kat_stream.log.broker_node import listed
from kat_stream.log.kafka import KafkaLog
from tests.contract.conftest import TOPICS
from tests.contract.log_records import SIZE, GroupJoin, everything, forgive_cut_off_commits, reward
from tests.waiting import until
from topics import Reward

pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(400)]
STILL_S = 150.0
"""By far longer than on a quiet machine (10-20 s). With 40 s of patience for each request it was not over by then."""
AGAIN_S = 25.0
"""Less than the 30 s that brokers wait for a controller's answer unless told otherwise."""
GROUPS = 12


class Stages:
    """A working and a joining stage of one process, and what was worked on."""

    def __init__(self, bootstrap: str, prefix: str, member: str, worked: set[float]) -> None:
        self.log = KafkaLog(bootstrap, prefix=prefix)
        self.stopping, self.gone = anyio.Event(), anyio.Event()
        self._member, self._worked = member, worked

    async def run(self) -> None:
        await self.log.start()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._work)
            tasks.start_soon(self._join)
        await self.log.close()
        self.gone.set()

    async def _work(self) -> None:
        async def handle(delivered: Delivered) -> Outcome:
            record = delivered.record()
            assert isinstance(record, Reward)
            self._worked.add(record.score)
            return Emit()

        await run_work(self.log, ["rewards"], group="w", handler=handle, member=self._member, stopping=self.stopping)

    async def _join(self) -> None:
        await run_transform(
            self.log,
            ["rewards"],
            group="t",
            member=self._member,
            handler=GroupJoin(),
            stopping=self.stopping,
            remember="ledger",
            batch=5,
        )


async def joined(log: KafkaLog) -> Counter[str]:
    return Counter(d.record().group_id for d in await everything(log, "ledger"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [1, 2, 3])  # each leads; one of them coordinates the groups, one is the controller
async def test_a_node_that_stands_still_beyond_its_session(kafka_cluster: broker.Cluster, number: int) -> None:
    where, prefix, worked = kafka_cluster.bootstrap, f"f{uuid.uuid4().hex[:8]}.", set[float]()
    log = KafkaLog(where, prefix=prefix)
    await log.start()
    await log.apply_topics(TOPICS)
    forgive_cut_off_commits()
    groups = [f"g{n}" for n in range(2 * GROUPS)]
    asked = [reward(n * SIZE + i, group) for n, group in enumerate(groups) for i in range(SIZE)]
    before, late = (Stages(where, prefix, member, worked) for member in ("m", "late"))
    still, others = kafka_cluster.node(number), {node.number for node in kafka_cluster.nodes} - {number}
    alive = partial(listed, kafka_cluster.node(min(others)).port)

    async def through() -> bool:
        return len(worked) == len(asked) and len(await joined(log)) == len(groups)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(before.run)
        await log.publish(*asked[: GROUPS * SIZE])
        await until(partial(joined, log), "a first group")
        still.pause()
        try:
            tasks.start_soon(late.run)
            await log.publish(*asked[GROUPS * SIZE :], deadline_s=STILL_S)
            await until(through, "all of it", STILL_S)
            late.stopping.set()
            with anyio.fail_after(STILL_S):
                await late.gone.wait()
            assert alive() == others  # it never came back
        finally:
            still.resume()  # a node that led, with what it knew then
        await until(lambda: alive() == others | {number}, "the node is back", STILL_S)
        before.stopping.set()
    assert await joined(log) == Counter(groups)
    assert sorted(d.record().score for d in await everything(log, "rewards")) == sorted(worked)  # type: ignore[attr-defined]
    await log.close()


def active_controller(cluster: broker.Cluster) -> broker.Node:
    """Who said last that it is the one; each line begins with its time."""
    said = {
        line: node
        for node in cluster.nodes
        for line in (node.folder / "broker.log").read_text().splitlines()
        if "Performing controller activation" in line
    }
    return said[max(said)]


async def test_the_controller_stands_still_as_another_node_comes_back(kafka_cluster: broker.Cluster) -> None:
    """Leaders ask the controller to count the node's copies again; until it agrees there are too few to write."""
    log = KafkaLog(kafka_cluster.bootstrap, prefix=f"f{uuid.uuid4().hex[:8]}.")
    await log.start()
    await log.apply_topics(TOPICS)
    everywhere = [reward(number, f"g{number}") for number in range(5 * GROUPS)]
    controller = active_controller(kafka_cluster)
    back, other = (node for node in kafka_cluster.nodes if node != controller)
    back.kill()
    await log.publish(*everywhere, deadline_s=STILL_S)
    back.launch()
    await until(lambda: back.number in listed(other.port), "the node is back")
    controller.pause()
    await log.publish(*everywhere, deadline_s=AGAIN_S)
    await log.close()
