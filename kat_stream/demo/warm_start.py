"""The warm start: a policy that copies well and works sloppily, trained from nothing on fresh demonstrations.

Owns the demo's starting checkpoint (`python -m kat_stream.demo.warm_start --out DIR`, a Hugging Face directory).
Invariant: only tasks of the training split are shown, each demonstration once; it takes at most four minutes on two
cores. Clean demonstrations come first, so that copying is learnt; the sloppy share comes last, so that what RL has to
remove is habit and not inability (why: research/demo.md, "Within 150 s RL moves T=1 towards the greedy rate").
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kat_stream.demo.demonstrations import Demonstration, clean, recovered, sloppy
from kat_stream.demo.tokenizer import ASSISTANT, CONTEXT_TOKENS, END, build_tokenizer
from kat_stream.env.mend.generator import MendTask, generate, stream

_VOCABULARY_TASKS = 3000


@dataclass(frozen=True)
class Recipe:
    """What the warm start does; the defaults are the committed checkpoint's."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    inner: int = 384
    steps: int = 1300
    batch: int = 32
    # Share of the steps that sees clean demonstrations only, and what follows it.
    clean_steps: float = 0.7
    sloppy_share: float = 0.48
    recovered_share: float = 0.12
    matrix_rate: float = 0.03
    other_rate: float = 6e-3
    # Weight of tokens that the agent did not write.
    context_weight: float = 0.1


def build_policy(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A small Qwen3 with an initialisation that lets attention copy early (measured: research/demo.md, INIT)."""
    end = end_id(tokenizer)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden // recipe.heads,
        intermediate_size=recipe.inner,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    policy = Qwen3ForCausalLM(config)
    for name, parameter in policy.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=initial_deviation(name, recipe.hidden))
    return policy


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of the token that ends a message, which also pads."""
    return int(tokenizer.get_vocab()[END])


def initial_deviation(name: str, hidden: int) -> float:
    if "embed" in name:
        return 0.1
    return 0.02 if "o_proj" in name or "down_proj" in name else hidden**-0.5


def demonstrations(recipe: Recipe, seed: int) -> Iterator[Demonstration]:
    """Fresh demonstrations, `steps * batch` of them: first clean and recovered, then mixed with sloppy ones."""
    rng = random.Random(f"demonstrations {seed}")
    total = recipe.steps * recipe.batch
    for number, task in zip(range(total), stream("train", seed), strict=False):
        sloppy_share = recipe.sloppy_share if number >= recipe.clean_steps * total else 0.0
        yield _one(task, rng, sloppy_share, recipe.recovered_share)


def _one(task: MendTask, rng: random.Random, sloppy_share: float, recovered_share: float) -> Demonstration:
    kind = rng.random()
    if kind < sloppy_share:
        return sloppy(task, rng)
    return recovered(task, rng) if kind > 1.0 - recovered_share else clean(task)


@dataclass(frozen=True)
class Example:
    """One encoded demonstration: ids and the weight of predicting each id, equally long."""

    ids: list[int]
    weights: list[float]


def encode(demonstration: Demonstration, tokenizer: PreTrainedTokenizerFast, context_weight: float) -> Example:
    """The conversation as the agent will see it, token by token; a slip weighs nothing."""
    text = tokenizer.apply_chat_template(demonstration.messages(), tokenize=False)
    return weigh(tokenizer.encode(text, add_special_tokens=False), demonstration, tokenizer, context_weight)


def weigh(
    ids: list[int], demonstration: Demonstration, tokenizer: PreTrainedTokenizerFast, context_weight: float
) -> Example:
    """A demonstration's ids: the agent's own tokens weigh 1, or nothing in a slip."""
    learnt = iter(turn.learn for turn in demonstration.turns)
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in (ASSISTANT, END))
    weights, weight = [], context_weight
    for token in ids:
        weights.append(weight)
        if token == begin:
            weight = 1.0 if next(learnt) else 0.0
        elif token == end:
            weight = context_weight
    return Example(ids, weights)


def batches(examples: list[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches of examples of like length in random order, within windows of 16 batches that keep the schedule."""
    window = 16 * size
    for start in range(0, len(examples), window):
        part = sorted(examples[start : start + window], key=lambda example: len(example.ids))
        groups = [part[i : i + size] for i in range(0, len(part), size)]
        rng.shuffle(groups)
        yield from groups


def batch_loss(policy: Qwen3ForCausalLM, batch: list[Example], pad: int) -> torch.Tensor:
    """Weighted mean of the next-token losses of one batch, right-padded (causal attention needs no mask)."""
    length = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), length), pad)
    weights = torch.zeros(len(batch), length)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.weights)
    wanted = weights[:, 1:] > 0
    hidden = policy.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    losses = F.cross_entropy(policy.lm_head(hidden[wanted]), ids[:, 1:][wanted], reduction="none")
    return (losses * weights[:, 1:][wanted]).sum() / weights[:, 1:].sum()


def optimizers(policy: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    named = list(policy.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Factor on the peak rate: 40 steps up, then a cosine to a twentieth."""
    if step < 40:
        return (step + 1) / 40
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 40) / (steps - 40)))


def vocabulary() -> Iterator[str]:
    """Texts that hold every piece of the demo's language, the same for every seed."""
    rng = random.Random("vocabulary")
    for task in generate("train", _VOCABULARY_TASKS):
        for demonstration in (clean(task), recovered(task, rng), sloppy(task, rng)):
            yield from (message["content"] for message in demonstration.messages())


def train(recipe: Recipe, seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train a policy from nothing."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary())
    policy = build_policy(recipe, tokenizer)
    examples = [encode(each, tokenizer, recipe.context_weight) for each in demonstrations(recipe, seed)]
    fit(policy, examples, recipe, seed, end_id(tokenizer))
    return policy.eval(), tokenizer


def fit(policy: Qwen3ForCausalLM, examples: list[Example], recipe: Recipe, seed: int, pad: int) -> None:
    """Show the policy each example once; prints a line every 100 steps."""
    steppers = optimizers(policy, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate(step, recipe.steps)) for o in steppers]
    progress = Progress(recipe.steps)
    for batch in batches(examples, recipe.batch, random.Random(f"order {seed}")):
        loss = batch_loss(policy, batch, pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for stepper, schedule in zip(steppers, schedules, strict=True):
            stepper.step()
            stepper.zero_grad(set_to_none=True)
            schedule.step()
        progress.report(loss.item(), sum(len(example.ids) for example in batch))


class Progress:
    """A line every 100 steps and at the end: step, mean loss since the last line, tokens a second, seconds."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._started = time.monotonic()
        self._losses: list[float] = []
        self._done = 0
        self._tokens = 0

    def report(self, loss: float, tokens: int) -> None:
        self._losses.append(loss)
        self._done += 1
        self._tokens += tokens
        if self._done % 100 == 0 or self._done == self._steps:
            seconds = time.monotonic() - self._started
            mean = sum(self._losses) / len(self._losses)
            rate = self._tokens / seconds
            line = f"step {self._done}/{self._steps} loss {mean:.3f} {rate:.0f} tok/s {seconds:.0f} s"
            _say(line)
            self._losses.clear()


def _say(line: str) -> None:
    sys.stdout.write(f"warm-start: {line}\n")
    sys.stdout.flush()


def save(policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the Hugging Face directory that AutoModelForCausalLM and AutoTokenizer load offline."""
    end = end_id(tokenizer)
    policy.generation_config = GenerationConfig(do_sample=True, temperature=1.0, eos_token_id=end, pad_token_id=end)
    policy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kat_stream.demo.warm_start", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the policy to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the demonstrations and of the weights")
    options = parser.parse_args(arguments)
    # A second thread gains a fifth on an idle machine and costs several times that beside other work (measured).
    torch.set_num_threads(1)
    policy, tokenizer = train(Recipe(), options.seed)
    save(policy, tokenizer, options.out)
    _say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
