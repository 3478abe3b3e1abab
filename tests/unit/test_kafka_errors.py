"""aiokafka's errors as ours: what may be well later is LogUnavailable, however aiokafka wrapped it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState

from kat_stream.errors import DataError, FencedError, LogError, LogUnavailable
from kat_stream.log.kafka_client import stopped, translated

PASSING = [
    kafka.NotCoordinatorForGroupError("w"),
    kafka.GroupCoordinatorNotAvailableError(),
    kafka.GroupLoadInProgressError(),
    kafka.NodeNotReadyError("1"),
    kafka.RequestTimedOutError(),
    # as its background tasks give them: the text is all that is left
    kafka.KafkaError(f"Unexpected error during coordination {kafka.NotCoordinatorForGroupError()!r}"),
    kafka.KafkaError(repr(kafka.GroupCoordinatorNotAvailableError())),
    TimeoutError(),
]
FOR_GOOD = [
    kafka.KafkaError("Unexpected error during coordination KeyError('x')"),
    kafka.UnknownError(),
    kafka.UnsupportedVersionError(),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_passes_is_unavailable_and_retriable(error: BaseException) -> None:
    with pytest.raises(LogUnavailable, match="committing") as caught, translated("committing"):
        raise error
    assert caught.value.retriable
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", FOR_GOOD, ids=repr)
def test_what_stays_is_not_retried(error: BaseException) -> None:
    with pytest.raises(LogError) as caught, translated("committing"):
        raise error
    assert not caught.value.retriable


def test_who_lost_partitions_is_fenced_and_what_is_too_large_is_bad_data() -> None:
    with pytest.raises(FencedError), translated("committing"):
        raise kafka.CommitFailedError()
    with pytest.raises(DataError), translated("writing"):
        raise kafka.MessageSizeTooLargeError()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (kafka.KafkaConnectionError("nobody"), "opening: KafkaConnectionError: nobody"),
        (kafka.NotLeaderForPartitionError(), "opening: [Error 6] NotLeaderForPartitionError"),
        (TimeoutError(), "opening: TimeoutError"),
        (TimeoutError("slow"), "opening: TimeoutError slow"),
    ],
)
def test_what_is_wrong_is_named_once(error: BaseException, said: str) -> None:
    with pytest.raises(LogUnavailable) as caught, translated("opening"):
        raise error
    assert str(caught.value) == said


async def _looks_up_a_coordinator() -> None:
    await AIOKafkaClient().coordinator_lookup(CoordinationType.TRANSACTION, "kat.t.0")


async def _opens_a_writer() -> None:
    await AIOKafkaProducer(transactional_id="kat.t.0")._sender.start()


async def _sends_in_the_background() -> None:
    await AIOKafkaProducer(transactional_id="kat.t.0")._sender._sender_routine()


async def _joins_a_group() -> None:
    subscription = SubscriptionState()
    subscription.subscribe({"kat.turns"})
    subscription.register_fetch_waiters(set())
    await GroupCoordinator(AIOKafkaClient(), subscription, group_id="kat.g")._coordination_task


@pytest.mark.anyio
@pytest.mark.parametrize("step", [_looks_up_a_coordinator, _opens_a_writer, _sends_in_the_background, _joins_a_group])
async def test_a_broker_that_names_no_nodes_yet_is_away(step: Callable[[], Awaitable[None]]) -> None:
    """aiokafka asserts that there are some; a service that dies of it has exit code 1 and not AWAY."""
    with pytest.raises(LogUnavailable, match="opening") as caught, translated("opening"):
        await step()
    met = (caught.value.__cause__, caught.value.__cause__ and caught.value.__cause__.__cause__)
    assert any(isinstance(error, AssertionError) for error in met)


def test_any_other_broken_invariant_stays_one() -> None:
    with pytest.raises(AssertionError, match="something else"), translated("opening"):
        raise AssertionError("something else")


@pytest.mark.anyio
async def test_closing_does_not_fail_for_what_a_background_task_met() -> None:
    closed = False

    async def stop() -> None:
        nonlocal closed
        closed = True
        raise kafka.NotCoordinatorForGroupError("w")

    await stopped(stop())
    assert closed
