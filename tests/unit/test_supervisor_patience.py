"""When the supervisor gives a service up: of its own fault, again and again, however long each life was."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from kat_stream.signals import AWAY
from kat_stream.supervisor import Member, Patience

MANY = 1000
SLOW = Patience(deaths=MANY)
"""Without the rule for quick deaths: here no time passes between two of them."""


@pytest.mark.parametrize("lived_s", [11.0, 60.0, 1800.0])
@pytest.mark.parametrize("code", [1, 2, -signal.SIGSEGV])
def test_a_service_that_fails_ten_times_in_a_row_is_given_up_however_long_it_lived(code: int, lived_s: float) -> None:
    member = Member("trainer", Path(), SLOW)
    reasons = [member.note_death(code, lived_s) for _ in range(10)]
    assert reasons[:-1] == [None] * 9
    assert reasons[-1] is not None and reasons[-1].startswith("trainer died 10 times in a row, last ")


@pytest.mark.parametrize("code", [0, AWAY, -signal.SIGKILL, -signal.SIGTERM])
def test_ends_from_outside_are_no_failures_and_break_the_row(code: int) -> None:
    member = Member("trainer", Path(), SLOW)
    assert all(member.note_death(code, 60.0) is None for _ in range(MANY - 1))
    row = [1] * 9 + [code] + [1] * 9
    member = Member("trainer", Path(), SLOW)
    assert [member.note_death(one, 60.0) for one in row] == [None] * len(row)


def test_a_long_life_begins_the_row_anew() -> None:
    member = Member("trainer", Path(), SLOW)
    lives = [60.0] * 9 + [4000.0] + [60.0] * 8
    assert [member.note_death(1, lived_s) for lived_s in lives] == [None] * len(lives)
    assert member.note_death(1, 60.0) is not None


def test_quick_deaths_are_given_up_sooner() -> None:
    member = Member("trainer", Path())
    reasons = [member.note_death(1, 0.1) for _ in range(6)]
    assert reasons[:-1] == [None] * 5
    assert reasons[-1] == "trainer died 6 times within 60 s, last exit code 1"
