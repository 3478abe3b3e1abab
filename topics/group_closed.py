"""`groups.closed`: the packer closed this group (compacted). Read back by the packer alone.

One small record a group, in the transaction that writes its batch: however late a message of the group is repeated, and
whatever became of the place from which the packer reads, the group is known.
"""

from __future__ import annotations

from topics.record import Record


class GroupClosed(Record, frozen=True, kw_only=True, tag="GroupClosed/1"):
    group_id: str
