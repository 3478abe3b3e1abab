"""`python -m tests.chaos`: strike a running system at random, account for every rollout; see ops/runbooks/chaos.md."""

from __future__ import annotations

import argparse
import fnmatch
import random
import shutil
import sys

import anyio

from kat_stream.log.jars import classpath
from tests.chaos.faults import BLOWS, draw
from tests.chaos.suite import fresh_directory, run_suite
from tests.chaos.system import System, private_world


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Starts a small system on a real Kafka in a private network, strikes it N times at random, and "
        "accounts for every rollout from the topics alone. Needs root on Linux, Java and Maven, ip, ss and bwrap.",
        epilog="examples:\n  python -m tests.chaos --faults 100 --seed 7\n"
        "  python -m tests.chaos --faults 20 --kinds 'kill:trainer*' 'cut:*'   only these kinds",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="which kinds at which moments (default 0)")
    parser.add_argument("--minutes", type=float, default=1e6, help="strike no more after so long")
    parser.add_argument(
        "--brokers", type=int, choices=(1, 3), default=1, help="Kafka nodes; 3: one is struck (default 1)"
    )
    parser.add_argument("--kinds", nargs="+", default=["*"], metavar="PATTERN", help="of: " + ", ".join(BLOWS))
    args = parser.parse_args()
    kinds = [kind for kind in BLOWS if any(fnmatch.fnmatch(kind, pattern) for pattern in args.kinds)]
    classpath()  # while there is a network to resolve Kafka's jars from
    private_world()
    directory = fresh_directory()
    print(f"chaos: {args.faults} faults, seed {args.seed}, in {directory}", flush=True)
    faults = draw(args.faults, random.Random(args.seed), kinds)
    outcome = anyio.run(
        run_suite, faults, args.seed, args.minutes, System(directory, args.brokers), lambda kind, seconds: None
    )
    print("\n".join(outcome.lines()))
    if outcome.ok:
        shutil.rmtree(directory, ignore_errors=True)
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
