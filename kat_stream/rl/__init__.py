"""The mathematics of reinforcement learning from turns: pure functions, no I/O, no clock; one loss a file.

`registry` finds losses and advantages by name. `advantages` and `staleness` need no torch, so that a packer can import
them alone; the losses do.
"""
