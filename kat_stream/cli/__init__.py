"""The command line: `kat-stream COMMAND`, one module a command group.

    console()            the console script
    main(argv) -> int    the same for tests and programs: the exit code, never SystemExit
Exit codes: 0 ok, 1 failure, 2 usage or configuration, 75 the log is away, 130 interrupted.
Invariant: a command imports what it needs inside its handler, so that `kat-stream tail` never loads torch.
"""

from __future__ import annotations

import os
import sys

try:
    from kat_stream.cli.main import main
except KeyboardInterrupt:  # before there is anybody to handle it
    sys.exit(130)

__all__ = ["console", "main"]


def console() -> None:
    """Entry point of the `kat-stream` script. Output that is closed from the start (`>&-`) is thrown away."""
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.exit(main())
