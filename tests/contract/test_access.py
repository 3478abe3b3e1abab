"""A secured broker: each service works with exactly its own rights, and without them it stops with a clear error."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from kat_stream.access import SERVICES, rules_of
from kat_stream.archive import read_archive
from kat_stream.config import Config, SecuritySection
from kat_stream.errors import AccessDenied, ConfigError, LogError, LogUnavailable
from kat_stream.log import Delivered, Emit, Log, open_log, run_transform, run_work
from kat_stream.log.lag import lags
from kat_stream.service import Context, load_service
from tests.conftest_secured import USERS, Secured, secured
from tests.contract.log_records import nothing
from tests.observe_kit import small
from tests.waiting import until
from topics import GroupClosed
from topics.catalogue import CATALOGUE

__all__ = ["secured"]
pytestmark = [pytest.mark.kafka, pytest.mark.anyio]
GRANTED, BARE = "kat.", "bare."


@pytest.fixture(scope="module")
def granted(secured: Secured) -> Secured:
    """All services have their rights under `kat.` and none under `bare.`; a run lives under both."""
    secured.grant(rule for service in SERVICES for rule in rules_of(service, GRANTED))
    secured.grant(rules_of("run", BARE))
    anyio.run(fill, secured)
    return secured


async def fill(secured: Secured) -> None:
    for prefix in (GRANTED, BARE):
        log = open_log(f"kafka:{secured.bootstrap}", prefix=prefix, security=secured.section("kat-run"))
        await log.start()
        assert set(await log.apply_topics(CATALOGUE)) == {topic.name for topic in CATALOGUE}
        await log.close()
        inside = open_log(f"kafka:{secured.inside}", prefix=prefix)
        await inside.start()
        await inside.publish(*(record for record, _ in small().records))
        await inside.close()


@pytest.fixture
async def connect(granted: Secured) -> AsyncIterator[Callable[..., Any]]:
    """A started log as a service's user."""
    opened: list[Log] = []

    async def as_service(service: str, prefix: str = GRANTED) -> Log:
        section = granted.section(f"kat-{service}")
        opened.append(open_log(f"kafka:{granted.bootstrap}", prefix=prefix, security=section))
        await opened[-1].start()
        return opened[-1]

    yield as_service
    for log in opened:
        await log.close()


# --- the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"])
async def test_every_mechanism_lets_the_right_password_in(granted: Secured, mechanism: str) -> None:
    section = granted.section("kat-viewer", mechanism=mechanism)
    log = open_log(f"kafka:{granted.bootstrap}", security=section)
    await log.start()
    assert len(await log.topics()) == len(CATALOGUE)
    await log.close()


async def test_a_password_from_the_environment(granted: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAT_KAFKA_USERNAME", "kat-viewer")
    monkeypatch.setenv("KAT_KAFKA_PASSWORD", USERS["kat-viewer"])
    section = granted.section("kat-viewer", username="", password_file="")
    log = open_log(f"kafka:{granted.bootstrap}", security=section)
    await log.start()
    assert "turns" in await log.topics()
    await log.close()


async def test_a_wrong_password_is_said_and_not_shown(granted: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAT_KAFKA_PASSWORD", "wrong-but-secret")
    log = open_log(f"kafka:{granted.bootstrap}", security=granted.section("kat-packer", password_file=""))
    with pytest.raises(AccessDenied, match="User:kat-packer may not log in to this cluster") as caught:
        await log.start()
    assert "wrong-but-secret" not in str(caught.value)
    assert caught.value.retriable is False


async def test_a_foreign_certificate_is_said(granted: Secured) -> None:
    log = open_log(f"kafka:{granted.bootstrap}", security=granted.section("kat-packer", ca_file=""))
    with pytest.raises(LogError, match="TLS: .*certificate verify failed.*ca_file"):
        await log.start()


async def test_a_secured_broker_that_is_away_is_only_unavailable(granted: Secured) -> None:
    log = open_log("kafka:127.0.0.1:1", security=granted.section("kat-packer"))
    with pytest.raises(LogUnavailable, match="no Kafka answers at 127.0.0.1:1"):
        await log.start()


# --- services with their own rights -----------------------------------------------------------------------------------


def context(log: Log, service: str, tmp_path: Path, **engine: Any) -> Context:
    config = Config()
    config = msgspec.structs.replace(config, log=msgspec.structs.replace(config.log, url="kafka:secured"))
    return Context(config=config, run="demo", run_dir=tmp_path, log=log, member=f"{service}-1")


async def test_the_archiver_archives_with_its_rights(connect: Any, tmp_path: Path) -> None:
    ctx = context(await connect("archiver"), "archiver", tmp_path)
    kinds = {type(record) for record, _ in small().records}
    filled = [topic.name for topic in CATALOGUE if topic.record in kinds]

    def missing() -> set[str]:
        return set(filled) - {message.position.topic for message in read_archive(tmp_path / "archive", filled)}

    async with anyio.create_task_group() as group:
        group.start_soon(load_service("archiver").run, ctx)
        await until(lambda: not missing(), "every topic in the archive")
        ctx.stopping.set()
    assert not missing()


@pytest.mark.parametrize(("service", "topics"), [("verifier", ("trajectories",)), ("rollout", ("rollout.requests",))])
async def test_a_working_service_reads_writes_and_commits(connect: Any, service: str, topics: Any) -> None:
    log = await connect(service)
    records = [record for record, _ in small().records]
    out = [next(r for r in records if type(r) is kind) for kind in _kinds(SERVICES[service].writes)]
    seen: list[object] = []

    async def handle(delivered: Any) -> Emit:
        seen.append(delivered.record())
        return Emit(*out) if len(seen) == 1 else Emit()

    stopping, stage = anyio.Event(), f"demo.{service}-{time.time_ns()}"
    async with anyio.create_task_group() as group:
        group.start_soon(_work, log, topics, stage, service, handle, stopping)
        await until(lambda: log.committed(stage), "a commit")
        stopping.set()
    assert seen


async def _work(log: Log, topics: Any, stage: str, member: str, handler: Any, stopping: anyio.Event) -> None:
    await run_work(log, topics, group=stage, member=member, handler=handler, stopping=stopping)


def _kinds(names: tuple[str, ...]) -> list[type]:
    return [topic.record for topic in CATALOGUE if topic.name in names]


class Copy:
    """The packer's use of the log: one output for the first message."""

    def __init__(self, out: list[Any]) -> None:
        self.out = out

    def assigned(self, partition: int, remembered: Any) -> None: ...
    def revoked(self, partition: int) -> None: ...

    async def handle(self, delivered: Any) -> Emit:
        out, self.out = self.out, []
        return Emit(*out)


async def test_the_packer_transforms_with_its_rights(connect: Any) -> None:
    closed = await _transform_until_committed(await connect("packer"))
    assert closed in [delivered.record() for delivered in await read(await connect("viewer"), "groups.closed")]


async def _transform_until_committed(log: Log) -> GroupClosed:
    """The last of what it wrote."""
    records = [record for record, _ in small().records]
    out = [next(r for r in records if type(r) is kind) for kind in _kinds(("batches", "ledger"))]
    stopping, stage = anyio.Event(), f"demo.packer-{time.time_ns()}"
    closed = GroupClosed(run=out[0].run, group_id=stage)  # type: ignore[attr-defined]

    async def run() -> None:
        await run_transform(
            log,
            ("trajectories", "rewards"),
            group=stage,
            member="packer",
            handler=Copy([*out, closed]),  # type: ignore[arg-type]
            stopping=stopping,
            remember="groups.closed",
        )

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await until(lambda: log.committed(stage), "a commit")
        stopping.set()
    return closed


async def test_the_trainer_fences_publishes_and_reads_with_its_rights(connect: Any) -> None:
    from kat_stream.log.message import seal

    log = await connect("trainer")
    records = [record for record, _ in small().records]
    out = [next(r for r in records if type(r) is kind) for kind in _kinds(SERVICES["trainer"].writes)]
    writer = await log.writer("demo.trainer", group="demo.trainer")
    await writer.commit([seal(record) for record in out], {})
    await writer.close()
    for topic in SERVICES["trainer"].reads:
        assert await read(log, topic)


async def test_the_sampler_asks_and_the_gateway_records(connect: Any) -> None:
    records = [record for record, _ in small().records]
    for service in ("sampler", "gateway"):
        log = await connect(service)
        kinds = _kinds(SERVICES[service].writes)
        await log.publish(*[record for record in records if type(record) in kinds])
        for topic in SERVICES[service].reads:
            assert len(await read(log, topic)) >= sum(type(record) in _kinds((topic,)) for record in records)


async def test_the_viewer_sees_lag_and_cannot_write(connect: Any) -> None:
    log = await connect("viewer")
    assert {lag.topic for lag in await lags(log)} <= {topic.name for topic in CATALOGUE}
    assert await read(log, "turns")
    record = small().records[0][0]
    with pytest.raises(AccessDenied, match="User:kat-viewer may not Write"):
        await log.publish(record)


async def read(log: Log, topic: str) -> list[Delivered]:
    async with log.follow([topic]) as follower:
        return [delivered async for delivered in follower.catch_up(60.0)]


# --- services without -----------------------------------------------------------------------------------------------


async def test_reading_what_is_not_ours_names_user_right_and_topic(connect: Any) -> None:
    log = await connect("weight_sync")
    with pytest.raises(AccessDenied) as caught:
        await read(log, "turns")
    error = caught.value
    assert (error.principal, error.operation, error.resource) == ("User:kat-weight_sync", "Describe", "topic kat.turns")


async def test_writing_what_is_only_ours_to_read_is_refused(connect: Any) -> None:
    log = await connect("packer")
    trajectory = next(record for record, _ in small().records if type(record).__name__ == "Trajectory")
    with pytest.raises(AccessDenied) as caught:
        await log.publish(trajectory)
    error = caught.value
    assert (error.principal, error.operation, error.resource) == ("User:kat-packer", "Write", "topic kat.trajectories")


async def test_a_stage_without_rights_stops_at_once(connect: Any) -> None:
    """It neither retries for ever nor loses anything: the error ends the service, and its supervisor says so."""
    verifier, packer = await connect("verifier", BARE), await connect("packer", BARE)
    with anyio.fail_after(30):
        with pytest.raises(AccessDenied, match=r"User:kat-verifier may not \w+ topic bare\.trajectories"):
            await _work(verifier, ("trajectories",), "demo.v", "v", None, anyio.Event())
        with pytest.raises((AccessDenied, ExceptionGroup)) as caught:
            await _transform_until_committed(packer)
    assert "User:kat-packer may not" in str(_first(caught.value))


async def test_a_group_and_a_transaction_that_are_not_ours(connect: Any) -> None:
    log = await connect("weight_sync")
    with pytest.raises(AccessDenied, match=r"User:kat-weight_sync may not Write transactional id kat\.demo\.x"):
        await log.writer("demo.x", group="demo.x")
    with pytest.raises(AccessDenied, match=r"User:kat-weight_sync may not Read group kat\.demo\.w"):
        await log.join(["policy.versions"], group="demo.w", member="w", on_revoked=nothing)


@pytest.mark.parametrize("service", ["archiver", "weight_sync"])
async def test_a_whole_service_without_rights_ends_with_the_reason(connect: Any, service: str, tmp_path: Path) -> None:
    ctx = context(await connect(service, BARE), service, tmp_path)
    with anyio.fail_after(60), pytest.raises((AccessDenied, ExceptionGroup)) as caught:
        await load_service(service).run(ctx)
    error = _first(caught.value)
    assert isinstance(error, AccessDenied)
    assert error.principal == f"User:kat-{service}"
    assert error.resource.startswith("topic bare.")


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


async def test_creating_topics_needs_the_right_to(connect: Any) -> None:
    log = await connect("gateway", "new.")
    with pytest.raises(AccessDenied, match=r"User:kat-gateway may not Create topic new\."):
        await log.apply_topics(CATALOGUE[:1])


def test_a_section_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"log\.security\.username"):
        open_log("kafka:h:1", security=SecuritySection(protocol="SSL", username="x"))
