"""The cap on dead letters against a plain count: only what its window holds counts, whatever came before."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.errors import TooManyDeadLetters
from kat_stream.log import dead_letter_cap
from kat_stream.log.dead_letter_cap import DeadLetterCap, DeadLetterLimit

LIMIT = DeadLetterLimit(most=2, share=0.5, window_s=10.0)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 4, 11]), st.booleans()), max_size=40))
def test_one_too_many_is_the_larger_share_and_above_the_most_of_a_window(events: list[tuple[int, bool]]) -> None:
    cap, clock, seen = DeadLetterCap(LIMIT), Clock(), list[tuple[float, bool]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead_letter_cap, "time", clock)
        for gap, dead in events:
            clock.now += gap
            seen.append((clock.now, dead))
            window = [one for at, one in seen if at >= clock.now - LIMIT.window_s]
            too_many = sum(window) > LIMIT.most and sum(window) / len(window) > LIMIT.share
            if not dead:
                cap.handled()
                continue
            with pytest.raises(TooManyDeadLetters, match="newest because: no use") if too_many else nullcontext():
                cap.bury("s", "no use")
