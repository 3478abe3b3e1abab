"""The parser over all command groups, and what becomes of errors.

Invariant: an error that this package raises on purpose, a full disk and a file that may not be written are one clear
line on stderr and an exit code; a traceback means a bug or `--debug`. A reader that closes the pipe (`| head`) ends a
command quietly.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kat_stream.cli.common import Formatter, add_debug
from kat_stream.errors import ConfigError, KatError, LogUnavailable, on_purpose

COMMANDS = {
    "demo": "demo",
    "run": "run",
    "serve": "serve",
    "eval": "eval",
    "sft": "sft",
    "tail": "tail",
    "trace": "trace",
    "ledger": "ledger",
    "replay": "replay",
    "shadow": "shadow",
    "plot": "plot",
    "export": "export",
    "lag": "lag",
    "topics": "topics",
    "blobs": "blobs",
    "dead-letters": "dead_letters",
    "broker": "broker",
    "gateway": "gateway",
    "datasets": "datasets",
    "scaffolds": "scaffolds",
    "sandboxes": "plugins",
    "losses": "plugins",
    "verifiers": "plugins",
    "formats": "plugins",
}
"""Command -> module of this package with `register(subparsers)`."""
FAILURE, USAGE, INTERRUPTED = 1, 2, 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
DESCRIPTION = """\
Trains coding agents by reinforcement learning on an event log: agents work in sandboxes, every model call,
trajectory, reward and batch is a record on a topic, and every part of the system reads and writes topics.

  kat-stream demo             the whole loop on this machine, in minutes
  kat-stream tail turns       what agents say, as they say it
  kat-stream ledger latest    what became of every rollout"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    atexit.register(gc.freeze)  # else the interpreter's last collection walks all of torch: seconds after Ctrl-C
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it reports ordinary events; our errors say what matters
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        build_parser().print_help()
        return USAGE
    try:
        args = build_parser(words).parse_args(words)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return stop.code if isinstance(stop.code, int) else USAGE
    except KeyboardInterrupt:  # while the command's module was imported
        return INTERRUPTED
    try:
        code: int = args.handler(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_output()
        return 0
    except OSError as error:
        if args.debug or error.errno not in NO_ROOM:
            raise
        _drop_output()
        print(f"kat-stream {words[0]}: {error.filename or 'cannot write'}: {error.strerror}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (KatError, BaseExceptionGroup) as error:
        if args.debug or (known := on_purpose(error)) is None:
            raise
        print(f"kat-stream {words[0]}: {known}", file=sys.stderr)
        return _exit_code(known)


def _drop_output() -> None:
    """The interpreter flushes stdout once more at exit: give it somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(error: KatError) -> int:
    if isinstance(error, LogUnavailable):
        from kat_stream.signals import AWAY

        return AWAY
    return USAGE if isinstance(error, ConfigError) else FAILURE


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for a command line: with the one group that its first word names, or with all of them."""
    parser = argparse.ArgumentParser(prog="kat-stream", description=DESCRIPTION, formatter_class=Formatter)
    parser.set_defaults(debug=False)
    add_debug(parser)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = words[0] if words else ""
    modules = [COMMANDS[asked]] if asked in COMMANDS else list(dict.fromkeys(COMMANDS.values()))
    for module in modules:
        _register(module, subparsers)
    return parser


def _register(module: str, subparsers: Any) -> None:
    name = f"kat_stream.cli.{module}"
    if find_spec(name) is not None:
        import_module(name).register(subparsers)
