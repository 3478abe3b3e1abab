"""A stage in a process of its own, to be killed.

`python -m tests.contract.log_worker BOOTSTRAP PREFIX work|transform MEMBER`
Prints a line for each message that it begins to handle: its score.
"""

from __future__ import annotations

import sys

import anyio

from kat_stream.log import Delivered, Emit, Log, Outcome, run_transform, run_work
from kat_stream.log.kafka import KafkaLog
from tests.contract.log_records import GroupJoin, entry
from topics import Reward

PAUSE_S = 0.04


async def handle(delivered: Delivered) -> Outcome:
    record = delivered.record()
    assert isinstance(record, Reward)
    print(int(record.score), flush=True)
    await anyio.sleep(PAUSE_S * (1 + record.score % 7))
    return Emit(entry(record.group_id, str(int(record.score))))


class SlowJoin(GroupJoin):
    async def handle(self, delivered: Delivered) -> Outcome:
        await anyio.sleep(PAUSE_S)
        return await super().handle(delivered)


async def main(bootstrap: str, prefix: str, way: str, member: str) -> None:
    log: Log = KafkaLog(bootstrap, prefix=prefix, session_timeout_ms=2000, heartbeat_interval_ms=200)
    await log.start()
    common = {"member": member, "stopping": anyio.Event()}
    if way == "work":
        await run_work(log, ["rewards"], group="w", handler=handle, max_in_flight=4, **common)  # type: ignore[arg-type]
    else:
        join = SlowJoin(lambda record: print(int(record.score), flush=True))
        await run_transform(log, ["rewards"], group="t", handler=join, remember="ledger", batch=5, **common)  # type: ignore[arg-type]


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
