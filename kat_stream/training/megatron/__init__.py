"""A second learner: Megatron-Core models behind the torch learner's protocol, tensor and expert parallel.

Whatever decides what is learned (trees, parts, losses, metrics, AdamW) is the torch learner's own code; here are the
model, its shards, and the exchange between ranks. Weights enter and leave in the Hugging Face layout, so engines,
weight sync and checkpoints know nothing of Megatron. Needs the extra `megatron`.
"""
