"""`kat-stream demo`: the small policy learns to mend repositories, on a laptop, in minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command

if TYPE_CHECKING:
    from kat_stream.config import Config

CONFIG = Path(__file__).parents[1] / "demo" / "demo.toml"
SHELL = "shell"


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "demo",
        demo,
        help="train the small policy that ships with the package on small repositories",
        description="Evaluates a small policy on held-out repositories, trains it by agents in sandboxes and "
        "evaluates it again. With --log memory everything runs in this process; with --log kafka a real "
        "Apache Kafka runs meanwhile (Java and Maven are needed, Docker is not) and every service is a process. "
        "With --scaffold the same tasks are learnt through an unmodified agent program and its own prompt. "
        "The small policy is taught to speak through it first; the result is kept in .kat/policies.",
        examples=[
            "demo                          minutes on two cores",
            "demo --seed 1 --set run.steps=10",
            "demo --scaffold codex         about half an hour, as --scaffold mini-swe-agent",
            "demo --log kafka              then, elsewhere: kat-stream tail trajectories",
        ],
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of tasks")
    parser.add_argument("--log", choices=("memory", "kafka"), default="memory", help="where records flow")
    parser.add_argument("--scaffold", default=SHELL, help="shell | codex | mini-swe-agent: who works on the tasks")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")


def demo(args: argparse.Namespace) -> int:
    import msgspec

    from kat_stream.cli.broker import running_meanwhile
    from kat_stream.cli.run import check_parts, conduct
    from kat_stream.config import load
    from kat_stream.runs import create_run

    asked = [f"run.seed={args.seed}", *args.set]
    config = _shell(load(CONFIG, asked)) if args.scaffold == SHELL else _black_box(args.scaffold, asked)
    check_parts(config)
    if args.log == "memory":
        config, run_dir = create_run(config)
        return conduct("demo", config, run_dir, resume=False)
    with running_meanwhile() as bootstrap:
        config = msgspec.structs.replace(config, log=msgspec.structs.replace(config.log, url=f"kafka:{bootstrap}"))
        config, run_dir = create_run(config)
        return conduct("demo", config, run_dir, resume=False)


def _shell(config: Config) -> Config:
    """The white-box demo, without isolation where there is none to be had."""
    import msgspec

    from kat_stream.sandboxing import or_local

    section, reason = or_local(config.rollout)
    if reason:
        print(f"demo: WARNING: no isolation: {config.rollout.sandbox}: {reason}", file=sys.stderr)
        print("demo: WARNING: the policy's commands run as you, on this machine", file=sys.stderr)
    return msgspec.structs.replace(config, rollout=section)


def _black_box(scaffold: str, asked: list[str]) -> Config:
    """The demo with an unmodified agent, and a policy that speaks through it. ConfigError as `policy_for`."""
    from kat_stream.config import load
    from kat_stream.demo.policies import policy_for
    from kat_stream.demo.wording import settings_of
    from kat_stream.sandboxing import open_backend

    config = load(settings_of(scaffold), [*asked, f"data.scaffold={scaffold}"])
    policy = policy_for(scaffold, config.sampler.max_context, lambda: open_backend(config.rollout), _say)
    return load(settings_of(scaffold), [*asked, f"data.scaffold={scaffold}", f"policy.model={policy}"])


def _say(line: str) -> None:
    print(f"demo: {line}", flush=True)
