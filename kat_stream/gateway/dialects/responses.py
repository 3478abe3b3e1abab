"""OpenAI responses: request, reply, stream and errors. Wire facts: research/routing_streaming.md D1.

Invariant: see dialects/base.py. Nothing is stored: a request that refers to an earlier response is refused, agents send
the whole history. Every event of a stream has its number.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from kat_stream.errors import RequestRefused
from kat_stream.gateway.dialects.base import COMMENT, arguments_value, decode, encode, event, openai_error, positive
from kat_stream.gateway.dialects.responses_items import CUSTOM, NAMESPACE, Item, Tool, messages, tools
from kat_stream.gateway.messages import Message, ModelCall, Reply, ToolCall
from kat_stream.gateway.stream_text import Shown


class _Asked(msgspec.Struct, omit_defaults=True):
    """Fields that are recorded as asked for."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    reasoning: Any = None
    text: Any = None
    tool_choice: Any = None


class _Body(msgspec.Struct):
    input: str | list[Item]
    instructions: str | None = None
    tools: list[Tool] | None = None
    stream: bool | None = False
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = False


_body = msgspec.json.Decoder(_Body)
_asked = msgspec.json.Decoder(_Asked)


class Responses:
    """Dialect `responses`."""

    name = "responses"

    def read(self, body: bytes, target: str) -> ModelCall:
        """A request body as a model call; RequestRefused (400) names the field."""
        request, asked = decode(_body, body), decode(_asked, body)
        for field in ("previous_response_id", "conversation", "background"):
            if getattr(request, field):
                raise RequestRefused(f"{field}: nothing is stored here; send the whole history", field)
        items = [Item(role="user", content=request.input)] if isinstance(request.input, str) else request.input
        if not items:
            raise RequestRefused("input: at least one item is needed", "input")
        head = [Message(role="system", content=request.instructions)] if request.instructions else []
        made, kinds = tools(request.tools or [])
        return ModelCall(
            dialect=self.name,
            messages=(*head, *messages(items)),
            tools=made or None,
            tool_kinds=kinds,
            tools_allowed=bool(made) and asked.tool_choice != "none",
            max_tokens=positive(asked.max_output_tokens, "max_output_tokens"),
            stream=bool(request.stream),
            model=asked.model,
            asked=encode(asked).decode(),
        )

    def reply(self, asked: ModelCall, reply: Reply) -> bytes:
        """A whole `response`."""
        output = [item for item in (_reasoning(reply), _message(reply)) if item is not None]
        output += [_call(asked, call) for call in reply.tool_calls]
        return encode(_response(asked, reply.turn_id, output, reply))

    def stream(self, asked: ModelCall, turn_id: str, prompt_tokens: int) -> ResponseStream:
        return ResponseStream(asked, turn_id)

    def counted(self, tokens: int) -> bytes:
        return encode({"object": "response.input_tokens", "input_tokens": tokens})

    def error(self, error: RequestRefused) -> bytes:
        return openai_error(error)


class ResponseStream:
    """One streamed answer: items one after the other, each added when its first piece is known."""

    alive = COMMENT

    def __init__(self, asked: ModelCall, turn_id: str) -> None:
        self._asked, self._turn_id = asked, turn_id
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open = ""
        self._text = ""

    def start(self) -> bytes:
        response = _response(self._asked, self._turn_id, [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def reasoning(self, delta: str) -> bytes:
        out = self._begin("reasoning")
        self._text += delta
        return out + self._piece("response.reasoning_text.delta", delta=delta)

    def text(self, delta: str) -> bytes:
        out = self._begin("message")
        self._text += delta
        return out + self._piece("response.output_text.delta", delta=delta, logprobs=[])

    def end(self, reply: Reply, shown: Shown) -> bytes:
        """What was not shown yet, tool calls whole, and the whole response."""
        out = self.reasoning(rest) if (rest := reply.reasoning[shown.reasoning :]) else b""
        rest = reply.content[shown.content :]
        if rest or not (reply.content or reply.tool_calls):
            out += self.text(rest)
        out += self._finish()
        for call in reply.tool_calls:
            out += self._called(call)
        response = _response(self._asked, self._turn_id, self._output, reply)
        return out + self._event(f"response.{response['status']}", response=response)

    def failed(self, error: RequestRefused) -> bytes:
        response = _response(self._asked, self._turn_id, self._output, None)
        # Agents try again after a failure of the server, and only then.
        code = error.code if error.status < 500 else "server_error"
        response |= {"status": "failed", "error": {"code": code, "message": str(error)}}
        return self._event("response.failed", response=response)

    def _begin(self, kind: str) -> bytes:
        if self._open == kind:
            return b""
        out = self._finish()
        self._open, self._text = kind, ""
        item = _item(kind, self._turn_id, "", "in_progress")
        out += self._event("response.output_item.added", output_index=len(self._output), item=item | {"content": []})
        if kind == "message":
            out += self._piece("response.content_part.added", part=_part(kind, ""))
        return out

    def _finish(self) -> bytes:
        if not self._open:
            return b""
        kind, text = self._open, self._text
        item = _item(kind, self._turn_id, text, "completed")
        if kind == "message":
            out = self._piece("response.output_text.done", text=text, logprobs=[])
            out += self._piece("response.content_part.done", part=_part(kind, text))
        else:
            out = self._piece("response.reasoning_text.done", text=text)
        out += self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._open = ""
        return out

    def _called(self, call: ToolCall) -> bytes:
        item, at = _call(self._asked, call), len(self._output)
        kind, field = (
            ("function_call_arguments", "arguments") if "arguments" in item else ("custom_tool_call_input", "input")
        )
        begun = item | {field: "", "status": "in_progress"}
        out = self._event("response.output_item.added", output_index=at, item=begun)
        about = {"item_id": item["id"], "output_index": at}
        out += self._event(f"response.{kind}.delta", **about, delta=item[field])
        out += self._event(f"response.{kind}.done", **about, name=item["name"], **{field: item[field]})
        self._output.append(item)
        return out + self._event("response.output_item.done", output_index=at, item=item)

    def _piece(self, name: str, /, **fields: Any) -> bytes:
        """An event about the one content part of the item that is open."""
        item_id = _item(self._open, self._turn_id, "", "")["id"]
        return self._event(name, item_id=item_id, output_index=len(self._output), content_index=0, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": name, "sequence_number": number, **fields}, name)


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(kind: str, turn_id: str, text: str, status: str) -> dict[str, Any]:
    """A message or a reasoning item."""
    item: dict[str, Any] = {"type": kind, "status": status, "content": [_part(kind, text)]}
    if kind == "reasoning":
        # Clients that keep no reasoning keep this: it stands for what the session remembers.
        return item | {"id": f"rs{turn_id}", "summary": [], "encrypted_content": turn_id}
    return item | {"id": f"msg{turn_id}", "role": "assistant"}


def _reasoning(reply: Reply) -> dict[str, Any] | None:
    return _item("reasoning", reply.turn_id, reply.reasoning, "completed") if reply.reasoning else None


def _message(reply: Reply) -> dict[str, Any] | None:
    needed = reply.content or not reply.tool_calls
    return _item("message", reply.turn_id, reply.content, "completed") if needed else None


def _call(asked: ModelCall, call: ToolCall) -> dict[str, Any]:
    """A call as the wire knows its tool. Free text for a custom tool; a policy that gave none gave its arguments."""
    kind = asked.tool_kinds.get(call.name, "")
    head = {"id": f"fc{call.id}", "status": "completed", "call_id": call.id, "name": call.name}
    if kind == CUSTOM:
        value = arguments_value(call.arguments)
        text = value["input"] if set(value) == {"input"} and isinstance(value["input"], str) else call.arguments
        return head | {"type": "custom_tool_call", "input": text}
    item = head | {"type": "function_call", "arguments": call.arguments}
    if kind.startswith(NAMESPACE):
        namespace = kind.removeprefix(NAMESPACE)
        item |= {"name": call.name.removeprefix(f"{namespace}__"), "namespace": namespace}
    return item


def _response(asked: ModelCall, turn_id: str, output: list[dict[str, Any]], reply: Reply | None) -> dict[str, Any]:
    cut = reply is not None and reply.finish_reason == "length"
    return {
        "id": f"resp{turn_id}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress" if reply is None else "incomplete" if cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "metadata": {},
        "model": asked.model,
        "output": output,
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "store": False,
        "usage": None if reply is None else _usage(reply),
    }


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.cached_tokens},
        "output_tokens": reply.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }
