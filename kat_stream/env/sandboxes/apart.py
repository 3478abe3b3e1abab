"""A second command server in a running bubblewrap sandbox, out of reach of what runs there already.

Owns the entry. Invariant: what it starts shares processes, network and files with the sandbox, but for directories of
its own, which are in a mount namespace of its own. It is in a user namespace beside the one of the sandbox's processes:
these, though their user is the same, are refused by the kernel whatever would lead to its directories (/proc/PID/root,
cwd, fd, mem). It has the system-call filter and no capability, as everything in the sandbox.
Source: user_namespaces(7), ptrace(2) "Ptrace access mode checking", setns(2).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from kat_stream.env.sandboxes.base import ENVIRONMENT, SandboxSpec
from kat_stream.env.sandboxes.stage import SHELL

# Run by a fresh interpreter: only a single-threaded process may enter a user namespace. In the sandbox's outer one
# (ioctl 0xB702 is NS_GET_PARENT) it may mount, and makes a third one beside the inner one, with the same user in it.
# The kernel counts earlier ones for a moment after their end, hence 9; nobody inside can make one (seccomp).
# Into the process namespace comes only who is born there (fork). prctl 4 is PR_SET_DUMPABLE (else its own /proc is not
# its own), 24 PR_CAPBSET_DROP, 38 PR_SET_NO_NEW_PRIVS, 22 PR_SET_SECCOMP; mount 6 is MS_NOSUID | MS_NODEV.
_HELPER = """
import ctypes, fcntl, json, os, sys
what = json.load(open(int(sys.argv[1])))
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *words):
    if getattr(libc, name)(*words) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
filters = os.fdopen(int(sys.argv[2]), "rb").read()
program = ctypes.create_string_buffer(filters)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
def entry(name):
    return os.open(f"/proc/{what['pid']}/ns/{name}", os.O_RDONLY)
spaces = [entry(name) for name in ("net", "ipc", "uts", "pid", "mnt")]
user, own = entry("user"), os.stat("/proc/self/ns/user").st_ino
while (parent := fcntl.ioctl(user, 0xB702)) >= 0 and os.fstat(parent).st_ino != own:
    user = parent
if os.geteuid() == 0:
    os.setgroups([])
here = os.open("/proc/self", os.O_RDONLY)
def write(file, text, place=None):
    handle = os.open(file, os.O_WRONLY, dir_fd=place)
    os.write(handle, text.encode())
    os.close(handle)
os.setns(user, os.CLONE_NEWUSER)
os.setresgid(0, 0, 0)
os.setresuid(0, 0, 0)
write("/proc/sys/user/max_user_namespaces", "9")
for space in spaces:
    os.setns(space, 0)
os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
call("prctl", 4, 1, 0, 0, 0)
write("setgroups", "deny", here)
write("uid_map", f"{what['uid']} 0 1", here)
write("gid_map", f"{what['gid']} 0 1", here)
os.close(here)
for directory in what["directories"]:
    call("mount", b"apart", os.fsencode(directory), b"tmpfs", 6, b"mode=0755,size=%d" % what["size"])
os.chdir(what["workdir"])
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)
call("prctl", 38, 1, 0, 0, 0)
call("prctl", 22, 2, ctypes.byref(Program(len(filters) // 8, ctypes.addressof(program))), 0, 0)
if child := os.fork():
    os.waitpid(child, 0)
    os._exit(0)
os.execve(what["shell"], [what["shell"]], what["env"])
"""


@dataclass(frozen=True)
class Entry:
    """How to get into one kind of sandbox: who runs there, what is said first (its groups, its limits), the filter."""

    uid: int
    gid: int
    prelude: str
    filter: bytes


def start_apart(entry: Entry, pid: int, spec: SandboxSpec, directories: Sequence[str]) -> subprocess.Popen[bytes]:
    """A shell with pipes beside process 1 of a sandbox (`pid` on the host), for which `directories` are fresh.

    The directories must exist, and none may be within another. It takes some 60 ms before it answers, and ends with
    the sandbox.
    """
    what = {
        "pid": pid,
        "uid": entry.uid,
        "gid": entry.gid,
        "directories": list(directories),
        "size": spec.disk_mb << 20,
        "workdir": spec.workdir,
        "shell": SHELL,
        "env": {**ENVIRONMENT, **spec.env},
    }
    with ExitStack() as passed_on:
        # Its variables go the same way: those of a task are not for an interpreter that has our rights.
        told = memory_file(json.dumps(what).encode(), passed_on)
        filters = memory_file(entry.filter, passed_on)
        return subprocess.Popen(
            ["/bin/sh", "-c", f'{entry.prelude}\nexec "$@"', "sh", sys.executable, "-I", "-S", "-c", _HELPER]
            + [str(told), str(filters)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            pass_fds=(told, filters),
            cwd="/",
            process_group=0,
        )


def memory_file(content: bytes, owner: ExitStack) -> int:
    """Anonymous file at offset 0; every sandbox gets its own, since processes share the offset of an inherited one."""
    descriptor = os.memfd_create("kat-stream", os.MFD_CLOEXEC)
    owner.callback(os.close, descriptor)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
