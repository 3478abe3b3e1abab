"""Learners: batches of trees in, optimizer steps, checkpoints and published weights out.

Nothing imports torch until `learner`, `attention` or `checkpoint` is asked for: `publication` alone serves weight sync.
"""
