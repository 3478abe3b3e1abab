"""The policy that a demo starts from: the shipped one, or, for a black-box agent, one made here once and kept.

Owns .kat/policies. Invariant: a directory there is complete, and was taught exactly the prompt that the agent says on
this machine today: the prompt, the recipe and what it started from are part of its name.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from kat_stream.demo.wording import Wording, get_wording
from kat_stream.env.sandboxes.base import SandboxBackend
from kat_stream.env.scaffolds import get_scaffold
from kat_stream.env.scaffolds.blackbox import BlackBox
from kat_stream.policy import model_dir

if TYPE_CHECKING:
    from kat_stream.demo.recording import Prompt

DIRECTORY = Path(".kat/policies")
_SEED = 0
Say = Callable[[str], None]


def policy_for(scaffold: str, max_context: int, sandboxes: Callable[[], SandboxBackend], say: Say) -> Path:
    """A Hugging Face directory of a policy that speaks through the agent; installs the agent if need be.

    `max_context`: tokens of the window that the agent will be told; its prompt may depend on it.
    ConfigError for a scaffold that the demo does not know, and if the agent does not run.
    """
    wording = get_wording(scaffold)
    agent = get_scaffold(scaffold)
    if isinstance(agent, BlackBox):
        agent.install()
    prompt = anyio.run(_recorded, scaffold, wording, max_context, sandboxes)
    say(f"{scaffold} says {len(prompt.text('')):,} characters before a task's first turn")
    made = (DIRECTORY / f"{scaffold}-{prompt.digest()}-{_recipe()}").absolute()
    if not made.is_dir():
        say("teaching the small policy to speak through it, once for this prompt")
        started = time.monotonic()
        _make(prompt, wording, made)
        say(f"taught in {time.monotonic() - started:.0f} s: {made}")
    return made


async def _recorded(
    scaffold: str, wording: Wording, max_context: int, sandboxes: Callable[[], SandboxBackend]
) -> Prompt:
    from kat_stream.demo.recording import record

    backend = sandboxes()
    try:
        return (await record(scaffold, wording, backend, max_context)).prompt()
    finally:
        await backend.close()


def _recipe() -> str:
    """A digest of all that makes the policy but the prompt."""
    from kat_stream.demo.adaptation import RECIPE

    start = hashlib.sha256((model_dir("demo") / "model.safetensors").read_bytes())
    start.update(repr((RECIPE, _SEED)).encode())
    return start.hexdigest()[:8]


def _make(prompt: Prompt, wording: Wording, made: Path) -> None:
    import torch

    from kat_stream.demo.adaptation import RECIPE, adapt
    from kat_stream.demo.warm_start import save
    from kat_stream.training.publication import atomic_directory

    torch.set_num_threads(1)  # see kat_stream.demo.warm_start
    policy, tokenizer = adapt(prompt, wording, RECIPE, _SEED)
    with atomic_directory(made) as work:
        save(policy, tokenizer, work)
