"""What every backend promises: isolation, limits, nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sandbox_backends import open_sandbox

from rft.sandbox import PROTECTIONS, Limits, Result, Sandbox, SandboxError

ADD = "def add(a, b):\n    return a + b\n"
SMALL = Limits(wall_s=8.0, memory=128 << 20)


def printed(sandbox: Sandbox, program: str, limits: Limits = SMALL) -> str:
    run = sandbox.run(program, limits=limits)
    assert run.code == 0, run
    return run.stdout.strip()


def test_a_program_reads_stdin_and_files_and_writes_its_scratch_folder(sandbox: Sandbox) -> None:
    program = (
        "import os\nprint(input(), open('data.txt').read())\nopen('new', 'w').write('x')\n"
        "print(sorted(os.listdir('.')))"
    )
    run = sandbox.run(program, {"data.txt": b"given"}, "typed \u00e9\n")
    assert (run.code, run.stdout) == (0, "typed \u00e9 given\n['data.txt', 'new']\n"), run
    assert printed(sandbox, "import os; print(os.listdir('.'))") == "[]", "the scratch folder is not private"


def test_packages_of_this_python_can_be_imported(sandbox: Sandbox) -> None:
    assert printed(sandbox, "import numpy; print(numpy.arange(3).sum())", Limits()) == "3"


def test_what_an_interpreter_needs_works(sandbox: Sandbox) -> None:
    """asyncio makes a pair of sockets, subprocess a pipe, threads a clone."""
    program = (
        "import asyncio, subprocess, threading\n"
        "async def f():\n    await asyncio.sleep(0)\n    return 3\n"
        "print(asyncio.run(f()), subprocess.run(['echo', 'hi'], capture_output=True).stdout)\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()"
    )
    assert printed(sandbox, program) == "3 b'hi\\n'\nthread"


def test_the_machine_cannot_be_reached(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush")
    secret.chmod(0o644)
    program = (
        "import ctypes, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\nout = []\n"
        "def tried(name, call):\n"
        "    try:\n        if call() not in (-1, None): out.append(name)\n    except OSError: pass\n"
        f"tried('secret', lambda: open({str(secret)!r}).read())\n"
        "tried('shadow', lambda: open('/etc/passwd').read())\n"
        "for f in ('AF_INET', 'AF_INET6', 'AF_UNIX', 'AF_NETLINK'):\n"
        "    tried(f, lambda: socket.socket(getattr(socket, f)))\n"
        "tried('datagrams', lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))\n"
        "for name, args in {'unshare': (0x10000000,), 'ptrace': (16, 1, 0, 0), 'chroot': (b'/',),\n"
        "                   'semget': (1, 1, 0o1666), 'shmget': (1, 4096, 0o1666), 'msgget': (1, 0o1666),\n"
        "                   'memfd_create': (b'x', 0)}.items():\n"
        "    tried(name, lambda: getattr(libc, name)(*args))\n"
        "tried('ppid', lambda: os.kill(os.getppid(), 0) or (1 if os.getppid() > 1 else None))\n"
        "tried('mem', lambda: open(f'/proc/{os.getppid()}/mem', 'rb').fileno())\n"
        "tried('write', lambda: open('/usr/evil', 'w').fileno())\n"
        "print(out)"
    )
    assert printed(sandbox, program) == "[]"


@pytest.mark.parametrize(
    ("kind", "program", "exceeded"),
    [
        ("wall", "import time; time.sleep(100)", {"wall time"}),
        ("cpu", "while True: pass", {"CPU time"}),
        ("memory", "x = []\nwhile True: x.append(bytearray(10 ** 7))", {"", "memory"}),
        (
            "shared maps",
            "import os, mmap, time\nfor i in range(8):\n if os.fork() == 0:\n  m = mmap.mmap(-1, 90 << 20)\n"
            "  for j in range(0, len(m), 4096): m[j] = 1\n  time.sleep(5); os._exit(0)\n"
            "time.sleep(4); print('alive')",
            {"memory"},
        ),
        (
            "shared maps out of every page table",
            "import os, mmap, time\nfor i in range(8):\n if os.fork() == 0:\n  m = mmap.mmap(-1, 90 << 20)\n"
            "  for j in range(0, len(m), 4096): m[j] = 1\n  m.madvise(mmap.MADV_DONTNEED)\n"
            "  time.sleep(5); os._exit(0)\ntime.sleep(4); print('alive')",
            {"memory"},
        ),
        (
            "socket buffers",
            "import os, socket, time\nfor _ in range(12):\n if os.fork() == 0: break\nk = []\ntry:\n"
            " for i in range(120):\n  k += socket.socketpair()\n  k[-1].setblocking(False)\n  try:\n"
            "   while True: k[-1].send(b'x' * 65536)\n  except BlockingIOError: pass\nexcept OSError: pass\n"
            "time.sleep(4); print('alive')",
            {"memory"},
        ),
        ("output", "while True: print('x' * 10000)", {"output"}),
        ("scratch", "f = open('x', 'wb')\nfor i in range(100):\n f.write(b'x' * (1 << 20)); f.flush()", {""}),
    ],
)
@pytest.mark.parametrize("counted", ["by the kernel", "by pid 1"])
def test_limits(best: Sandbox, kind: str, program: str, exceeded: set[str], counted: str) -> None:
    """With a control group, and without one, as on machines where none can be made."""
    groups = best._groups
    if counted == "by the kernel" and groups is None:
        pytest.skip("no control group can be made here")
    if counted == "by pid 1":
        best._groups = None
    try:
        limits = Limits(wall_s={"wall": 3.0, "cpu": 60.0}.get(kind, 8.0), cpu_s=2, memory=128 << 20)
        run = best.run(program, limits=limits)
    finally:
        best._groups = groups
    assert run.exceeded in exceeded, run
    assert run.code != 0
    assert "alive" not in run.stdout


def test_a_large_send_buffer_is_refused(sandbox: Sandbox) -> None:
    program = (
        "import socket\na, b = socket.socketpair()\n"
        "for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):\n"
        "    try: a.setsockopt(socket.SOL_SOCKET, option, 1 << 24); print('set')\n"
        "    except PermissionError: pass"
    )
    assert printed(sandbox, program) == ""


SURVIVORS = {
    "a daemon": "import os, time\nif os.fork() == 0:\n os.setsid()\n"
    " if os.fork() == 0: time.sleep(60)\n os._exit(0)",
    "without a parent-death signal": "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
    "if os.fork() == 0: ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); time.sleep(60)",
    "a reaper of its own": "import ctypes, os, time\nctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"
    "if os.fork() == 0:\n if os.fork() == 0: time.sleep(60)\n os._exit(0)",
    "signals ignored": "import os, signal, time\nfor s in range(1, 65):\n"
    " try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\n"
    "if os.fork() == 0: time.sleep(60)",
}


@pytest.mark.parametrize("name", SURVIVORS)
def test_nothing_outlives_its_request(sandbox: Sandbox, name: str) -> None:
    marker = f"rft-survivor-{os.getpid()}-{time.monotonic_ns()}"
    mark = f"import ctypes\nctypes.CDLL(None).prctl(15, {marker[:15].encode()!r}, 0, 0, 0)\n"  # its name
    assert sandbox.run(mark + SURVIVORS[name]).code == 0
    assert sandbox.run(argv=["true"]).code == 0
    left = [p for p in _zygotes_descendants(sandbox) if p]
    assert left == [], "a process was left behind"


def _zygotes_descendants(sandbox: Sandbox) -> list[str]:
    """Command lines below the zygote that are not the zygote's."""
    from rft.sandbox.zygote import descendants

    assert sandbox._process is not None
    names = []
    for pid in descendants(sandbox._process.pid):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            names.append(line.decode())
    if sandbox.backend == "bubblewrap":  # its own pid 1 and the zygote below it
        names = names[2:]
    return names


OWNER = """
import sys, threading
from rft.sandbox import Limits, Sandbox
s = Sandbox(backend=sys.argv[1], require=())
print(s._process.pid, flush=True)
prog = ("import ctypes, os, time\\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\\nos.fork()\\n"
        "print('up', flush=True)\\ntime.sleep(60)")
s.run(prog, limits=Limits(wall_s=50.0))
"""


@pytest.mark.parametrize("backend", ["bubblewrap", "native", "landlock"])
def test_a_zygote_killed_in_the_middle_of_a_request_is_replaced(backend: str) -> None:
    """With a namespace the request dies with it; with Landlock alone, whose pid 1 has to end the program
    itself, the request goes on. Either way the next one works, and nothing stays."""
    from rft.sandbox.zygote import descendants

    with open_sandbox(backend) as sandbox:
        assert sandbox._process is not None
        top = sandbox._process.pid
        ends: list[Result | SandboxError] = []

        def run() -> None:
            try:
                ends.append(sandbox.run("import time; time.sleep(4)", limits=Limits(wall_s=30.0)))
            except SandboxError as error:
                ends.append(error)

        request = threading.Thread(target=run)
        request.start()
        zygote_and_below = 2 + 2 * (backend == "bubblewrap")
        deadline = time.monotonic() + 20
        while len(descendants(top)) < zygote_and_below and time.monotonic() < deadline:
            time.sleep(0.02)
        below = descendants(top)
        os.kill(below[1] if backend == "bubblewrap" else top, signal.SIGKILL)
        request.join(20)
        assert not request.is_alive()
        (end,) = ends
        assert end.code == 0 if isinstance(end, Result) else backend != "landlock"
        assert printed(sandbox, "print('again')") == "again"
        while any(os.path.exists(f"/proc/{pid}") for pid in below) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [pid for pid in below if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("backend", ["bubblewrap", "native", "landlock"])
def test_a_zygote_that_has_just_ended_is_replaced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end of the socket is closed a moment before its exit status can be read."""
    from rft.sandbox.zygote import descendants

    with open_sandbox(backend) as sandbox:
        process = sandbox._process
        assert process is not None
        os.kill(descendants(process.pid)[1] if backend == "bubblewrap" else process.pid, signal.SIGKILL)
        ready, _, _ = select.select([sandbox._socket], [], [], 20)
        assert ready, "the socket of a killed zygote stays open"
        monkeypatch.setattr(process, "poll", lambda: None)
        assert printed(sandbox, "print('again')") == "again"
        assert sandbox._process is not process


@pytest.mark.parametrize("backend", ["bubblewrap", "native", "landlock"])
def test_everything_dies_with_a_killed_owner(backend: str) -> None:
    from sandbox_backends import open_sandbox

    open_sandbox(backend).close()
    owner = subprocess.Popen([sys.executable, "-c", OWNER, backend], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    zygote = int(owner.stdout.readline())
    from rft.sandbox.zygote import descendants

    deadline = time.monotonic() + 60
    while len(descendants(zygote)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    below = descendants(zygote)
    assert len(below) >= 3, "the program has not started"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 30
    alive = [zygote, *below]
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [pid for pid in alive if _lives(pid)]
    assert alive == []


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_a_thousand_requests_leave_the_machine_as_it_was(best: Sandbox) -> None:
    best.run("pass")
    assert best._process is not None

    def state() -> dict[str, int]:
        pid = best._process.pid  # type: ignore[union-attr]
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "zygote's descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "zygote's processes": len(_zygotes_descendants(best)),
            "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
            "semaphores": len(Path("/proc/sysvipc/sem").read_text().splitlines()),
            "segments": len(Path("/proc/sysvipc/shm").read_text().splitlines()),
            "queues": len(Path("/proc/sysvipc/msg").read_text().splitlines()),
        }

    before = state()
    memory = _resident(best._process.pid)
    leave = """
for path in ("x", "/dev/shm/rft-test-leftover"):
    try:
        open(path, "w").write("x" * 1000)
    except OSError:
        pass
"""
    for i in range(1000):
        assert best.run(f"{leave}print({i})").stdout == f"{i}\n"
    assert state() == before
    assert not Path("/dev/shm/rft-test-leftover").exists()
    assert _resident(best._process.pid) - memory < 4 << 20


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- sessions ----------------------------------------------------------------------------------------


def test_a_session_keeps_its_state(sandbox: Sandbox) -> None:
    with sandbox.session({"a.txt": b"one"}) as session:
        assert session.run("x = 3\nprint('set')\nx + 1").stdout == "set\n4\n"
        assert session.run("def double():\n    return 2 * x").stdout == ""
        assert session.run("double()").stdout == "6\n"
        raised = session.run("print('before')\n1 / 0")
        assert (raised.stdout, raised.error.splitlines()[-1]) == (
            "before\n",
            "ZeroDivisionError: division by zero",
        )
        assert "unterminated" in session.run("'abc").error
        assert "SystemExit" in session.run("import sys; sys.exit(3)").error
        assert session.run("print(open('a.txt').read(), x)").stdout == "one 3\n"
        assert sandbox.run("print('beside')").stdout == "beside\n"


def test_a_session_that_breaks_a_limit_ends_and_says_so(best: Sandbox) -> None:
    with best.session(limits=Limits(wall_s=1.0)) as session:
        assert session.run("1").stdout == "1\n"
        assert session.run("while True: pass").exceeded == "wall time"
        with pytest.raises(SandboxError, match="the session has ended: wall time"):
            session.run("1")
    with best.session() as session:
        ended = session.run("import os; os._exit(7)")
        assert (ended.code, ended.exceeded) == (7, "")
        with pytest.raises(SandboxError, match="it ended with 7"):
            session.run("1")
    with best.session(limits=Limits(output=1000)) as session:
        assert session.run("while True: print('x' * 100)").exceeded == "output"


def test_a_session_cannot_forge_what_it_prints_later(best: Sandbox) -> None:
    """A child that answers in the session's place confuses that session only."""
    with best.session() as session:
        session.run("import os\nif os.fork() == 0:\n    os._exit(0)")
        assert session.run("2 + 2").stdout == "4\n"


# -- start -------------------------------------------------------------------------------------------


def test_what_protects_is_said(sandbox: Sandbox) -> None:
    assert set(sandbox.protections) == set(PROTECTIONS)
    assert f"sandbox ({sandbox.backend})" in sandbox.describe()
    if sandbox.backend != "landlock":
        assert all(sandbox.protections.values())


def test_a_named_backend_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SandboxError, match="bubblewrap"):
        Sandbox(backend="bubblewrap")
    with Sandbox(require=()) as sandbox:
        assert sandbox.backend in ("native", "landlock")


def test_a_readable_folder_below_tmp_is_seen(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path("/tmp") / f"rft-readable-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "mine.py").write_text("VALUE = 5\n")
        folder.chmod(0o755)
        for backend in ("bubblewrap", "native"):
            try:
                opened = Sandbox([str(folder)], backend=backend)  # type: ignore[arg-type]
            except SandboxError as error:
                pytest.skip(str(error))
            with opened as sandbox:
                program = f"import sys; sys.path.append({str(folder)!r})\nimport mine\nprint(mine.VALUE)"
                assert printed(sandbox, program) == "5", backend
                assert printed(sandbox, "import tempfile; tempfile.TemporaryFile(); print('ok')") == "ok"
    finally:
        (folder / "mine.py").unlink()
        folder.rmdir()


def test_the_package_imports_nothing_of_rft() -> None:
    """It can be read, and moved, by itself."""
    import ast

    import rft.sandbox

    for file in Path(rft.sandbox.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not (node.module or "").startswith("rft"), file
            elif isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == "rft" for a in node.names), file
