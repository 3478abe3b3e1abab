"""aiokafka's errors as ours: what may be well later is LogUnavailable, however aiokafka wrapped it."""

from __future__ import annotations

import pytest
from aiokafka import errors as kafka

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


@pytest.mark.anyio
async def test_closing_does_not_fail_for_what_a_background_task_met() -> None:
    closed = False

    async def stop() -> None:
        nonlocal closed
        closed = True
        raise kafka.NotCoordinatorForGroupError("w")

    await stopped(stop())
    assert closed
