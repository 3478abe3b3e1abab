"""What a black-box agent says to its model: one real run of it, with a scripted policy that knows the solution.

Owns the recorded prompt from which the demo's policy learns the agent's language. Invariant: the text is what the
gateway rendered for the unmodified agent in a sandbox, to the last character; only the task's instruction is replaced.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from kat_stream.demo.tokenizer import ASSISTANT, END, teach_phrases
from kat_stream.demo.wording import Wording
from kat_stream.env.datasets import open_dataset
from kat_stream.env.mend import MendTask, generate
from kat_stream.env.rollout import RolloutRunner
from kat_stream.env.sandboxes.base import SandboxBackend
from kat_stream.env.scaffolds.rehearsal import stage
from kat_stream.errors import ConfigError
from kat_stream.policy import load_tokenizer
from topics import RolloutRequest, Sampling, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kat_stream.engines.scripted import ScriptedPolicy

_AGENT_S, _MARGIN_S = 400.0, 100.0
_SAMPLING = Sampling(max_turns=8, max_new_tokens=1024)
_WIDE = 400_000
"""Tokens in which any agent's prompt fits, spelt out."""
_MEND = "mend:train?count=15&seed=0"
_ROLE = re.compile(r"<\|\w+\|>")
_PARAGRAPH = re.compile(r".+?(?:\n\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """What an agent says before the policy's first turn: `head`, a task's instruction, `tail`."""

    head: str
    tail: str

    def text(self, instruction: str) -> str:
        return self.head + instruction + self.tail

    def digest(self) -> str:
        """Equal for equal prompts."""
        return hashlib.sha256(self.text("\0").encode()).hexdigest()[:12]

    def paragraphs(self) -> list[str]:
        """What stands between roles and empty lines, each once."""
        texts = [part for half in (self.head, self.tail) for part in _ROLE.split(half)]
        found = [paragraph for text in texts for paragraph in _PARAGRAPH.findall(text)]
        # A bare word is no phrase of the agent's: it stands elsewhere, too.
        return list(dict.fromkeys(paragraph for paragraph in found if re.search(r"\S\S.*\s", paragraph, re.DOTALL)))


@dataclass(frozen=True)
class Recording:
    """One run: the task, all prompts that the policy saw (as text), and how it ended."""

    task: MendTask
    prompts: tuple[str, ...]
    trajectory: Trajectory

    def prompt(self) -> Prompt:
        """ConfigError if the agent never asked, or does not say the instruction exactly once."""
        first = self.prompts[0] if self.prompts else ""
        head, instruction, tail = first.partition(self.task.instruction)
        if not instruction or instruction in tail:
            end = self.trajectory
            raise ConfigError(
                f"demo: the agent did not say its task once; it ended in {end.outcome}: {end.log[-1000:]}"
            )
        return Prompt(head, tail)


async def record(
    scaffold: str, wording: Wording, sandboxes: SandboxBackend, max_context: int, number: int = 0
) -> Recording:
    """Run the agent on a training task with the commands that mend it. ConfigError if it is not installed.

    Twice: an agent fits its prompt to the window that it is told, so it must be told the policy's own, and the prompt
    fits into that only when its paragraphs are tokens: the first run, with a wide window, shows them.
    """
    wide = await _run(scaffold, wording, sandboxes, _WIDE, number, [])
    return await _run(scaffold, wording, sandboxes, max_context, number, wide.prompt().paragraphs())


async def _run(
    scaffold: str, wording: Wording, sandboxes: SandboxBackend, max_context: int, number: int, paragraphs: list[str]
) -> Recording:
    words = load_tokenizer("demo")
    teach_phrases(words, [*paragraphs, *wording.phrases()])
    made = generate("train", number + 1)[number]
    task = open_dataset(_MEND).tasks(number + 1)[number]
    replies = [*map(wording.call, made.solution), wording.finish]
    seen: list[list[int]] = []
    async with stage(_saying(replies, words, seen), words=words) as world:
        runner = RolloutRunner(sandboxes, world.control, world.data_url)
        try:
            trajectory = await runner.run(
                RolloutRequest(
                    run="record",
                    group_id="record-t0",
                    rollout_id="record-t0-0",
                    sample=0,
                    group_size=1,
                    task=msgspec.structs.replace(task, scaffold=scaffold, agent_timeout_s=_AGENT_S),
                    sampling=msgspec.structs.replace(_SAMPLING, max_context=max_context),
                    deadline_unix_s=time.time() + _AGENT_S + _MARGIN_S,
                )
            )
        finally:
            await runner.close()
    return Recording(made, tuple(str(words.decode(ids)) for ids in seen), trajectory)


def _saying(replies: list[str], words: PreTrainedTokenizerFast, seen: list[list[int]]) -> ScriptedPolicy:
    """A policy that gives these replies in turn, by how many the prompt holds; it keeps what it saw in `seen`."""
    begin, end = (int(words.get_vocab()[token]) for token in (ASSISTANT, END))
    encoded = [[*words(reply, add_special_tokens=False)["input_ids"], end] for reply in replies]

    def policy(ids: list[int]) -> list[int]:
        seen.append(ids)
        return encoded[min(ids.count(begin), len(encoded)) - 1]

    return policy
