"""A fixed 500 of the malformed records that `make fuzz` makes 10,000 of."""

from tests.fuzz.run import run


def test_500_malformed_records_break_no_stage_and_stop_no_good_group() -> None:
    result = run(500, seed=4)
    assert result.problems == ()
    assert result.packed_groups == result.good_groups == 20
    assert result.dead_letters > 20 and result.unreadable > 100
