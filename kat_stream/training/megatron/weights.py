"""Hugging Face tensors <-> the shards of a rank's Megatron parameters.

Owns the one table of names and cuts, used for weights and for everything that has their shape (AdamW's moments).
Invariant: exact both ways: shards are slices and rearrangements, nothing is computed; each Hugging Face tensor is used
once, and none is left over. A padded vocabulary is Megatron's own affair: the padding is cut off on the way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from kat_stream.errors import CheckpointError
from kat_stream.training.megatron.exchange import all_shards
from kat_stream.training.megatron.model import TreeModel, head_size

Read = Callable[[str], Tensor]
"""The whole Hugging Face tensor of a name."""
Sharding = Literal["replicated", "heads", "tensor", "expert"]
"""Ranks of a tensor group hold all of it, all of it but see only their own heads, or a shard; or own experts."""


class Cut(Protocol):
    def shards(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """The parameter of each of `count` ranks, of whole Hugging Face tensors."""
        ...

    def whole(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        ...


class Same:
    """Every rank has the tensor itself."""

    def shards(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        return [tensors[0]] * count

    def whole(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the vocabulary, padded with zeros to a multiple of the ranks."""

    rows: int

    def shards(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        tensor = tensors[0]
        padding = tensor.new_zeros(-self.rows % count, tensor.shape[1])
        return list(torch.cat([tensor, padding]).chunk(count))

    def whole(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards))[: self.rows]]


class Columns:
    def shards(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        return list(tensors[0].chunk(count, dim=1))

    def whole(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards), dim=1)]


class Gated:
    """Gate and up projection: each rank has its rows of the one, then those of the other."""

    def shards(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        gate, up = (tensor.chunk(count) for tensor in tensors)
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def whole(self, shards: Sequence[Tensor]) -> list[Tensor]:
        pairs = [shard.chunk(2) for shard in shards]
        return [torch.cat([gate for gate, _ in pairs]), torch.cat([up for _, up in pairs])]


@dataclass(frozen=True, slots=True)
class Grouped:
    """Query, key and value (weights or biases): group after group its query heads, its key and its value head."""

    groups: int
    head: int

    def shards(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        rest = tensors[0].shape[1:]
        heads = [tensor.view(self.groups, -1, self.head, *rest) for tensor in tensors]
        return list(torch.cat(heads, dim=1).reshape(-1, *rest).chunk(count))

    def whole(self, shards: Sequence[Tensor]) -> list[Tensor]:
        fused = torch.cat(list(shards))
        rest = fused.shape[1:]
        heads = fused.view(self.groups, -1, self.head, *rest)
        split = heads.split([heads.shape[1] - 2, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in split]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter of a rank comes from."""

    names: tuple[str, ...]
    """Hugging Face names; `{expert}` stands for the expert's number."""
    cut: Cut
    sharding: Sharding
    expert: int = 0
    """Number among the rank's own experts."""


Kind = Literal["same", "heads", "rows", "columns", "gated", "grouped"]
TOP: dict[str, tuple[tuple[str, ...], Kind]] = {
    "embedding.word_embeddings.weight": (("model.embed_tokens.weight",), "rows"),
    "output_layer.weight": (("lm_head.weight",), "rows"),
    "decoder.final_layernorm.weight": (("model.norm.weight",), "same"),
}
IN_LAYER: dict[str, tuple[tuple[str, ...], Kind]] = {
    "input_layernorm.weight": (("input_layernorm.weight",), "same"),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), "same"),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), "heads"),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), "heads"),
    "self_attention.linear_qkv.weight": (tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "grouped"),
    "self_attention.linear_qkv.bias": (tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), "grouped"),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), "columns"),
    "mlp.router.weight": (("mlp.gate.weight",), "same"),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated"),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), "columns"),
}
EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def slots(model: TreeModel) -> dict[str, Slot]:
    """Each parameter of the rank's model, by its Megatron name."""
    config = model.config
    kinds: dict[Kind, tuple[Cut, Sharding]] = {
        "same": (Same(), "replicated"),
        "heads": (Same(), "heads"),
        "rows": (Rows(config.vocab_size), "tensor"),
        "columns": (Columns(), "tensor"),
        "gated": (Gated(), "tensor"),
        "grouped": (Grouped(config.num_key_value_heads, head_size(config)), "tensor"),
    }
    found = {}
    for name, _ in model.gpt.named_parameters():
        if name in TOP:
            names, kind = TOP[name]
            found[name] = Slot(names, *kinds[kind])
            continue
        match = LAYER.fullmatch(name)
        assert match is not None, name
        prefix, inner = f"model.layers.{match[1]}.", match[2]
        if expert := EXPERT.fullmatch(inner):
            of = ("gate_proj", "up_proj") if expert[2] == "linear_fc1.weight" else ("down_proj",)
            names = tuple(f"{prefix}mlp.experts.{{expert}}.{each}.weight" for each in of)
            found[name] = Slot(names, Gated() if len(of) > 1 else Same(), "expert", int(expert[1]))
        else:
            names, kind = IN_LAYER[inner]
            found[name] = Slot(tuple(prefix + each for each in names), *kinds[kind])
    return found


class Shards:
    """The mapping of one rank of one model."""

    def __init__(self, model: TreeModel) -> None:
        self.slots = slots(model)
        self._tensor, self._expert = model.gpt.pg_collection.tp, model.gpt.pg_collection.ep

    @property
    def names(self) -> set[str]:
        """Of all Hugging Face tensors, those of other ranks' experts included."""
        return {name for slot in self.slots.values() for rank in self._ranks(slot) for name in self._named(slot, rank)}

    @torch.no_grad()
    def place(self, read: Read, targets: Mapping[str, Tensor]) -> None:
        """Fill this rank's tensors from whole ones."""
        for name, slot in self.slots.items():
            tensors = [read(each) for each in self._named(slot, self._expert.rank())]
            if slot.sharding == "expert":
                shard = slot.cut.shards(tensors, 1)[0]
            else:
                shard = slot.cut.shards(tensors, self._tensor.size())[self._tensor.rank()]
            if shard.shape != targets[name].shape:
                raise CheckpointError(f"of another model: {name} is {shard.shape}, expected {targets[name].shape}")
            targets[name].copy_(shard)

    @torch.no_grad()
    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of what the ranks hold, on the CPU; every rank must take part."""
        whole: dict[str, Tensor] = {}
        for name, slot in self.slots.items():
            if slot.sharding == "expert":
                of_ranks = [slot.cut.whole([shard]) for shard in all_shards(tensors[name], self._expert)]
            elif slot.sharding == "tensor":
                of_ranks = [slot.cut.whole(all_shards(tensors[name], self._tensor))]
            else:
                of_ranks = [slot.cut.whole([tensors[name]])]
            for rank, parts in enumerate(of_ranks):
                for each, part in zip(self._named(slot, rank), parts, strict=True):
                    whole[each] = part.detach().cpu().clone(memory_format=torch.contiguous_format)
        return whole

    def _ranks(self, slot: Slot) -> range:
        return range(self._expert.size() if slot.sharding == "expert" else 1)

    def _named(self, slot: Slot, rank: int) -> list[str]:
        """Hugging Face names of the parameter as a rank of the expert group holds it."""
        own = sum(other.names == slot.names for other in self.slots.values())
        return [name.format(expert=rank * own + slot.expert) for name in slot.names]


@contextmanager
def weight_files(directory: Path) -> Iterator[tuple[set[str], Read]]:
    """Names in the *.safetensors files of a directory, and how to read one. `CheckpointError` if there is none."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(directory.glob("*.safetensors"))]
        if not files:
            raise CheckpointError(f"{directory}: no *.safetensors file")
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no dict: it has no iterator
        yield set(where), lambda name: where[name].get_tensor(name)


def load_weights(model: TreeModel, directory: Path) -> None:
    """`CheckpointError` if the directory's tensors are not exactly those of the model."""
    shards = Shards(model)
    with weight_files(directory) as (names, read):
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        different = sorted(shards.names ^ (names - tied))
        if different:
            raise CheckpointError(f"{directory}: {different[0]} is missing or has no place in the Megatron model")
        shards.place(read, dict(model.gpt.named_parameters()))
