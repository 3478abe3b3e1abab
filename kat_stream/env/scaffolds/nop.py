"""Does nothing and says it is done: a lower bound for every agent and half of a dataset's audit."""

from __future__ import annotations

from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.scaffolds.base import Limits, Needs, ScaffoldResult, SessionEndpoint
from topics import Task


class NopScaffold:
    name = "nop"

    def needs(self) -> Needs:
        return Needs(session=False)

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        return ScaffoldResult("submitted")

    async def close(self) -> None:
        pass
