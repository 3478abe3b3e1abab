"""Model calls of the agents that run in the worker: chat completions at the gateway, over one connection pool.

Owns the wire. Invariant: what is returned is a whole reply; a policy that ran out of tokens, before the call or in it,
is told apart from every failure of ours, which is a GatewayError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from kat_stream.env.scaffolds.base import Limits, SessionEndpoint
from kat_stream.errors import GatewayError

MODEL = "policy"


class Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str = "{}"
    """JSON, as the policy wrote it."""


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: Function
    type: str = "function"


class Message(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


class _Fault(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | int | None = None


class _FaultBody(msgspec.Struct, frozen=True):
    error: _Fault


class OutOfTokens(Exception):
    """The conversation no longer fits into the policy's context, or its last reply was cut; which one, in words."""


class ChatClient:
    """Serves many rollouts at once."""

    def __init__(self) -> None:
        self._http: aiohttp.ClientSession | None = None

    async def ask(
        self, session: SessionEndpoint, messages: Sequence[Any], limits: Limits, tools: Sequence[Any] = ()
    ) -> Message:
        """One model call. OutOfTokens; GatewayError if the gateway is away or answers something that is no completion.

        `messages` and `tools` are JSON objects of the chat-completions API.
        """
        said = {"model": MODEL, "messages": messages, "max_tokens": limits.max_new_tokens}
        body = msgspec.json.encode({**said, "tools": tools} if tools else said)
        headers = {"Authorization": f"Bearer {session.key}", "Content-Type": "application/json"}
        url = f"{session.base_url}/v1/chat/completions"
        timeout = aiohttp.ClientTimeout(total=limits.seconds)
        try:
            async with self._client().post(url, data=body, headers=headers, timeout=timeout) as reply:
                choice = _choice(reply.status, await reply.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise GatewayError(f"chat completions: {type(error).__name__}: {error}") from error
        if choice.finish_reason == "length":
            raise OutOfTokens(f"a reply was longer than {limits.max_new_tokens} tokens")
        return choice.message

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

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
        return OutOfTokens("the context is full")
    return GatewayError(f"chat completions: HTTP {status}: {fault.message}")
