"""The warm start: claimed outputs are real, tokens are lossless, the committed policy can copy and is sloppy."""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import kat_stream.demo
from kat_stream.demo import warm_start
from kat_stream.demo.demonstrations import Demonstration, clean, recovered, sloppy
from kat_stream.demo.tokenizer import ASSISTANT, END, build_tokenizer
from kat_stream.demo.warm_start import Recipe, encode
from kat_stream.env.mend import MendTask, generate
from kat_stream.env.mend.harbor import write_files
from kat_stream.env.mend.words import NAMES

POLICY = Path(kat_stream.demo.__file__).parent / "policy"
TOKENIZER = build_tokenizer(warm_start.vocabulary())
TRAIN = generate("train", 45)
SMALL = Recipe(hidden=32, heads=2, layers=1, inner=32, steps=3, batch=4)


def every_kind(task: MendTask) -> list[Demonstration]:
    rng = random.Random(task.task_id)
    return [clean(task), recovered(task, rng), *(sloppy(task, rng) for _ in range(4))]


def ids_of(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("task", TRAIN[:30], ids=lambda task: task.template)
def test_predicted_outputs_are_what_the_commands_print(task: MendTask, tmp_path: Path) -> None:
    for number, demonstration in enumerate(every_kind(task)):
        tree = tmp_path / str(number)
        write_files(tree, task.files)
        for turn in demonstration.turns[:-1]:
            done = subprocess.run(
                ["sh", "-c", turn.command],
                cwd=tree,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=60,
            )
            assert (done.stdout.decode(), done.returncode) == turn.printed, (task.template, turn.command)


@pytest.mark.parametrize("task", TRAIN[:15], ids=lambda task: task.template)
def test_clean_demonstrations_mend_and_faults_do_not(task: MendTask, tmp_path: Path) -> None:
    rng = random.Random(7)
    # A demonstration that never submits has mended the tree; the reward asks for both.
    candidates = [sloppy(task, rng) for _ in range(8)]
    wrong = [each for each in candidates if each.turns[-1].command == "submit"]
    assert wrong
    for number, (demonstration, mended) in enumerate([(clean(task), True), *((each, False) for each in wrong)]):
        tree = tmp_path / str(number)
        write_files(tree, task.files)
        for turn in demonstration.turns[:-1]:
            subprocess.run(["sh", "-c", turn.command], cwd=tree, capture_output=True, timeout=60)
        checked = subprocess.run(["sh", "-c", task.check], cwd=tree, capture_output=True, timeout=60)
        assert (checked.returncode == 0) is mended, demonstration.turns


@given(st.text(max_size=60))
def test_tokens_lose_nothing(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_a_name_is_one_token_whatever_stands_around_it() -> None:
    for name in NAMES:
        (alone,) = TOKENIZER(name, add_special_tokens=False)["input_ids"]
        for text in (f"mv {name}.py x", f"s/{name}/", f'"{name}":', f"In {name}.ini, set"):
            assert alone in TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("task", TRAIN[:15], ids=lambda task: task.template)
def test_a_longer_conversation_extends_the_ids_of_the_shorter(task: MendTask) -> None:
    for demonstration in every_kind(task):
        messages = demonstration.messages()
        whole = ids_of(TOKENIZER, messages, prompt=False)
        for cut in range(2, len(messages), 2):
            shorter = ids_of(TOKENIZER, messages[:cut], prompt=True)
            assert whole[: len(shorter)] == shorter


def test_only_the_agents_tokens_are_learnt_in_full_and_slips_not_at_all() -> None:
    demonstration = recovered(TRAIN[0], random.Random(1))
    example = encode(demonstration, TOKENIZER, context_weight=0.1)
    begin, end = TOKENIZER.convert_tokens_to_ids(ASSISTANT), TOKENIZER.convert_tokens_to_ids(END)
    spans = []
    for start in (i for i, token in enumerate(example.ids) if token == begin):
        stop = example.ids.index(end, start)
        spans.append((TOKENIZER.decode(example.ids[start + 1 : stop]), set(example.weights[start + 1 : stop + 1])))
    slip, *rest = demonstration.turns
    assert spans == [(slip.command, {0.0}), *((turn.command, {1.0}) for turn in rest)]
    assert set(example.weights) == {0.0, 0.1, 1.0}


def test_held_out_solutions_are_never_shown() -> None:
    shown = {each.task.solution for each in warm_start.demonstrations(replace(SMALL, steps=500), seed=0)}
    assert not shown & {task.solution for task in generate("held-out", 480)}


def test_the_same_seed_gives_the_same_policy_and_it_loads_offline(tmp_path: Path) -> None:
    first, tokenizer = warm_start.train(SMALL, seed=5)
    second, _ = warm_start.train(SMALL, seed=5)
    warm_start.save(first, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    ids = torch.tensor([ids_of(tokenizer, clean(TRAIN[0]).messages(), prompt=False)])
    assert torch.equal(loaded(input_ids=ids).logits, first(input_ids=ids).logits)
    assert torch.allclose(first(input_ids=ids).logits, second(input_ids=ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id


def likely(task: MendTask, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[bool, float]:
    """Of a task's clean solution: whether every name in it is the most likely token, and its probability at T=1."""
    example = encode(clean(task), tokenizer, context_weight=0.0)
    ids, own = torch.tensor(example.ids), torch.tensor(example.weights)[1:] > 0
    names = own & torch.tensor([tokenizer.decode([token]) in NAMES for token in example.ids[1:]])
    with torch.no_grad():
        logs = policy(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    probability = float(logs.gather(1, ids[1:, None])[:, 0][own].sum().exp())
    return bool((logs.argmax(-1) == ids[1:])[names].all()), probability


def test_the_committed_policy_copies_well_and_works_sloppily() -> None:
    policy = AutoModelForCausalLM.from_pretrained(POLICY, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(POLICY, local_files_only=True)
    tasks = generate("held-out", 300)
    seen: dict[str, list[tuple[bool, float]]] = {}
    for task in tasks:
        seen.setdefault(task.template, []).append(likely(task, policy, tokenizer))
    copied = {template: sum(each for each, _ in pairs) / len(pairs) for template, pairs in seen.items()}
    assert min(copied.values()) >= 0.85 and sum(copied.values()) / len(copied) >= 0.95, copied
    assert 0.3 <= sum(p for pairs in seen.values() for _, p in pairs) / len(tasks) <= 0.45
