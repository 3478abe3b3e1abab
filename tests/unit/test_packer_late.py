"""A group is closed at most once: any order and number of late duplicates, any restart, any place an operator sets.

The packer's handler in the real stage loop. A life of the stage is given messages in any order, whole groups again and
again among them; it may crash at any message, time enough to give up what is incomplete may pass, and between lives the
group's places may be set back to the beginning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.packer import CLOSED, PackerHandler
from kat_stream.log import Committed, Delivered, Emit, MemoryLog, Outcome, run_transform, transform
from kat_stream.log.memory_group import MemoryMember
from kat_stream.rl.group import GroupRules
from kat_stream.rl.incomplete import GRACE_S
from kat_stream.versions import Versions
from tests.contract.log_records import WAIT_S, everything
from tests.unit.records import RUN, request, reward, trajectory, turn
from tests.waiting import until
from topics import CATALOGUE, GroupClosed, PackedBatch, PolicyVersion, Record

ROLLOUT_S = 600.0
TURN_S = 0.001
"""How long the stage waits for messages that do not come."""
SIZE = 2
WHOLE = [f"{RUN}-t{number:06d}" for number in range(3)]
HALF = f"{RUN}-t000009"
"""Of this group one member is lost."""


def _messages() -> list[Record]:
    found: list[Record] = []
    for group in (*WHOLE, HALF):
        for sample in range(1 if group == HALF else SIZE):
            asked = request(group, sample, SIZE)
            found += [trajectory(asked, turn(asked, [1, 2], [5 + sample])), reward(asked, float(sample))]
    return found


MESSAGES = _messages()


@pytest.fixture(scope="module", autouse=True)
def short_turns() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "POLL_S", TURN_S)
        yield


@dataclass(frozen=True)
class Life:
    """One life of the stage."""

    order: list[int]
    """Messages that come, by their index; twice or ever so late."""
    crash_after: int | None = None
    gives_up: bool = False
    """Whether so much time passes at its end that incomplete groups are given up."""
    set_back: bool = False
    """Whether an operator sets the places to the beginning before it."""


class Packing(PackerHandler):
    """One life's handler."""

    def __init__(self, crash_after: int | None) -> None:
        versions = Versions(RUN)
        versions.take(PolicyVersion(run=RUN, model="m", lineage="a", number=0, path="", checksum=""))
        super().__init__(RUN, versions, GroupRules(staleness=2, budget_tokens=256), rollout_s=ROLLOUT_S)
        self.left = crash_after
        self.passing_s = 0.0
        self.turns = 0

    async def handle(self, delivered: Delivered) -> Outcome:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the process dies here")
        return await super().handle(delivered)

    def late(self, partition: int) -> Emit | None:
        self.turns += 1
        self.time[partition].listened_s += self.passing_s
        self.time[partition].log_s += self.passing_s
        return super().late(partition)


@dataclass
class Watched:
    """A log that tells where its members stand."""

    log: MemoryLog
    members: list[MemoryMember] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)

    async def join(self, topics: Any, **how: Any) -> Any:
        self.members.append(await self.log.join(topics, **how))  # type: ignore[arg-type]
        return self.members[-1]

    @property
    def has_unread(self) -> bool:
        return not self.members or not self.members[-1].owned or self.log.readable(self.members[-1]._active())


async def live(log: MemoryLog, life: Life) -> None:
    if life.set_back:
        places = log._group("packer").committed
        places.update({place: Committed(0) for place in places})
    await log.publish(*[MESSAGES[index] for index in life.order])
    handler, stopping, watched = Packing(life.crash_after), anyio.Event(), Watched(log)
    topics = ("trajectories", "rewards")
    how: dict[str, Any] = {"remember": CLOSED, "mine": handler.mine, "late": handler.late, "batch": 4}

    async def stage() -> None:
        await run_transform(watched, topics, group="packer", member="m", handler=handler, stopping=stopping, **how)

    async def turns(count: int) -> None:
        """So many turns of every partition pass, with nothing left to read."""
        end = handler.turns + count * len(handler.time)
        await until(lambda: handler.turns >= end and not watched.has_unread, f"{count} turns", WAIT_S)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stage)
            await until(lambda: handler.time and not watched.has_unread, "everything read", WAIT_S)
            await turns(2)
            handler.passing_s = 2 * (ROLLOUT_S + GRACE_S) if life.gives_up else 0.0
            await turns(2)
            stopping.set()
    except* RuntimeError:
        assert life.crash_after is not None


lives = st.builds(
    Life,
    st.lists(st.integers(0, len(MESSAGES) - 1), max_size=20),
    st.none() | st.integers(0, 20),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(lives, max_size=4), st.permutations(range(len(MESSAGES))))
@settings(max_examples=25)
def test_each_group_is_closed_once(earlier: list[Life], order: list[int]) -> None:
    async def scenario() -> Counter[str]:
        log = MemoryLog()
        await log.apply_topics(CATALOGUE)
        await log.publish(*[GroupClosed(run="other", group_id=group) for group in (*WHOLE, HALF)])
        for life in [*earlier, Life(order), Life(order, gives_up=True, set_back=True), Life(order, gives_up=True)]:
            await live(log, life)
        closed = [word for one in await everything(log, CLOSED) if (word := one.record()).run == RUN]
        batches = [one.record() for one in await everything(log, "batches")]
        names = Counter(batch.group_id for batch in batches if isinstance(batch, PackedBatch))
        assert names == Counter(word.group_id for word in closed)  # type: ignore[attr-defined]
        return names

    assert anyio.run(scenario) == Counter([*WHOLE, HALF])
