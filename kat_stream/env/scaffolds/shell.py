"""The white-box shell agent: it runs in the worker and sends each reply of the policy to the sandbox as one command.

Owns the loop of turns. Invariant: the conversation only grows, each turn by exactly one reply and one observation; the
agent ends by FINISH_COMMAND, by its turn limit, or by a reply that was cut.
"""

from __future__ import annotations

from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.scaffolds.base import Limits, Needs, ScaffoldResult, SessionEndpoint
from kat_stream.env.scaffolds.chat import ChatClient, OutOfTokens
from kat_stream.env.scaffolds.commands import observe
from kat_stream.env.scaffolds.shell_prompt import FINISH_COMMAND, first_messages
from topics import Task


class ShellScaffold:
    name = "shell"

    def __init__(self) -> None:
        self._chat = ChatClient()

    def needs(self) -> Needs:
        return Needs()

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        messages: list[dict[str, str]] = first_messages(task.instruction)
        for _ in range(limits.max_turns):
            try:
                reply = await self._chat.ask(session, messages, limits)
            except OutOfTokens as end:
                return ScaffoldResult("token_limit", str(end))
            content = reply.content or ""
            if content.strip() == FINISH_COMMAND:
                return ScaffoldResult("submitted")
            seen = await observe(sandbox, content.strip(), limits)
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": seen}]
        return ScaffoldResult("turn_limit", f"{limits.max_turns} turns without {FINISH_COMMAND!r}")

    async def close(self) -> None:
        await self._chat.close()
