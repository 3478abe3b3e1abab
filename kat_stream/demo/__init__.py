"""The laptop demo's policy: its tokenizer, its demonstrations, its warm start and the committed checkpoint.

Owns what `make demo` starts from. Invariant: nothing here is imported by the stages; the system only ever sees a
Hugging Face directory.
"""
