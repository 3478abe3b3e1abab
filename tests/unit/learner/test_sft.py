"""Fine-tuning on conversations: every assistant message is learnt in its context, and a bad line is named."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from kat_stream.config import load
from kat_stream.errors import DataError
from kat_stream.policy import load_tokenizer
from kat_stream.training.sft import fine_tune, lines_of, turns_of_line

CHAT = [
    {"role": "system", "content": "Mend the repository."},
    {"role": "user", "content": "Rename fennel.py to sugar.py."},
    {"role": "assistant", "content": "mv sugar.py fennel.py"},
    {"role": "user", "content": "[exit 1]"},
    {"role": "assistant", "content": "submit"},
]


def test_turns_are_what_the_template_adds_for_each_reply() -> None:
    tokenizer = load_tokenizer("demo")
    first, second = turns_of_line(json.dumps({"messages": CHAT}).encode(), 1, tokenizer, 400)
    assert tokenizer.decode(first.sampled_ids).startswith("mv sugar.py fennel.py")
    assert tokenizer.decode(second.sampled_ids).startswith("submit")
    path = [*first.prompt_ids, *first.sampled_ids]
    assert list(second.prompt_ids[: len(path)]) == path


def test_the_loss_falls_and_the_result_loads(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(4)))
    out = tmp_path / "tuned"
    wanted = {"data": data, "out": out, "epochs": 6, "batch": 4, "learning_rate": 1e-3, "warmup_steps": 1}
    config = load(None, [f"sft.{key}={json.dumps(str(v)) if isinstance(v, Path) else v}" for key, v in wanted.items()])
    losses: list[float] = []
    publication = fine_tune(config, lambda metrics, steps: losses.append(metrics.loss))
    assert publication.path == out
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]
    AutoModelForCausalLM.from_pretrained(out, local_files_only=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 7"),
        ('{"messages": [{"role": "\udcff"}]}', "line 7: .*utf-8"),
        (json.dumps({"messages": "x"}), "line 7: Expected `array`"),
        (json.dumps({"messages": CHAT[:2]}), "line 7: no assistant message"),
        (json.dumps({"messages": CHAT[2:]}), "line 7: it begins with an assistant message"),
        (json.dumps({"messages": [*CHAT, *CHAT[1:]] * 9}), r"line 7: \d+ tokens, the model has 400 positions"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        turns_of_line(line.encode(errors="surrogateescape"), 7, load_tokenizer("demo"), 400)


@pytest.mark.parametrize("template", ["{{ raise_exception('no tools here') }}", "{{ messages[0].content + 1 }}"])
def test_a_conversation_that_the_template_refuses_is_named(template: str) -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"line 7: chat template: (TemplateError: no tools here|TypeError: )"):
        turns_of_line(json.dumps({"messages": CHAT}).encode(), 7, tokenizer, 400)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """Valid JSON may hold U+2028, U+0085 and the like inside a string."""
    spoken = [{"role": "user", "content": "one\u2028two\u0085three"}, CHAT[2]]
    data = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": spoken}, ensure_ascii=False)
    data.write_bytes(f"{line}\r\n\n{line}".encode())
    assert [number for number, _ in lines_of(data)] == [1, 3]
    assert all(turns_of_line(text, number, load_tokenizer("demo"), 400) for number, text in lines_of(data))
