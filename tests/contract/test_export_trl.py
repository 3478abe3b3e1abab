"""TRL takes an export as it is: its trainer's own batches hold the ids that were recorded, and learn those sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import datasets
import pytest
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kat_stream.env import plugins
from kat_stream.env.manager import GROUP, Policy, Rules
from kat_stream.env.manager.export import Export, export
from kat_stream.gateway.render import Renderer
from kat_stream.log.memory import MemoryLog
from kat_stream.observe.sources import LogSource
from tests.contract.gateway_kit import tokenizer
from tests.unit.records import RUN
from tests.unit.test_formats_sft import CONVERSATION, QWEN, TOOL, recorded, saved
from topics import CATALOGUE, Trajectory
from topics.record import ints

# The same template with TRL's marks around what an assistant says.
MARKED = QWEN.replace(
    "{%- if m.role == 'user' or m.role == 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}",
    "{%- if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{%- elif m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}",
).replace("{%- endfor %}<|im_end|>\n{%- elif", "{%- endfor %}<|im_end|>{% endgeneration %}\n{% elif")


def exported(name: str, model: str, finished: Trajectory, out: Path) -> datasets.Dataset:
    async def write() -> None:
        log = MemoryLog()
        await log.start()
        await log.apply_topics(CATALOGUE)
        await log.publish(finished)
        how = Export(plugins.load(GROUP, name), Policy(model), Rules())
        assert (await export(LogSource(log, "memory:", RUN), how, out)).rows == 1
        await log.close()

    anyio.run(write)
    return datasets.load_dataset(str(out), split="train", cache_dir=str(out.parent / "cache"))


@pytest.mark.parametrize("name", ["sft", "linear"])
def test_trl_learns_what_was_sampled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from trl import SFTConfig, SFTTrainer

    marked: PreTrainedTokenizerFast = tokenizer(MARKED)
    finished = recorded(Renderer(marked), CONVERSATION, [TOOL])
    data = exported(name, saved(MARKED, tmp_path / "model"), finished, tmp_path / "out")
    about = Qwen3Config(
        vocab_size=len(marked), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=1, max_length=None, use_cpu=True,
        bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
        assistant_only_loss=name == "sft",
    )  # fmt: skip
    trainer = SFTTrainer(Qwen3ForCausalLM(about), config, train_dataset=data, processing_class=marked)
    batch: dict[str, Any] = next(iter(trainer.get_train_dataloader()))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()

    path = [token for turn in finished.turns for part in (turn.prompt_ids, turn.sampled_ids) for token in ints(part)]
    sampled = [token for turn in finished.turns for token in ints(turn.sampled_ids)]
    assert ids[: len(path)] == path and '"name": "run"' in marked.decode(ids)
    assert [label for label in labels if label != -100] == sampled
    assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    assert trainer.train().training_loss > 0
