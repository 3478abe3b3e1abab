"""Typed configuration: TOML in, frozen structs out; every key is known, documented (sections.py) and checked.

Invariant: what is wrong is a ConfigError that names the file and the key, with the nearest valid one, or value and
bound; a loaded configuration is complete (every default is in it), so `--dry-run` prints exactly what would run. What
no command can work with is refused when it is read, what only a run that trains cannot have by `check_training`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from kat_stream import toml
from kat_stream.errors import ConfigError
from kat_stream.ranges import refusal
from kat_stream.sections import (
    BlobsSection,
    Config,
    GatewaySection,
    LogSection,
    RolloutSection,
    ScorerSection,
    Section,
    SecuritySection,
    TeacherSection,
    TrainerSection,
)

__all__ = [
    "BlobsSection",
    "Config",
    "GatewaySection",
    "LogSection",
    "RolloutSection",
    "ScorerSection",
    "Section",
    "SecuritySection",
    "TeacherSection",
    "check_training",
    "dump",
    "load",
]

_UNKNOWN = re.compile(r"Object contains unknown field `(.+?)`(?: - at `\$\.(.+)`)?")
_NO_PASSWORD = (
    "`log.security.password`: configurations are kept in run folders and shown, so they hold no secrets; "
    "use log.security.password_file or the environment variable KAT_KAFKA_PASSWORD"
)


def load(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (or only defaults) and apply `a.b=value` overrides; values are TOML, bare words are strings."""
    table = {} if path is None else toml.read(path)
    for override in overrides:
        toml.override(table, override)
    try:
        return _checked(table)
    except ConfigError as error:
        raise ConfigError(f"{path or 'defaults'}: {error}") from error


def check_training(config: Config) -> None:
    """`ConfigError` for what only a run that trains cannot have; other commands, and old runs, may."""
    temperature = config.sampler.temperature
    if temperature not in (0, 1):
        raise ConfigError(
            f"sampler.temperature is {temperature:g}: engines report log-probs at the temperature of sampling and the "
            "learner scores at 1, so every ratio would be wrong; a run that trains takes 1, or 0 (greedy)"
        )


def dump(config: Config) -> str:
    """The complete configuration as TOML."""
    lines: list[str] = []
    for section, values in msgspec.to_builtins(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {toml.literal(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _checked(table: dict[str, Any]) -> Config:
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(refusal(str(error), table) or _explained(str(error))) from error
    _check_numbers("", table)
    _check_blobs(config.blobs)
    try:
        _check_trainer(config.trainer)
    except ConfigError as error:
        raise ConfigError(f"[trainer] {error}") from error
    if config.trainer.routing_replay and not config.engine.record_routing:
        raise ConfigError("[trainer] routing_replay needs engine.record_routing")
    if config.trainer.distillation_coefficient > 0 and not (config.scorer.enabled and config.scorer.teachers):
        raise ConfigError("[trainer] distillation_coefficient needs scorer.enabled and scorer.teachers")
    _check_scorer(config.scorer)
    return config


def _check_numbers(key: str, value: Any) -> None:
    """Neither nan nor infinity, which bounds of a range may let through, nor an integer that no record can hold."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(f"{key}.{name}".lstrip("."), inner)
    elif (isinstance(value, float) and not math.isfinite(value)) or (
        isinstance(value, int) and not -(2**63) <= value < 2**63
    ):
        raise ConfigError(f"{key} is {value}, expected a finite number of 64 bits")


def _check_blobs(section: BlobsSection) -> None:
    place = section.url.removeprefix("file:").removeprefix("//")
    if place != section.url and not place.startswith(("/", "~")):
        raise ConfigError(
            f"blobs.url is {section.url!r}, expected an absolute path: services of the run may start in other folders"
        )


def _check_trainer(section: TrainerSection) -> None:
    if section.sharding == "full" and section.ranks == 1:
        raise ConfigError("sharding full needs ranks of at least 2")
    if section.loss == "static_weights" and section.updates > 1:
        raise ConfigError("loss static_weights is exact on-policy, where only the first of several updates is")
    _check_megatron(section)
    section.ratio()
    section.distillation()
    section.penalty()


def _check_megatron(section: TrainerSection) -> None:
    shares = section.megatron.tensor_parallel, section.megatron.expert_parallel
    if section.learner == "torch":
        if shares != (1, 1):
            raise ConfigError('megatron.tensor_parallel and megatron.expert_parallel need learner = "megatron"')
        return
    if section.sharding != "none" or section.routing_replay:
        raise ConfigError("sharding and routing_replay are of the torch learner, learner is megatron")
    if section.ranks % (shares[0] * shares[1]):
        raise ConfigError(f"ranks is {section.ranks}, expected a multiple of megatron's {shares[0]} x {shares[1]}")


def _check_scorer(section: ScorerSection) -> None:
    if section.enabled and section.repeats == 0 and not section.teachers:
        raise ConfigError(f"[scorer] repeats is {section.repeats} and there are no teachers: nothing to score")
    names: set[str] = set()
    for teacher in section.teachers:
        if teacher.name in names:
            raise ConfigError(f"[scorer] there are two teachers {teacher.name}")
        names.add(teacher.name)
        for family in teacher.scores:
            if family.count("/") != 1:
                raise ConfigError(f"[scorer] teacher {teacher.name}: `{family}` is not DATASET/SCAFFOLD")


def _explained(message: str) -> str:
    """What msgspec says of a table, in the words of TOML and with the nearest valid key."""
    if unknown := _UNKNOWN.fullmatch(message):
        section = re.sub(r"\[\d+\]", "", unknown[2] or "")
        return _unknown(f"{section}.{unknown[1]}".lstrip("."))
    what, _, path = message.rpartition(" - at `$.")
    if what.startswith("Invalid enum value"):
        what += f", expected {' | '.join(_choices(path.rstrip('`')))}"
    key, index, _ = path.rstrip("`").partition("[")
    if not what.startswith("Expected `object`"):
        return f"`{path.rstrip('`')}`: {what[0].lower()}{what[1:]}" if what else message
    return f"`{key}` is a list of sections, written [[{key}]]" if index else f"`{key}` is a section, written [{key}]"


def _unknown(key: str) -> str:
    if key == "log.security.password":
        return _NO_PASSWORD
    near = difflib.get_close_matches(key, _keys(Config), n=1, cutoff=0.7)
    return f"unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else "")


def _choices(key: str) -> tuple[str, ...]:
    """The words that a key takes."""
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(kind)[name.partition("[")[0]]
        kind = next((one for one in get_args(kind) if isinstance(one, type) and issubclass(one, Section)), kind)
    return get_args(kind)


def _keys(kind: type[Section], prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        yield f"{prefix}{name}"
        for one in (hint, *get_args(hint)):
            if isinstance(one, type) and issubclass(one, Section):
                yield from _keys(one, f"{prefix}{name}.")
