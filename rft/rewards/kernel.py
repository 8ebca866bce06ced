"""The protections that a Linux process can put on itself: namespaces, seccomp, Landlock, limits.

Standard library only: this file runs in the sandbox's own process, isolated from the rest of rft.
Everything that fails raises OSError; what to do without a feature is decided by the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 2, 4, 4096, 16384
MS_PRIVATE = 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47

SYSTEM_PATHS: tuple[str, ...] = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/alternatives",
    "/etc/ld.so.cache",
)
SYSTEM_PATHS += ("/etc/localtime", "/etc/java-11-openjdk", "/etc/java-17-openjdk", "/etc/java-21-openjdk")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, a: int = 0, b: int = 0) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(a), ctypes.c_ulong(b), 0, 0), f"prctl({option})")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else value.encode()

    args = (text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    _check(_libc.mount(*args), f"mount {source} on {target}")


# -- namespaces and file system ----------------------------------------------------------------------


def enter_namespaces() -> None:
    """New mount, network, IPC and host-name namespaces; with a user namespace where not root."""
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if uid == 0:
        unshare(flags)
    else:
        unshare(CLONE_NEWUSER | flags)
        for name, value in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(value)
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def build_root(root: str, readable: Sequence[str]) -> None:
    """Make `root` the file system: the given paths read-only, a few devices, nothing else."""
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in (*SYSTEM_PATHS, *readable):
        _bind(root, path, read_only=True)
    for path in DEVICES:
        _bind(root, path, read_only=False)
    for path in ("/proc", "/tmp", "/old"):
        os.makedirs(root + path, exist_ok=True)
    mount("/proc", root + "/proc", None, MS_BIND | MS_REC)
    os.chdir(root)
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    _check(_libc.syscall(number, b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", 2), "umount")
    os.rmdir("/old")
    set_read_only("/", recursive=False)


def _bind(root: str, path: str, *, read_only: bool) -> None:
    if not os.path.lexists(path) or os.path.lexists(root + path):
        return
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), root + path)
        return
    if os.path.isdir(path):
        os.mkdir(root + path)
    else:
        open(root + path, "w").close()
    mount(path, root + path, None, MS_BIND | MS_REC)
    if read_only:
        set_read_only(root + path, recursive=True)


def set_read_only(path: str, *, recursive: bool) -> None:
    """mount_setattr(2): read-only and no set-user-id, on all mounts below `path` too."""
    attr = struct.pack("QQQQ", 1 | 2, 0, 0, 0)
    flags = 0x8000 if recursive else 0  # AT_RECURSIVE
    _check(_libc.syscall(442, -100, path.encode(), flags, attr, len(attr)), f"mount_setattr {path}")


# -- privileges --------------------------------------------------------------------------------------


def drop_privileges(uid: int | None) -> None:
    """Become `uid` (None: keep it), without capabilities, for good."""
    with contextlib.suppress(OSError):  # not privileged: nothing to drop from
        for capability in range(64):
            prctl(PR_CAPBSET_DROP, capability)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    with contextlib.suppress(OSError):
        prctl(PR_CAP_AMBIENT, 4)  # clear all
    _check(_libc.capset(header, bytes(24)), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)


def limit(memory: int, cpu_s: int, file_bytes: int, processes: int, *, address_space: bool) -> None:
    """Resource limits; a CPU-time excess kills."""
    rules = [
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]
    if address_space:
        rules.append((resource.RLIMIT_AS, memory))
    for which, value in rules:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


# -- seccomp -----------------------------------------------------------------------------------------

_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: (x86_64, aarch64)
_DENIED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount_setattr": (442, 442),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "open_by_handle_at": (304, 265),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "clock_settime": (227, 112),
    "settimeofday": (164, 170),
    "sethostname": (170, 161),
}
_SIGNALS = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424)}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NAMESPACE_FLAGS = 0x7E020000  # of clone(2)
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def filter_syscalls(*, signals: bool) -> None:
    """Install the seccomp filter. signals: False forbids sending signals to others at all."""
    machine = platform.machine()
    column = {"x86_64": 0, "aarch64": 1}[machine]
    denied = {**_DENIED, **({} if signals else _SIGNALS)}
    code: list[tuple[int, int, int, int]] = [
        (0x20, 0, 0, 4),  # load the architecture
        (0x15, 1, 0, _ARCH[machine]),
        (0x06, 0, 0, _KILL),
        (0x20, 0, 0, 0),  # load the number
        (0x35, 0, 1, 0x40000000),  # x32 system calls
        (0x06, 0, 0, _EPERM),
        (0x15, 0, 1, _CLONE3[column]),  # its flags are out of reach: libc falls back to clone
        (0x06, 0, 0, _ENOSYS),
    ]
    for number in denied.values():
        code += [(0x15, 0, 1, number[column]), (0x06, 0, 0, _EPERM)]
    code += [
        (0x15, 0, 3, _CLONE[column]),
        (0x20, 0, 0, 16),  # its flags
        (0x45, 0, 1, _NAMESPACE_FLAGS),
        (0x06, 0, 0, _EPERM),
        (0x06, 0, 0, _ALLOW),
    ]
    program = b"".join(struct.pack("=HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    address = ctypes.create_string_buffer(header)
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(address))


# -- Landlock ----------------------------------------------------------------------------------------


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    return max(0, _libc.syscall(444, 0, 0, 1))


def landlock(readable: Sequence[str], writable: str) -> None:
    """Read and execute below `readable`, everything below `writable`, nothing else; no TCP; no signals
    to processes outside, as far as the kernel's version goes."""
    abi = landlock_abi()
    if abi < 1:
        raise OSError("this kernel has no Landlock")
    handled = (1 << (13 if abi < 2 else 14 if abi < 3 else 15)) - 1
    attr = struct.pack("QQQ", handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _check(_libc.syscall(444, attr, size, 0), "landlock_create_ruleset")
    read_only = 1 | 4 | 8  # execute, read file, read dir
    for path in (*readable, *SYSTEM_PATHS, *DEVICES, "/proc/self", writable):
        if not os.path.exists(path):
            continue
        access = handled if path == writable else read_only
        if path in DEVICES:
            access = 4 | 2
        elif not os.path.isdir(path):
            access = 1 | 4
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access & handled, fd)
        _check(_libc.syscall(445, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(fd)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _check(_libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def readable_prefixes() -> list[str]:
    """The folders that this Python needs."""
    found = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)} | {sys.prefix}
    return sorted(p for p in found if not p.startswith("/usr") and p != "/")
