"""`kat-stream eval`: one agent over a dataset, without a log and without training."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from os import SEEK_END
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, count, writing

if TYPE_CHECKING:
    from kat_stream.config import Config
    from kat_stream.env.evaluation import Result
    from kat_stream.env.rollout import Sessions

WITHOUT_MODEL = ("oracle", "nop")
SOLVED = 1.0
SPECS = "mend:SPLIT?count=N, harbor:PATH or polyglot:PATH"


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "eval",
        eval_,
        help="run one agent over a dataset and grade it",
        description="Runs the agent once on every task, each in a sandbox of its own, and grades the result in a "
        "second, clean one. `oracle` applies the reference solution and `nop` does nothing: together "
        "they check a dataset. Other agents need a policy, which is served in this process. The exit "
        "code is 1 if a task could not be run or graded; that is never counted as reward 0.",
        examples=[
            "eval --dataset 'mend:held-out?count=48' --agent shell --model demo",
            "eval --dataset polyglot:PATH --language python --agent oracle --json results.json",
            "eval --dataset harbor:PATH --agent nop --limit 10",
        ],
    )
    parser.add_argument("--dataset", required=True, metavar="SPEC", help=SPECS)
    parser.add_argument("--language", default="", help="of a dataset with several")
    parser.add_argument("--agent", required=True, help="oracle, nop, shell, ...; see: kat-stream scaffolds list")
    parser.add_argument("--model", default="demo", metavar="DIR", help="Hugging Face directory, or `demo`")
    parser.add_argument("--sandbox", default="", help="see: kat-stream sandboxes list (default: rollout.sandbox)")
    parser.add_argument("--concurrency", type=count, default=2, metavar="N", help="tasks at once (default: 2)")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N tasks")
    rows = "write [{task, reward, outcome, seconds}, ...], task by task: what is done is there if it is killed"
    parser.add_argument("--json", type=Path, metavar="FILE", help=rows)
    parser.add_argument("--config", type=Path, metavar="FILE", help="sampling, engine and sandbox settings")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")


def eval_(args: argparse.Namespace) -> int:
    import anyio

    from kat_stream.config import load

    overrides = [*args.set, *([f"rollout.sandbox={args.sandbox}"] if args.sandbox else [])]
    rows = _Rows(args.json) if args.json else None
    results = anyio.run(_evaluate, args, load(args.config, overrides), rows)
    print(closing(results))
    return 1 if any(result.reward is None for result in results) or not results else 0


def closing(results: Sequence[Result]) -> str:
    """`mean reward 0.958, 46 of 48 tasks solved, 0 not graded`."""
    graded = [result.reward for result in results if result.reward is not None]
    mean = f"{sum(graded) / len(graded):.3f}" if graded else "-"
    solved = sum(reward >= SOLVED for reward in graded)
    return f"mean reward {mean}, {solved} of {len(graded)} tasks solved, {len(results) - len(graded)} not graded"


class _Rows:
    """Results in a file as one JSON array, which is whole after each of them: an evaluation of hours may be killed."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        with writing(path):  # before hours of work, of which there would be no record
            path.open("a").close()

    def add(self, result: Result) -> None:
        import json

        row = f"\n {json.dumps(result.as_row())}\n]\n".encode()
        with writing(self._path), self._path.open("r+b" if self._count else "wb") as file:
            if self._count:
                file.seek(-len(b"\n]\n"), SEEK_END)
            file.write((b"," if self._count else b"[") + row)
        self._count += 1


async def _evaluate(args: argparse.Namespace, config: Config, rows: _Rows | None) -> list[Result]:
    from kat_stream.env.evaluation import evaluate
    from kat_stream.sandboxing import open_backend

    def on_result(result: Result) -> None:
        if rows is not None:
            rows.add(result)
        _print_result(result)

    async with _gateway(args, config) as (sessions, data_url):
        return await evaluate(
            dataset_spec(args.dataset, args.language),
            args.agent,
            open_backend(config.rollout),
            gateway=sessions,
            data_url=data_url,
            sampling=_sampling(config),
            limit=args.limit,
            concurrency=args.concurrency,
            on_result=on_result,
        )


def dataset_spec(dataset: str, language: str) -> str:
    """The dataset with `language` among its options."""
    from kat_stream.env.datasets import Spec

    return Spec.parse(dataset).with_options(language=language) if language else dataset


def _print_result(result: Result) -> None:
    from kat_stream.observe.text import one_line

    reward = "-" if result.reward is None else f"{result.reward:g}"
    why = "" if result.reward == SOLVED else f"  {one_line(result.detail, 80)}"
    task = one_line(result.task, 200)
    print(f"{task:<40} {reward:>5}  {result.outcome:<15} {result.seconds:6.2f} s{why}".rstrip(), flush=True)


def _sampling(config: Config) -> Any:
    from topics import Sampling

    section = config.sampler
    return Sampling(
        temperature=section.temperature,
        max_new_tokens=section.max_new_tokens,
        max_turns=section.max_turns,
        max_context=section.max_context,
    )


@asynccontextmanager
async def _gateway(args: argparse.Namespace, config: Config) -> AsyncIterator[tuple[Sessions | None, str]]:
    """A gateway before the policy, and its address for agents; nothing for agents that need no policy."""
    if args.agent in WITHOUT_MODEL:
        yield None, ""
        return
    import aiohttp

    from kat_stream.gateway.app import start_gateway
    from kat_stream.gateway.client import GatewayControl
    from kat_stream.log import open_log
    from kat_stream.policy import load_tokenizer
    from kat_stream.routing import Router
    from topics import CATALOGUE

    log = open_log("memory:")
    await log.start()
    await log.apply_topics(CATALOGUE)
    tokenizer = load_tokenizer(args.model)
    async with _engines(args.model, config) as urls, Router(urls) as router, aiohttp.ClientSession() as session:
        server = await start_gateway(
            tokenizer=tokenizer, log=log, router=router, config=config.gateway, model_name=config.policy.name
        )
        try:
            yield GatewayControl(server.control_url, session), server.data_url
        finally:
            await server.close()
            await log.close()


@asynccontextmanager
async def _engines(model: str, config: Config) -> AsyncIterator[Sequence[str]]:
    """The configured engines, or an embedded one with the policy."""
    if config.engine.urls:
        yield config.engine.urls
        return
    from kat_stream.engines.embedded import start_engine
    from kat_stream.policy import model_dir

    server = await start_engine(
        model_dir(model),
        model_name=config.policy.name,
        max_total_tokens=config.engine.max_total_tokens,
        max_running=config.engine.max_running,
        threads=config.engine.threads,
    )
    try:
        yield (server.url,)
    finally:
        await server.close()
