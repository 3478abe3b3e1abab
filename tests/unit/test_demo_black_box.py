"""The demo's policy speaks through agents: phrases lose nothing, texts are the template's, a taught policy loads."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kat_stream.cli.main import main
from kat_stream.config import load
from kat_stream.demo.adaptation import RECIPE, adapt, conversation
from kat_stream.demo.demonstrations import clean, recovered, sloppy
from kat_stream.demo.recording import Prompt
from kat_stream.demo.tokenizer import teach_phrases
from kat_stream.demo.warm_start import save
from kat_stream.demo.wording import get_wording, settings_of, wording_names
from kat_stream.env.mend import generate
from kat_stream.gateway.parsers import hermes
from kat_stream.gateway.render import Renderer
from kat_stream.policy import load_tokenizer

PROMPT = Prompt(
    '<|system|>{"name": "t"}\n<|end|><|system|>You are an agent.\n\n**Don’t**\n\nAsk.<|end|><|user|>Please: ',
    "\n\nBe quick.<|end|><|assistant|>",
)
TRAIN = generate("train", 15)


def taught(name: str) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer("demo")
    teach_phrases(tokenizer, [*PROMPT.paragraphs(), *get_wording(name).phrases()])
    return tokenizer


TAUGHT = {name: taught(name) for name in wording_names()}


@pytest.mark.parametrize("name", wording_names())
def test_a_call_is_read_as_the_command_and_costs_two_tokens_beside_it(name: str) -> None:
    wording = get_wording(name)
    for command in (*(command for task in TRAIN for command in task.solution), 'sed -i "1i a" b', "echo 'a>b'\n\\"):
        rest, (call,) = hermes.parse(wording.call(command))
        assert (rest, call.name, json.loads(call.arguments)) == ("", wording.tool, {wording.argument: command})
    ids = [TAUGHT[name].encode(text, add_special_tokens=False) for text in (wording.call("ls"), "ls")]
    assert len(ids[0]) == len(ids[1]) + 2


@pytest.mark.parametrize("name", wording_names())
@given(text=st.text(max_size=40))
def test_phrases_lose_nothing(name: str, text: str) -> None:
    wording, tokenizer = get_wording(name), TAUGHT[name]
    whole = PROMPT.text(text) + wording.call(text) + wording.observation(text, 1, random.Random(0))
    assert tokenizer.decode(tokenizer.encode(whole, add_special_tokens=False)) == whole


@pytest.mark.parametrize("name", wording_names())
def test_a_head_encoded_alone_is_the_head_of_the_whole(name: str) -> None:
    tokenizer, rng = TAUGHT[name], random.Random(1)
    head = tokenizer.encode(PROMPT.head, add_special_tokens=False)
    for task in TRAIN:
        for each in (clean(task), recovered(task, rng), sloppy(task, rng)):
            text = conversation(each, PROMPT, get_wording(name), rng)
            whole = tokenizer.encode(PROMPT.head + text, add_special_tokens=False)
            assert whole == [*head, *tokenizer.encode(text, add_special_tokens=False)]


def test_a_conversation_is_what_the_gateway_renders() -> None:
    wording, task = get_wording("mini-swe-agent"), TRAIN[1]
    tools = [{"name": "t"}]
    messages = [{"role": "system", "content": "You are an agent."}, {"role": "user", "content": task.instruction}]
    for turn in clean(task).turns[:-1]:
        function = {"name": wording.tool, "arguments": {wording.argument: turn.command}}
        assert turn.printed is not None
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": function}]},  # type: ignore[dict-item]
            {"role": "tool", "content": wording.observation(*turn.printed, random.Random(0))},
        ]
    rendered = Renderer(TAUGHT["mini-swe-agent"]).text(messages, tools)
    head = '<|system|>{"name": "t"}\n<|end|><|system|>You are an agent.<|end|><|user|>'
    text = conversation(clean(task), Prompt(head, "<|end|><|assistant|>"), wording, random.Random(0))
    assert f"{head}{text}" == f"{rendered}{wording.finish}<|end|>"


def test_a_taught_policy_loads_keeps_old_ids_and_grows_by_the_phrases(tmp_path: Path) -> None:
    wording, shipped = get_wording("codex"), load_tokenizer("demo")
    policy, tokenizer = adapt(PROMPT, wording, replace(RECIPE, steps=2, batch=2), 0)
    save(policy, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    words = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert words.chat_template == tokenizer.chat_template and loaded.config.vocab_size == len(words) > len(shipped)
    assert {piece: words.get_vocab()[piece] for piece in shipped.get_vocab()} == shipped.get_vocab()
    ids = torch.tensor([words.encode(PROMPT.text("In a.py") + wording.call("ls"), add_special_tokens=False)])
    assert torch.equal(loaded(input_ids=ids).logits, policy(input_ids=ids).logits)


def test_each_agents_settings_are_read_and_another_scaffold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in wording_names():
        assert load(settings_of(name)).data.scaffold == name
    assert main(["demo", "--scaffold", "qwen-code"]) != 0
    assert "there are: shell, codex, mini-swe-agent" in capsys.readouterr().err
