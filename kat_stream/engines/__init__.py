"""Inference engines: a client for SGLang's HTTP contract, and the embedded CPU engine that speaks the same contract.

Invariant: importing this package, or the client, never imports torch.
"""
