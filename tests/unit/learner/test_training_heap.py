"""A learner's heap: what one step frees, later ones have without a page fault."""

from __future__ import annotations

import subprocess
import sys

STEPS = """
import resource, sys, threading, torch
from kat_stream.training.heap import keep_freed
if sys.argv[1] == "kept":
    assert keep_freed()
torch.set_num_threads(1)
narrow = torch.ones(2000, 128, requires_grad=True)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = narrow
    for _ in range(4):
        x = torch.nn.functional.silu(x.repeat(1, 3))[:, :128] * 0.5
    x.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def measure():
    print(sum([faults() for _ in range(120)][60:]))
measure()
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


def faults(how: str) -> list[int]:
    """Page faults of steps that have the heap of those before: in the main thread, and in another.

    Of late steps: how a kept heap is cut up differs between processes, and it grows a little until it fits.
    """
    command = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return [int(line) for line in done.stdout.split()]


def test_what_a_step_frees_is_there_for_later_ones() -> None:
    given_back, kept = faults("given back"), faults("kept")
    assert all(4 * few < many for few, many in zip(kept, given_back, strict=True)), (kept, given_back)
