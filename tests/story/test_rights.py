"""Whole services on a secured broker, each under a user of its own with only its rules of kat_stream/access.py: a run
goes to its end. Without one of these rules a service ends, and its error names user, operation and resource.
"""

from __future__ import annotations

import importlib
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest

from kat_stream.access import Rule, rules_of
from kat_stream.config import Config, load
from kat_stream.errors import AccessDenied, LogUnavailable
from kat_stream.log import Log, open_log
from kat_stream.observe.sources import archived_ledger
from kat_stream.runs import create_run
from kat_stream.service import Context, load_service
from tests.conftest_secured import Secured, secured
from tests.story.conftest import DEMO
from tests.unit.records import RUN, request, reward, trajectory, turn
from topics import CATALOGUE, PolicyVersion

__all__ = ["secured"]
pytestmark = [pytest.mark.kafka, pytest.mark.timeout(900)]
GRANTED, LACKING = "rights.", "less."
FLOW = ("sampler", "rollout", "verifier", "packer", "trainer", "weight_sync", "gateway", "engine", "archiver")
"""In the order in which they stop."""
SMALL = {
    "run.name": RUN,
    "run.steps": "1",
    "sampler.groups_per_step": "2",
    "sampler.group_size": "2",
    "sampler.eval_tasks": "2",
    "data.held_out": "'mend:held-out?count=2&seed=0'",
    "data.train": "'mend:train?count=10&seed=0'",
}
MISSING = {
    "sampler": ("Write", "transactional-id", ""),
    "verifier": ("Write", "topic", "rewards"),
    "packer": ("Write", "topic", "ledger"),
    "trainer": ("Write", "transactional-id", ""),
    "archiver": ("Read", "topic", "turns"),
}
"""Service -> the one right that it lacks: operation, kind, name."""


async def opened(stack: AsyncExitStack, secured: Secured, service: str, prefix: str) -> Log:
    """A log as this service's user."""
    log = open_log(f"kafka:{secured.bootstrap}", prefix=prefix, security=secured.section(f"kat-{service}"))
    stack.push_async_callback(log.close)
    await log.start()
    return log


async def lived(ctx: Context, name: str) -> bool:
    """One life of a service; False if it ended because the broker was slow: its supervisor starts it again then."""
    try:
        await load_service(name).run(ctx)
        return True
    except LogUnavailable:
        return False
    except BaseExceptionGroup as group:
        if group.split(LogUnavailable)[1] is not None:
            raise
        return False


async def run_to_its_end(secured: Secured, config: Config, run_dir: Path) -> None:
    """Every service as a task, as `run_local` runs them, but each on a log of its own."""
    async with AsyncExitStack() as stack:
        admin = await opened(stack, secured, "run", GRANTED)
        await admin.apply_topics(CATALOGUE)
        contexts, ended = {}, {name: anyio.Event() for name in FLOW}
        for name in FLOW:
            log = await opened(stack, secured, name, GRANTED)
            contexts[name] = Context(config=config, run=RUN, run_dir=run_dir, log=log, member=name)

        async def live(name: str) -> None:
            while not await lived(contexts[name], name):
                assert not contexts[name].stopping.is_set(), f"{name} never came to its end"
            ended[name].set()

        async with anyio.create_task_group() as tasks:
            for name in reversed(FLOW):
                tasks.start_soon(live, name)
            for name in FLOW:
                with anyio.fail_after(400 if name == "sampler" else 60):
                    await ended[name].wait()
                following = FLOW[FLOW.index(name) + 1 :]
                if following:
                    contexts[following[0]].stopping.set()


def new_run(folder: Path) -> tuple[Config, Path]:
    changes = [f"{key}={value}" for key, value in SMALL.items()]
    return create_run(load(DEMO, [*changes, f"run.directory='{folder}'", "log.url='kafka:secured:1'"]))


def test_a_run_of_services_with_only_their_own_rights_goes_to_its_end(secured: Secured, tmp_path: Path) -> None:
    for service in (*FLOW, "run"):
        secured.grant(rules_of(service, GRANTED))
    config, run_dir = new_run(tmp_path)
    for name in FLOW:  # here and not on the loop: an import of torch would stop the heartbeats of all
        load_service(name)
    importlib.import_module("kat_stream.engines.embedded")
    anyio.run(run_to_its_end, secured, config, run_dir)
    ledger = archived_ledger(run_dir).summary()
    assert ledger.requested == 2 * 2 + 2 * 2 == ledger.accounted
    assert sum(ledger.in_flight.values()) == 0


# --- without one right ------------------------------------------------------------------------------------------------


def missing_rule(service: str) -> Rule:
    operation, kind, name = MISSING[service]
    (rule,) = [
        rule
        for rule in rules_of(service, LACKING)
        if (rule.operation, rule.resource, rule.name) == (operation, kind, LACKING + name)
    ]
    return rule


@pytest.fixture(scope="module")
def lacking(secured: Secured, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run's records under another prefix, where each service has all rules but one."""
    for service in MISSING:
        missing = missing_rule(service)
        secured.grant(rule for rule in rules_of(service, LACKING) if rule != missing)
    secured.grant(rules_of("run", LACKING))
    anyio.run(fill, secured)
    return new_run(tmp_path_factory.mktemp("lacking"))


async def fill(secured: Secured) -> None:
    """A version, and a whole group."""
    async with AsyncExitStack() as stack:
        await (await opened(stack, secured, "run", LACKING)).apply_topics(CATALOGUE)
        log = open_log(f"kafka:{secured.inside}", prefix=LACKING)
        stack.push_async_callback(log.close)
        await log.start()
        await log.publish(PolicyVersion(run=RUN, model="m", lineage="a", number=0, path="", checksum=""))
        for sample in range(2):
            asked = request(sample=sample)
            await log.publish(trajectory(asked, turn(asked, [1, 2], [5 + sample])), reward(asked, float(sample)))


@pytest.mark.parametrize("service", MISSING)
def test_without_one_right_a_service_ends_and_names_it(
    secured: Secured, lacking: tuple[Config, Path], service: str
) -> None:
    config, run_dir = lacking
    load_service(service)  # its imports take longer than it has
    error = anyio.run(refused, secured, config, run_dir, service)
    operation, kind, name = MISSING[service]
    unseen = (operation, kind) == ("Read", "topic")  # who may not read a topic may not even see it
    assert (error.principal, error.operation) == (f"User:kat-{service}", "Describe" if unseen else operation)
    assert error.resource.startswith(f"{kind.replace('-', ' ')} {LACKING}{name}")
    assert not error.retriable


async def refused(secured: Secured, config: Config, run_dir: Path, service: str) -> AccessDenied:
    async with AsyncExitStack() as stack:
        log = await opened(stack, secured, service, LACKING)
        folder = run_dir.with_name(f"without-{service}")
        folder.mkdir()
        ctx = Context(config=config, run=RUN, run_dir=folder, log=log, member=service)
        with anyio.fail_after(180):
            return await _error_of(ctx, service)


async def _error_of(ctx: Context, service: str) -> AccessDenied:
    try:
        await load_service(service).run(ctx)
    except AccessDenied as error:
        return error
    except BaseExceptionGroup as group:
        found = group.subgroup(AccessDenied)
        assert found is not None, group
        return _first(found)
    raise AssertionError(f"{service} ended without an error")


def _first(error: BaseException) -> AccessDenied:
    if isinstance(error, BaseExceptionGroup):
        return _first(error.exceptions[0])
    assert isinstance(error, AccessDenied)
    return error
