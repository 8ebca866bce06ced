"""Build the filter of system calls that a sandboxed process may not make, each with its reason.

The filter is compiled by libseccomp if that library is installed, and otherwise from the numbers below.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import linux

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
OPTIMIZE = 8  # SCMP_FLTATR_CTL_OPTIMIZE
NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW* of clone(2)
SOL_SOCKET, AF_UNIX = 1, 1
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@dataclass(frozen=True)
class Masked:
    """The condition `argument & mask == value` (32 bits); `unequal`: its negation, with a full mask."""

    argument: int
    mask: int
    value: int
    unequal: bool = False


@dataclass(frozen=True)
class Rule:
    """A call that fails with `error` if all conditions in `when` hold (no condition: always).

    numbers: of x86_64 and aarch64; -1 if the architecture does not have the call.
    """

    call: str
    numbers: tuple[int, int]
    reason: str
    when: tuple[Masked, ...] = ()
    error: int = errno.EPERM


def _equal(argument: int, value: int) -> Masked:
    return Masked(argument, 0xFFFFFFFF, value)


def _rules(reason: str, **calls: tuple[int, int]) -> list[Rule]:
    return [Rule(call, numbers, reason) for call, numbers in calls.items()]


RULES: list[Rule] = [
    *_rules(
        "reach the network or a service of the host", socket=(41, 198), connect=(42, 203), bind=(49, 200)
    ),
    *_rules(
        "read or change another process",
        ptrace=(101, 117),
        process_vm_readv=(310, 270),
        process_vm_writev=(311, 271),
        process_madvise=(440, 440),
        pidfd_getfd=(438, 438),
        kcmp=(312, 272),
    ),
    *_rules(
        "change what the file system looks like, or leave it",
        mount=(165, 40),
        umount2=(166, 39),
        pivot_root=(155, 41),
        chroot=(161, 51),
        mount_setattr=(442, 442),
        open_tree=(428, 428),
        move_mount=(429, 429),
        fsopen=(430, 430),
        fsconfig=(431, 431),
        fsmount=(432, 432),
        fspick=(433, 433),
        open_by_handle_at=(304, 265),
        name_to_handle_at=(303, 264),
        fanotify_init=(300, 262),
        quotactl=(179, 60),
    ),
    *_rules("make a namespace, in which privileges come back", unshare=(272, 97), setns=(308, 268)),
    *[
        Rule("clone", (56, 220), "make a namespace with a process", (Masked(0, 1 << bit, 1 << bit),))
        for bit in range(32)
        if NAMESPACE_FLAGS >> bit & 1
    ],
    # Its flags are in memory, which a filter cannot read. libc falls back to clone.
    Rule("clone3", (435, 435), "make a namespace with a process", error=errno.ENOSYS),
    *_rules(
        "kernel interfaces with a history of escapes",
        bpf=(321, 280),
        perf_event_open=(298, 241),
        userfaultfd=(323, 282),
        io_uring_setup=(425, 425),
        io_uring_enter=(426, 426),
        io_uring_register=(427, 427),
    ),
    # Pid 1 of the request may run as the same user.
    Rule("prlimit64", (302, 261), "limit another process", (Masked(0, 0xFFFFFFFF, 0, unequal=True),)),
    *_rules("keys outlive the program", add_key=(248, 217), request_key=(249, 218), keyctl=(250, 219)),
    *_rules(
        "memory that no limit counts, or that outlives the program",
        memfd_create=(319, 279),
        memfd_secret=(447, 447),
        shmget=(29, 194),
        semget=(64, 190),
        msgget=(68, 186),
        mq_open=(240, 180),
    ),
    *_rules(
        "memory in the kernel that no process shows: pages in pipes, descriptors in flight, watches",
        vmsplice=(278, 75),
        sendmsg=(46, 211),
        sendmmsg=(307, 269),
        inotify_init=(253, -1),
        inotify_init1=(294, 26),
        io_setup=(206, 0),
    ),
    # asyncio and multiprocessing need a pair of stream sockets; datagrams and larger buffers would only
    # allocate kernel memory.
    *[
        Rule("socketpair", (53, 199), "memory in the kernel", (Masked(1, 0xF, kind),))
        for kind in (2, 3, 4, 5, 6)
    ],
    *[
        Rule("setsockopt", (54, 208), "memory in the kernel", (_equal(1, SOL_SOCKET), _equal(2, option)))
        for option in (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF, and the variants that ignore the limit
    ],
    Rule("fcntl", (72, 25), "memory in the kernel", (_equal(1, 1031),)),  # F_SETPIPE_SZ
    *_rules(
        "change the machine",
        init_module=(175, 105),
        finit_module=(313, 273),
        delete_module=(176, 106),
        kexec_load=(246, 104),
        kexec_file_load=(320, 294),
        reboot=(169, 142),
        swapon=(167, 224),
        swapoff=(168, 225),
        acct=(163, 89),
        syslog=(103, 116),
        clock_settime=(227, 112),
        settimeofday=(164, 170),
        adjtimex=(159, 171),
        clock_adjtime=(305, 266),
        sethostname=(170, 161),
        setdomainname=(171, 162),
        iopl=(172, -1),
        ioperm=(173, -1),
    ),
]
SIGNAL_RULES = _rules(
    "signal processes outside, where no namespace hides them",
    kill=(62, 129),
    tkill=(200, 130),
    tgkill=(234, 131),
    pidfd_send_signal=(424, 424),
    rt_sigqueueinfo=(129, 138),
    rt_tgsigqueueinfo=(297, 240),
    setpgid=(109, 154),  # into the killer's process group, which is not killed as a group
    setpriority=(141, 140),
    sched_setscheduler=(144, 119),
    sched_setparam=(142, 118),
    sched_setattr=(314, 274),
    ioprio_set=(251, 30),
    migrate_pages=(256, 238),
    move_pages=(279, 239),
)
# Limits and CPU affinity of another process: the first argument is a process id; 0 means the caller.
SIGNAL_RULES.append(
    Rule("sched_setaffinity", (203, 122), "move processes outside", (Masked(0, 0xFFFFFFFF, 0, unequal=True),))
)
# The owner of a descriptor is signalled when it becomes ready, without a call of kill.
SIGNAL_RULES += [
    Rule("fcntl", (72, 25), "have the kernel signal processes outside", (_equal(1, command),))
    for command in (8, 10, 15, 1026)  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY
]
SIGNAL_RULES += [
    Rule("ioctl", (16, 29), "have the kernel signal processes outside", (_equal(1, request),))
    for request in (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP
]
# Pages of a shared map stay allocated when most of the map is unmapped, and only a privileged process can
# count them. With this rule the file system also omits /dev/zero, which provides such maps too.
SHARED_MEMORY_RULES = [
    Rule("mmap", (9, 222), "shared memory that nothing here can count", (Masked(3, 0x21, 0x21),))
]


@dataclass(frozen=True)
class Filter:
    """A compiled filter: BPF instructions, and the compiler's name."""

    code: bytes
    compiler: str


def build_filter(*, signals: bool, shared_memory: bool = True) -> Filter:
    """Compile the rules.

    signals: whether processes may signal others (they have a separate process namespace).
    shared_memory: whether shared maps without a file are allowed (their pages are counted elsewhere).

    Raises OSError on a processor without rules, or if libseccomp refuses them.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no seccomp rules for {machine}")
    rules = [
        *RULES,
        *([] if signals else SIGNAL_RULES),
        *([] if shared_memory else SHARED_MEMORY_RULES),
    ]
    library = _libseccomp()
    if library is not None:
        return Filter(_by_libseccomp(library, rules), "libseccomp")
    return Filter(_compile_builtin(rules, *_ARCHITECTURES[machine]), "built-in table")


def install(filter_: Filter) -> None:
    """Install the filter irrevocably on this process and its children. Raises OSError."""
    count = len(filter_.code) // 8
    buffer = ctypes.create_string_buffer(filter_.code, len(filter_.code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", count, ctypes.addressof(buffer)))
    linux.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


# -- libseccomp --------------------------------------------------------------------------------------


class _Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


def _libseccomp() -> Any:
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        return None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Comparison),
    ]
    return library


def _by_libseccomp(library: Any, rules: Sequence[Rule]) -> bytes:
    allow, error_action, masked_equal, unequal, unknown = 0x7FFF0000, 0x00050000, 7, 1, -1
    context = library.seccomp_init(allow)
    if not context:
        raise OSError(errno.ENOMEM, "seccomp_init failed")
    try:
        # A binary tree: on installation the kernel runs the filter once for every call number. Versions
        # before 2.5 refuse this, and the filter is a list.
        library.seccomp_attr_set(context, OPTIMIZE, 2)
        for rule in rules:
            number = library.seccomp_syscall_resolve_name(rule.call.encode())
            if number == unknown:  # newer than this libseccomp
                column, _ = _ARCHITECTURES[platform.machine()]
                number = rule.numbers[column]
            if number < 0:
                continue
            comparisons = (_Comparison * len(rule.when))(
                *(
                    _Comparison(c.argument, unequal, c.value, 0)
                    if c.unequal
                    else _Comparison(c.argument, masked_equal, c.mask, c.value)
                    for c in rule.when
                )
            )
            action = error_action | rule.error
            failed = library.seccomp_rule_add_array(context, action, number, len(rule.when), comparisons)
            if failed:
                raise OSError(-failed, f"libseccomp rejects the rule for {rule.call}: {os.strerror(-failed)}")
        fd = os.memfd_create("seccomp")
        try:
            failed = library.seccomp_export_bpf(context, fd)
            if failed:
                raise OSError(-failed, f"seccomp_export_bpf: {os.strerror(-failed)}")
            return os.pread(fd, 1 << 20, 0)
        finally:
            os.close(fd)
    finally:
        library.seccomp_release(context)


# -- built-in compiler -------------------------------------------------------------------------------

_LOAD, _AND, _JUMP_EQ, _JUMP_GE, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def _compile_builtin(rules: Sequence[Rule], column: int, architecture: int) -> bytes:
    """Compile: check the architecture, refuse x32 numbers, then add one block per rule."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQ, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_GE, 0, 1, 0x40000000),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    for rule in rules:
        number = rule.numbers[column]
        if number < 0:
            continue
        block: list[tuple[int, int, int, int]] = []
        left = 3 * len(rule.when) + 1  # remaining instructions of this rule after this jump
        if rule.when:
            left += 1  # and reloading the number
        block.append((_JUMP_EQ, 0, left, number))
        for position, c in enumerate(rule.when):
            behind = 3 * (len(rule.when) - position - 1) + 1  # up to reloading the number
            block += [
                (_LOAD, 0, 0, 16 + 8 * c.argument),
                (_AND, 0, 0, c.mask),
                (_JUMP_EQ, behind, 0, c.value) if c.unequal else (_JUMP_EQ, 0, behind, c.value),
            ]
        block.append((_RETURN, 0, 0, _ERRNO | rule.error))
        if rule.when:
            block.append((_LOAD, 0, 0, 0))
        code += block
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in code)
