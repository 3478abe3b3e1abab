"""The account closes, whatever the order and the repetition of the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from kat_stream.observe.heads import HEADS, Head, head_of
from kat_stream.observe.ledger import Ledger
from kat_stream.observe.lineages import surviving
from tests import observe_kit as fab
from tests.observe_kit import FabricatedRun
from topics import GroupMember, LedgerEntry, Record


def account(records: Sequence[Record | Head]) -> Ledger:
    ledger = Ledger()
    for record in records:
        ledger.apply(record)
    return ledger


def counted(ledger: Ledger) -> Counter[tuple[str, str]]:
    return Counter((fate.state, fate.reason) for fate in ledger.fates().values())


def draw_run(data: st.DataObject) -> FabricatedRun:
    run = fab.FabricatedRun()
    groups = data.draw(st.lists(st.lists(st.sampled_from(fab.TRAIN_FATES), min_size=1, max_size=4), max_size=4))
    for number, fates in enumerate(groups, 1):
        # In a group that is still open nobody is packed yet, so no member has a later fate.
        early = (*fab.OPEN, "failed rollout", "failed entry", "failed grading", "cancelled")
        still_open = [fate for fate in fates if fate in early]
        run.train_group(number, still_open if set(fates) & set(fab.OPEN) else fates)
    run.evaluation(0, data.draw(st.lists(st.sampled_from(("passed", "not passed", "failed grading", "requested")))))
    return run


@settings(max_examples=60)
@given(data=st.data())
def test_any_interleaving_and_repetition_gives_the_same_closed_account(data: st.DataObject) -> None:
    run = draw_run(data)
    records = [record for record, _ in run.records]
    repeated = records + data.draw(st.lists(st.sampled_from(records), max_size=20) if records else st.just([]))
    ledger = account(data.draw(st.permutations(repeated)))
    assert counted(ledger) == run.expected
    assert ledger.check() == []
    summary = ledger.summary()
    assert summary.requested == summary.accounted == run.expected.total()


def test_each_number_names_its_rollouts(small_run: FabricatedRun) -> None:
    ledger = account([record for record, _ in small_run.records])
    assert ledger.rollouts("trained") == sorted(small_run.by_fate["trained"])
    assert ledger.rollouts("failed", "VerifierError") == small_run.by_fate["failed grading"]
    assert ledger.rollouts("in flight", "graded") == small_run.by_fate["graded"]
    summary = ledger.summary()
    assert summary.filtered == {"equal_rewards": 2}
    assert summary.failed == {"SandboxUnavailable": 1, "VerifierError": 1}
    assert summary.in_flight == {"requested": 1, "graded": 1}
    assert (summary.trained, summary.stale, summary.cancelled, summary.evaluated) == (4, 2, 1, 7)


def test_a_step_of_an_abandoned_lineage_does_not_count(small_run: FabricatedRun) -> None:
    first, second = "demo-t000001", "demo-t000002"
    resumed = fab.step(2, [second], [], [f"{second}-0", f"{second}-1"], lineage="b", unix_s=fab.START_MS / 1000 + 99)
    ledger = account([*(record for record, _ in small_run.records), resumed])
    fates = ledger.fates()
    assert (fates[f"{first}-0"].state, fates[f"{first}-0"].step) == ("trained", 1)
    assert (fates[f"{second}-0"].state, fates[f"{second}-0"].step) == ("stale", 2)
    assert ledger.check() == []


def test_a_lineage_that_goes_further_back_than_the_one_before_it_undoes_the_steps_of_all() -> None:
    """Newer checkpoints were damaged: `b` went on from step 2, `c` after it from step 1."""
    steps = [fab.step(n, [], [f"a{n}"]) for n in (1, 2, 3)]
    steps.append(fab.step(3, [], ["b3"], lineage="b", unix_s=fab.START_MS / 1000 + 10))
    steps.append(fab.step(2, [], ["c2"], lineage="c", unix_s=fab.START_MS / 1000 + 20))
    for order in (steps, steps[::-1]):
        assert [step.trained for step in surviving(order)] == [("a1",), ("c2",)]


def test_a_rollout_of_an_undone_step_is_in_flight_until_it_is_trained_again(small_run: FabricatedRun) -> None:
    resumed = fab.step(2, ["demo-t000003"], [], lineage="b", unix_s=fab.START_MS / 1000 + 99)
    ledger = account([*(record for record, _ in small_run.records), resumed])
    assert ledger.fates()["demo-t000002-0"].state == "in flight"
    assert ledger.fates()["demo-t000002-0"].reason == "packed"


def test_the_newest_attempt_counts() -> None:
    asked = fab.request("demo-t000001", 0, 1)
    first = fab.trajectory(asked, "infra_error", "SandboxUnavailable", attempt=1)
    second = fab.trajectory(asked, attempt=2)
    for order in ([asked, first, second], [second, first, asked]):
        assert account(order).summary().in_flight == {"finished": 1}


def test_a_trajectory_stands_in_for_a_request_that_retention_removed() -> None:
    asked = fab.request("demo-t000001", 0, 1)
    ledger = account([fab.trajectory(asked), fab.reward(asked, 1.0)])
    assert ledger.summary().in_flight == {"graded": 1}
    assert ledger.check() == []


def test_the_word_of_the_group_outranks_that_of_the_grading() -> None:
    """The verifier failed at one member, and the group was given up for want of another."""
    asked = fab.request("demo-t000001", 0, 2)
    lost = GroupMember(rollout_id=asked.rollout_id, fate="failed", reason="incomplete")
    records = [asked, fab.trajectory(asked), fab.reward(asked, 0.0, "failed"), fab.batch(asked.group_id, [lost])]
    for order in (records, records[::-1]):
        assert account(order).summary().failed == {"incomplete": 1}


def test_what_was_never_requested_is_reported() -> None:
    ledger = account([fab.reward(fab.request("demo-t000009", 0, 1), 1.0)])
    assert ledger.summary().requested == 0
    assert ledger.check() == ["demo-t000009-0: has a fate but was never requested"]


def test_a_rollout_in_two_steps_of_one_lineage_is_reported() -> None:
    asked = fab.request("demo-t000001", 0, 1)
    steps = [fab.step(n, ["demo-t000001"], [asked.rollout_id]) for n in (1, 2)]
    words = [one for n in (1, 2) for one in fab.said(n, [asked], [asked.rollout_id], [])]
    assert account([asked, *steps, *words]).check() == ["demo-t000001-0: trained in steps [1, 2]"]


def test_two_accounts_that_disagree_are_reported(small_run: FabricatedRun) -> None:
    """Each kind of contradiction between the topic `ledger` and the stages' own records, with its rollout."""
    one, two, three = (fab.request(f"demo-t00000{n}", 0, 2) for n in (1, 2, 3))
    records = [record for record, _ in small_run.records]
    mute = [r for r in records if not (isinstance(r, LedgerEntry) and r.rollout_id == one.rollout_id)]
    assert account(mute).check() == [
        "demo-t000001-0: train.steps says trained in step 1 of lineage a, ledger does not",
        "demo-t000001-0: batches says packed, ledger says nothing",
    ]
    invented = [*records, *fab.said(9, [two], [two.rollout_id], [])]
    assert account(invented).check() == [
        "demo-t000002-0: ledger says trained in step 9 of lineage a, train.steps does not"
    ]
    other = [r for r in records if not (isinstance(r, LedgerEntry) and r.rollout_id == three.rollout_id)]
    other.append(fab.entry(three, "stale", stage="packer"))
    assert account(other).check() == ["demo-t000003-0: ledger says stale, batches says filtered"]


def test_a_ledger_topic_that_was_compacted_still_agrees(small_run: FabricatedRun) -> None:
    """Only the newest entry of each rollout is left."""
    newest = {r.rollout_id: r for r, _ in small_run.records if isinstance(r, LedgerEntry)}
    rest = [record for record, _ in small_run.records if not isinstance(record, LedgerEntry)]
    assert account([*rest, *newest.values()]).check() == []


def test_heads_give_the_same_account_as_records(small_run: FabricatedRun) -> None:
    heads = [head_of(one) for one in small_run.delivered() if one.position.topic in HEADS]
    assert None not in heads
    ledger = account([head for head in heads if head is not None])
    assert ledger.fates() == account([record for record, _ in small_run.records]).fates()
    assert ledger.check() == []
