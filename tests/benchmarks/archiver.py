"""Whether an archiver's memory and time stay flat: `python -m tests.benchmarks.archiver [--flushes 720]`.

The archive's writer, flushed and merged on a worker thread as the service does it, but without waiting between two
flushes: an hour of flushes in minutes. The messages are those of the ledger's benchmark, the same ones again and again
at later offsets; by default a flush has as many as one of the demo under full load. A line a tenth of the run, then
what was resident at MARKS, and the slope from the first third on. The log and its client are not in it: see the
benchmark `memory`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from kat_stream.archive import ArchiveWriter
from kat_stream.log.base import Delivered, Position
from tests import observe_kit as fab
from tests.benchmarks.ledger import synthetic

ROLLOUTS = 512
"""Of which the messages are made: 19 MB, more than the compressor looks back."""

MARKS = (30, 100, 300, 600, 1000)
AN_HOUR = 720
"""Flushes (archiver.flush_s)."""


@dataclass(frozen=True, slots=True)
class Flush:
    """What one flush and the merge after it took."""

    resident_mb: float
    peak_mb: float
    flush_s: float
    merge_s: float
    files: int


def endless(messages: list[Delivered]) -> Iterator[Delivered]:
    """The messages for ever, offsets going on."""
    ends: dict[tuple[str, int], int] = defaultdict(int)
    for one in cycle(messages):
        topic, partition, _ = one.position
        position = Position(topic, partition, ends[topic, partition])
        ends[topic, partition] += 1
        yield Delivered(position, one.key, one.value, one.headers, one.timestamp_ms)


def status_mb(line: str) -> float:
    """A line of this process's status, in MB."""
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(f"{line}:"))
    return int(found.split()[1]) * 1024 / 1e6


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def archive(directory: Path, flushes: int, messages: int) -> list[Flush]:
    writer, source = ArchiveWriter(directory, run=fab.RUN), endless(list(synthetic(ROLLOUTS)))
    seen = []
    with ThreadPoolExecutor(1) as worker:
        for _ in range(flushes):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            for one in islice(source, messages):
                writer.add(one)
            flush_s, merge_s = (worker.submit(timed, work).result() for work in (writer.flush, writer.merge))
            files = sum(1 for _ in directory.rglob("part-*.parquet"))
            seen.append(Flush(status_mb("VmRSS"), status_mb("VmHWM"), flush_s, merge_s, files))
    return seen


def table(seen: list[Flush], messages: int) -> Iterator[str]:
    """Between flushes and a flush: medians. A merge: mean and longest. Peak and files: highest."""
    names = ("messages", "resident MB", "peak MB", "flush ms", "merge ms", "longest", "files")
    yield " ".join(f"{name:>11}" for name in names)
    tenth = max(1, len(seen) // 10)
    for first in range(0, len(seen), tenth):
        part = seen[first : first + tenth]
        merges = [one.merge_s * 1e3 for one in part]
        numbers = (
            (first + len(part)) * messages,
            statistics.median(one.resident_mb for one in part),
            max(one.peak_mb for one in part),
            statistics.median(one.flush_s for one in part) * 1e3,
            statistics.mean(merges),
            max(merges),
            max(one.files for one in part),
        )
        yield " ".join(f"{number:11.0f}" for number in numbers)


def growth(seen: list[Flush]) -> str:
    """By least squares."""
    marks = ", ".join(f"{seen[mark - 1].resident_mb:.0f} MB at {mark}" for mark in MARKS if mark <= len(seen))
    late = [one.resident_mb for one in seen[len(seen) // 3 :]]
    slope = statistics.linear_regression(range(len(late)), late).slope
    return f"resident {marks}; {slope * AN_HOUR:+.1f} MB an hour of flushes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flushes", type=int, default=AN_HOUR, help="by default those of an hour")
    parser.add_argument("--messages", type=int, default=320, help="in one flush")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kat-archiver-") as directory:
        seen = archive(Path(directory), args.flushes, args.messages)
    print(*table(seen, args.messages), growth(seen), sep="\n")


if __name__ == "__main__":
    main()
