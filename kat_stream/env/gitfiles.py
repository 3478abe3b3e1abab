"""Files as what git keeps of them: objects, a pack of these and an index, made without git.

Owns the two formats (git's gitformat-pack and gitformat-index, both version 2, which every git reads). Invariant: the
objects are of the files byte for byte, whatever attributes among them say; nothing of a .git is in them.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import struct
import zlib
from itertools import accumulate

from kat_stream.env.datasets import Files

type _Folder = dict[bytes, _Folder | _File]
type _File = tuple[int, bytes]
"""(mode, id of the content)."""

type Objects = dict[bytes, tuple[bytes, bytes]]
"""Id -> (kind, body)."""

_KINDS = {b"commit": 1, b"tree": 2, b"blob": 3}
_FOLDER_MODE, _FILE_MODE, _PROGRAM_MODE = 0o40000, 0o100644, 0o100755
_LONGEST_NAME = 0xFFF


def git_files(files: Files) -> tuple[str, Files]:
    """(The tree's id, what to put into a repository without objects that it has the tree and its index holds it.)

    The index knows nothing about the files on a disk: git reads each to see whether it is still the same.
    """
    tree, objects, entries = _kept(files)
    pack, pack_index = _pack(objects)
    place = "objects/pack/pack-files"
    made = {f"{place}.pack": pack, f"{place}.idx": pack_index, "index": _index(entries)}
    return tree.hex(), {path: (content, 0o644) for path, content in made.items()}


def objects_of(files: Files) -> tuple[bytes, Objects]:
    """(The tree's id, the objects of files and directories.)"""
    tree, objects, _ = _kept(files)
    return tree, objects


def store(objects: Objects, kind: bytes, body: bytes) -> bytes:
    """Add an object; returns its id."""
    name = _sha1(head(kind, body), body)
    objects[name] = kind, body
    return name


def head(kind: bytes, body: bytes) -> bytes:
    """What stands before the body in a loose file, and is hashed with it."""
    return b"%s %d\0" % (kind, len(body))


def _kept(files: Files) -> tuple[bytes, Objects, dict[bytes, _File]]:
    """(The tree's id, its objects, the index's entries.)"""
    objects: Objects = {}
    root: _Folder = {}
    entries: dict[bytes, _File] = {}
    for path, (content, mode) in files.items():
        name = os.fsencode(posixpath.normpath(path))
        *above, last = name.split(b"/")
        if b".git" not in (*above, last):
            entries[name] = (_PROGRAM_MODE if mode & 0o100 else _FILE_MODE, store(objects, b"blob", content))
            _folder(root, above)[last] = entries[name]
    return _tree(objects, root), objects, entries


def _folder(root: _Folder, above: list[bytes]) -> _Folder:
    for name in above:
        below = root.setdefault(name, {})
        assert isinstance(below, dict), "no file is a directory, too"
        root = below
    return root


def _tree(objects: Objects, folder: _Folder) -> bytes:
    """Store a folder and what is below it; returns its id."""
    rows = {}
    for name, entry in folder.items():
        if isinstance(entry, dict):
            # Git sorts a directory as if its name ended in a slash.
            rows[name + b"/"] = b"%o %s\0%s" % (_FOLDER_MODE, name, _tree(objects, entry))
        else:
            rows[name] = b"%o %s\0%s" % (entry[0], name, entry[1])
    return store(objects, b"tree", b"".join(rows[name] for name in sorted(rows)))


def _packed(kind: bytes, body: bytes) -> bytes:
    """An object as a pack holds it."""
    # Four bits of the length beside the kind, then seven a byte, the lowest first; the last byte has no top bit.
    first, rest = [_KINDS[kind] << 4 | len(body) & 0xF], len(body) >> 4
    while rest:
        first[-1] |= 0x80
        first.append(rest & 0x7F)
        rest >>= 7
    return bytes(first) + zlib.compress(body, 1)


def _pack(whole: Objects) -> tuple[bytes, bytes]:
    """(A pack, its index)."""
    objects = {name: _packed(*one) for name, one in whole.items()}
    pack = _signed(b"PACK" + struct.pack(">2I", 2, len(objects)) + b"".join(objects.values()))
    offsets = dict(zip(objects, accumulate(map(len, objects.values()), initial=12), strict=False))
    names = sorted(objects)
    first_bytes = [0] * 256
    for name in names:
        first_bytes[name[0]] += 1
    tables = (
        *accumulate(first_bytes),
        *(zlib.crc32(objects[name]) for name in names),
        *(offsets[name] for name in names),
    )
    numbers = struct.pack(f">{len(tables)}I", *tables)
    return pack, _signed(b"\377tOc\0\0\0\2" + numbers[:1024] + b"".join(names) + numbers[1024:] + pack[-20:])


def _index(entries: dict[bytes, _File]) -> bytes:
    rows = []
    for name, (mode, content) in sorted(entries.items()):
        # Times, device, inode, owner and size are 0: no file on a disk is taken for this one unread.
        row = struct.pack(">10I20sH", 0, 0, 0, 0, 0, 0, mode, 0, 0, 0, content, min(len(name), _LONGEST_NAME)) + name
        rows.append(row + bytes(8 - len(row) % 8))
    return _signed(b"DIRC" + struct.pack(">2I", 2, len(rows)) + b"".join(rows))


def _signed(content: bytes) -> bytes:
    return content + _sha1(content)


def _sha1(*parts: bytes) -> bytes:
    hashed = hashlib.sha1(usedforsecurity=False)
    for part in parts:
        hashed.update(part)
    return hashed.digest()
