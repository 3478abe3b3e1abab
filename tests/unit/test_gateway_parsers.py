"""Each family's way of writing tool calls, reasoning, and the proof that prompts are the template's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.cli.main import main
from kat_stream.gateway.parsers.reasoning import opened_by, split
from kat_stream.gateway.shape import PROBES, ROLES, Shape
from kat_stream.gateway.tools import PARSERS, family, get_parser, read_reply
from kat_stream.gateway.verify import verify
from tests.contract.gateway_kit import CHATML, FORGETFUL, OWN_IDS, THINKING, tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}, "n": {"type": "integer"}}},
        },
    }
]
DS = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
DS_CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
KIMI = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
KIMI_CALL = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
CODER = (
    "<tool_call>\n<function=bash>\n<parameter=command>\n{}\n</parameter>\n<parameter=n>\n{}\n</parameter>\n"
    "</function>\n</tool_call>"
)
GLM = (
    "<tool_call>bash\n<arg_key>command</arg_key>\n<arg_value>{}</arg_value>\n"
    "<arg_key>n</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", 'a\n<tool_call>\n{"name": "bash", "arguments": {"n":  1}}\n</tool_call>', "a", ['{"n":  1}']),
        ("qwen3-coder", "a\n\n" + CODER.format("1", "2"), "a", ['{"command":"1","n":2}']),
        ("qwen3-coder", CODER.format("x\ny", "no") + "\n" + CODER.format("", "[1]"), "", [
            '{"command":"x\\ny","n":"no"}', '{"command":"","n":[1]}',
        ]),
        ("glm", "a" + GLM.format("true", "3"), "a", ['{"command":"true","n":3}']),
        ("glm", "<tool_call>bash</tool_call>", "", ["{}"]),
        ("llama3", '{"name": "bash", "parameters": {"n": 1}}', "", ['{"n": 1}']),
        ("llama3", '<|python_tag|>{"type": "function", "name": "bash", "parameters": {}}', "", ["{}"]),
        ("deepseek", "a\n" + DS.format(DS_CALL.format("function", 'bash\n```json\n{"n": 1}\n```')), "a", ['{"n": 1}']),
        ("deepseek", DS.format(DS_CALL.format("bash", '{"n": 1}') * 2), "", ['{"n": 1}', '{"n": 1}']),
        ("kimi", "a" + KIMI.format(KIMI_CALL.format("functions.bash:0", '{"n": 1}')), "a", ['{"n": 1}']),
    ],
)  # fmt: skip
def test_calls_as_each_family_writes_them(name: str, text: str, content: str, calls: list[str]) -> None:
    said, written = get_parser(name).parse(text, TOOLS)
    assert (said, [call[:2] for call in written]) == (content, [("bash", arguments) for arguments in calls])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3-coder", CODER.format("1", "2")[:-12]),
        ("qwen3-coder", CODER.format("1", "2").replace("</parameter>", "")),
        ("glm", GLM.format("1", "2").replace("<arg_value>", "")),
        ("glm", GLM.format("1", "2").replace("<arg_value>", "<arg_va>", 1)),
        ("llama3", 'so: {"name": "bash", "parameters": {}}'),
        ("llama3", '{"name": "bash", "parameters": []}'),
        ("llama3", '{"name": "bash", "parameters": {}} and more'),
        ("deepseek", DS.format(DS_CALL.format("bash", "{broken"))),
        ("deepseek", DS.format("words")),
        ("deepseek", DS.format(DS_CALL.format("bash", "{}")) + "after"),
        ("kimi", KIMI.format(KIMI_CALL.format("bash", "{}"))),
        ("kimi", KIMI.format(KIMI_CALL.format("functions.bash:0", "7"))),
    ],
)
def test_what_is_no_call_stays_text_and_is_flagged(name: str, text: str) -> None:
    said = read_reply(get_parser(name), text, "t", tools=TOOLS)
    assert (said.content, said.tool_calls) == (text, ())
    assert said.ill_formed == (not text.startswith("so:"))


@given(st.dictionaries(st.sampled_from(["command", "n"]), st.one_of(st.text(max_size=9), st.integers())))
def test_json_families_keep_arguments_byte_for_byte(value: dict[str, str | int]) -> None:
    written = json.dumps(value, ensure_ascii=False)
    texts = {
        "hermes": '<tool_call>{"name": "bash", "arguments": ' + written + "}</tool_call>",
        "llama3": '{"name": "bash", "parameters": ' + written + "}",
        "kimi": KIMI.format(KIMI_CALL.format("functions.bash:0", written)),
        "deepseek": DS.format(DS_CALL.format("bash", written)),
    }
    for name, text in texts.items():
        content, (call,) = PARSERS[name].parse(text, TOOLS)
        assert (content, call.name, call.arguments) == ("", "bash", written), name


@pytest.mark.parametrize(
    ("name", "around", "unit"),
    [
        ("hermes", "<tool_call>{}", "\n"),
        ("hermes", "{}", "<tool_call>"),
        ("glm", "<tool_call>bash{}", "\n"),
        ("glm", "{}", "<tool_call>a"),
        ("glm", "<tool_call>a{}</tool_call>", "<arg_key>k</arg_key><arg_value>"),
        ("glm", "<tool_call>a{}</tool_call>", "<arg_key>k</arg_key>\n"),
        ("qwen3-coder", "<tool_call>{}", "\n"),
        ("qwen3-coder", "{}", "<tool_call><function=a>"),
        ("qwen3-coder", "<tool_call><function=a>{}", "</function>\n"),
        ("qwen3-coder", "<tool_call><function=a>{}</function></tool_call>", "<parameter=a>\n"),
        ("deepseek", DS, "<｜tool▁call▁begin｜>"),
        ("deepseek", DS, "<｜tool▁call▁begin｜>a<｜tool▁sep｜>"),
        ("kimi", KIMI, "<|tool_call_begin|>a"),
        ("kimi", KIMI, "<|tool_call_begin|>a<|tool_call_argument_begin|>"),
    ],
)
def test_a_reply_that_runs_away_is_read_in_passing(name: str, around: str, unit: str) -> None:
    """The parser runs on the loop that serves all sessions: where its work grows with the square, this never ends."""
    text = around.format(unit * (5_000_000 // len(unit)))
    assert get_parser(name).parse(text, TOOLS) == (text, [])


@pytest.mark.parametrize("number", ["1e999", "-1e400"])
def test_arguments_that_nobody_can_decode_are_no_call(number: str) -> None:
    text = '<tool_call>{"name": "bash", "arguments": {"n": ' + number + "}}</tool_call>"
    said = read_reply(get_parser("hermes"), text, "t", tools=TOOLS)
    assert (said.content, said.tool_calls, said.ill_formed) == (text, (), True)


def test_reasoning_begins_a_reply_or_is_none() -> None:
    assert split("<think>\nhm\n</think>\n\nls", opened=False) == ("hm", "ls", True)
    assert split("hm\n</think>\nls</think>", opened=True) == ("hm", "ls</think>", True)
    assert split("a <think>b</think>", opened=False) == ("", "a <think>b</think>", True)
    assert split("<think>never closed", opened=False) == ("never closed", "", False)
    assert opened_by("<|im_start|>assistant\n<think>\n") and not opened_by("<think>\n\n</think>\n\n")
    said = read_reply(get_parser("hermes"), '<think>x <tool_call>{"name": "a"}</tool_call>', "t", thinks=True)
    assert said.reasoning and not said.tool_calls and said.ill_formed


def test_the_template_says_whose_calls_they_are() -> None:
    assert family(CHATML) == "hermes" and family("<tool_call><function=x>") == "qwen3-coder"
    assert family("{{ messages }}") == "none"


def test_shapes_lose_no_text() -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    for roles in PROBES:
        messages = [{"role": names[role], "content": f"t{i}"} for i, role in enumerate(roles)]
        assert ROLES[0].fit(messages) == messages
        for shape in ROLES[1:]:
            fitted = shape.fit(messages)
            assert "".join(m["content"] for m in fitted).replace("\n\n", "") == "".join(m["content"] for m in messages)
            assert [m["role"] for m in fitted].count("system") == roles.startswith("s")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    assert Shape(text_arguments=True).fit([call])[0]["tool_calls"][0]["function"]["arguments"] == '{"a":1}'


STRICT = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('first only') }}{% endif %}"
    "{% if not loop.first and m.role == 'user' and messages[loop.index0 - 1].role == 'user' %}"
    "{{ raise_exception('alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# As Qwen3: what was thought is shown behind the place where a user spoke last.
SINCE_ASKED = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
) + THINKING.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.index0 > ns.asked %}")
# Writes a message by how many stand before it: nothing can be told from a shortened history.
COUNTING = CHATML.replace("{{ m.content }}", "{% if m.role == 'tool' %}{{ loop.index0 }}: {% endif %}{{ m.content }}")


@pytest.mark.parametrize("template", [CHATML, THINKING, FORGETFUL, STRICT, SINCE_ASKED, COUNTING, OWN_IDS])
def test_prompts_are_what_the_template_would_write(template: str) -> None:
    report = verify(tokenizer(template), conversations=60)
    assert report.wrong == [] and report.unwritable == 0
    assert (report.shortened == 0) == (template == COUNTING)
    assert report.turns > 150 and report.extended > (0 if template == FORGETFUL else 100)
    assert report.calls > 50 or template == STRICT


def test_the_proof_as_a_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["gateway", "verify", "demo", "--conversations", "20"]) == 0
    assert "differences" in capsys.readouterr().out
    assert main(["gateway", "verify", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


# The template takes a call apart from its brackets: the parser of its family cannot read it.
CROOKED = CHATML.replace("\\n</tool_call>'", "'").replace("\n</tool_call>", "")


def test_a_template_whose_calls_cannot_be_read_back_is_found_out() -> None:
    report = verify(tokenizer(CROOKED), conversations=20)
    assert report.wrong and "are not read back" in report.wrong[0]
