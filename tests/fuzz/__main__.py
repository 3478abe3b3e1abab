"""`python -m tests.fuzz [--count 10000] [--seed N]`: malformed records through the real stages; one closing line."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time

from tests.fuzz.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="malformed records")
    parser.add_argument("--seed", type=int, default=-1, help="the same records again (default: a new seed)")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if args.seed < 0 else args.seed
    logging.disable(logging.CRITICAL)
    print(f"fuzz: seed {seed}", flush=True)
    began = time.monotonic()
    result = run(args.count, seed)
    for problem in result.problems[:20]:
        print(f"  {problem}")
    print(
        f"fuzz: {result.sent} malformed records, 0 crashes, {result.unreadable} unreadable, {result.dead_letters} dead "
        f"letters, good groups {result.packed_groups} of {result.good_groups}, {time.monotonic() - began:.0f} s"
    )
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
