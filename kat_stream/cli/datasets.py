"""`kat-stream datasets`: what is registered, whether a dataset is sound, and the own family as directories."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_group, count, writing
from kat_stream.cli.eval import SPECS
from kat_stream.cli.plugins import add_list

if TYPE_CHECKING:
    from kat_stream.env.evaluation import Finding

_LINE = 1000  # characters: what a test printed may be more than anybody reads


def register(subparsers: Any) -> None:
    about = "where tasks come from"
    group = add_group(subparsers, "datasets", help=about, description=f"{about.capitalize()}.")
    add_list(group, "datasets")
    _register_check(group)
    _register_write(group)


def _register_check(group: Any) -> None:
    parser = add_command(
        group,
        "check",
        check,
        help="audit a dataset by its own reference solutions",
        description="Runs each reference solution, which must get the full reward, and an agent that does nothing, "
        "twice, which must not. Prints one line for each task with a problem; the exit code is 1 if "
        "there is any.",
        examples=["datasets check 'mend:held-out?count=48'", "datasets check harbor:PATH --limit 5"],
    )
    parser.add_argument("dataset", metavar="SPEC", help=SPECS)
    parser.add_argument("--sandbox", default="", help="see: kat-stream sandboxes list (default: rollout.sandbox)")
    parser.add_argument("--concurrency", type=count, default=2, metavar="N", help="tasks at once (default: 2)")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N tasks")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")


def _register_write(group: Any) -> None:
    parser = add_command(
        group,
        "write",
        write,
        help="write the mend family as Harbor task directories",
        description="Writes tasks of the seeded family of small repositories in the format of Harbor and "
        "Terminal-Bench 2, to be read by people and by other harnesses. Training itself makes them in "
        "memory.",
        examples=["datasets write /tmp/mend --split held-out --count 20"],
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="one directory a task is made in it")
    parser.add_argument("--split", choices=("train", "held-out"), default="train")
    parser.add_argument("--count", type=count, default=20, metavar="N", help="number of tasks (default: 20)")
    parser.add_argument("--seed", type=int, default=0)


def check(args: argparse.Namespace) -> int:
    import anyio

    from kat_stream.observe.text import one_line

    findings = anyio.run(_check, args)
    broken = [finding for finding in findings if finding.problems]
    for finding in broken:
        print(one_line(f"{finding.task}: {'; '.join(finding.problems)}", _LINE))
    print(f"{len(findings) - len(broken)} of {len(findings)} tasks are sound")
    return 1 if broken or not findings else 0


async def _check(args: argparse.Namespace) -> list[Finding]:
    from kat_stream.config import load
    from kat_stream.env import evaluation
    from kat_stream.sandboxing import open_backend

    overrides = [*args.set, *([f"rollout.sandbox={args.sandbox}"] if args.sandbox else [])]
    sandboxes = open_backend(load(None, overrides).rollout)
    return await evaluation.check(args.dataset, sandboxes, limit=args.limit, concurrency=args.concurrency)


def write(args: argparse.Namespace) -> int:
    from kat_stream.env.mend import generate, write_task

    with writing(args.directory):
        for task in generate(args.split, args.count, args.seed):
            write_task(task, args.directory / task.task_id.replace("/", "-"))
    print(f"{args.count} tasks in {args.directory}")
    return 0
