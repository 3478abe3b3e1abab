"""The words of a Dockerfile: where a text is split, and what quotes, backslashes and variables mean in it.

Owns Docker's rules for that (docs.docker.com/reference/dockerfile, "Environment replacement"): nothing is replaced
between single quotes, as in a shell. Pure: no I/O. Invariant: text whose value only the base image or a build could
tell is a ValueError, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_WORD = re.compile(r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|\S)+""", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_]\w*|\d", re.ASCII)
_MODIFIER = re.compile(r":?[-+]")


def split(text: str) -> list[str]:
    """The words, parted by blanks outside quotes; quotes and backslashes stay in them, for `expand`."""
    return _WORD.findall(text)


def expand(text: str, known: Mapping[str, str]) -> str:
    """The text without its quotes and with its variables replaced; ValueError says what cannot be replaced."""
    return _unquoted(text, 0, "", known)[0]


def _unquoted(text: str, at: int, stop: str, known: Mapping[str, str]) -> tuple[str, int]:
    """The value of text[at:] up to the character `stop` (or the end), and where that is."""
    parts: list[str] = []
    while at < len(text) and text[at] != stop:
        mark = text[at]
        if mark == "'":
            end = _end_of_quote(text, at)
            piece, at = text[at + 1 : end], end + 1
        elif mark == '"':
            piece, at = _quoted(text, at + 1, known)
        elif mark == "\\":
            piece, at = text[at + 1 : at + 2], at + 2
        elif mark == "$":
            piece, at = _variable(text, at + 1, known)
        else:
            piece, at = mark, at + 1
        parts.append(piece)
    if stop and at >= len(text):
        raise ValueError(f"{text}: no closing {stop}")
    return "".join(parts), at


def _end_of_quote(text: str, at: int) -> int:
    end = text.find("'", at + 1)
    if end < 0:
        raise ValueError(f"{text}: no closing '")
    return end


def _quoted(text: str, at: int, known: Mapping[str, str]) -> tuple[str, int]:
    """The value up to the closing double quote, and what is behind it; a backslash quotes `"`, `$` and `\\` only."""
    parts: list[str] = []
    while at < len(text) and text[at] != '"':
        if text[at] == "\\" and text[at + 1 : at + 2] in ('"', "$", "\\"):
            piece, at = text[at + 1], at + 2
        elif text[at] == "$":
            piece, at = _variable(text, at + 1, known)
        else:
            piece, at = text[at], at + 1
        parts.append(piece)
    if at >= len(text):
        raise ValueError(f'{text}: no closing "')
    return "".join(parts), at + 1


def _variable(text: str, at: int, known: Mapping[str, str]) -> tuple[str, int]:
    """The value of the variable named behind a `$`, and what is behind it; a lone `$` is one."""
    braces = text[at : at + 1] == "{"
    name = _NAME.match(text, at + braces)
    if not braces:
        return (_value(name[0], known), name.end()) if name else ("$", at)
    if not name:
        raise ValueError(f"{text}: no variable behind ${{")
    if text[name.end() : name.end() + 1] == "}":
        return _value(name[0], known), name.end() + 1
    modifier = _MODIFIER.match(text, name.end())
    if not modifier:
        raise ValueError(f"{text}: of the forms of ${{{name[0]}}} only :-, -, :+ and + are supported")
    word, end = _unquoted(text, modifier.end(), "}", known)
    return _modified(name[0], modifier[0], word, known), end + 1


def _value(name: str, known: Mapping[str, str]) -> str:
    if name not in known:
        raise ValueError(f"${name} is not set in this Dockerfile, and no base image is read; see ${{{name}:-default}}")
    return known[name]


def _modified(name: str, modifier: str, word: str, known: Mapping[str, str]) -> str:
    """`-` gives the word where the variable is not set, `+` where it is; with `:` an empty one counts as not set."""
    is_set = bool(known.get(name)) if modifier.startswith(":") else name in known
    if modifier.endswith("+"):
        return word if is_set else ""
    return known[name] if is_set else word
