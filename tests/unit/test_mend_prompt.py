"""The shell agent's wording: outputs come back whole or cut in the middle, whatever their bytes, with the exit code."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kat_stream.env.scaffolds.shell_prompt import first_messages, observation


def test_a_conversation_opens_with_system_and_instruction() -> None:
    system, user = first_messages("Do it.")
    assert system["role"] == "system" and system["content"]
    assert user == {"role": "user", "content": "Do it."}


def test_an_output_ends_in_its_exit_code_on_its_own_line() -> None:
    assert observation(b"", 0) == "[exit 0]"
    assert observation(b"one\n", 1) == "one\n[exit 1]"
    assert observation(b"no newline", 2) == "no newline\n[exit 2]"


def test_a_long_output_keeps_both_ends() -> None:
    text = observation(b"a" * 300 + b"b" * 300, 0, limit_bytes=100)
    assert text == "a" * 50 + "\n...\n" + "b" * 50 + "\n[exit 0]"


@given(st.binary(max_size=900), st.integers(0, 255))
def test_any_bytes_give_text_of_bounded_length(output: bytes, exit_code: int) -> None:
    text = observation(output, exit_code, limit_bytes=400)
    assert text.endswith(f"[exit {exit_code}]")
    # Each byte gives at most one character; then the gap, a newline and the exit code.
    assert len(text) <= 400 + 5 + 1 + len("[exit 255]")
    assert text.encode()
