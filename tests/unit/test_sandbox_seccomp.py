"""The system-call filter, run instruction by instruction as the kernel would."""

from __future__ import annotations

import errno
import platform
import struct

import pytest

from kat_stream.env.sandboxes.seccomp import denied_calls, filter_program
from kat_stream.errors import SandboxUnavailable

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HARMLESS = {"x86_64": {"read": 0, "execve": 59, "openat": 257}, "aarch64": {"read": 63, "execve": 221, "openat": 56}}
SPECIAL = {"x86_64": (56, 435, 41, 16, 135), "aarch64": (220, 435, 198, 29, 92)}


def verdict(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """The value that a classic BPF program returns for one system call."""
    padded = [*arguments, *([0] * (6 - len(arguments)))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *padded)
    accumulator, at = 0, 0
    instructions = list(struct.iter_unpack("<HBBI", program))
    while True:
        code, if_true, if_false, k = instructions[at]
        at += 1
        if code == 0x06:
            return int(k)
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        else:
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_deny_list_is_denied_and_the_rest_allowed(machine: str) -> None:
    program = filter_program(machine)
    assert len(program) % 8 == 0 and len(program) // 8 < 4096
    for name, number in denied_calls(machine).items():
        assert verdict(program, ARCH[machine], number) == ERRNO | errno.EPERM, name
    for name, number in HARMLESS[machine].items():
        assert verdict(program, ARCH[machine], number) == ALLOW, name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_arguments_decide(machine: str) -> None:
    program, arch = filter_program(machine), ARCH[machine]
    clone, clone3, socket, ioctl, personality = SPECIAL[machine]
    assert verdict(program, arch, clone, 0x01200011) == ALLOW
    for bit in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(program, arch, clone, bit | 17) == ERRNO | errno.EPERM
    assert verdict(program, arch, clone3) == ERRNO | errno.ENOSYS
    assert [verdict(program, arch, socket, family) for family in (1, 2, 10, 16)] == [ALLOW] * 4
    for family in (15, 17, 21, 38, 40):
        assert verdict(program, arch, socket, family) == ERRNO | errno.EAFNOSUPPORT
    assert verdict(program, arch, ioctl, 0, 0x5401) == ALLOW
    # The high half of a request is not looked at by the kernel either.
    assert verdict(program, arch, ioctl, 0, 0x5412 | 1 << 32) == ERRNO | errno.EPERM
    assert verdict(program, arch, personality, 0xFFFFFFFF) == ALLOW
    assert verdict(program, arch, personality, 0x0040000) == ERRNO | errno.EPERM


def test_foreign_calling_conventions_do_not_exist() -> None:
    program = filter_program("x86_64")
    assert verdict(program, 0x40000003, 11) == ERRNO | errno.ENOSYS
    assert verdict(program, ARCH["x86_64"], 0x40000000) == ERRNO | errno.ENOSYS
    assert verdict(program, ARCH["aarch64"], 63) == ERRNO | errno.ENOSYS


def test_an_unknown_machine_is_an_error() -> None:
    with pytest.raises(SandboxUnavailable, match="riscv64"):
        filter_program("riscv64")
    assert platform.machine() not in ARCH or filter_program() == filter_program(platform.machine())
