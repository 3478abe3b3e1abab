"""Weights as a Hugging Face directory that an engine can load: written aside, checked, renamed into place.

Invariant: a directory under its final name is complete, and its checksum is a function of its weights alone.
No torch here: weight sync verifies what it has engines load with the same function, where only the core is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kat_stream.errors import CheckpointError, StorageError


@dataclass(frozen=True, slots=True)
class Publication:
    path: Path
    checksum: str
    """`weights_checksum(path)`."""


def weights_checksum(directory: Path) -> str:
    """sha256 over the *.safetensors files in name order; `CheckpointError` if there is none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors file")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def verify_weights(directory: Path, checksum: str) -> None:
    """`CheckpointError` unless the weights in `directory` are those of `checksum`; nothing is claimed if that is empty.

    One that cannot be read now may be on its way, or pruned: that is a `CheckpointError`, too.
    """
    if not checksum:
        return
    try:
        found = weights_checksum(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
    if found != checksum:
        raise CheckpointError(f"{directory}: its weights have the checksum {found}, published was {checksum}")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target`, contents synced first, when the block ends without an error.

    `CheckpointError` if `target` is there already: what was published is never overwritten. `StorageError` if the disk
    is full or cannot be written; torch and safetensors report that as errors of their own.
    """
    from safetensors import SafetensorError  # only who writes weights has it

    if target.exists():
        raise CheckpointError(f"{target} exists already")
    try:
        yield from _written_aside(target)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StorageError(f"{target} cannot be written: {error}") from error


def _written_aside(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        for path in work.iterdir():
            _sync(path)
        _sync(work)
        work.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Everything beside the weights that an engine needs: configuration, tokenizer, chat template."""
    for path in source.iterdir():
        wanted = path.suffix in (".json", ".jinja", ".txt", ".model") and not path.name.endswith(".index.json")
        if wanted and path.is_file():
            shutil.copyfile(path, target / path.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
