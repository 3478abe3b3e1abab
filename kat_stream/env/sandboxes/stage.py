"""What a bubblewrap sandbox sees of the host: the system directory, a generated /etc, the toolchains asked for,
nothing else.

Owns the generated files and, for root, the *stage*: a private mount namespace whose root holds only those
directories, from which sandboxes are started. Invariant: a path of the host that is not named here does not exist
on the stage, not even for bwrap itself; the stage has no process and no mount of its own in the host's namespace,
and dies with the last file descriptor that refers to it. Toolchains below directories that the sandbox's user
cannot enter (/root/.pyenv) work, because root binds them onto the stage.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kat_stream.env.sandboxes.base import Mount
from kat_stream.errors import ConfigError, SandboxUnavailable

SANDBOX_UID = 10001
"""The user that sandboxes run as when we are root; otherwise it is our own."""

SHELL = "/etc/kat-stream/shell"
_BUILD_DEADLINE_S = 20.0
# /etc of the host as far as programs need it to start: never whole, it holds keys and passwords.
_COPIED = (
    "alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "perl",
    "ssl/certs", "ssl/openssl.cnf", "ca-certificates.conf", "python3*", "java-*-openjdk", "profile", "bash.bashrc",
)  # fmt: skip
_FIXED = {
    "group": "root:x:0:\nagent:x:{gid}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "hostname": "sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "passwd": "root:x:0:0:root:/nonexistent:/bin/false\nagent:x:{uid}:{gid}:agent:/home/agent:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "resolv.conf": "",
}
# Runs in a new mount namespace: builds the stage in a tmpfs and makes it the root. $1: an empty directory, then pairs
# of source and target. Reads standard input until the caller has taken hold of the namespace. mount -n, since it would
# otherwise keep notes of its own in /run.
_BUILD = """
set -e
mount -n -t tmpfs -o mode=0755,size=1m,nosuid,nodev kat-stream "$1"
cd "$1"; shift
mkdir usr proc dev etc run mounts old tmp
mount -n --bind /usr usr; mount -n -o remount,bind,ro,nosuid,nodev usr
mount -n --bind /proc proc
mount -n --bind /dev dev
for name in bin sbin lib lib32 lib64 libx32; do if [ -L "/$name" ]; then cp -P "/$name" .; fi; done
while [ $# -gt 0 ]; do
    if [ -d "$1" ]; then mkdir -p ".$2"; else : > ".$2"; fi
    mount -n --bind "$1" ".$2"; shift 2
done
pivot_root . old
cd /
umount -n -l old
rmdir old
mount -n -o remount,ro /
echo ready
read -r end || true
"""


@dataclass(frozen=True)
class Stage:
    """Where bwrap finds things; `namespace` is a path to enter first, None to start from the host's own view."""

    etc: str
    runs: str
    mounts: tuple[Mount, ...]
    namespace: str | None = None


def system_links() -> dict[str, str]:
    """The host's links from / into /usr, e.g. {"/bin": "usr/bin"}."""
    paths = map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"))
    return {str(path): str(path.readlink()) for path in paths if path.is_symlink()}


def system_directory(cache: Path, uid: int, gid: int) -> Path:
    """The generated /etc, made once for each state of the host's files; below `cache`."""
    sources = [p for pattern in _COPIED for p in sorted(Path("/etc").glob(pattern))]
    shell = Path("/bin/sh").resolve()
    state = [(str(p), p.stat().st_mtime_ns) for p in (*sources, shell, Path(__file__))]
    target = cache / f"etc-{hashlib.sha256(repr((state, uid, gid)).encode()).hexdigest()[:16]}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache))
        _fill(scratch, sources, shell, uid, gid)
        _publish(scratch, target)
    return target


def _fill(directory: Path, sources: Sequence[Path], shell: Path, uid: int, gid: int) -> None:
    directory.chmod(0o755)
    for name, text in _FIXED.items():
        (directory / name).write_text(text.format(uid=uid, gid=gid))
        (directory / name).chmod(0o644)
    for source in sources:
        copy = directory / source.relative_to("/etc")
        copy.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, symlinks=True)
        else:
            shutil.copy(source, copy)
    copy = directory / SHELL.removeprefix("/etc/")
    copy.parent.mkdir(mode=0o755)
    shutil.copy(shell, copy)
    # Executable but not readable: the kernel makes such a process undumpable, so nobody inside can open its pipes.
    copy.chmod(0o111)


def _publish(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        # Another process was first; its directory has the same content.
        shutil.rmtree(scratch)
        if not target.exists():
            raise


def host_stage(etc: Path, runs: Path, mounts: tuple[Mount, ...]) -> Stage:
    """For an ordinary user: bwrap itself reads what this user can read."""
    return Stage(str(etc), str(runs), mounts)


class PrivateStages:
    """Stages for root, one for each set of mounts, kept while the back end lives."""

    def __init__(self, etc: Path, runs: Path) -> None:
        self._etc, self._runs = etc, runs
        self._open: dict[tuple[Mount, ...], int] = {}

    def get(self, mounts: tuple[Mount, ...]) -> Stage:
        """Blocks for some 30 ms the first time that a set of mounts is asked for."""
        if mounts not in self._open:
            self._open[mounts] = self._build(mounts)
        shown = tuple(Mount(f"/mounts/{n}", mount.target) for n, mount in enumerate(mounts))
        # Through our own /proc entry, not an inherited descriptor: nothing of it can leak into the sandbox.
        return Stage("/etc", "/run", shown, f"/proc/{os.getpid()}/fd/{self._open[mounts]}")

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _build(self, mounts: tuple[Mount, ...]) -> int:
        pairs = [str(self._etc), "/etc", str(self._runs), "/run"]
        for n, mount in enumerate(mounts):
            pairs += [_readable_source(mount), f"/mounts/{n}"]
        with tempfile.TemporaryDirectory(prefix="kat-stream-stage-") as place:
            command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _BUILD, "stage", place, *pairs]
            return _namespace_of(command)


def _readable_source(mount: Mount) -> str:
    """The source without links; ConfigError if the sandbox's user could not read it."""
    source = Path(mount.source).resolve()
    if not source.exists():
        raise ConfigError(f"mount {mount.source}: no such file or directory")
    needed = 0o005 if source.is_dir() else 0o004
    if source.stat().st_mode & needed != needed:
        raise ConfigError(f"mount {mount.source}: not readable for other users (uid {SANDBOX_UID} in the sandbox)")
    return str(source)


def _namespace_of(command: Sequence[str]) -> int:
    """Run the builder and take hold of its mount namespace."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as builder:
        assert builder.stdin is not None and builder.stdout is not None and builder.stderr is not None
        if builder.stdout.readline() != b"ready\n":
            reason = builder.stderr.read(2000).decode(errors="replace").strip()
            raise SandboxUnavailable(f"cannot build the sandbox's view of the system: {reason}")
        namespace = os.open(f"/proc/{builder.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        builder.stdin.close()
        builder.wait(_BUILD_DEADLINE_S)
    return namespace
