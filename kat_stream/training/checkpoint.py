"""Checkpoints: all that is needed to go on as if nothing had happened, and to say what entered which step.

    DIRECTORY/step-000012/
        state.pt      weights, optimizer and random state, as `TorchLearner.state_dict` gives them
        state.json    step, lineage, positions, manifest, and the sha256 of state.pt

Invariant: a directory of that name is complete (written aside, synced, renamed) and resumes bitwise; one that was cut
short, changed or written by something else is refused with a `CheckpointError` that says why. One process writes to a
directory; it removes what an earlier life left half-written there.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from kat_stream.errors import CheckpointError
from kat_stream.training.publication import atomic_directory

FORMAT = "kat-stream checkpoint 1"
NAME = re.compile(r"step-\d{6,}")


@dataclass(frozen=True, eq=False, slots=True)
class Checkpoint:
    state: dict[str, Any]
    """`TorchLearner.state_dict()`."""
    lineage: str
    positions: dict[str, int]
    """Partition (of whatever topics the caller reads) -> next offset: state and positions are one atom."""
    manifest: tuple[str, ...]
    """Rollout ids in the gradient of the last step."""

    @property
    def step(self) -> int:
        """Optimizer steps since the start of the run."""
        return int(self.state["step"])


class _Card(msgspec.Struct, kw_only=True):
    """state.json."""

    format: str
    written_ns: int
    """Unix time."""
    step: int
    lineage: str
    positions: dict[str, int]
    manifest: tuple[str, ...]
    sha256: str


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint under `directory`, then drop all but the newest `keep`.

    `CheckpointError` if there is one of the same step.
    """
    for leftover in directory.glob(".step-*"):
        shutil.rmtree(leftover)
    target = directory / f"step-{checkpoint.step:06d}"
    with atomic_directory(target) as work:
        torch.save(checkpoint.state, work / "state.pt")
        card = _Card(
            format=FORMAT,
            written_ns=time.time_ns(),
            step=checkpoint.step,
            lineage=checkpoint.lineage,
            positions=checkpoint.positions,
            manifest=checkpoint.manifest,
            sha256=_sha256(work / "state.pt"),
        )
        (work / "state.json").write_bytes(msgspec.json.format(msgspec.json.encode(card)))
    for old in checkpoints(directory)[keep:]:
        shutil.rmtree(old)
    return target


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints there, newest first by time of writing. `CheckpointError` if one of them cannot be read."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: _read_card(path).written_ns, reverse=True)


def latest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, or None if there is none. `CheckpointError` as in `load_checkpoint`."""
    newest = checkpoints(directory)
    return load_checkpoint(newest[0]) if newest else None


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
    return Checkpoint(state=state, lineage=card.lineage, positions=card.positions, manifest=card.manifest)


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
