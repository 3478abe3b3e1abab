"""What people see of a run: pure reducers over its records, and views that print and draw them.

The reducers (ledger, state, story, tail) have no clock and no I/O; sources, watch and plot are the rim around them.
"""
