"""A byte-level tokenizer in which every word, number or sign of the demo's language is one token.

Owns the vocabulary and the chat template. Invariants: decoding the ids of any text gives that text (what is no known
piece falls back to its bytes), and the ids of a longer conversation begin with those of a shorter one, because the
template only appends.

A piece takes the one space behind it with it, and the demo's names are always followed by a sign: so a name is the same
token wherever it stands, and copying it is one-back induction (measured: research/demo.md, "Best recipe so far").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
TOOL = "<|tool|>"
CONTEXT_TOKENS = 4096

_SPECIAL = (SYSTEM, USER, ASSISTANT, END)
# exit code | file suffix | option | word | number | run of signs | any other white space; each with one space behind.
_PIECE = r"\[exit [0-9]+\]|\.[A-Za-z]+ ?|-[A-Za-z]+ ?|[A-Za-z]+ ?|[0-9]{1,2} ?|[^\sA-Za-z0-9]+ ?|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}"
    "{{ '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""CHAT_TEMPLATE for agents with tools: what there is stands first, calls are written as Hermes does."""


def build_tokenizer(texts: Iterable[str], size: int = 1024) -> PreTrainedTokenizerFast:
    """Specials, the 256 bytes, then the most frequent pieces of `texts` (ties by spelling), `size` at most.

    The same texts give the same ids.
    """
    split = _splitter()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    pieces = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
    words = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces][:size]
    # No merges: a piece is one token if it is in the vocabulary, else its bytes.
    tokenizer = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def _splitter() -> pre_tokenizers.PreTokenizer:
    by_piece = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    return pre_tokenizers.Sequence([by_piece, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def teach_phrases(tokenizer: PreTrainedTokenizerFast, phrases: Iterable[str]) -> None:
    """Make each phrase one token wherever it stands, and the chat template one with tools. Old ids stay as they are."""
    tokenizer.add_tokens([AddedToken(TOOL, special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(phrase, special=False, normalized=False) for phrase in phrases])
    tokenizer.chat_template = TOOLS_TEMPLATE
