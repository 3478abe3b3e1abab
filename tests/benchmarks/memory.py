"""Whether memory is flat under load: `python -m tests.benchmarks.memory [--seconds 3600]`.

A run on a real broker, one process a service, sampled over the given time: resident memory of every service, of the
run's own process and of the broker. Leaves the samples as JSON lines (--samples), a plot (docs/memory.png) and a line a
process: slope by least squares after the warm-up, in MB/h. A process that died meanwhile begins a new line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kat_stream.log import broker
from kat_stream.supervisor import PROCESSES
from tests.chaos.system import SETTINGS, member_pid
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
NAME = "memory"
START_S, STOP_S = 300.0, 60.0
LOAD = {
    **SETTINGS,
    "run.name": NAME,
    "sampler.group_size": "8",
    "sampler.groups_per_step": "4",
    "rollout.in_flight": "8",
    "sampler.rollout_timeout_s": "300.0",
    "trainer.step_timeout_s": "600.0",
}
"""The chaos suite's endless run, with more of everything at once."""

Samples = dict[str, list[tuple[float, float]]]
"""By `member pid`: seconds since the start, resident MB."""


def rss_mb(pid: int) -> float | None:
    """None if the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(found[0].split()[1]) * 1024 / 1e6 if found else None


@contextmanager
def a_run(directory: Path) -> Iterator[dict[str, int]]:
    """A run that goes on for ever; the processes beside the services: `run` and `broker`."""
    bootstrap = broker.up(directory / "broker")
    settings = {**LOAD, "log.url": f"kafka:{bootstrap}", "run.directory": str(directory / "runs")}
    command = [sys.executable, "-m", "kat_stream.cli", "run"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    out = (directory / "run.out").open("wb")
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    run_dir = directory / "runs" / NAME
    try:
        wait_for(lambda: all(member_pid(run_dir, name) for name in PROCESSES), "every member", START_S)
        yield {"run": process.pid, "broker": broker.status(directory / "broker").pid}
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        out.close()
        broker.down(directory / "broker")


def sample(run_dir: Path, others: Mapping[str, int], seconds: float, every_s: float, kept: Path) -> Samples:
    """Look at every process every `every_s`; each look is appended to `kept` at once."""
    samples: Samples = {}
    began = time.monotonic()
    with kept.open("w") as lines:
        while (now := time.monotonic() - began) < seconds:
            pids = {**{name: member_pid(run_dir, name) for name in PROCESSES}, **others}
            for name, pid in pids.items():
                megabytes = rss_mb(pid) if pid else None
                if megabytes is not None:
                    samples.setdefault(f"{name} {pid}", []).append((now, megabytes))
                    print(json.dumps([f"{name} {pid}", round(now, 1), round(megabytes, 1)]), file=lines, flush=True)
            time.sleep(min(every_s, max(0.0, seconds - now)))
    return samples


def slope(points: list[tuple[float, float]], warm_up_s: float) -> tuple[float, float] | None:
    """Least squares after the process's own first `warm_up_s`: MB/h, and its standard error; None: too few points."""
    first = points[0][0] + warm_up_s
    late = np.array([point for point in points if point[0] >= first])
    if len(late) < 3:
        return None
    hours, megabytes = late[:, 0] / 3600, late[:, 1]
    (rate, _), covariance = np.polyfit(hours, megabytes, 1, cov="unscaled")
    residual = megabytes - np.poly1d(np.polyfit(hours, megabytes, 1))(hours)
    return float(rate), float(np.sqrt(covariance[0, 0] * (residual**2).sum() / (len(late) - 2)))


def table(samples: Samples, warm_up_s: float) -> list[str]:
    """A line a process: memory after the warm-up and at the end, slope."""
    lines = [f"{'process':<22} {'from MB':>8} {'to MB':>8} {'MB/h':>9}  (after {warm_up_s:g} s)"]
    for name, points in sorted(samples.items()):
        fitted = slope(points, warm_up_s)
        if fitted is None:
            lines.append(f"{name:<22} lived {points[-1][0] - points[0][0]:.0f} s: too short for a slope")
            continue
        late = [megabytes for at, megabytes in points if at >= points[0][0] + warm_up_s]
        lines.append(f"{name:<22} {late[0]:8.1f} {late[-1]:8.1f} {fitted[0]:9.1f} ± {fitted[1]:.1f}")
    return lines


def draw(samples: Samples, path: Path, warm_up_s: float) -> None:
    """One line a process, named in the order of their ends."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    for name, points in sorted(samples.items(), key=lambda item: -item[1][-1][1]):
        minutes, megabytes = [at / 60 for at, _ in points], [mb for _, mb in points]
        fitted = slope(points, warm_up_s)
        label = f"{name.rpartition(' ')[0]}  {fitted[0]:+.1f} MB/h" if fitted else name
        axes.plot(minutes, megabytes, linewidth=1.2, label=label)
    axes.axvline(warm_up_s / 60, color="#bbbbbb", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident memory (MB)")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--warm-up", type=float, default=600.0, help="seconds of a process's life that do not count")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "memory.png")
    parser.add_argument("--samples", type=Path, default=Path(".kat/memory.jsonl"))
    args = parser.parse_args()
    args.samples.parent.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kat-memory-") as directory, a_run(Path(directory)) as others:
        run_dir = Path(directory) / "runs" / NAME
        samples = sample(run_dir, others, args.seconds, args.every, args.samples)
        last = (Path(directory) / "run.out").read_text(errors="replace").splitlines()[-3:]
    print(*table(samples, args.warm_up), sep="\n")
    print("the run's last words:", *last, sep="\n  ")
    draw(samples, args.plot, args.warm_up)


if __name__ == "__main__":
    main()
