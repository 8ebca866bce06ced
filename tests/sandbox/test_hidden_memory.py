# ruff: noqa: E501 (programs in strings)
"""What a program holds out of sight, what it does to the process that watches it, and to the folder it gets."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from rft.sandbox import Limits, Sandbox

SMALL = Limits(wall_s=15.0, cpu_s=8, memory=128 << 20)
C_MAP = (
    "import ctypes, os, time\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\n"
    "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]\n"
    "libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]\nlibc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]\n"
    "libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]\nSIZE = 40 << 20\n"
    "def shared():\n    a = libc.mmap(None, SIZE, 3, 0x21, -1, 0)\n    if a in (None, 2 ** 64 - 1): os._exit(1)\n"
    "    libc.memset(a, 1, SIZE)\n    return a\n"
)
HIDDEN = {
    "a shared map that is given back but for one page": C_MAP
    + "for i in range(8):\n    libc.munmap(shared() + 4096, SIZE - 4096); time.sleep(0.1)\ntime.sleep(1); print('alive')",
    "a shared map without permissions": C_MAP
    + "for i in range(8):\n    if os.fork() == 0: libc.mprotect(shared(), SIZE, 0); time.sleep(5); os._exit(0)\n"
    "time.sleep(3); print('alive')",
    "threads whose first has ended": "import ctypes, os, threading, time\ndef hold():\n    x = bytearray(50 << 20)\n"
    "    for j in range(0, len(x), 4096): x[j] = 1\n    time.sleep(5)\n    os._exit(0)\nfor i in range(6):\n"
    "    if os.fork() == 0:\n        threading.Thread(target=hold).start(); time.sleep(0.1)\n        ctypes.PyDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[os.uname().machine], 0)\n"
    "time.sleep(3); print('alive')",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_memory_is_counted(best: Sandbox, name: str) -> None:
    """Without control groups, by pid 1."""
    groups, best._groups = best._groups, None
    try:
        run = best.run(HIDDEN[name], limits=SMALL)
    finally:
        best._groups = groups
    assert run.exceeded == "memory", run
    assert "alive" not in run.stdout


def test_calls_that_hold_memory_in_the_kernel_are_refused(sandbox: Sandbox) -> None:
    program = (
        "import ctypes, os, signal, socket\nlibc = ctypes.CDLL(None)\nout = []\n"
        "if libc.inotify_init1(0) >= 0: out.append('inotify')\nr, w = os.pipe()\n"
        "if libc.vmsplice(w, ctypes.c_void_p(), 0, 0) >= 0: out.append('vmsplice')\n"
        "a, b = socket.socketpair()\ntry:\n    socket.send_fds(a, [b'x'], [r]); out.append('descriptors')\nexcept OSError: pass\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [40])\nn = 0\n"
        "while n < 5000 and libc.sigqueue(os.getpid(), 40, None) == 0: n += 1\nif n == 5000: out.append('signals')\nprint(out)"
    )
    assert sandbox.run(program, limits=SMALL).stdout.strip() == "[]"


def test_a_folder_of_any_depth_and_permissions_is_removed(sandbox: Sandbox) -> None:
    program = (
        "import os\nhome = os.getcwd()\nos.mkdir('shut'); os.mkdir('shut/in'); os.chmod('shut', 0); os.symlink('/', 'root')\n"
        "for i in range(1200):\n    os.mkdir('d'); os.chdir('d')\nprint(home)"
    )
    home = Path(sandbox.run(program, limits=Limits(wall_s=30.0)).stdout.strip())
    assert home.is_absolute() and not home.exists()


UNPRIVILEGED = """
import sys
sys.path.insert(0, sys.argv[1])
from rft.sandbox import Sandbox, SandboxError
for backend in ("bubblewrap", "native", "landlock"):
    try:
        sandbox = Sandbox(backend=backend, require=())
    except SandboxError:
        continue
    with sandbox:
        for number in (1, 2, 10, 15, 19):
            run = sandbox.run(f"import os\\ntry: os.kill(os.getppid(), {number})\\nexcept OSError: pass\\nprint('on')")
            assert run.stdout == "on\\n", (backend, number, run)
        print(backend, sandbox.test("def f(): return 1", ["assert f() == 1"]).passed)
"""


def test_the_same_user_cannot_disturb_pid_1() -> None:
    """Where rft does not run as root, programs have the user id of what watches them."""
    python = Path("/usr/bin/python3.11")
    if os.getuid() != 0 or not python.exists():
        pytest.skip("needs root, to become another user, and a Python that others can read")
    root = str(Path(__file__).parents[2])
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", str(python)]
    done = subprocess.run([*command, "-c", UNPRIVILEGED, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.endswith(" 1") for line in done.stdout.splitlines()), done.stdout


def test_an_interrupted_call_leaves_no_descriptor_and_no_process(best: Sandbox, monkeypatch: Any) -> None:
    import rft.sandbox.client as client

    best.test("def f(): return 1", ["assert f()"])  # two control groups are kept from here on
    before = len(os.listdir("/proc/self/fd"))

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(client, "_collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            best.run("import time; time.sleep(60)", limits=Limits(wall_s=60.0))
        with pytest.raises(KeyboardInterrupt):
            best.test("import time; time.sleep(60)", ["assert f()"], limits=Limits(wall_s=60.0))
    assert len(os.listdir("/proc/self/fd")) == before
    assert best.run("print(1)").stdout == "1\n"


def test_threads_and_forks_may_use_one_sandbox(best: Sandbox) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(best.run(f"print({i})").stdout.strip()))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [str(i) for i in range(6)]
    pid = os.fork()
    if pid == 0:
        try:
            right = best.run("print('child')").stdout == "child\n"
            best.close()
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert best.run("print('parent')").stdout == "parent\n"


def test_ctrl_c_is_for_the_owner(best: Sandbox) -> None:
    assert best._process is not None
    assert os.getsid(best._process.pid) != os.getsid(0)
