"""The shipped policy taught another agent's language: its prompt, its tool calls, its way to end.

Owns the starting checkpoint of the demo with a black-box agent. Invariant: what it is taught is, token for token, what
the gateway will render for that agent; only tasks of the training split are shown. The agent's prompt stays as it is,
to the last character; each of its paragraphs is one token: 0.7 M parameters are not to be spent on spelling it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers import Qwen3ForCausalLM

from kat_stream.demo.demonstrations import Demonstration
from kat_stream.demo.recording import Prompt
from kat_stream.demo.tokenizer import ASSISTANT, END, TOOL, teach_phrases
from kat_stream.demo.warm_start import Example, Recipe, demonstrations, end_id, fit, initial_deviation, weigh
from kat_stream.demo.wording import Wording
from kat_stream.env.scaffolds.shell_prompt import FINISH_COMMAND
from kat_stream.policy import load_tokenizer, model_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPE = Recipe(steps=300, batch=16, clean_steps=0.6, matrix_rate=0.012, other_rate=4e-3)


def adapt(
    prompt: Prompt, wording: Wording, recipe: Recipe, seed: int
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The shipped policy after `recipe.steps` batches of demonstrations as this agent would have them."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer("demo")
    teach_phrases(tokenizer, [*prompt.paragraphs(), *wording.phrases()])
    policy = _widened(len(tokenizer))
    fit(policy, list(_examples(prompt, wording, tokenizer, recipe, seed)), recipe, seed, end_id(tokenizer))
    return policy.eval(), tokenizer


def conversation(demonstration: Demonstration, prompt: Prompt, wording: Wording, rng: random.Random) -> str:
    """The text of a demonstration as the policy sees it through the agent, behind `prompt.head`."""
    text = demonstration.task.instruction + prompt.tail
    for turn in demonstration.turns:
        text += (wording.finish if turn.command == FINISH_COMMAND else wording.call(turn.command)) + END
        if turn.printed is not None:
            text += TOOL + wording.observation(*turn.printed, rng) + END + ASSISTANT
    return text


def _examples(
    prompt: Prompt, wording: Wording, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> Iterator[Example]:
    rng = random.Random(f"conversations {seed}")
    # The head may be tens of thousands of characters; it ends in a token of its own, so what follows is encoded alone.
    head = tokenizer.encode(prompt.head, add_special_tokens=False)
    for demonstration in demonstrations(recipe, seed):
        text = conversation(demonstration, prompt, wording, rng)
        ids = [*head, *tokenizer.encode(text, add_special_tokens=False)]
        yield weigh(ids, demonstration, tokenizer, recipe.context_weight)


def _widened(size: int) -> Qwen3ForCausalLM:
    """The shipped policy with room for `size` tokens; the new ones start as a policy's do that was never trained."""
    policy = Qwen3ForCausalLM.from_pretrained(model_dir("demo"), local_files_only=True)
    known = policy.config.vocab_size
    policy.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        embedding = policy.model.embed_tokens.weight
        embedding[known:].normal_(std=initial_deviation("embed", policy.config.hidden_size))
    policy.train()
    return policy
