"""A listening socket of this process inside another process's network namespace.

Owns the entry into the namespace. Invariant: nothing runs in the sandbox for it, and the thread or process that
entered is gone before the socket is handed out. Source: setns(2), ioctl_ns(2); measured in research/sandboxes.md 4.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading

from kat_stream.errors import DeadlineExceeded, SandboxError

_DEADLINE_S = 5.0
_BACKLOG = 128
# Run by a fresh interpreter: only a single-threaded process may enter a user namespace. The network namespace belongs
# to the outermost user namespace of the sandbox, the parent (NS_GET_PARENT) of the one that its processes are in.
_HELPER = """
import array, fcntl, os, socket, sys
pid, port, channel = int(sys.argv[1]), int(sys.argv[2]), socket.socket(fileno=int(sys.argv[3]))
network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
user, own = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY), os.stat("/proc/self/ns/user").st_ino
while (parent := fcntl.ioctl(user, 0xB702)) >= 0 and os.fstat(parent).st_ino != own:
    user = parent
os.setns(user, os.CLONE_NEWUSER)
os.setns(network, os.CLONE_NEWNET)
listener = socket.create_server(("127.0.0.1", port), backlog=128)
socket.send_fds(channel, [b"."], [listener.fileno()])
"""


def listen_as_root(pid: int, port: int) -> socket.socket:
    """127.0.0.1:`port` in the network namespace of `pid`; takes under a millisecond, in a thread that ends with it."""
    result: list[socket.socket | OSError] = []
    thread = threading.Thread(target=_enter_and_listen, args=(pid, port, result), name=f"netns-{pid}")
    thread.start()
    thread.join(_DEADLINE_S)
    if not result:
        raise DeadlineExceeded(f"listener in the network namespace of {pid}", _DEADLINE_S)
    if isinstance(result[0], OSError):
        raise SandboxError(f"cannot listen on port {port} in the sandbox: {result[0]}") from result[0]
    return result[0]


def _enter_and_listen(pid: int, port: int, result: list[socket.socket | OSError]) -> None:
    try:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.setns(namespace, os.CLONE_NEWNET)
        finally:
            os.close(namespace)
        result.append(_nonblocking(socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)))
    except OSError as error:
        result.append(error)


async def listen_as_user(pid: int, port: int) -> socket.socket:
    """The same without privileges, through a helper process (some 60 ms)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-I", "-S", "-c", _HELPER, str(pid), str(port), str(theirs.fileno())]
        helper = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        try:
            _, errors = await asyncio.wait_for(helper.communicate(), _DEADLINE_S)
        except TimeoutError:
            helper.kill()
            await helper.wait()
            raise DeadlineExceeded(f"listener in the network namespace of {pid}", _DEADLINE_S) from None
        if helper.returncode != 0:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise SandboxError(f"cannot listen on port {port} in the sandbox: {last}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    return _nonblocking(socket.socket(fileno=descriptors[0]))


def _nonblocking(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    return listener
