"""Restrict a Linux process: namespaces, mounts, privileges, limits, Landlock.

Every failure raises OSError; the caller decides how to proceed without a feature.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 2, 4, 4096, 16384
MS_PRIVATE = 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47

SCRATCH = "/box"  # the folder that a program may write to; /tmp is a link to it

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
# Without /dev/zero: its shared memory stays allocated when most of the map is unmapped.
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, a: int = 0, b: int = 0) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(a), ctypes.c_ulong(b), 0, 0), f"prctl({option})")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def fork_into(namespaces: int) -> int:
    """Fork, as `os.fork`, into new namespaces (CLONE_NEW* flags; 0: none). For single-threaded processes.

    `unshare` and a fork would take one more process: the unsharing process is not in the new namespace.
    """
    api = ctypes.pythonapi
    number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    api.PyOS_BeforeFork()
    pid = int(_libc_with_gil.syscall(number, ctypes.c_ulong(namespaces | signal.SIGCHLD), 0, 0, 0, 0))
    failed = ctypes.get_errno()
    if pid == 0:
        api.PyOS_AfterFork_Child()
        return 0
    api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(failed, f"clone: {os.strerror(failed)}")
    return pid


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else value.encode()

    args = (text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    _check(_libc.mount(*args), f"mount {source} on {target}")


# -- namespaces and file system ----------------------------------------------------------------------


def enter_namespaces() -> None:
    """Enter new mount, network, IPC and host-name namespaces; with a user namespace unless root."""
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
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(value)
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def build_root(readable: Sequence[str]) -> None:
    """Create a new root file system: the given paths read-only, a few devices, an empty `SCRATCH`."""
    root = _mount_point(readable)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in (*SYSTEM_PATHS, *readable):
        _bind(root, path, read_only=True)
    for path in DEVICES:
        _bind(root, path, read_only=False)
    for path in ("/proc", SCRATCH, "/old"):
        os.makedirs(root + path, exist_ok=True)
    if not os.path.lexists(root + "/tmp"):  # a readable path below /tmp makes it a folder
        os.symlink(SCRATCH, root + "/tmp")
    mount("/proc", root + "/proc", None, MS_BIND | MS_REC)
    os.chdir(root)
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    _check(_libc.syscall(number, b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", 2), "umount")
    os.rmdir("/old")
    set_read_only("/", recursive=False)


def _mount_point(readable: Sequence[str]) -> str:
    """Return a folder where mounting the new root hides none of the needed paths."""
    needed = [os.path.realpath(path) + "/" for path in (*readable, *SYSTEM_PATHS)]
    for folder in ("/mnt", "/media", "/srv", "/opt", "/tmp", "/var", "/home", "/root"):
        real = os.path.realpath(folder)
        if os.path.isdir(real) and not any(path.startswith(real + "/") for path in needed):
            return real
    raise OSError("no folder is free to mount the sandbox's root on (tried /mnt, /media, /srv, /opt, /tmp)")


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
        open(root + path, "wb").close()
    mount(path, root + path, None, MS_BIND | MS_REC)
    if read_only:
        set_read_only(root + path, recursive=True)


def set_read_only(path: str, *, recursive: bool) -> None:
    """Set mounts to read-only, without set-user-id, by mount_setattr(2); recursive: also below `path`."""
    attr = struct.pack("QQQQ", 1 | 2, 0, 0, 0)
    flags = 0x8000 if recursive else 0  # AT_RECURSIVE
    _check(_libc.syscall(442, -100, path.encode(), flags, attr, len(attr)), f"mount_setattr {path}")


# -- privileges --------------------------------------------------------------------------------------


def bound_capabilities() -> None:
    """Empty the bounding set, so that no program executed here or in a child can gain a capability."""
    with contextlib.suppress(OSError):  # not privileged, or past the last capability
        for capability in range(64):
            prctl(PR_CAPBSET_DROP, capability)


def drop_privileges(uid: int | None) -> None:
    """Switch to `uid` (None: keep it) irrevocably, without capabilities. The bounding set must be empty."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    with contextlib.suppress(OSError):
        prctl(PR_CAP_AMBIENT, 4)  # clear all
    _check(_libc.capset(header, bytes(24)), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def limit(memory: int, cpu_s: int, file_bytes: int, processes: int, *, address_space: bool) -> None:
    """Set resource limits; exceeding the CPU time kills the process."""
    rules = [
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 1024),  # queued signals and timers use kernel memory
    ]
    if address_space:
        rules.append((resource.RLIMIT_AS, memory))
    for which, value in rules:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


# -- Landlock ----------------------------------------------------------------------------------------


def landlock_abi() -> int:
    """Return the kernel's Landlock version; 0 if it is not supported."""
    return max(0, _libc.syscall(444, 0, 0, 1))


def landlock(readable: Sequence[str], writable: str) -> None:
    """Allow reading and execution below `readable`, all access below `writable`, and no other files.

    Also forbids TCP, and signals to processes outside, if the kernel's version supports it.
    """
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


def python_paths() -> list[str]:
    """Return the folders that this Python needs, including importable packages."""
    paths = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)} | {sys.prefix}
    paths |= {p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")}
    paths = {p for p in paths if not p.startswith("/usr/") and p not in ("/", "/usr")}
    return sorted(p for p in paths if not any(p.startswith(q + "/") for q in paths))
