"""Time travel: any optimizer step of a run made again, and a shadow that makes all of them with another loss.

    history.py    which steps led to a step, from `train.steps` and `policy.versions`. Pure
    groups.py     the groups of steps, from the live log or the archive
    remake.py     the batch of a step to the bit, the learner as it stood before it, and the step itself
    shadow.py     follows a run from its own folder
    table.py      recorded and remade, side by side
Invariant: nothing here writes to a log or into the folder of the run that it reads.
"""
