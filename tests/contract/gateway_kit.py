"""What the gateway's tests stand on: a tokenizer, scripted engines, a real in-memory log, the official client.

The policy's ids are single bytes while the tokenizer knows merges, so a reply that was encoded again would be seen.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import aiohttp
import anthropic
import anyio
import openai
from google import genai
from google.genai import types as google
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kat_stream.config import GatewaySection
from kat_stream.engines.scripted import ScriptedEngine, ScriptedPolicy, start_scripted_engine
from kat_stream.gateway.app import GatewayControl, GatewayServer, SessionHandle, start_gateway
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.recording import Publisher
from kat_stream.log import Message
from kat_stream.log.memory import MemoryLog
from kat_stream.routing import Router
from tests.contract.log_records import everything
from topics import Sampling, Turn, topic_named
from topics.record import floats, ints

CHATML = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{%- endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: reasoning of earlier turns is dropped once a user speaks again.
FORGETFUL = CHATML.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
)
# As Qwen3 with tools: what was thought since the last user spoke is kept.
THINKING = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}",
)
# As Kimi K2: the policy's own ids of calls stand in the prompt, beside the calls and before their results.
OWN_IDS = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{% endif %}{{ m.content }}"
    "{%- if m.tool_calls %}<|tool_calls_section_begin|>{% for call in m.tool_calls %}"
    "<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}"
    "<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = [("l", "s"), ("c", "a"), ("ca", "t"), ("Ġ", "-"), ("Ġ-", "l")]


@cache
def tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges and ChatML's special tokens."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    inner.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    wrapped.chat_template = template
    return wrapped


def by_bytes(text: str, *, end: bool = True) -> list[int]:
    """Ids of a text, one a byte, as the tokenizer itself would never write it, and the token that ends a turn."""
    unicode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = [tokenizer().convert_tokens_to_ids(char) for piece, _ in unicode for char in piece]
    return [*ids, tokenizer().convert_tokens_to_ids("<|im_end|>")] if end else ids


def saying(*replies: str) -> ScriptedPolicy:
    """A policy that says these, chosen by how many assistant turns the prompt already opens."""
    start, *_ = tokenizer().encode("<|im_start|>assistant", add_special_tokens=False)
    name = tokenizer().encode("assistant\n", add_special_tokens=False)

    def policy(prompt: list[int]) -> list[int]:
        opened = sum(prompt[i] == start and prompt[i + 1 : i + 1 + len(name)] == name for i in range(len(prompt)))
        return by_bytes(replies[min(opened, len(replies)) - 1])

    return policy


def going_on(text: str) -> ScriptedPolicy:
    """A policy that says this, and goes on where it was when the prompt ends with a beginning of it."""
    plan = by_bytes(text)

    def policy(prompt: list[int]) -> list[int]:
        return plan[next(n for n in range(len(plan), -1, -1) if prompt[len(prompt) - n :] == plan[:n]) :]

    return policy


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class Gate:
    """A log whose acknowledgements can be held back, or that can be away, in front of a real one."""

    def __init__(self, inner: Publisher) -> None:
        self.inner = inner
        self.open = anyio.Event()
        self.waiting = 0

    async def append(self, *messages: Message, deadline_s: float = 30.0) -> None:
        self.waiting += 1
        await self.open.wait()
        await self.inner.append(*messages, deadline_s=deadline_s)


class Gates(list[Gate]):
    """As `wrap` of a world: the gates that it puts in front of the world's gateways."""

    def __call__(self, log: Publisher) -> Gate:
        self.append(Gate(log))
        return self[-1]


@dataclass
class World:
    """A gateway in front of scripted engines. `published` reads the turns from the log."""

    server: GatewayServer
    control: GatewayControl
    router: Router
    log: MemoryLog
    engines: list[ScriptedEngine]
    http: aiohttp.ClientSession
    stack: AsyncExitStack

    async def session(
        self, sampling: Sampling | None = None, purpose: str = "train", group: str = "g1"
    ) -> SessionHandle:
        return await self.control.open(
            run="r1", group_id=group, rollout_id="r1g1s0", sampling=sampling or Sampling(), purpose=purpose
        )

    def client(self, handle: SessionHandle, *, key: str = "", retries: int = 0) -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(
            base_url=f"{self.server.data_url}{handle.path}/v1",
            api_key=key or handle.key,
            max_retries=retries,
            timeout=30.0,
        )
        self.stack.push_async_callback(client.close)
        return client

    def anthropic(self, handle: SessionHandle) -> anthropic.AsyncAnthropic:
        base = self.server.data_url + handle.path
        client = anthropic.AsyncAnthropic(base_url=base, api_key=handle.key, max_retries=0, timeout=30.0)
        self.stack.push_async_callback(client.close)
        return client

    def google(self, handle: SessionHandle) -> genai.Client:
        options = google.HttpOptions(base_url=self.server.data_url + handle.path, timeout=30_000)
        client = genai.Client(api_key=handle.key, http_options=options)
        self.stack.push_async_callback(client.aio.aclose)
        return client

    async def post(self, handle: SessionHandle, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and body of a POST behind the session; bytes are sent as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        known = {"Authorization": f"Bearer {handle.key}", **headers}
        async with self.http.post(f"{self.server.data_url}{handle.path}/{path}", data=raw, headers=known) as answer:
            return answer.status, await answer.json(content_type=None)

    async def published(self) -> list[Turn]:
        return [delivered.record() for delivered in await everything(self.log, "turns")]  # type: ignore[misc]


@asynccontextmanager
async def world(
    policy: ScriptedPolicy,
    *,
    engines: int = 1,
    token_s: float = 0.0,
    tools: str = "none",
    template: str = CHATML,
    limits: Limits | None = None,
    wrap: Callable[[Publisher], Publisher] = lambda log: log,
) -> AsyncIterator[World]:
    """All of it, closed at the end."""
    async with AsyncExitStack() as stack:
        fleet = [await start_scripted_engine(policy, token_s=token_s) for _ in range(engines)]
        for engine in fleet:
            stack.push_async_callback(engine.close)
        log = MemoryLog()
        await log.start()
        stack.push_async_callback(log.close)
        await log.apply_topics([topic_named("turns")])
        router = await stack.enter_async_context(Router([engine.url for engine in fleet], poll_s=0.05))
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        server = await start_gateway(
            tokenizer=tokenizer(template),
            log=wrap(log),
            router=router,
            config=GatewaySection(tools=tools),
            model_name="policy",
            limits=limits,
        )
        stack.push_async_callback(server.close)
        yield World(server, GatewayControl(server.control_url, http), router, log, fleet, http, stack)


def paths(turns: list[Turn]) -> dict[str, tuple[list[int], list[int]]]:
    """turn_id -> (whole prompt, sampled), put together from the records alone."""
    out: dict[str, tuple[list[int], list[int]]] = {}
    for turn in turns:
        before = [] if not turn.parent else [*out[turn.parent][0], *out[turn.parent][1]]
        assert turn.prefix_len <= len(before)
        sampled = list(ints(turn.sampled_ids))
        assert len(floats(turn.logprobs)) == len(sampled)
        assert [span.start for span in turn.spans] == [0, *(span.end for span in turn.spans[:-1])][: len(turn.spans)]
        assert not sampled or turn.spans[-1].end == len(sampled)
        out[turn.turn_id] = ([*before[: turn.prefix_len], *ints(turn.prompt_ids)], sampled)
    return out
