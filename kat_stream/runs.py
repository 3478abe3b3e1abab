"""A run's folder: its resolved configuration, its processes, and how it is found again.

    runs/NAME/config.toml        complete configuration, ports and log address included
    runs/NAME/services/*.json    one file a live service process: pid, /metrics address
    runs/NAME.targets.json       Prometheus file_sd targets made from these (its globs may not cross folders)
    runs/NAME/.lock              held by the `kat-stream run` that works on it
    runs/NAME/{checkpoints,weights,archive,blobs,logs}/

Invariant: config.toml is written once, before anything starts, and every process of the run reads it from there; one
`kat-stream run` at a time works on a folder.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec

from kat_stream.config import Config, check_training, dump, load
from kat_stream.errors import ConfigError, StorageError
from kat_stream.locks import try_lock
from kat_stream.log import Log, open_log
from kat_stream.ports import choose_port, try_port

LATEST = "latest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""It begins ids, and groups on the broker: `a.b` would be taken for the stage `b` of a run `a`."""


def create_run(config: Config) -> tuple[Config, Path]:
    """Name the run, choose free ports, write the folder. The returned configuration is complete.

    ConfigError: there is a run of this name, none can be called so, or none can train so. StorageError: no folder of
    this name can be made there.
    """
    check_training(config)
    parent = Path(config.run.directory)
    name = config.run.name or f"{time.strftime('%Y%m%d-%H%M%S')}-s{config.run.seed}"
    if not _NAME.fullmatch(name) or name == LATEST:
        raise ConfigError(f"run.name: {name!r}: expected letters, digits, - and _, and not `{LATEST}`")
    run_dir = parent / name
    try:
        config = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, name=name))
        config = choose_ports(config)
        run_dir.mkdir(parents=True, exist_ok=True)
        is_new = _write_first(run_dir / "config.toml", dump(config))
    except OSError as error:
        raise StorageError(f"run.name: no folder {run_dir} can be made ({error.strerror or error})") from error
    if not is_new:
        raise ConfigError(f"run.name: {run_dir} exists; `kat-stream run --resume {run_dir}` goes on with it")
    return config, run_dir


def reopen_run(run_dir: Path) -> Config:
    """The configuration of an existing run, with fresh ports where the old ones are taken."""
    config = load_run(run_dir)
    if not config.run.name:
        raise ConfigError(f"{run_dir}/config.toml: no run.name: it is not the configuration that a run has left")
    check_training(config)
    config = choose_ports(config, moving=True)
    _write(run_dir / "config.toml", dump(config))
    return config


@contextmanager
def worked_on(run_dir: Path) -> Iterator[None]:
    """By this process alone, until it ends, however it ends.

    ConfigError if another one does. StorageError if the folder cannot be written.
    """
    try:
        lock = (run_dir / ".lock").open("a+")
    except OSError as error:
        raise StorageError(f"{run_dir}: cannot be written ({error.strerror or error})") from error
    with lock:
        if not try_lock(lock.fileno()):
            raise ConfigError(f"{run_dir}: another `kat-stream run` works on it")
        yield


def load_run(run_dir: Path) -> Config:
    return load(run_dir / "config.toml")


def find_run(name: str, parent: Path = Path("runs")) -> Path:
    """A folder, a name under `runs/`, or `latest`."""
    candidates = list(dict.fromkeys([Path(name), parent / name]))
    if name == LATEST:
        candidates = sorted(parent.glob("*/config.toml"), key=lambda path: path.stat().st_mtime, reverse=True)
        candidates = [path.parent for path in candidates[:1]]
    for candidate in candidates:
        with suppress(OSError):  # a name that no file can have
            if (candidate / "config.toml").is_file():
                return candidate
    raise ConfigError(f"no run `{name}`: looked for config.toml in {', '.join(map(str, candidates)) or parent}")


def open_run_log(config: Config, run_dir: Path) -> Log:
    """The log of a run, with the store of its large values: the configured one, or the run's own folder."""
    return open_log(
        config.log.url,
        security=config.log.security,
        blobs=blobs_url(config, run_dir),
        blob_limit_bytes=config.blobs.limit_bytes,
        static_member=config.log.static_member,
    )


def blobs_url(config: Config, run_dir: Path) -> str:
    return config.blobs.url or f"file:{run_dir.absolute()}/blobs"


def choose_ports(config: Config, *, moving: bool = False) -> Config:
    """Replace every port that is 0 and, if `moving`, every one that somebody else has taken since."""
    gateway, engine = config.gateway, config.engine
    chosen: set[int] = set()

    def port(host: str, known: int, key: str) -> int:
        found = _port(host, known, key, moving, chosen)
        chosen.add(found)
        return found

    gateway = msgspec.structs.replace(
        gateway,
        port=port(gateway.host, gateway.port, "gateway.port"),
        control_port=port(gateway.host, gateway.control_port, "gateway.control_port"),
        more=tuple(
            (port(gateway.host, data, "gateway.more"), port(gateway.host, control, "gateway.more"))
            for data, control in gateway.more
        ),
    )
    if not engine.urls:
        engine = msgspec.structs.replace(engine, port=port(engine.host, engine.port, "engine.port"))
    return msgspec.structs.replace(config, gateway=gateway, engine=engine)


@contextmanager
def registered(run_dir: Path, member: str, metrics_url: str) -> Iterator[None]:
    """This process appears in the run's folder while it lives."""
    path = run_dir / "services" / f"{member}.json"
    path.parent.mkdir(exist_ok=True)
    here = {"member": member, "host": socket.gethostname(), "pid": os.getpid()}
    _write(path, json.dumps({**here, "metrics": metrics_url, "started": time.time()}))
    write_targets(run_dir)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        write_targets(run_dir)


def seems_live(run_dir: Path) -> bool:
    """Whether a service works for the run, for all that is known here."""
    return bool(_services(run_dir))


def write_targets(run_dir: Path) -> None:
    """Prometheus `file_sd_configs` targets of the live services.

    Services come and go beside this one without a lock: who wrote last looks once more, so what stays is what is true.
    """
    engines = [("engine-http", address) for address in _engine_addresses(load_run(run_dir))]
    written: list[tuple[str, str]] | None = None
    while (services := _services(run_dir)) != written:
        addresses = [*services, *engines]
        targets = [{"targets": [where], "labels": {"service": who, "run": run_dir.name}} for who, where in addresses]
        _write(targets_file(run_dir), json.dumps(targets, indent=1))
        written = services


def _services(run_dir: Path) -> list[tuple[str, str]]:
    """Member and /metrics address of each live service; the file of one that was killed here is passed over."""
    found = []
    for path in sorted((run_dir / "services").glob("*.json")):
        with suppress(FileNotFoundError):  # it has ended since it was listed
            service = json.loads(path.read_text())
            if not _was_killed(service):
                found.append((service["member"], _address(service["metrics"])))
    return found


def _was_killed(service: dict[str, Any]) -> bool:
    """Of another machine's processes nothing is known."""
    return service.get("host") == socket.gethostname() and not Path(f"/proc/{service['pid']}").exists()


def _engine_addresses(config: Config) -> list[str]:
    """Where engines answer /metrics themselves, under SGLang's names."""
    urls = config.engine.urls or (f"http://{config.engine.host}:{config.engine.port}",)
    return [_address(url) for url in urls]


def _address(url: str) -> str:
    return url.partition("//")[2].partition("/")[0]


def targets_file(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.targets.json")


def _port(host: str, port: int, key: str, moving: bool, chosen: Container[int]) -> int:
    try:
        if port:
            with suppress(OSError) if moving else nullcontext():
                return try_port(host, port)
        return choose_port(host, but=chosen)
    except OSError as error:
        raise ConfigError(f"{key}: {host}:{port} cannot be used ({error.strerror})") from error


def _write(path: Path, text: str) -> None:
    _beside(path, text).replace(path)


def _write_first(path: Path, text: str) -> bool:
    """False, and nothing written, if anybody has written it before, be it at this very moment."""
    temporary = _beside(path, text)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _beside(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # in containers every service has the same pid
    temporary.write_text(text, encoding="utf-8")
    return temporary
