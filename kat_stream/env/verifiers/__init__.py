"""Verifiers of KwaiEnv: how a finished work tree becomes a score, one file a way of grading.

Owns the protocol's registration. Invariant: a verifier that fails raises; it never turns its own failure into a score.
"""

from kat_stream.env.verifiers.base import GROUP, Verdict, Verifier, get_verifier

__all__ = ["GROUP", "Verdict", "Verifier", "get_verifier"]
