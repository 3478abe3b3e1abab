"""The white-box shell agent: it runs in the worker and sends each reply of the policy to the sandbox as one command.

Owns the loop of turns. Invariant: the conversation only grows, each turn by exactly one reply and one observation; the
agent ends by FINISH_COMMAND, by its turn limit, or by a reply that was cut.
"""

from __future__ import annotations

import aiohttp
import msgspec

from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.scaffolds.base import Limits, Needs, ScaffoldResult, SessionEndpoint
from kat_stream.env.scaffolds.shell_prompt import FINISH_COMMAND, first_messages, observation
from kat_stream.errors import GatewayError
from topics import Task

MODEL = "policy"
_NO_COMMAND = b"no command in the reply"
_USAGE_ERROR = 2
_TIMED_OUT = 124
_MIN_COMMAND_S = 5.0
_MIN_OBSERVATION_BYTES = 400


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


class _Fault(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | int | None = None


class _FaultBody(msgspec.Struct, frozen=True):
    error: _Fault


class _ContextFull(Exception):
    """The conversation no longer fits into the policy's context."""


class ShellScaffold:
    name = "shell"

    def __init__(self) -> None:
        self._http: aiohttp.ClientSession | None = None

    def needs(self) -> Needs:
        return Needs()

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        messages: list[dict[str, str]] = first_messages(task.instruction)
        for _ in range(limits.max_turns):
            try:
                choice = await self._ask(session, messages, limits)
            except _ContextFull:
                return ScaffoldResult("token_limit", "the context is full")
            if choice.finish_reason == "length":
                return ScaffoldResult("token_limit", f"a reply was longer than {limits.max_new_tokens} tokens")
            content = choice.message.content or ""
            if content.strip() == FINISH_COMMAND:
                return ScaffoldResult("submitted")
            seen = await _observe(sandbox, content.strip(), limits)
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": seen}]
        return ScaffoldResult("turn_limit", f"{limits.max_turns} turns without {FINISH_COMMAND!r}")

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _ask(self, session: SessionEndpoint, messages: list[dict[str, str]], limits: Limits) -> _Choice:
        """One model call; GatewayError if the gateway is away or answers something that is no completion."""
        body = msgspec.json.encode({"model": MODEL, "messages": messages, "max_tokens": limits.max_new_tokens})
        headers = {"Authorization": f"Bearer {session.key}", "Content-Type": "application/json"}
        url = f"{session.base_url}/v1/chat/completions"
        timeout = aiohttp.ClientTimeout(total=limits.seconds)
        try:
            async with self._client().post(url, data=body, headers=headers, timeout=timeout) as reply:
                return _choice(reply.status, await reply.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise GatewayError(f"chat completions: {type(error).__name__}: {error}") from error

    def _client(self) -> aiohttp.ClientSession:
        if self._http is None:
            # The number of rollouts in flight bounds the connections; the default limit of 100 would queue them here.
            self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._http


def _choice(status: int, content: bytes) -> _Choice:
    if status != 200:
        raise _fault(status, content)
    try:
        return msgspec.json.decode(content, type=_Completion).choices[0]
    except (msgspec.DecodeError, IndexError) as error:
        raise GatewayError(f"chat completions: not a completion: {error}: {content[:200]!r}") from error


def _fault(status: int, content: bytes) -> Exception:
    try:
        fault = msgspec.json.decode(content, type=_FaultBody).error
    except msgspec.DecodeError:
        return GatewayError(f"chat completions: HTTP {status}: {content[:200]!r}")
    if fault.code == "context_length_exceeded":
        return _ContextFull(fault.message)
    return GatewayError(f"chat completions: HTTP {status}: {fault.message}")


async def _observe(sandbox: Sandbox, command: str, limits: Limits) -> str:
    """Run one command and word what came back; a reply that is no command is answered as the shell would."""
    limit_bytes = max(_MIN_OBSERVATION_BYTES, limits.max_context // 4)
    if not command or "\0" in command:
        return observation(_NO_COMMAND, _USAGE_ERROR, limit_bytes)
    timeout_s = max(_MIN_COMMAND_S, limits.seconds / 10)
    done = await sandbox.exec(command, timeout_s=timeout_s, merge_stderr=True, output_limit=limit_bytes * 4)
    return observation(done.stdout, _TIMED_OUT if done.timed_out else done.exit_code, limit_bytes)
