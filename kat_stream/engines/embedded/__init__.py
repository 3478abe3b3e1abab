"""The embedded engine: a Hugging Face causal model on the CPU behind SGLang's HTTP contract.

Owns nothing itself; `start_engine` is the way in. Invariant: log-probabilities are those of a plain float32 forward
with the weights named by the token's span (under an in_place pause: with the keys and values kept from before it).
"""

from kat_stream.engines.embedded.server import EngineServer, start_engine

__all__ = ["EngineServer", "start_engine"]
