"""Weight sync before engines that fail at the worst moment: none stays paused, none gets weights nobody published."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from aiohttp import web

from consumers import weight_sync
from consumers.weight_sync import WeightSync
from kat_stream.config import load
from kat_stream.errors import CheckpointError
from kat_stream.log import MemoryLog
from kat_stream.service import Context
from kat_stream.training.publication import weights_checksum
from tests.waiting import until
from topics import CATALOGUE, PolicyVersion

pytestmark = pytest.mark.anyio
SECONDS = 30.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"RETRY_S": 0.01, "LOOK_AGAIN_S": 0.01, "RESUME_S": 0.5}.items():
        monkeypatch.setattr(weight_sync, name, seconds)


class Engine:
    """What weight sync sees of an engine; `fault` befalls the first resume after a pause: reset | 503 | slow."""

    def __init__(self) -> None:
        self.version, self.paused, self.pauses, self.loaded = "a.0", False, 0, [""]
        self.fault = ""
        self.silent_pause = False
        """The pause takes effect, but its answer never comes."""

    async def pause(self, _: web.Request) -> web.Response:
        self.paused = True
        self.pauses += 1
        if self.silent_pause:
            await anyio.sleep_forever()
        return web.Response()

    async def update(self, http: web.Request) -> web.Response:
        self.version = (await http.json())["weight_version"]
        self.loaded.append(self.version)
        return web.Response()

    async def resume(self, http: web.Request) -> web.Response:
        fault, self.fault = (self.fault, "") if self.pauses else ("", self.fault)
        if fault == "reset":
            assert http.transport is not None
            http.transport.abort()
        elif fault == "slow":
            await anyio.sleep_forever()
        if not fault:
            self.paused = False
        return web.Response(status=503 if fault else 200)

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": "", "weight_version": self.version})

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        app = web.Application()
        for path, handler in {
            "/pause_generation": self.pause,
            "/update_weights_from_disk": self.update,
            "/continue_generation": self.resume,
        }.items():
            app.router.add_post(path, handler)
        app.router.add_get("/model_info", self.info)
        app.router.add_get("/health", self.health)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield site.name
        finally:
            await runner.cleanup()


def published(number: int, path: Path = Path("nowhere"), checksum: str = "") -> PolicyVersion:
    return PolicyVersion(run="r", model="m", lineage="a", number=number, path=str(path), checksum=checksum)


@asynccontextmanager
async def synced(tmp_path: Path, engine: Engine) -> AsyncIterator[Context]:
    """The service at work on one engine; it is stopped at the end of the block, and then has ended."""
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    async with engine.listening() as url:
        config = load(None, [f'engine.urls=["{url}"]'])
        ctx = Context(config=config, run="r", run_dir=tmp_path, log=log, member="weight_sync")
        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as group:
                group.start_soon(WeightSync().run, ctx)
                yield ctx
                ctx.stopping.set()


@pytest.mark.parametrize("fault", ["reset", "503", "slow"])
async def test_an_engine_whose_resume_failed_is_resumed_again(tmp_path: Path, fault: str) -> None:
    engine = Engine()
    engine.fault = fault
    async with synced(tmp_path, engine) as ctx:
        await ctx.log.publish(published(1))
        await until(lambda: engine.version == "a.1" and not engine.fault)
        await until(lambda: not engine.paused)
    assert (engine.pauses, engine.loaded) == (1, ["", "a.1"])


async def test_a_service_that_is_stopped_while_it_pauses_leaves_no_engine_paused(tmp_path: Path) -> None:
    engine = Engine()
    engine.silent_pause = True
    async with synced(tmp_path, engine) as ctx:
        await ctx.log.publish(published(1))
        await until(lambda: engine.paused)
    assert not engine.paused


async def test_an_engine_that_an_earlier_life_left_paused_is_resumed_at_start(tmp_path: Path) -> None:
    engine = Engine()
    engine.paused = True
    async with synced(tmp_path, engine):
        await until(lambda: not engine.paused)
    assert (engine.paused, engine.pauses, engine.loaded) == (False, 0, [""])


def _weights(directory: Path, content: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(content)
    return directory


async def test_weights_on_their_way_are_loaded_when_they_are_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, path = Engine(), _weights(tmp_path / "a.1", b"whole")
    version = published(1, path, weights_checksum(path))
    half = weights_checksum(_weights(path, b"who"))
    async with synced(tmp_path, engine) as ctx:
        await ctx.log.publish(version)
        await until(lambda: "looking again" in caplog.text)
        assert half in caplog.text and version.checksum in caplog.text
        assert (engine.version, engine.pauses) == ("a.0", 0)
        _weights(path, b"whole")
        await until(lambda: engine.version == "a.1" and not engine.paused)


async def test_wrong_weights_give_way_to_the_next_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, path = Engine(), _weights(tmp_path / "a.2", b"good")
    async with synced(tmp_path, engine) as ctx:
        await ctx.log.publish(published(1, tmp_path / "gone", "0" * 64))
        await until(lambda: "looking again" in caplog.text)
        await ctx.log.publish(published(2, path, weights_checksum(path)))
        await until(lambda: engine.version == "a.2" and not engine.paused)
    assert engine.loaded == ["", "a.2"]


async def test_weights_that_stay_wrong_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sync, "WEIGHTS_S", 0.05)
    engine, path = Engine(), _weights(tmp_path / "a.1", b"other")
    with pytest.raises(ExceptionGroup) as caught:
        async with synced(tmp_path, engine) as ctx:
            await ctx.log.publish(published(1, path, "0" * 64))
            await anyio.sleep_forever()
    assert caught.group_contains(CheckpointError, match=f"{weights_checksum(path)}, published was {'0' * 64}")
    assert (engine.version, engine.pauses) == ("a.0", 0)
