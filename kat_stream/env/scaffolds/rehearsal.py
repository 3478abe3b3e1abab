"""A stage for black-box agents without a model: a scripted policy behind the real engine client, router and gateway.

Owns the tokenizer, the task and the set-up that `scaffolds check` and the fault matrix share. Invariant: the policy's
ids are single bytes while the tokenizer knows merges, so a reply that was ever encoded again would be seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import msgspec

from kat_stream.config import GatewaySection
from kat_stream.engines.scripted import ScriptedEngine, ScriptedPolicy, start_scripted_engine
from kat_stream.env.datasets import open_dataset
from kat_stream.env.scaffolds.description import Step
from kat_stream.gateway.app import GatewayControl, start_gateway
from kat_stream.log.memory import MemoryLog
from kat_stream.routing import Router
from topics import RolloutRequest, Sampling, Task, topic_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARGIN_S = 120.0
INSTRUCTION = "Create the file answer.txt containing the word fixed."
_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call them as <tool_call>.<|im_end|>\n{%- endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGES = [
    ("e", "c"),
    ("ec", "h"),
    ("ech", "o"),
    ("t", "h"),
    ("i", "n"),
    ("e", "r"),
    ("Ġ", "t"),
    ("o", "n"),
    ("a", "n"),
]
_TASK = {
    "task.toml": 'version = "1.0"\n[verifier]\ntimeout_sec = 30.0\n[agent]\ntimeout_sec = {seconds}\n'
    '[environment]\nmemory = "256M"\nstorage = "32M"\n',
    "instruction.md": INSTRUCTION + "\n",
    "environment/Dockerfile": "FROM debian:bookworm-slim\nWORKDIR /app\nCOPY repo/ /app/\n",
    "environment/repo/README.md": "A repository without an answer.\n",
    "tests/test.sh": "#!/bin/sh\nmkdir -p /logs/verifier\n"
    "grep -qx fixed answer.txt && echo 1 > /logs/verifier/reward.txt || echo 0 > /logs/verifier/reward.txt\n",
    "solution/solve.sh": "#!/bin/sh\necho fixed > answer.txt\n",
}
Front = Callable[[str], AbstractAsyncContextManager[str]]
"""Stands between sandboxes and the gateway: its data URL in, the URL to give to agents out."""


@dataclass(frozen=True)
class Stage:
    """What a rollout needs of the world, and the engine that saw it."""

    control: GatewayControl
    data_url: str
    engine: ScriptedEngine


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges and ChatML's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in _MERGES)]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=_MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    wrapped.chat_template = _TEMPLATE
    return wrapped


def playing(steps: Sequence[Step]) -> ScriptedPolicy:
    """A policy that says these, chosen by how many assistant turns the prompt already holds; then always the last."""
    words = tokenizer()
    opening = words.encode("<|im_start|>assistant\n", add_special_tokens=False)
    replies = [_ids(_text(step)) for step in steps]

    def policy(prompt: list[int]) -> list[int]:
        size = len(opening)
        held = sum(prompt[i : i + size] == opening for i, token in enumerate(prompt) if token == opening[0])
        return replies[min(max(held - 1, 0), len(replies) - 1)]

    return policy


@asynccontextmanager
async def stage(
    policy: ScriptedPolicy, front: Front | None = None, *, words: PreTrainedTokenizerFast | None = None
) -> AsyncIterator[Stage]:
    """An engine, a gateway over an in-memory log, and a `front` before it; all closed at the end.

    `words`: the policy's tokenizer, if it is not the rehearsal's own; its tool calls are written as Hermes does.
    """
    async with AsyncExitStack() as stack:
        engine = await start_scripted_engine(policy)
        stack.push_async_callback(engine.close)
        log = MemoryLog()
        await log.start()
        stack.push_async_callback(log.close)
        await log.apply_topics([topic_named("turns")])
        router = await stack.enter_async_context(Router([engine.url]))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        server = await start_gateway(
            tokenizer=words or tokenizer(),
            log=log,
            router=router,
            config=GatewaySection(tools="hermes"),
            model_name="policy",
        )
        stack.push_async_callback(server.close)
        url = await stack.enter_async_context(front(server.data_url)) if front else server.data_url
        yield Stage(GatewayControl(server.control_url, http), url, engine)


def task_in(directory: Path, scaffold: str, seconds: float) -> Task:
    """The one task of a rehearsal, written below `directory`: answer.txt must read `fixed`."""
    for path, text in _TASK.items():
        (directory / "fix" / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / "fix" / path).write_text(text.replace("{seconds}", str(float(seconds))))
    return msgspec.structs.replace(open_dataset(f"harbor:{directory}").tasks(1)[0], scaffold=scaffold)


def request_for(task: Task, sampling: Sampling, sample: int = 0) -> RolloutRequest:
    """One rollout of it, with time to make the sandbox and to take the patch."""
    return RolloutRequest(
        run="check",
        group_id="check-t0",
        rollout_id=f"check-t0-{sample}",
        sample=sample,
        group_size=1,
        task=task,
        sampling=sampling,
        deadline_unix_s=time.time() + task.agent_timeout_s + _MARGIN_S,
    )


def _text(step: Step) -> str:
    call = json.dumps({"name": step.tool, "arguments": step.arguments})
    return "\n".join(
        [*([step.say] if step.say else []), *([f"<tool_call>\n{call}\n</tool_call>"] if step.tool else [])]
    )


def _ids(text: str) -> list[int]:
    """One id a byte, as the tokenizer itself would never write it, and the token that ends a turn."""
    from tokenizers import pre_tokenizers

    words = tokenizer()
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    tokens = [char for piece, _ in pieces for char in piece]
    ids: list[int] = words.convert_tokens_to_ids([*tokens, "<|im_end|>"])  # type: ignore[assignment]
    return ids
