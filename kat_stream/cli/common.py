"""What commands share: how they are described, which run and which log they mean.

Invariant: a command that reads a run takes the same options with the same meaning everywhere.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from kat_stream.errors import ConfigError, StorageError
from kat_stream.ranges import LAST_PORT

if TYPE_CHECKING:
    from kat_stream.config import Config, LogSection, SecuritySection
    from kat_stream.log import Log
    from kat_stream.observe.sources import Source

HELP_WIDTH = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
Handler = Callable[[argparse.Namespace], int]


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples are printed as they are written."""


def add_command(
    subparsers: Any, name: str, handler: Handler, *, help: str, description: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A command with a line for the list, a text that teaches, and examples."""
    text = fill(description, HELP_WIDTH, break_on_hyphens=False)
    epilog = "\n".join(["examples:", *(f"  kat-stream {example}" for example in examples)])
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=text, epilog=epilog, formatter_class=Formatter
    )
    add_debug(parser)
    parser.set_defaults(handler=handler)
    return parser


def add_group(subparsers: Any, name: str, *, help: str, description: str) -> Any:
    """A command with commands of its own."""
    text = fill(description, HELP_WIDTH, break_on_hyphens=False)
    parser = subparsers.add_parser(name, help=help, description=text, formatter_class=Formatter)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def add_debug(parser: argparse.ArgumentParser) -> None:
    text = "show the traceback of an error"
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """--log, --config, --set: which log to ask."""
    parser.add_argument("--log", metavar="URL", default="", help="kafka:host:port[,host:port] (default: the run's log)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="take the log from this configuration")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", default="latest", help="a run's folder, its name, or `latest`")


def add_run_option(parser: argparse.ArgumentParser) -> None:
    text = "a run's folder, its name, or `latest` (default: latest)"
    parser.add_argument("--run", default="", metavar="RUN", help=text)


def count(text: str) -> int:
    """How many of something, as argparse's `type`: at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def port(text: str) -> int:
    """A TCP port, as argparse's `type`; 0: any that is free."""
    number = int(text)
    if not 0 <= number <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"{number}: expected 0 to {LAST_PORT}")
    return number


def duration(text: str) -> float:
    """`1.5h` -> 5400.0 seconds, as argparse's `type`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m, 24h or 7d")
    return float(match[1]) * _UNITS[match[2]]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with files at a path that the user named is a StorageError that names it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or path}: cannot be written ({error.strerror or error})") from error


@dataclass(frozen=True, slots=True)
class Where:
    """What a command line says of run and log."""

    run_dir: Path | None
    url: str
    security: SecuritySection | None

    def source(self) -> AbstractAsyncContextManager[Source]:
        """The records that are meant."""
        from kat_stream.observe.sources import open_source

        return open_source(self.run_dir, self.url, self.security)


def where(args: argparse.Namespace) -> Where:
    """The run and the log of a command that has the run and the log options.

    With --log and no --run, all runs on that log. ConfigError if there is no such run.
    """
    from kat_stream.runs import find_run

    config = _given_config(args)
    url = args.log or (config.log.url if config else "")
    security = config.log.security if config else None
    if url.startswith("memory:"):
        url = ""
    run_dir = find_run(args.run or "latest") if args.run or not url else None
    return Where(run_dir, url, security)


def broker_log(args: argparse.Namespace, *, values: bool = False) -> Log:
    """The log of a command that asks the broker itself; ConfigError if the log lives in a run's own process.

    `values`: with the store of its large values, for a command that reads or writes them.
    """
    from kat_stream.log import open_log

    section = log_section(args)
    url = args.log or section.url
    if url.startswith("memory:"):
        raise ConfigError(
            "the log is memory:, which lives and dies inside the run's own process; this needs a run on Kafka, or "
            "--log kafka:HOST:PORT"
        )
    return open_log(url, security=section.security, blobs=_store(args) if values else "")


def _store(args: argparse.Namespace) -> str:
    """Where the large values of the log lie: of the run that is meant, else as configured; empty if nobody says."""
    from kat_stream.runs import blobs_url, find_run, load_run

    config, run = _given_config(args), getattr(args, "run", "")
    if run or (config is None and not args.log):
        run_dir = find_run(run or "latest")
        return blobs_url(load_run(run_dir), run_dir)
    return config.blobs.url if config else ""


def log_section(args: argparse.Namespace) -> LogSection:
    """[log] of the given configuration, else of the run; the defaults if only --log is given."""
    from kat_stream.config import LogSection
    from kat_stream.runs import find_run, load_run

    config = _given_config(args)
    if config is None and not args.log:
        config = load_run(find_run(getattr(args, "run", "") or "latest"))
    return config.log if config else LogSection()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the left, two spaces apart, the last one free."""
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    lines = ("  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in rows)
    return "\n".join(lines)


def _given_config(args: argparse.Namespace) -> Config | None:
    from kat_stream.config import load

    return load(args.config, args.set) if args.config or args.set else None
