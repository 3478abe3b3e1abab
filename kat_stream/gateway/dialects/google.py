"""Google generateContent, streamGenerateContent, countTokens, as Gemini CLI and google-genai speak it.

Invariant: see dialects/base.py. Model and streaming stand in the path. Calls may come without ids: a result then is
that of the oldest call of its name without one. A field counts in camel case and by its own name, as JSON of protocol
buffers has both, whichever a client mixes; what is inside arguments and schemas is the policy's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import msgspec

from kat_stream.errors import ContextOverflow, RequestRefused
from kat_stream.gateway.dialects.base import (
    arguments_value,
    as_written,
    decode,
    encode,
    event,
    function_tool,
    only_text,
    positive,
    stop_strings,
)
from kat_stream.gateway.messages import Message, ModelCall, Reply, ToolCall, join_text
from kat_stream.gateway.stream_text import Shown

_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}


def _by_both_names[S: msgspec.Struct](kind: type[S]) -> type[S]:
    """The struct, which also takes each field that it has in camel case by the field's own name."""
    own = {f"own_{f.name}": f for f in msgspec.structs.fields(kind) if f.name != f.encode_name}

    def settle(made: S) -> None:
        for name, field in own.items():
            if (value := getattr(made, name)) is not None:
                setattr(made, field.name, value)
                setattr(made, name, None)

    both = msgspec.defstruct(
        kind.__name__,
        [(name, field.type | None, None) for name, field in own.items()],
        bases=(kind,),
        namespace={"__post_init__": settle},
        module=kind.__module__,
        rename={name: field.name for name, field in own.items()},
        omit_defaults=True,
    )
    return cast(type[S], both)


class _FunctionCall(msgspec.Struct):
    name: str
    args: msgspec.Raw = msgspec.Raw(b"{}")
    id: str | None = None


class _FunctionResponse(msgspec.Struct):
    name: str
    response: Any = None
    id: str | None = None


@_by_both_names
class _Part(msgspec.Struct, rename="camel"):
    text: str | None = None
    thought: bool | None = None
    function_call: _FunctionCall | None = None
    function_response: _FunctionResponse | None = None
    inline_data: Any = None
    file_data: Any = None


class _Content(msgspec.Struct):
    parts: list[_Part] = []
    role: Literal["user", "model", "function", "tool", "system"] = "user"


@_by_both_names
class _Declaration(msgspec.Struct, rename="camel"):
    name: str
    description: str | None = None
    parameters: Any = None
    parameters_json_schema: Any = None


@_by_both_names
class _Tool(msgspec.Struct, rename="camel"):
    # Tools that run at the provider (search, code execution) have other keys: the policy does not see them.
    function_declarations: list[_Declaration] = []


@_by_both_names
class _Generation(msgspec.Struct, rename="camel", omit_defaults=True):
    """Fields that are recorded as asked for."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: float | None = None
    max_output_tokens: int | None = None
    stop_sequences: list[str] | None = None
    candidate_count: int | None = None
    thinking_config: Any = None
    response_mime_type: str | None = None


@_by_both_names
class _Body(msgspec.Struct, rename="camel"):
    contents: list[_Content]
    system_instruction: _Content | None = None
    tools: list[_Tool] | None = None
    tool_config: Any = None
    generation_config: _Generation | None = None


@_by_both_names
class _Wrapped(msgspec.Struct, rename="camel"):
    """A question for tokens may hold a whole request."""

    generate_content_request: _Body | None = None


_body = msgspec.json.Decoder(_Body)
_wrapped = msgspec.json.Decoder(_Wrapped)


class GenerateContent:
    """Dialect `google`."""

    name = "google"

    def read(self, body: bytes, target: str) -> ModelCall:
        """A request body as a model call; RequestRefused (400) names the field."""
        model, _, action = target.rpartition("/")[2].rpartition(":")
        wrapped = decode(_wrapped, body).generate_content_request if action == "countTokens" else None
        request = wrapped or decode(_body, body)
        if not request.contents:
            raise RequestRefused("contents: at least one content is needed", "contents")
        asked = request.generation_config or _Generation()
        if asked.candidate_count not in (None, 1):
            raise RequestRefused("generationConfig.candidateCount: only one candidate a request", "candidateCount")
        declared = [declaration for tool in request.tools or () for declaration in tool.function_declarations]
        return ModelCall(
            dialect=self.name,
            messages=tuple(_messages(request)),
            tools=[_tool(declaration) for declaration in declared] or None,
            tools_allowed=bool(declared) and not _forbidden(request.tool_config),
            max_tokens=positive(asked.max_output_tokens, "generationConfig.maxOutputTokens"),
            stop=stop_strings(asked.stop_sequences, "generationConfig.stopSequences"),
            stream=action == "streamGenerateContent",
            model=model,
            asked=encode({"model": model} | msgspec.to_builtins(asked)).decode(),
        )

    def reply(self, asked: ModelCall, reply: Reply) -> bytes:
        """A whole GenerateContentResponse."""
        return encode(_answer(asked, reply.turn_id, _parts(reply, Shown()), reply))

    def stream(self, asked: ModelCall, turn_id: str, prompt_tokens: int) -> GoogleStream:
        return GoogleStream(asked, turn_id)

    def counted(self, tokens: int) -> bytes:
        return encode({"totalTokens": tokens})

    def error(self, error: RequestRefused) -> bytes:
        """An error in Google's shape and, for a full context, in Google's words."""
        message = str(error)
        if isinstance(error, ContextOverflow):
            message = (
                f"The input token count ({error.tokens}) exceeds the maximum number of tokens allowed ({error.limit})."
            )
        status = _STATUS.get(error.status, "INVALID_ARGUMENT" if error.status < 500 else "INTERNAL")
        return encode({"error": {"code": error.status, "message": message, "status": status}})


class GoogleStream:
    """One streamed answer: whole responses, each with the parts that are new."""

    alive = b"\n\n"
    """No comment: google-genai takes every line that is neither empty nor data for the JSON of an error."""

    def __init__(self, asked: ModelCall, turn_id: str) -> None:
        self._asked, self._turn_id = asked, turn_id

    def start(self) -> bytes:
        return b""

    def reasoning(self, delta: str) -> bytes:
        return event(_answer(self._asked, self._turn_id, [{"text": delta, "thought": True}], None))

    def text(self, delta: str) -> bytes:
        return event(_answer(self._asked, self._turn_id, [{"text": delta}], None))

    def end(self, reply: Reply, shown: Shown) -> bytes:
        """What was not shown yet, tool calls, finish reason, usage."""
        return event(_answer(self._asked, self._turn_id, _parts(reply, shown), reply))

    def failed(self, error: RequestRefused) -> bytes:
        return b"data: " + GenerateContent().error(error) + b"\n\n"


def _messages(request: _Body) -> Iterator[Message]:
    if request.system_instruction is not None:
        parts = request.system_instruction.parts
        texts = [_text(part, f"systemInstruction.parts[{i}]") for i, part in enumerate(parts)]
        yield Message(role="system", content=join_text(texts, "system"))
    waiting: list[ToolCall] = []
    for i, content in enumerate(request.contents):
        if content.role == "model":
            message = _assistant(content, i)
            waiting = list(message.tool_calls)
            yield message
        else:
            yield from _user(content, i, waiting)


def _assistant(content: _Content, index: int) -> Message:
    texts, thoughts, calls = [], [], []
    for i, part in enumerate(content.parts):
        if (call := part.function_call) is not None:
            calls.append(ToolCall(call.id or f"call{index}x{i}", call.name, as_written(call.args)))
        elif part.thought:
            thoughts.append(part.text or "")
        else:
            texts.append(_text(part, f"contents[{index}].parts[{i}]"))
    text = join_text(texts, "assistant")
    return Message(role="assistant", content=text, tool_calls=tuple(calls), reasoning="".join(thoughts))


def _user(content: _Content, index: int, waiting: list[ToolCall]) -> Iterator[Message]:
    texts: list[str] = []
    for i, part in enumerate(content.parts):
        if (result := part.function_response) is None:
            texts.append(_text(part, f"contents[{index}].parts[{i}]"))
            continue
        if texts:
            yield Message(role="user", content=join_text(texts, "user"))
            texts = []
        yield Message(role="tool", content=_result(result), tool_call_id=_answered(result, waiting), name=result.name)
    if texts or not content.parts:
        yield Message(role="system" if content.role == "system" else "user", content=join_text(texts, "user"))


def _answered(result: _FunctionResponse, waiting: list[ToolCall]) -> str:
    """The id of the call that this is the result of."""
    if result.id:
        return result.id
    call = next((call for call in waiting if call.name == result.name), None)
    if call is None:
        return ""
    waiting.remove(call)
    return call.id


def _result(result: _FunctionResponse) -> str:
    value = result.response
    if isinstance(value, dict) and len(value) == 1 and isinstance(text := next(iter(value.values())), str):
        return text
    return encode(value).decode()


def _text(part: _Part, where: str) -> str:
    for kind, data in (("inlineData", part.inline_data), ("fileData", part.file_data)):
        if data is not None:
            raise only_text(kind, where)
    if part.text is None:
        raise RequestRefused(f"{where}: no text here, and no call or result of a function", where)
    return part.text


def _tool(declaration: _Declaration) -> dict[str, Any]:
    schema = declaration.parameters_json_schema or declaration.parameters
    return function_tool(declaration.name, declaration.description, _lower(schema))


def _lower(schema: Any) -> Any:
    """Google writes the types of JSON schema in capitals."""
    if isinstance(schema, list):
        return [_lower(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: v.lower() if k == "type" and isinstance(v, str) else _lower(v) for k, v in schema.items()}


def _forbidden(config: Any) -> bool:
    if not isinstance(config, dict):
        return False
    calling = config.get("functionCallingConfig", config.get("function_calling_config"))
    return isinstance(calling, dict) and calling.get("mode") == "NONE"


def _parts(reply: Reply, shown: Shown) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if rest := reply.reasoning[shown.reasoning :]:
        parts.append({"text": rest, "thought": True})
    rest = reply.content[shown.content :]
    if rest or not (reply.content or reply.tool_calls):
        parts.append({"text": rest})
    return parts + [
        {"functionCall": {"id": call.id, "name": call.name, "args": arguments_value(call.arguments)}}
        for call in reply.tool_calls
    ]


def _answer(asked: ModelCall, turn_id: str, parts: list[dict[str, Any]], reply: Reply | None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": parts}, "index": 0}
    answer: dict[str, Any] = {"candidates": [candidate], "modelVersion": asked.model, "responseId": turn_id}
    if reply is not None:
        candidate["finishReason"] = "MAX_TOKENS" if reply.finish_reason == "length" else "STOP"
        answer["usageMetadata"] = {
            "promptTokenCount": reply.prompt_tokens,
            "candidatesTokenCount": reply.completion_tokens,
            "totalTokenCount": reply.prompt_tokens + reply.completion_tokens,
            "cachedContentTokenCount": reply.cached_tokens,
        }
    return answer
