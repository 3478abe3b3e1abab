"""How long the running system needs to go on after each kind of fault: `python -m tests.benchmarks.recovery`.

By default every kill once, some minutes on a quiet machine; `--kinds '*'` adds freezes, hangs, cuts and full disks (36
kinds). Each recovery is appended to a file as soon as it is known, so that a run that was stopped goes on where it was;
`--out` of a new file begins anew. The system is the chaos suite's (tests/chaos/system.py); seconds count from the
moment the cause was gone until the struck stage's next record is on the log.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import anyio

from kat_stream.log.jars import classpath
from tests.chaos.faults import BLOWS
from tests.chaos.suite import fresh_directory, run_suite, table
from tests.chaos.system import System, private_world

DEFAULT = Path(".kat/recovery.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.recovery", description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["kill:*"], metavar="PATTERN", help="of: " + ", ".join(BLOWS))
    parser.add_argument("--times", type=int, default=1, help="how often each kind (default 1)")
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"where results are kept (default {DEFAULT})")
    args = parser.parse_args()
    classpath()  # while there is a network to resolve Kafka's jars from
    private_world()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    missing = _missing(args.out, args.kinds, args.times)
    outcome = None
    if missing:
        with args.out.open("a") as out:

            def told(kind: str, seconds: float) -> None:
                print(json.dumps([kind, seconds]), file=out, flush=True)

            seed = len(_known(args.out))
            random.Random(seed).shuffle(missing)
            outcome = anyio.run(run_suite, missing, seed, float("inf"), System(fresh_directory()), told)
        print("\n".join(outcome.lines()))
    print(f"all of {args.out}:", *table(_known(args.out)), sep="\n")
    return 0 if outcome is None or outcome.ok else 1


def _known(path: Path) -> list[tuple[str, float]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [(kind, seconds) for kind, seconds in map(json.loads, lines)]


def _missing(path: Path, patterns: Sequence[str], times: int) -> list[str]:
    """Each kind as often as it is still to be done."""
    done = Counter(kind for kind, _ in _known(path))
    wanted = [kind for kind in BLOWS if any(fnmatch.fnmatch(kind, pattern) for pattern in patterns)]
    return [kind for kind in wanted for _ in range(times - done[kind])]


if __name__ == "__main__":
    sys.exit(main())
