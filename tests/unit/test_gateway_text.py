"""Replies as text: tool parsers, canonical comparison, what a stream may show, stop strings."""

from __future__ import annotations

import json
from copy import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat_stream.engines.client import Generation, Span
from kat_stream.errors import ConfigError, RequestRefused
from kat_stream.gateway.calls import without_stop
from kat_stream.gateway.dialects import ChatCompletions
from kat_stream.gateway.ids import joined, unpack, written
from kat_stream.gateway.messages import Message, ToolCall, chain
from kat_stream.gateway.render import Renderer
from kat_stream.gateway.sampling import Draft
from kat_stream.gateway.stream_text import StreamText
from kat_stream.gateway.template import Template
from kat_stream.gateway.tools import NONE, PARSERS, get_parser, read_reply
from tests.contract.gateway_kit import CHATML, THINKING, by_bytes, tokenizer
from topics import VersionSpan
from topics.record import pack_ints

HERMES = get_parser("hermes")
CALL = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'


def test_hermes_calls_are_taken_out_and_their_arguments_kept_as_written() -> None:
    text = 'I look.\n<tool_call>{"name":"a","arguments":{ "x" : 1}}</tool_call>\n' + CALL
    said = read_reply(HERMES, text, "ab12" * 8)
    content, calls = said.content, said.tool_calls
    assert (
        not said.ill_formed
        and content == "I look."
        and [(c.name, c.arguments) for c in calls]
        == [
            ("a", '{ "x" : 1}'),
            ("bash", '{"command": "ls"}'),
        ]
    )
    assert all(call.id.isalnum() for call in calls) and calls[0].id != calls[1].id


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        CALL[:-5],
        CALL + "<tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "a", "arguments": "text"}</tool_call>',
        CALL + "<tool_call>{broken}</tool_call>",
    ],
)
def test_what_does_not_parse_stays_text(text: str) -> None:
    assert HERMES.parse(text, None) == (text, [])
    assert read_reply(HERMES, text, "t").ill_formed == ("<tool_call>" in text)


def test_an_unknown_parser_is_named() -> None:
    with pytest.raises(ConfigError, match="auto, deepseek, glm, hermes"):
        get_parser("xml")


@given(st.text(max_size=40))
def test_parsers_never_fail(text: str) -> None:
    for parser in PARSERS.values():
        content, calls = parser.parse(text, None)
        assert calls or content == text


def _message(**fields: object) -> bytes:
    body = {"messages": [{"role": "assistant", **fields}]}
    return ChatCompletions().read(json.dumps(body).encode(), "").messages[0].canonical()


def test_an_echo_that_changes_nothing_is_equal() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": [2]}'}}
    same = {"id": "call1", "type": "function", "function": {"name": "f", "arguments": '{"b":[2],"a":1}'}}
    other = {"id": "call1", "type": "function", "function": {"name": "f", "arguments": '{"b":[2],"a":2}'}}
    assert _message(content=None, tool_calls=[call]) == _message(content="", tool_calls=[same])
    assert _message(content="x") == _message(content=[{"type": "text", "text": "x"}])
    assert _message(content="x") == _message(content="x", reasoning_content="hm", provider_specific_fields={"a": None})
    assert _message(content=None, tool_calls=[call]) != _message(content=None, tool_calls=[other])
    assert _message(content="x") != _message(content="x ")


def test_a_conversation_is_the_same_whatever_tools_there_are() -> None:
    plain = ChatCompletions().read(b'{"messages": [{"role": "user", "content": "x"}]}', "")
    tools = ChatCompletions().read(
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f"}}]}', ""
    )
    assert chain(plain) == chain(tools) and len(chain(plain)) == 2
    assert plain.tools_digest() != tools.tools_digest()


def test_arguments_that_are_no_json_are_compared_as_text() -> None:
    message = Message(role="assistant", tool_calls=(ToolCall("i", "f", "{broken"),))
    assert message.for_template()["tool_calls"][0]["function"]["arguments"] == "{broken"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tokenizer())


PIECES = (
    CALL,
    "a",
    "b ",
    "<tool_call>",
    "</tool_call>",
    "<",
    "to",
    "é",
    "😀",
    "\n",
    '{"name"',
    "<think>",
    "</think>",
    "</th",
)


@given(
    st.lists(st.sampled_from(PIECES), max_size=9).map("".join),
    st.sampled_from(sorted(PARSERS)),
    st.integers(1, 7),
    st.booleans(),
    st.booleans(),
)
def test_deltas_begin_the_final_reply(
    renderer: Renderer, text: str, name: str, step: int, thinks: bool, opened: bool
) -> None:
    ids, parser = by_bytes(text), PARSERS[name]
    shown = StreamText(renderer, parser, ("END",), thinks=thinks, opened=opened)
    deltas = [shown.feed(ids[:n]) for n in [*range(0, len(ids), step), len(ids)]]
    reasoning, content = ("".join(parts) for parts in zip(*deltas, strict=True))
    said = read_reply(parser, text, "t", thinks=thinks, opened=opened)
    assert said.content.startswith(content) and len(content) == shown.shown.content
    assert said.reasoning.startswith(reasoning) and len(reasoning) == shown.shown.reasoning


def test_text_is_shown_as_soon_as_it_is_certain(renderer: Renderer) -> None:
    shown = StreamText(renderer, NONE, ("END",))
    assert [shown.feed(by_bytes(text, end=False))[1] for text in ("ab", "abE", "abEN", "abENc", "abENcEND")] == [
        "ab",
        "",
        "",
        "ENc",
        "",
    ]


def test_a_template_without_assistants_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="does not show what an assistant says"):
        Renderer(tokenizer("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"))


def test_a_template_that_refuses_is_told_to_the_agent() -> None:
    refuse = "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    strict = "{% for m in messages %}" + refuse + "{{ m.content }}{% endfor %}"
    with pytest.raises(RequestRefused, match="no tools"):
        Renderer(tokenizer(strict)).text([{"role": "tool", "content": "x"}], None)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=st.text(max_size=9),
    reasoning=st.text(max_size=5),
    tool_calls=st.lists(
        st.builds(ToolCall, st.just("i"), st.just("f"), st.dictionaries(st.text(max_size=5), VALUES).map(json.dumps)),
        max_size=2,
    ).map(tuple),
)
# Reads reasoning by both of its names, and what a message does not have.
OTHER = THINKING.replace("{{ m.role }}", "{{ m.role }}{{ m.thinking }}{{ m.missing }}{{ bos_token }}{{ documents }}")


@settings(max_examples=50)
@given(st.lists(MESSAGES, min_size=1, max_size=4), st.lists(st.dictionaries(st.text(max_size=5), VALUES), max_size=2))
def test_the_template_writes_what_transformers_would(messages: list[Message], tools: list[dict[str, Any]]) -> None:
    shown = [message.for_template() for message in messages]
    for source in (CHATML, OTHER):
        made = tokenizer(source)
        wanted = made.apply_chat_template(shown, tools=tools or None, tokenize=False, add_generation_prompt=True)
        template = Template(made)
        assert template.direct and template.text(shown, tools, ask=True) == wanted


def test_a_choice_of_templates_is_left_to_transformers() -> None:
    made = copy(tokenizer())
    made.chat_template = {"default": CHATML, "tool_use": THINKING}
    template, thought = Template(made), [Message(role="assistant", reasoning="hm").for_template()]
    assert not template.direct
    assert "hm" not in template.text(thought, None, ask=True) and "hm" in template.text(thought, [{}], ask=True)


@given(st.lists(st.integers(0, 2**31 - 1)), st.lists(st.integers(0, 2**31 - 1)))
def test_ids_as_an_engine_reads_them(known: list[int], new: list[int]) -> None:
    assert json.loads(b"[" + joined(written(known), written(unpack(pack_ints(new)))) + b"]") == known + new


def test_a_stop_string_stays_in_the_ids_and_leaves_the_text() -> None:
    draft = Draft()
    draft.close_part(
        0,
        Generation(
            output_ids=[1, 2], logprobs=[-1.0, -2.0], finish_reason="stop", matched="END", cached_tokens=0,
            prompt_tokens=3, spans=[Span("v", 0, 2)], seconds=0.1,
        ),
    )  # fmt: skip
    assert without_stop("ls\nEND", draft) == "ls\n" and draft.ids == [1, 2]
    assert without_stop("ls", Draft()) == "ls"


@pytest.mark.parametrize(("text", "stop", "kept"), [("x\n\n", "\n", "x"), ("a END b END", "END", "a ")])
def test_the_text_ends_before_the_first_stop_string(text: str, stop: str, kept: str) -> None:
    """The token that makes it whole may hold it twice, and engines look for the first."""
    assert without_stop(text, Draft(matched_stop=stop)) == kept


@pytest.mark.parametrize("end", [1, 3, 4, 5])
def test_a_draft_that_ends_at_a_stop_string_loses_all_behind_it(end: int) -> None:
    draft = Draft(
        ids=[1, 2, 3, 4, 5],
        logprobs=[-1.0, -2.0, -3.0, -4.0, -5.0],
        spans=[VersionSpan("v1", 0, 3), VersionSpan("v2", 3, 5)],
        routed=bytes(range(14)),
        routed_rows=7,
    )
    draft.stop_at(end, "END")
    assert draft.ids == [1, 2, 3, 4, 5][:end] and draft.logprobs == [-1.0, -2.0, -3.0, -4.0, -5.0][:end]
    assert [(span.start, span.end) for span in draft.spans] == ([(0, min(end, 3))] + [(3, end)] * (end > 3))
    assert draft.routing(7 - (5 - end)) == bytes(range(14))[: 2 * (7 - (5 - end))]
    assert (draft.finish_reason, draft.matched_stop) == ("stop", "END")


def test_parts_of_one_turn_are_put_together() -> None:
    def part(version: str, ids: list[int]) -> Generation:
        return Generation(
            output_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="abort", matched=None, cached_tokens=1,
            prompt_tokens=3, spans=[Span(version, 0, len(ids))] if ids else [], seconds=0.5,
        )  # fmt: skip

    draft = Draft()
    for version, ids in (("v1", [1, 2]), ("v1", [3]), ("v2", []), ("v2", [4, 5])):
        draft.close_part(len(draft.ids), part(version, ids))
    assert draft.ids == [1, 2, 3, 4, 5] and len(draft.logprobs) == 5 and draft.seconds == 2.0
    assert draft.spans == [VersionSpan("v1", 0, 3), VersionSpan("v2", 3, 5)] and draft.cover()
    draft.ids.append(6)
    assert not draft.cover() and draft.spans[-1] == VersionSpan("", 5, 6)
