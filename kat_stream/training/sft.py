"""Supervised fine-tuning on conversations: the same trees, the same learner, another loss.

Data is JSON lines of OpenAI messages: {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}. Every
assistant message is trained, in the context that the policy would have seen.
Invariant: what is trained as an agent's turn is exactly what the chat template adds for it; a conversation whose
template does not extend its own prefix is refused by line number, as is all else that is wrong with a line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np

from kat_stream.config import Config
from kat_stream.errors import DataError
from kat_stream.policy import load_tokenizer, model_dir
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.metrics import StepMetrics
from kat_stream.training.publication import Publication
from kat_stream.trees import TrainBatch, TurnTokens, make_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Conversation(msgspec.Struct, frozen=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def fine_tune(config: Config, report: Callable[[StepMetrics, int], None]) -> Publication:
    """Train as the section [sft] says and write the result; `report` gets each step and the number of steps."""
    section = config.sft
    tokenizer = load_tokenizer(config.policy.model)
    learner = TorchLearner(
        model_dir(config.policy.model),
        LearnerConfig(
            loss="sft",
            learning_rate=section.learning_rate,
            warmup_steps=section.warmup_steps,
            grad_clip=config.trainer.grad_clip,
            micro_batch_tokens=config.trainer.micro_batch_tokens,
        ),
    )
    positions = learner.max_positions
    data = [turns_of_line(line, number, tokenizer, positions) for number, line in lines_of(Path(section.data))]
    steps = list(_batches(len(data), section.batch, section.epochs, config.run.seed))
    for chosen in steps:
        batch = _batch([data[i] for i in chosen], config.trainer.micro_batch_tokens)
        report(learner.step(batch), len(steps))
    return learner.publish(Path(section.out))


def turns_of_line(line: bytes, number: int, tokenizer: PreTrainedTokenizerFast, positions: int) -> list[TurnTokens]:
    """The trained turns of one conversation, each a path of at most `positions` tokens; `DataError` names the line."""
    try:
        conversation = msgspec.json.decode(line, type=Conversation)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"line {number}: {error}") from error
    spoken = [i for i, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
    if not spoken:
        raise DataError(f"line {number}: no assistant message to learn from")
    if spoken[0] == 0:
        raise DataError(f"line {number}: it begins with an assistant message, which answers nothing")
    turns = [_turn(conversation, at, number, tokenizer) for at in spoken]
    longest = max(len(turn.prompt_ids) + len(turn.sampled_ids) for turn in turns)
    if longest > positions:
        raise DataError(f"line {number}: {longest} tokens, the model has {positions} positions")
    return turns


def _turn(conversation: Conversation, at: int, number: int, tokenizer: PreTrainedTokenizerFast) -> TurnTokens:
    try:
        prompt = _render(conversation, at, tokenizer, asking=True)
        whole = _render(conversation, at + 1, tokenizer, asking=False)
    except Exception as error:  # a chat template is a program of the model's author: it raises what it likes
        raise DataError(f"line {number}: chat template: {type(error).__name__}: {error}") from error
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise DataError(f"line {number}: the chat template does not extend the prompt by message {at + 1}")
    said = np.asarray(whole[len(prompt) :], np.int32)
    return TurnTokens(f"{number}-{at}", np.asarray(prompt, np.int32), said, np.zeros(len(said), np.float32))


def _render(conversation: Conversation, count: int, tokenizer: PreTrainedTokenizerFast, *, asking: bool) -> list[int]:
    tools = cast("Any", conversation.tools)
    text = tokenizer.apply_chat_template(
        conversation.messages[:count], tools=tools, tokenize=False, add_generation_prompt=asking
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1; `DataError` if the file cannot be read.

    A newline alone ends a line: a string of JSON may hold what Unicode calls the end of one.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"sft.data: {path} cannot be read ({error.strerror})") from error
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _batches(count: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    if not count:
        raise DataError("sft.data: no conversations")
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from (order[at : at + size] for at in range(0, count, size))


def _batch(conversations: Sequence[Sequence[TurnTokens]], budget: int) -> TrainBatch:
    turns = [turn for conversation in conversations for turn in conversation]
    owner = np.repeat(np.arange(len(conversations)), [len(conversation) for conversation in conversations])
    return make_batch(
        turns,
        rollout=owner,
        advantage=np.ones(len(turns)),
        weight=np.ones(len(turns)),
        rollout_ids=[conversation[0].turn_id for conversation in conversations],
        budget_tokens=budget,
    )
