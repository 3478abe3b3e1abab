"""Where the policy comes from: a Hugging Face directory, or the small one that ships with the package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kat_stream.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEMO = Path(__file__).parent / "demo" / "policy"


def model_dir(name: str) -> Path:
    """`demo` or a directory that holds config.json, weights and a tokenizer."""
    path = DEMO if name == "demo" else Path(name)
    if not (path / "config.json").is_file():
        raise ConfigError(f"policy.model: {path} is no Hugging Face model directory (no config.json)")
    return path


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The policy's tokenizer, from disk only."""
    from transformers import AutoTokenizer

    path = model_dir(name)
    try:
        tokenizer = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(path, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.model: {path} has no usable tokenizer: {error}") from error
    if not tokenizer.chat_template:
        raise ConfigError(f"policy.model: the tokenizer in {path} has no chat template")
    return tokenizer


def vocabulary(name: str) -> str:
    """A fingerprint of the token ids that a model reads: equal for two models if every id stands for the same text."""
    entries = sorted(load_tokenizer(name).get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def max_positions(name: str) -> int | None:
    """Longest path that the policy's positions allow, in tokens; None if its configuration does not say."""
    config = json.loads((model_dir(name) / "config.json").read_text())
    limit = config.get("max_position_embeddings")
    return int(limit) if limit else None
