"""`kat-stream sft CONFIG`: supervised fine-tuning of the policy on conversations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, writing

if TYPE_CHECKING:
    from kat_stream.training.metrics import StepMetrics


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "sft",
        sft,
        help="fine-tune the policy on conversations",
        description="Trains policy.model on sft.data, JSON lines of OpenAI messages (every assistant message is learnt "
        "in its context), and writes a Hugging Face directory to sft.out.",
        examples=["sft my.toml", "sft --set sft.data=chats.jsonl --set sft.out=models/tuned --set sft.epochs=2"],
    )
    parser.add_argument("config", nargs="?", type=Path, help="TOML file; without it, the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")


def sft(args: argparse.Namespace) -> int:
    from kat_stream.config import load
    from kat_stream.errors import ConfigError
    from kat_stream.training.sft import fine_tune

    config = load(args.config, args.set)
    for key in ("data", "out"):
        if not getattr(config.sft, key):
            raise ConfigError(f"sft.{key} is not set")
    out = Path(config.sft.out)
    if out.exists():
        raise ConfigError(f"sft.out: {out} exists already; give another folder or remove it")
    with writing(out):  # before hours of training, of which nothing would be left
        out.parent.mkdir(parents=True, exist_ok=True)
    publication = fine_tune(config, _report)
    print(f"sft: wrote {publication.path} (sha256 {publication.checksum[:12]})")
    return 0


def _report(metrics: StepMetrics, steps: int) -> None:
    print(f"step {metrics.step}/{steps}: loss {metrics.loss:.4f}, {metrics.tokens_per_second:.0f} tokens/s", flush=True)
