"""Clocks that jump: whatever time a message says, it is shown on one line, and the account does not depend on it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kat_stream.observe.ledger import Ledger
from kat_stream.observe.state import RunState
from kat_stream.observe.tail import json_line, line
from tests import observe_kit as kit

TIMES = [-1, 0, -(1 << 62), (1 << 62), kit.START_MS - 10**10, kit.START_MS + 10**10]


@pytest.mark.parametrize("timestamp_ms", TIMES)
def test_any_time_is_shown_on_one_line(timestamp_ms: int) -> None:
    for delivered in kit.small().delivered():
        late = replace(delivered, timestamp_ms=timestamp_ms)
        assert "\n" not in line(late) and "\n" not in json_line(late)
    assert line(late).startswith("--:--:--.---") == (not 0 <= timestamp_ms < 253_402_300_800_000)


def test_an_account_does_not_depend_on_clocks() -> None:
    run = kit.small()
    ledger, state = Ledger(), RunState(run=kit.RUN)
    for at, (record, _) in enumerate(run.records):
        ledger.apply(record)
        state.apply(record, TIMES[at % len(TIMES)])
    summary = ledger.summary()
    assert summary.requested == summary.accounted == sum(run.expected.values())
    assert state.steps_done == 2
