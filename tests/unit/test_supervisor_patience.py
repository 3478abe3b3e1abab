"""When the supervisor gives a service up: of its own fault, again and again, however long each life was."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import pytest

from kat_stream.config import load
from kat_stream.errors import ServiceDied
from kat_stream.runs import create_run
from kat_stream.signals import AWAY
from kat_stream.supervisor import End, Member, Patience, supervise

MANY = 1000
KILLED = -signal.SIGKILL
FAILED = End(1)
HUNG = End(KILLED, hung=True)
FROZEN = End(KILLED, hung=True, stopped=True)
SLOW = Patience(deaths=MANY)
"""Without the rule for quick deaths: here no time passes between two of them."""


@pytest.mark.parametrize("lived_s", [11.0, 60.0, 1800.0])
@pytest.mark.parametrize("end", [FAILED, End(2), End(-signal.SIGSEGV), HUNG])
def test_a_service_that_fails_ten_times_in_a_row_is_given_up_however_long_it_lived(end: End, lived_s: float) -> None:
    member = Member("trainer", Path(), SLOW)
    reasons = [member.note_death(end, lived_s) for _ in range(10)]
    assert reasons[:-1] == [None] * 9
    assert reasons[-1] is not None and reasons[-1].startswith("trainer died 10 times in a row, last ")


@pytest.mark.parametrize("end", [End(0), End(AWAY), End(KILLED), End(-signal.SIGTERM), FROZEN])
def test_ends_from_outside_are_no_failures_and_break_the_row(end: End) -> None:
    member = Member("trainer", Path(), SLOW)
    assert all(member.note_death(end, 60.0) is None for _ in range(MANY - 1))
    row = [FAILED] * 9 + [end] + [FAILED] * 9
    member = Member("trainer", Path(), SLOW)
    assert [member.note_death(one, 60.0) for one in row] == [None] * len(row)


def test_a_long_life_begins_the_row_anew() -> None:
    member = Member("trainer", Path(), SLOW)
    lives = [60.0] * 9 + [4000.0] + [60.0] * 8
    assert [member.note_death(FAILED, lived_s) for lived_s in lives] == [None] * len(lives)
    assert member.note_death(FAILED, 60.0) is not None


def test_quick_deaths_are_given_up_sooner() -> None:
    member = Member("trainer", Path())
    reasons = [member.note_death(FAILED, 0.1) for _ in range(6)]
    assert reasons[:-1] == [None] * 5
    assert reasons[-1] == "trainer died 6 times within 60 s, last exit code 1"


def test_a_service_that_hangs_in_every_life_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    _, folder = create_run(load(None, ["log.url=kafka:127.0.0.1:1", f"run.directory={tmp_path}", "run.name=hangs"]))
    patience = Patience(first_beat_s=0.05, failures=3, deaths=MANY, backoff_s=(0.05,))  # no Python starts so fast

    async def scenario() -> None:
        with anyio.fail_after(60):
            await supervise(folder, anyio.Event(), ("verifier-1",), patience)

    with pytest.raises(ServiceDied, match="verifier-1 died 3 times in a row, last hang"):
        anyio.run(scenario)
