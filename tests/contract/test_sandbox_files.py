"""The contract of every sandbox back end: files go in and come out, mounts are shown."""

from __future__ import annotations

import io
import tarfile
import threading
from collections import UserDict
from collections.abc import Iterator

import pytest

from kat_stream.env.sandboxes import Mount, Sandbox, SandboxSpec
from kat_stream.errors import SandboxError
from tests.contract.sandbox_kit import kind, play

__all__ = ["kind"]


def test_files_go_in_and_come_out(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        files = {"a.sh": (b"#!/bin/sh\necho ran\n", 0o755), "deep/er/ä b.bin": (bytes(range(256)) * 999, 0o640)}
        await sandbox.put(files, "/work/in")
        result = await sandbox.exec("in/a.sh; stat -c %a in/a.sh in/deep/er/*", timeout_s=10)
        assert result.stdout == b"ran\n755\n640\n"
        assert await sandbox.read_file("/work/in/deep/er/ä b.bin", 1 << 20) == bytes(range(256)) * 999
        with tarfile.open(fileobj=io.BytesIO(await sandbox.get("/work/in", limit_bytes=1 << 20))) as archive:
            assert {m.name for m in archive if m.isfile()} == {"work/in/a.sh", "work/in/deep/er/ä b.bin"}
        relative = await sandbox.get(["in/a.sh"], limit_bytes=1 << 20)
        with tarfile.open(fileobj=io.BytesIO(relative)) as archive:
            assert archive.getnames() == ["work/in/a.sh"]
        await sandbox.put_tar(relative, "/tmp/copy")
        assert await sandbox.read_file("/tmp/copy/work/in/a.sh", 100) == files["a.sh"][0]

    play(kind, scenario)


class Watched(UserDict[str, tuple[bytes, int]]):
    """Files that know which thread walked through them."""

    thread = 0

    def __iter__(self) -> Iterator[str]:
        self.thread = threading.get_ident()
        return super().__iter__()


def test_many_files_do_not_keep_the_event_loop(kind: str) -> None:
    files = Watched({f"{n % 50}/{n}": (b"%d" % n, 0o644) for n in range(5000)})

    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put(files, "/work")
        assert files.thread not in (0, threading.get_ident())
        assert (await sandbox.exec("find . -type f | wc -l; cat 49/4999", timeout_s=10)).stdout == b"5000\n4999"

    play(kind, scenario)


@pytest.mark.parametrize("name", ["a\\nb", "a\\101", "a\nb", "-C", "caf\udce9", "x y"])
def test_a_name_is_taken_as_it_is(kind: str, name: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put({name: (b"file", 0o644)}, f"/work/{name}")
        assert await sandbox.read_file(f"/work/{name}/{name}", 100) == b"file"
        with tarfile.open(fileobj=io.BytesIO(await sandbox.get(f"/work/{name}", limit_bytes=1 << 20))) as archive:
            assert archive.getnames() == [f"work/{name}", f"work/{name}/{name}"]

    play(kind, scenario)


def test_a_file_has_a_date_that_archives_can_hold(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put({"f": (b"", 0o644)}, "/work")
        result = await sandbox.exec("python3 -m zipfile -c f.zip f", timeout_s=20)
        assert result.exit_code == 0, result.stderr

    play(kind, scenario)


def test_files_go_into_the_further_writable_directories(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put({"test.sh": (b"exit 3", 0o644)}, "/tests")
        assert (await sandbox.exec(f"sh {sandbox.root}/tests/test.sh", timeout_s=10)).exit_code == 3
        await sandbox.exec(f"echo 1 > {sandbox.root}/logs/verifier/reward.txt", timeout_s=10)
        assert await sandbox.read_file("/logs/verifier/reward.txt", 10) == b"1\n"

    play(kind, scenario, SandboxSpec(writable=("/tests", "/logs/verifier")))


def test_wrong_files_are_typed_errors(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        with pytest.raises(FileNotFoundError):
            await sandbox.read_file("/work/none", 10)
        with pytest.raises(FileNotFoundError):
            await sandbox.get(["/work", "/work/none"], limit_bytes=1 << 20)
        with pytest.raises(SandboxError, match="not a regular file"):
            await sandbox.read_file("/work", 10)
        await sandbox.exec("head -c 5000 /dev/zero > big; mkfifo fifo", timeout_s=10)
        with pytest.raises(SandboxError, match="larger"):
            await sandbox.read_file("big", 4999)
        with pytest.raises(SandboxError, match="not a regular file"):
            await sandbox.read_file("fifo", 4999)
        assert len(await sandbox.read_file("big", 5000)) == 5000
        with pytest.raises(SandboxError, match="larger"):
            await sandbox.get("big", limit_bytes=5000)
        with pytest.raises(SandboxError, match="leads out"):
            await sandbox.put({"../x": (b"", 0o644)}, "/work")
        with pytest.raises(SandboxError, match="cannot unpack"):
            await sandbox.put_tar(b"this is no tar archive" * 100, "/work")

    play(kind, scenario)


def test_links_come_out_as_links(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.exec("mkdir r; ln -s /etc/shadow r/soft; echo x > r/one; ln r/one r/two", timeout_s=10)
        with tarfile.open(fileobj=io.BytesIO(await sandbox.get("r", limit_bytes=1 << 20))) as archive:
            members = {m.name: m for m in archive}
        assert members["work/r/soft"].issym() and members["work/r/soft"].linkname == "/etc/shadow"
        assert members["work/r/one"].isreg() and members["work/r/two"].isreg()

    play(kind, scenario)


def test_a_mount_is_shown(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tool = tmp_path_factory.mktemp("tool")
    tool.chmod(0o755)  # its parent stays unreadable for the sandbox's user
    (tool / "bin").mkdir()
    (tool / "bin" / "greet").write_text("#!/bin/sh\necho hello\n")
    (tool / "bin" / "greet").chmod(0o755)

    async def scenario(sandbox: Sandbox) -> None:
        assert (await sandbox.exec(f"{sandbox.root}/opt/tool/bin/greet", timeout_s=10)).stdout == b"hello\n"

    play(kind, scenario, SandboxSpec(mounts=(Mount(str(tool), "/opt/tool"),)))
