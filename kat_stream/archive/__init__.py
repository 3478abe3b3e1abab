"""Topics as Parquet: a run can be read when its log is gone, and by anything that reads Parquet.

    archive/<topic>/run=<run>/day=<YYYY-MM-DD>/part-*.parquet      a row a message: its fields as columns, its bytes

columns.py makes rows of records, parts.py names files and changes them all at once, writer.py writes and merges,
reader.py reads. Invariants: a message is archived once over any number of restarts and kills; values and headers are
the log's bytes. Offsets have a meaning within one log only, so each file names its log: a run that goes on with a new
in-memory log starts again at offset 0, and both halves are kept.
"""

import os

# Arrow's own allocator keeps pages of which nothing is in use, whatever it is told: with flushes and merges of all
# sizes a process grows by them for hours. malloc gives back all that is free when the writer asks it to. Arrow reads
# this when it is loaded, which is below.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

from kat_stream.archive.parts import archived_positions, claimed
from kat_stream.archive.reader import GroupFilter, read_archive, read_rows
from kat_stream.archive.writer import ArchiveWriter

__all__ = ["ArchiveWriter", "GroupFilter", "archived_positions", "claimed", "read_archive", "read_rows"]
