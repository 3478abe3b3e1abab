"""The white-box agent with SWE-agent's tools: `bash`, `str_replace_editor` and `submit`, called as functions.

Owns the loop of turns; it runs in the worker, and so do its tools, on the sandbox's commands and files. Invariant: the
conversation only grows, each turn by one reply and one answer to each of its calls, or a word that it made none.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.scaffolds import swe_wording as wording
from kat_stream.env.scaffolds.base import Limits, Needs, ScaffoldResult, SessionEndpoint
from kat_stream.env.scaffolds.chat import ChatClient, Function, Message, OutOfTokens
from kat_stream.env.scaffolds.commands import observe, seen_bytes
from kat_stream.env.scaffolds.editor import Edit, Editor, Refused
from kat_stream.env.scaffolds.shell_prompt import cut
from topics import Task


class SweToolsScaffold:
    name = "swe-tools"

    def __init__(self) -> None:
        self._chat = ChatClient()

    def needs(self) -> Needs:
        return Needs()

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        messages = wording.first_messages(task.instruction, task.environment.workdir)
        tools = _Tools(sandbox, limits)
        for _ in range(limits.max_turns):
            try:
                reply = await self._chat.ask(session, messages, limits, wording.TOOLS)
            except OutOfTokens as end:
                return ScaffoldResult("token_limit", str(end))
            messages.append(_echoed(reply))
            if not reply.tool_calls:
                messages.append({"role": "user", "content": wording.NO_CALL})
            for call in reply.tool_calls or ():
                if call.function.name == wording.SUBMIT:
                    return ScaffoldResult("submitted")
                seen = await tools.run(call.function)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": seen})
        return ScaffoldResult("turn_limit", f"{limits.max_turns} turns without `{wording.SUBMIT}`")

    async def close(self) -> None:
        await self._chat.close()


class _Bash(msgspec.Struct, frozen=True):
    command: str


class _Tools:
    """The tools of one rollout."""

    def __init__(self, sandbox: Sandbox, limits: Limits) -> None:
        self._sandbox = sandbox
        self._editor = Editor(sandbox)
        self._limits = limits

    async def run(self, asked: Function) -> str:
        """What the policy sees of a call; SandboxDied if the sandbox is gone."""
        try:
            match asked.name:
                case wording.BASH:
                    command = msgspec.json.decode(asked.arguments, type=_Bash).command
                    return await observe(self._sandbox, command.strip(), self._limits)
                case wording.EDITOR:
                    seen = await self._editor.run(msgspec.json.decode(asked.arguments, type=Edit))
                    return cut(seen.encode(), seen_bytes(self._limits))
                case _:
                    return f"Error: there is no tool {asked.name!r}"
        except msgspec.DecodeError as error:
            return f"Error: arguments of {asked.name}: {error}"
        except Refused as error:
            return f"Error: {error}"


def _echoed(message: Message) -> dict[str, Any]:
    """A reply as the next request repeats it: byte for byte, so that the gateway finds what it sampled."""
    said = {"role": "assistant", "content": message.content}
    more = {"reasoning_content": message.reasoning_content, "tool_calls": message.tool_calls}
    return {**said, **{name: value for name, value in more.items() if value}}
