"""Checkpoints: all that is needed to go on as if nothing had happened, and to say what entered which step.

    DIRECTORY/step-000012.LINEAGE/
        state.pt      weights, optimizer and random state, as `TorchLearner.state_dict` gives them
        state.json    step, lineage, positions, manifest, and the sha256 of state.pt
    DIRECTORY/OWNER   the lineage that writes here now

Invariant: a directory of that name is complete (written aside, synced, renamed) and resumes bitwise; one that was cut
short, changed or written by something else is refused with a `CheckpointError` that says why. One lineage owns a
directory. One that was followed while it stood still can do no harm when it wakes: it is refused, names hold the
lineage, and of what it could still remove nothing is newer than its own newest checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from kat_stream import telemetry
from kat_stream.curriculum import Groups
from kat_stream.errors import CheckpointError, FencedError, StorageError
from kat_stream.training.publication import atomic_directory

log = logging.getLogger(__name__)

FORMAT = "kat-stream checkpoint 1"
NAME = re.compile(r"step-\d{6,}\.\w+")


@dataclass(frozen=True, eq=False, slots=True)
class Checkpoint:
    state: dict[str, Any]
    """`TorchLearner.state_dict()`."""
    lineage: str
    positions: dict[str, int]
    """Partition (of whatever topics the caller reads) -> next offset: state and positions are one atom."""
    manifest: tuple[str, ...]
    """Rollout ids in the gradient of the last step."""
    groups: Groups = Groups()
    """All training groups that entered a step so far; a shadow, which asks for no rollouts, keeps none."""

    @property
    def step(self) -> int:
        """Optimizer steps since the start of the run."""
        return int(self.state["step"])


class _Card(msgspec.Struct, kw_only=True):
    """state.json."""

    format: str
    written_ns: int
    """Unix time, but later than that of every other checkpoint there: a clock may be set back."""
    step: int
    lineage: str
    positions: dict[str, int]
    manifest: tuple[str, ...]
    groups: Groups
    sha256: str


class CheckpointStore:
    """The checkpoints of a run in the hands of one lineage. `open` before `save`."""

    def __init__(self, directory: Path, lineage: str) -> None:
        self.directory = directory
        self.lineage = lineage
        self._prunable: list[Path] = []
        """What was there at `open`, then our own, oldest first."""

    def open(self) -> None:
        """Take the directory over, and remove what an earlier owner left half-written. `StorageError`."""
        claim = self.directory / f".owner.{self.lineage}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            claim.write_text(self.lineage)
            claim.replace(self._owner)
        except OSError as error:
            raise StorageError(f"{self._owner} cannot be written: {error}") from error
        for leftover in self.directory.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._prunable = checkpoints(self.directory)[::-1]

    def save(self, checkpoint: Checkpoint, *, keep: int) -> Path:
        """Write a checkpoint, then drop all but the newest `keep`.

        `FencedError` if another lineage owns the directory; `CheckpointError` if this step is saved already;
        `StorageError` as in `atomic_directory`.
        """
        self._check_owner()
        target = self.directory / f"step-{checkpoint.step:06d}.{self.lineage}"
        with atomic_directory(target) as work:
            _write(work, checkpoint)
            self._check_owner()
        self._prunable.append(target)
        while len(self._prunable) > keep:
            self._check_owner()
            shutil.rmtree(self._prunable.pop(0), ignore_errors=True)
        return target

    @property
    def _owner(self) -> Path:
        return self.directory / "OWNER"

    def _check_owner(self) -> None:
        try:
            owner = self._owner.read_text()
        except OSError as error:
            raise StorageError(f"{self._owner} cannot be read: {error}") from error
        if owner != self.lineage:
            raise FencedError(f"{self.directory} belongs to lineage {owner} now, this is {self.lineage}")


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints there, newest first by time of writing; those whose card cannot be read come last."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if NAME.fullmatch(path.name)]
    return sorted(paths, key=_written_ns, reverse=True)


def latest_checkpoint(
    directory: Path, usable: Callable[[str, int], bool] = lambda _lineage, _step: True
) -> Checkpoint | None:
    """The newest checkpoint whose lineage and step are `usable`, or None if there is none.

    One that is damaged is passed over for an older one, loudly: the positions are in it, so that nothing is lost.
    `CheckpointError` if every one is damaged.
    """
    refused: list[str] = []
    for path in checkpoints(directory):
        try:
            card = _read_card(path)
            if usable(card.lineage, card.step):
                return load_checkpoint(path)
        except CheckpointError as error:
            log.error("a damaged checkpoint is passed over: %s", error)
            telemetry.DAMAGED_CHECKPOINTS.inc()
            refused.append(str(error))
    if refused:
        raise CheckpointError(f"no checkpoint can be read, move them away to begin anew: {'; '.join(refused)}")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in this directory. `CheckpointError` if it is truncated, changed or foreign."""
    card = _read_card(path)
    file = path / "state.pt"
    if not file.is_file():
        raise CheckpointError(f"{path}: state.pt is missing")
    if _sha256(file) != card.sha256:
        raise CheckpointError(f"{path}: state.pt is not what was written (truncated or changed)")
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: state.pt: {error}") from error
    return Checkpoint(state, card.lineage, card.positions, card.manifest, card.groups)


def _write(work: Path, checkpoint: Checkpoint) -> None:
    torch.save(checkpoint.state, work / "state.pt")
    earlier = checkpoints(work.parent)
    card = _Card(
        format=FORMAT,
        written_ns=max(time.time_ns(), _written_ns(earlier[0]) + 1 if earlier else 0),
        step=checkpoint.step,
        lineage=checkpoint.lineage,
        positions=checkpoint.positions,
        manifest=checkpoint.manifest,
        groups=checkpoint.groups,
        sha256=_sha256(work / "state.pt"),
    )
    (work / "state.json").write_bytes(msgspec.json.format(msgspec.json.encode(card)))


def _written_ns(path: Path) -> int:
    try:
        return _read_card(path).written_ns
    except CheckpointError:
        return -1


def _read_card(path: Path) -> _Card:
    try:
        data = (path / "state.json").read_bytes()
        if msgspec.json.decode(data, type=dict).get("format") != FORMAT:
            raise CheckpointError(f"{path}: state.json is not of format {FORMAT!r}")
        return msgspec.json.decode(data, type=_Card)
    except OSError as error:
        raise CheckpointError(f"{path}: no checkpoint: state.json: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: state.json: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
