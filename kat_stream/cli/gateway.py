"""`kat-stream gateway`: whether a model directory is understood by the gateway, before a run depends on it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_group, count, table

if TYPE_CHECKING:
    from kat_stream.gateway.verify import Report

_SHOWN = 10


def register(subparsers: Any) -> None:
    group = add_group(
        subparsers, "gateway", help="the proxy that agents talk to", description="The LLM proxy of agents."
    )
    parser = add_command(
        group,
        "verify",
        verify,
        help="prove that prompts are what the model's chat template would write",
        description="Generates conversations with tools, reasoning and results, and compares each prompt that the "
        "gateway would send with the text of the model's own chat template; tool calls that the template writes "
        "must be read back. Prints how many prompts go on behind the sampled ids and why the others fork. The exit "
        "code is 1 if anything differs.",
        examples=["gateway verify demo", "gateway verify /models/Qwen3-8B --conversations 500"],
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="a Hugging Face directory with a tokenizer, or `demo`")
    parser.add_argument("--conversations", type=count, default=200, metavar="N", help="to generate (default: 200)")
    parser.add_argument("--seed", type=int, default=0)


def verify(args: argparse.Namespace) -> int:
    from kat_stream.gateway.verify import verify as compare
    from kat_stream.policy import load_tokenizer

    report = compare(load_tokenizer(args.model), conversations=args.conversations, seed=args.seed)
    print(_summary(report))
    for line in report.wrong[:_SHOWN]:
        print(f"WRONG {line}")
    return 1 if report.wrong else 0


def _summary(report: Report) -> str:
    forks = ", ".join(f"{count} {cause}" for cause, count in sorted(report.forks.items())) or "none"
    return table(
        [
            ["tool calls", report.family],
            ["reasoning", "<think>" if report.thinks else "none"],
            ["messages", report.shape],
            ["prompts compared", str(report.turns)],
            ["go on behind sampled ids", str(report.extended)],
            ["  seen on a shortened history", str(report.shortened)],
            ["  with a reply as it was sampled", f"{report.kept} (the template would write it another way)"],
            ["forks", forks],
            ["tool calls read back", str(report.calls)],
            ["conversations refused by the template", str(report.unwritable)],
            ["differences", str(len(report.wrong))],
        ]
    )
