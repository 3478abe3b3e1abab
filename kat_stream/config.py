"""Typed configuration: TOML in, frozen structs out; every key is known, documented here and checked.

Invariant: an unknown or mistyped key is a ConfigError that names the file, the key and the nearest valid one; a loaded
configuration is complete (every default is in it), so `--dry-run` prints exactly what would run.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from kat_stream.errors import ConfigError


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every section."""


class RunSection(Section, frozen=True, kw_only=True):
    name: str = ""
    """Name of the run; empty: made from the date and the seed."""
    directory: str = "runs"
    """Parent of the run's folder."""
    seed: int = 0
    steps: int = 40
    """Optimizer steps to make."""


class LogSection(Section, frozen=True, kw_only=True):
    url: str = "memory:"
    """`memory:` (one process) or `kafka:host:port[,host:port]` (one process a service)."""
    security: dict[str, str] = {}
    """aiokafka's security settings, passed through."""


class PolicySection(Section, frozen=True, kw_only=True):
    model: str = "demo"
    """Hugging Face directory of the policy to start from, or `demo` for the small one that ships with the package."""
    name: str = "policy"


class DataSection(Section, frozen=True, kw_only=True):
    train: str = "mend:train?count=4000&seed=0"
    held_out: str = "mend:held-out?count=240&seed=0"
    scaffold: str = "shell"
    """The agent that works on the tasks."""


class SamplerSection(Section, frozen=True, kw_only=True):
    group_size: int = 8
    groups_per_step: int = 8
    staleness: int = 2
    """Policy versions that may be made between the sampling of a rollout and its training."""
    temperature: float = 1.0
    max_new_tokens: int = 40
    max_turns: int = 6
    max_context: int = 1024
    rollout_timeout_s: float = 900.0
    """From the request to the agent's end, waiting included. A task's own limit should be well below."""
    eval_before: bool = True
    eval_after: bool = True
    eval_every: int = 0
    """Optimizer steps between evaluations while training goes on; 0: none."""
    eval_tasks: int = 48
    """Tasks of an evaluation while training goes on; before and after all held-out tasks are used."""


class RolloutSection(Section, frozen=True, kw_only=True):
    sandbox: str = "bwrap"
    allow_unsafe: bool = False
    """Permit a sandbox without isolation."""
    in_flight: int = 16
    """Rollouts at once in one worker."""
    attempts: int = 3
    """Tries of one rollout when our side fails."""


class VerifierSection(Section, frozen=True, kw_only=True):
    in_flight: int = 4


class GatewaySection(Section, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 0
    """Port for agents; 0: chosen at start."""
    control_port: int = 0
    """Port for workers; agents never reach it."""
    tools: str = "none"
    """Parser for tool calls in the policy's text: none | hermes."""


class EngineSection(Section, frozen=True, kw_only=True):
    urls: tuple[str, ...] = ()
    """Running SGLang servers; empty: the embedded CPU engine is started."""
    host: str = "127.0.0.1"
    port: int = 0
    max_total_tokens: int = 65536
    max_running: int = 64
    threads: int = 1
    update_mode: str = "retract"
    """How running requests live through a weight update: retract (exact) | in_place (keeps old KV) | abort."""


class TrainerSection(Section, frozen=True, kw_only=True):
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    level: str = "turn"
    """Unit of the ratio: token | turn | sequence."""
    length_exponent: float = 0.0
    """p of the turn ratio's |T|^-p: 0 (report) | 0.5 | 1 (geometric)."""
    clip_low: float = 0.3
    clip_high: float = 0.3
    dual_clip: float = 5.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    normalise_std: bool = False
    """Divide advantages by the group's standard deviation."""
    micro_batch_tokens: int = 8192
    threads: int = 1
    checkpoint_every: int = 5
    keep_checkpoints: int = 2
    keep_weights: int = 4
    step_timeout_s: float = 600.0
    """Longest wait for the groups of one step before the trainer says what it is waiting for."""


class SftSection(Section, frozen=True, kw_only=True):
    data: str = ""
    """JSON lines of conversations: {"messages": [...], "tools": [...]}."""
    out: str = ""
    """Hugging Face directory to write."""
    epochs: int = 1
    batch: int = 16
    """Conversations a step."""
    learning_rate: float = 1e-5
    warmup_steps: int = 10


class ArchiverSection(Section, frozen=True, kw_only=True):
    flush_s: float = 5.0


class MetricsSection(Section, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 0
    """/metrics of the process; 0: chosen at start."""


class Config(Section, frozen=True, kw_only=True):
    run: RunSection = RunSection()
    log: LogSection = LogSection()
    policy: PolicySection = PolicySection()
    data: DataSection = DataSection()
    sampler: SamplerSection = SamplerSection()
    rollout: RolloutSection = RolloutSection()
    verifier: VerifierSection = VerifierSection()
    gateway: GatewaySection = GatewaySection()
    engine: EngineSection = EngineSection()
    trainer: TrainerSection = TrainerSection()
    sft: SftSection = SftSection()
    archiver: ArchiverSection = ArchiverSection()
    metrics: MetricsSection = MetricsSection()


def load(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (or only defaults) and apply `a.b=value` overrides; values are TOML, bare words are strings."""
    where = str(path) if path else "defaults"
    table: dict[str, Any] = {}
    if path is not None:
        table = _read(path)
    for override in overrides:
        _apply(table, override)
    _check_keys(where, table, Config, "")
    try:
        return msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_humanise(str(error))}") from error


def dump(config: Config) -> str:
    """The complete configuration as TOML."""
    lines: list[str] = []
    for section, values in msgspec.to_builtins(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _apply(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        raise ConfigError(f"--set {override}: expected section.key=value, for example --set run.steps=20")
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target = table.setdefault(section, {})
    if not isinstance(target, dict):
        raise ConfigError(f"--set {override}: `{section}` is no section")
    target[name] = value


def _check_keys(where: str, table: Mapping[str, Any], kind: type[msgspec.Struct], prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, _all_keys() if not prefix else hints, n=1, cutoff=0.5)
            hint = f"; did you mean `{near[0] if not prefix else prefix + near[0]}`?" if near else ""
            raise ConfigError(f"{where}: unknown key `{prefix}{key}`{hint}")
        inner = hints[key]
        if isinstance(inner, type) and issubclass(inner, Section):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: `{key}` is a section, written [{key}]")
            _check_keys(where, value, inner, f"{key}.")


def _all_keys() -> list[str]:
    keys = list(get_type_hints(Config))
    return keys + [f"{name}.{key}" for name, kind in get_type_hints(Config).items() for key in get_type_hints(kind)]


def _humanise(message: str) -> str:
    text, _, path = message.rpartition(" - at `$.")
    return f"`{path.rstrip('`')}`: {text[0].lower()}{text[1:]}" if path else message


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + " }"
    return repr(value)
