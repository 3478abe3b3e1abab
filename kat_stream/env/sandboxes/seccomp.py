"""The system-call filter of a sandbox, as a classic BPF program in the byte form that `bwrap --seccomp` reads.

Owns the deny list. Invariant: what is denied is denied on every architecture listed here, and a call made through a
foreign ABI (i386, x32) does not exist. Source of the numbers: Linux uapi asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import platform
import struct

from kat_stream.errors import SandboxUnavailable

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

# name: (x86_64, aarch64); None where the call does not exist.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # Mounts and roots: the view of the file system is made once, by bwrap.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "statmount": (457, 457),
    "listmount": (458, 458), "open_tree_attr": (467, 467),
    # Namespaces; clone and clone3 are handled by argument below.
    "unshare": (272, 97), "setns": (308, 268),
    # Large kernel surfaces with a history of privilege escalation.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    # Reaching into other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    # Files by handle go past directory permissions.
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # The machine itself.
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "create_module": (174, None),
    "get_kernel_syms": (177, None), "query_module": (178, None), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "vhangup": (153, 58), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "uselib": (134, None),
    "ustat": (136, None), "sysfs": (139, None), "_sysctl": (156, None), "vserver": (236, None),
    # NUMA placement acts on the whole machine's memory.
    "mbind": (237, 235), "set_mempolicy": (238, 237), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "set_mempolicy_home_node": (450, 450),
}  # fmt: skip

_SPECIAL = {
    "x86_64": {"clone": 56, "clone3": 435, "socket": 41, "socketpair": 53, "ioctl": 16, "personality": 135},
    "aarch64": {"clone": 220, "clone3": 435, "socket": 198, "socketpair": 199, "ioctl": 29, "personality": 92},
}

_CLONE_NEW = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}; NEWTIME cannot be asked of clone(2)
_FAMILIES = (1, 2, 10, 16)  # UNIX, INET, INET6, NETLINK. VSOCK above all is not bound by network namespaces
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_PERSONALITIES = (0, 0xFFFFFFFF)  # PER_LINUX, and the query

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # offsets in struct seccomp_data; low halves on little endian
_ALLOW = 0x7FFF0000

_Instruction = tuple[int, int, int, int]


def _errno(code: int) -> int:
    return 0x00050000 | code


def _load(offset: int) -> _Instruction:
    return (_LOAD, 0, 0, offset)


def _give(value: int) -> _Instruction:
    return (_RETURN, 0, 0, value)


def _refuse_if(operation: int, value: int, code: int) -> list[_Instruction]:
    return [(operation, 0, 1, value), _give(_errno(code))]


def _block(number: int, body: list[_Instruction]) -> list[_Instruction]:
    """`body` for one system call; it must end in a return."""
    return [(_EQUAL, 0, len(body), number), *body]


def _only(offset: int, values: tuple[int, ...], code: int) -> list[_Instruction]:
    """Allow the argument at `offset` to be one of `values`, refuse all others."""
    tests: list[_Instruction] = []
    for value in values:
        tests += [(_EQUAL, 0, 1, value), _give(_ALLOW)]
    return [_load(offset), *tests, _give(_errno(code))]


def _arguments(calls: dict[str, int]) -> list[_Instruction]:
    """The calls that are needed, with some of their arguments refused."""
    clone = [_load(_ARG0), *_refuse_if(_ANY_BIT, _CLONE_NEW, errno.EPERM), _give(_ALLOW)]
    ioctl = [_load(_ARG1)]
    for request in _TERMINAL_INJECTION:
        ioctl += _refuse_if(_EQUAL, request, errno.EPERM)
    family = _only(_ARG0, _FAMILIES, errno.EAFNOSUPPORT)
    return [
        *_block(calls["clone"], clone),
        # Its flags lie in memory, where a filter cannot look; ENOSYS makes the C library use clone.
        *_block(calls["clone3"], [_give(_errno(errno.ENOSYS))]),
        *_block(calls["socket"], family),
        *_block(calls["socketpair"], family),
        *_block(calls["ioctl"], [*ioctl, _give(_ALLOW)]),
        *_block(calls["personality"], _only(_ARG0, _PERSONALITIES, errno.EPERM)),
    ]


def denied_calls(machine: str) -> dict[str, int]:
    """Names and numbers of the calls refused with EPERM on `machine` ("x86_64" or "aarch64")."""
    column = list(_AUDIT_ARCH).index(machine)
    return {name: number for name, both in _DENIED.items() if (number := both[column]) is not None}


def filter_program(machine: str = platform.machine()) -> bytes:
    """struct sock_filter[] for `machine`; SandboxUnavailable for an architecture without a table."""
    if machine not in _AUDIT_ARCH:
        raise SandboxUnavailable(f"no system-call table for {machine}; there are {', '.join(_AUDIT_ARCH)}")
    program = [_load(_ARCH), (_EQUAL, 1, 0, _AUDIT_ARCH[machine]), _give(_errno(errno.ENOSYS)), _load(_NUMBER)]
    if machine == "x86_64":
        program += _refuse_if(_AT_LEAST, _X32_BIT, errno.ENOSYS)
    for number in denied_calls(machine).values():
        program += _refuse_if(_EQUAL, number, errno.EPERM)
    program += [*_arguments(_SPECIAL[machine]), _give(_ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
