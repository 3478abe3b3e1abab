"""What the watch makes of what it has seen."""

from pathlib import Path

from tests.chaos.watch import Watch


def test_the_longest_silence_begins_at_the_blow_or_at_a_step_after_it() -> None:
    watch = Watch("", Path(), stepped=[1.0, 90.0, 103.0, 110.0, 112.0])
    assert watch.longest_silence(100.0) == 7.0
    assert watch.longest_silence(102.0) == 7.0
    assert watch.longest_silence(80.0) == 13.0
    assert watch.longest_silence(91.0) == 12.0
