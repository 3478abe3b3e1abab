"""Typed configuration: TOML in, frozen structs out; every key is known, documented here and checked.

Invariant: an unknown or mistyped key is a ConfigError that names the file, the key and the nearest valid one; a loaded
configuration is complete (every default is in it), so `--dry-run` prints exactly what would run.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec

from kat_stream.errors import ConfigError
from kat_stream.rl.settings import (
    Aggregation,
    ClipBand,
    Denominator,
    DistillationConfig,
    Divergence,
    Level,
    MaskName,
    PenaltyConfig,
    RatioConfig,
)


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


class SecuritySection(Section, frozen=True, kw_only=True):
    """Passwords are not among these: they come from `password_file` or from KAT_KAFKA_PASSWORD."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"] = "SCRAM-SHA-512"
    username: str = ""
    """Empty: KAT_KAFKA_USERNAME, so that each service may have its own."""
    password_file: str = ""
    ca_file: str = ""
    """PEM of the authority that signed the brokers' certificates; empty: the system's."""
    cert_file: str = ""
    """PEM of this client's own certificate, where brokers ask for one."""
    key_file: str = ""


class LogSection(Section, frozen=True, kw_only=True):
    url: str = "memory:"
    """`memory:` (one process) or `kafka:host:port[,host:port]` (one process a service)."""
    security: SecuritySection = SecuritySection()
    dead_letters_most: int = 20
    """A stage stops once more than so many messages of the window are dead letters, ..."""
    dead_letters_share: float = 0.5
    """... and more than this share of all that it handled in it."""
    dead_letters_window_s: float = 60.0


class BlobsSection(Section, frozen=True, kw_only=True):
    url: str = ""
    """Where values too large for the log lie: `file:DIRECTORY` or `s3://BUCKET/PREFIX`; empty: the run's own folder."""
    limit_bytes: int = 900_000
    """Values over this go there; a broker takes 1 MiB by default."""


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
    scaffold: dict[str, float] = {}
    """Agents and their weights, as in {codex = 1, shell = 3}: the members of each group are shared out among them, and
    compared with those of their own agent. Empty: all run under data.scaffold."""
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
    tools: str = "auto"
    """How the policy writes tool calls: auto (as its chat template shows) | none | hermes | qwen3-coder | llama3 |
    deepseek | glm | kimi."""


class EngineSection(Section, frozen=True, kw_only=True):
    urls: tuple[str, ...] = ()
    """Running SGLang servers; empty: the embedded CPU engine is started."""
    host: str = "127.0.0.1"
    port: int = 0
    max_total_tokens: int = 65536
    max_running: int = 64
    threads: int = 1
    update_mode: Literal["abort", "retract", "in_place"] = "retract"
    """How running requests live through a weight update: retract (exact) | in_place (keeps old KV) | abort."""


class TrainerSection(Section, frozen=True, kw_only=True):
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    loss: str = "turn_ratio"
    """See: kat-stream losses list."""
    level: Level = "turn"
    """Unit of the ratio: token | turn | sequence."""
    length_exponent: float = 0.0
    """p of the turn ratio's |T|^-p: 0 (report) | 0.5 | 1 (geometric)."""
    clip_low: float = 0.3
    clip_high: float = 0.3
    clip_band: ClipBand = "constant"
    """constant | sqrt_length: bounds of a turn of T tokens to the power sqrt(T), as noise grows."""
    dual_clip: float = 5.0
    denominator: Denominator = "rollout"
    """pi_old of the ratio: rollout (the behaviour log-probs) | train (the learner's own before the step)."""
    mask: MaskName = "icepop"
    """Tokens on which learner and engine disagree: icepop | truncated | token | unit | none."""
    mask_low: float = 0.5
    mask_high: float = 5.0
    """Band of pi_train / pi_rollout; `unit` wants a narrow one, such as 0.999 .. 1.002."""
    advantage: Literal["group_mean", "group_std", "leave_one_out"] = "group_mean"
    """Baseline of a rollout's reward, over the group's rollouts with the same scaffold."""
    aggregation: Aggregation = "trajectory"
    """trajectory (turns of a trajectory share its weight) | global (every unit of the ratio weighs the same)."""
    distillation_coefficient: float = 0.0
    distillation_clip: float = 5.0
    """Largest |log pi_teacher - log pi| that counts, in nats."""
    kl_coefficient: float = 0.0
    """Of the KL to the policy that the run started from."""
    kl_estimator: Divergence = "k3"
    entropy_coefficient: float = 0.0
    attention: Literal["auto", "segments", "dense", "flex", "flash"] = "segments"
    """How trees attend: auto (the cheaper of segments and dense by a measured cost model), flex and flash on GPUs."""
    micro_batch_tokens: int = 8192
    """Unique tokens run at once; a larger tree runs in parts, with the same gradient."""
    threads: int = 1
    checkpoint_every: int = 5
    keep_checkpoints: int = 2
    keep_weights: int = 4
    step_timeout_s: float = 600.0
    """Longest wait for the groups of one step before the trainer says what it is waiting for."""

    def ratio(self) -> RatioConfig:
        """The ratio's part; `ConfigError` if it is meaningless."""
        return RatioConfig(
            level=self.level,
            length_exponent=self.length_exponent,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            clip_band=self.clip_band,
            dual_clip=self.dual_clip,
            denominator=self.denominator,
            mask=self.mask,
            mask_low=self.mask_low,
            mask_high=self.mask_high,
        )

    def distillation(self) -> DistillationConfig:
        return DistillationConfig(coefficient=self.distillation_coefficient, clip=self.distillation_clip)

    def penalty(self) -> PenaltyConfig:
        return PenaltyConfig(
            kl_coefficient=self.kl_coefficient,
            kl_estimator=self.kl_estimator,
            entropy_coefficient=self.entropy_coefficient,
        )


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
    blobs: BlobsSection = BlobsSection()
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
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_humanise(str(error))}") from error
    _check_trainer(where, config.trainer)
    return config


def _check_trainer(where: str, section: TrainerSection) -> None:
    """Said when the file is read, not when the trainer starts."""
    try:
        section.ratio()
        section.distillation()
        section.penalty()
    except ConfigError as error:
        raise ConfigError(f"{where}: [trainer] {error}") from error


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
    section, dot, name = key.strip().rpartition(".")
    if not equals or not dot or not name:
        raise ConfigError(f"--set {override}: expected section.key=value, for example --set run.steps=20")
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target: Any = table
    for part in section.split("."):
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {key.strip()}: `{section}` is no section")
    target[name] = value


def _check_keys(where: str, table: Mapping[str, Any], kind: type[msgspec.Struct], prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in table.items():
        if f"{prefix}{key}" == "log.security.password":
            raise ConfigError(f"{where}: {_NO_PASSWORD}")
        if key not in hints:
            near = difflib.get_close_matches(key, _all_keys() if not prefix else hints, n=1, cutoff=0.5)
            hint = f"; did you mean `{near[0] if not prefix else prefix + near[0]}`?" if near else ""
            raise ConfigError(f"{where}: unknown key `{prefix}{key}`{hint}")
        inner = hints[key]
        if isinstance(inner, type) and issubclass(inner, Section):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: `{key}` is a section, written [{key}]")
            _check_keys(where, value, inner, f"{prefix}{key}.")


_NO_PASSWORD = (
    "`log.security.password`: configurations are kept in run folders and shown, so they hold no secrets; "
    "use log.security.password_file or the environment variable KAT_KAFKA_PASSWORD"
)


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
