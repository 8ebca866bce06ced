"""The code reward: real programs, and hostile ones that must neither score nor do harm."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from real_data import read_rows

from rft.config.rewards import RewardConfig, RewardsConfig
from rft.rewards import Outcome, load_reward
from rft.rewards.code import extract_code, stdio_cases
from rft.rewards.runner import RewardRunner
from rft.sandbox import PROTECTIONS, Limits, Sandbox, SandboxError
from rft.utils.process import descendants

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(5, 5) == 10"]


@pytest.fixture(scope="module")
def sandbox() -> Any:
    try:
        with Sandbox() as opened:
            print(opened.describe())
            yield opened
    except SandboxError as error:
        pytest.skip(f"this machine cannot sandbox: {error}")


@pytest.fixture(scope="module")
def code(sandbox: Sandbox) -> Any:
    return load_reward("code", timeout_s=4.0, cpu_s=2, scoring="fraction")


def test_all_protections_are_on_and_named(sandbox: Sandbox) -> None:
    assert set(sandbox.protections) == set(PROTECTIONS)
    assert all(sandbox.protections.values())
    assert "OFF" not in sandbox.describe()


def _humaneval() -> list[dict[str, Any]]:
    return read_rows("humaneval/HumanEval.jsonl.gz")


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in ("test", "entry_point")}


def test_every_canonical_solution_of_humaneval_passes(sandbox: Sandbox) -> None:
    rows = _humaneval()
    reward = load_reward("code", timeout_s=30.0, cpu_s=20)
    scores = reward.score(
        [r["prompt"] for r in rows], [r["canonical_solution"] for r in rows], **_columns(rows)
    )  # type: ignore[attr-defined]
    failed = [(r["task_id"], s.detail) for r, s in zip(rows, scores, strict=True) if s.value != 1.0]
    assert len(rows) == 164
    assert failed == []


def test_every_broken_body_of_humaneval_fails(sandbox: Sandbox) -> None:
    rows = _humaneval()
    reward = load_reward("code", timeout_s=30.0, cpu_s=20)
    bodies = ["    return None\n", "    raise ValueError\n", "    return 12345\n"]
    unfinished = [bodies[i % 3] for i in range(len(rows))]
    scores = reward.score([r["prompt"] for r in rows], unfinished, **_columns(rows))  # type: ignore[attr-defined]
    passed = [r["task_id"] for r, s in zip(rows, scores, strict=True) if s.value != 0.0]
    assert passed == []


def test_asserts_fraction_and_all(code: Any) -> None:
    half = "def add(a, b):\n    return 3\n"
    assert code([""], [f"```python\n{ADD}```"], tests=[TESTS]) == [1.0]
    assert code([""], [half], tests=[TESTS]) == [0.5]
    assert load_reward("code")([""], [half], tests=[TESTS]) == [0.0]


def test_objects_exceptions_and_mutation_cross_the_boundary(code: Any) -> None:
    program = (
        "class Stack:\n"
        "    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n"
        "    def top(self): return self.items[-1]\n"
        "def bad(): raise KeyError('k')\n"
        "def sort(xs): xs.sort()\n"
        "def count():\n    yield from range(3)\n"
    )
    tests = (
        "s = Stack()\ns.push((1, 'a'))\nassert s.top() == (1, 'a')\nassert len(s.items) == 1\n"
        "xs = [3, 1]\nsort(xs)\nassert xs == [1, 3]\nassert list(count()) == [0, 1, 2]\n"
        "try:\n    bad()\n    assert 1 == 2\nexcept KeyError:\n    pass\n"
    )
    score = code.score([""], [program], tests=[tests])[0]
    assert (score.value, score.detail) == (1.0, "5 of 5 tests passed")


def test_stdin_stdout_pairs(code: Any) -> None:
    program = "a, b = map(int, input().split())\nprint(a + b)"
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5\n", "output": "9"}]
    assert code([""], [program], tests=[tests]) == [1.0]
    assert code([""], ["print(3)"], tests=[tests]) == [0.5]
    assert code([""], ["import os; os._exit(0)"], tests=[tests]) == [0.0]
    assert stdio_cases({"inputs": ["1"], "outputs": ["2"]}) == [("1", "2")]


def test_a_program_is_found_in_the_last_fence() -> None:
    assert extract_code("```\nold\n```\ntext\n```python\nnew\n```") == "new\n"
    assert extract_code("<think>```python\nx\n```</think>```py\ny\n```") == "y\n"
    assert extract_code("```python\ncut off") is None
    assert extract_code("  ") is None


HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "infinite loop": "while True: pass",
    "infinite loop in the call": "def add(a, b):\n    while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "memory hog": "x = []\nwhile True: x.append(bytearray(10 ** 7))",
    "memory hogs in children": "import os, time\nfor _ in range(8):\n    if os.fork() == 0: break\n"
    "x = bytearray(3 * 10 ** 8)\nfor i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(100)",
    "1 GB of output": "import sys\nfor _ in range(1024):\n    sys.stdout.write('x' * (1 << 20))\n"
    "    sys.stderr.write('x' * (1 << 20))",
    "a full scratch folder": "f = open('x', 'wb')\nwhile True:\n    f.write(b'x' * (1 << 20)); f.flush()",
    "os._exit(0)": "import sys, os\nsys.exit = lambda *a: None\nos._exit(0)",
    "exit after the first right answer": "import os\nn = 0\ndef add(a, b):\n    global n\n    n += 1\n"
    "    if n > 1: os._exit(0)\n    return a + b",
    "patched assert": "import builtins, sys\nbuiltins.AssertionError = type('X', (AssertionError,), {})\n"
    "sys.excepthook = lambda *a: None\nclass Same:\n    def __eq__(self, other): return True\n"
    "def add(a, b): return Same()",
    "an int that equals all": "class I(int):\n    def __eq__(s, o): return True\n"
    "    __hash__ = int.__hash__\ndef add(a, b): return I(999)",
    "a forged report": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, "
    '\'{"passed": 2, "total": 2, "failures": [], "problem": ""}\\n\'.encode() * 5)\n'
    "    except OSError: pass\nos._exit(0)",
    "tests read from memory": "import gc\ndef add(a, b):\n    found = [o for o in gc.get_objects() "
    "if isinstance(o, str) and 'assert' in o]\n    return found",
    "killing the parent": "import os\nfor p in (os.getppid(), -1, *range(2, 3000)):\n"
    "    try: os.kill(p, 9)\n    except OSError: pass\nos._exit(0)",
    "a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    "
    "if os.fork() == 0: time.sleep(1000)\n    os._exit(0)\n",
    "a syntax error": "def add(a, b) return a + b",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_not_score(code: Any, name: str) -> None:
    score = code.score([""], [HOSTILE[name]], tests=[TESTS])[0]
    assert score.value == 0.0, score.detail
    assert score.outcome in (Outcome.wrong, Outcome.timeout)
    assert code([""], [ADD], tests=[TESTS]) == [1.0], "the sandbox does not work any more"
    deadline = time.monotonic() + 10  # the kernel takes a killed process away when it gets to it
    while _jailed() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _jailed() == set(), "a process was left behind"


def _jailed() -> set[str]:
    """Command lines of processes with a jailed user id."""
    found = set()
    for pid in _jailed_pids():
        with contextlib.suppress(OSError):
            found.add(Path(f"/proc/{pid}/cmdline").read_text())
    return found


def _probe(sandbox: Sandbox, program: str) -> str:
    run = sandbox.run(program)
    assert run.code == 0, run.stderr
    return run.stdout.strip()


def test_nothing_outside_the_scratch_folder_can_be_written(sandbox: Sandbox, tmp_path: Path) -> None:
    targets = [
        "/evil",
        "/usr/evil",
        "/etc/evil",
        "/proc/sys/kernel/core_pattern",
        "/dev/evil",
        "/tmp/../evil",
    ]
    targets += [str(tmp_path / "evil"), str(Path(__file__).parent / "evil"), os.path.expanduser("~/evil")]
    program = (
        f"done = []\nfor path in {targets!r}:\n"
        "    try:\n        open(path, 'w').write('x'); done.append(path)\n    except OSError: pass\n"
        "open('here', 'w').write('x')\nprint(done)"
    )
    assert _probe(sandbox, program) == "[]"
    assert not any(Path(t).exists() for t in targets if t.endswith("evil"))


def test_scratch_folders_are_private(sandbox: Sandbox) -> None:
    assert _probe(sandbox, "open('mine', 'w').write('x')") == ""
    assert _probe(sandbox, "import os; print([f for f in os.listdir('.') if not f.startswith('.')])") == "[]"


def test_the_environment_is_not_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    with Sandbox() as sandbox:
        program = (
            "import os, glob\nseen = str(os.environ)\nfor path in glob.glob('/proc/*/environ'):\n"
            "    try: seen += open(path).read()\n    except OSError: pass\n"
            "print('hush' in seen, len(glob.glob('/proc/[0-9]*')))"
        )
        assert _probe(sandbox, program) == "False 2"


def test_no_socket_reaches_the_host(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            "import socket\nfor name in ('AF_INET', 'AF_INET6', 'AF_UNIX', 'AF_NETLINK'):\n"
            "    family = getattr(socket, name)\n"
            f"    try: socket.socket(family).connect(('127.0.0.1', {port})); print('open')\n"
            "    except (OSError, TypeError): pass"
        )
        assert _probe(sandbox, program) == ""


def test_privileges_cannot_be_had(sandbox: Sandbox) -> None:
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print(libc.unshare(0x10000000), libc.mount(b'x', b'/tmp', b'tmpfs', 0, None),"
        " libc.ptrace(16, 1, 0, 0), libc.chroot(b'/tmp'), libc.setuid(0), os.getuid() != 0)"
    )
    assert _probe(sandbox, program) == "-1 -1 -1 -1 -1 True"


def test_cpu_time_is_limited(sandbox: Sandbox) -> None:
    run = sandbox.run("while True: pass", limits=Limits(wall_s=30.0, cpu_s=1))
    assert run.exceeded == "CPU time"
    assert run.wall_s < 29


def test_a_missing_protection_is_refused_by_name() -> None:
    with pytest.raises(SandboxError, match="unknown protection 'fire'"):
        Sandbox(require=["fire"])


def _others_can_run(path: str) -> bool:
    """Every folder on the way to the real file is open to all."""
    file = Path(path)
    return file.exists() and all(
        p.stat().st_mode & 0o001 for p in (file.resolve(), *file.resolve().parents, *file.parents)
    )


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_the_sandbox_works_without_root(tmp_path: Path) -> None:
    code = (
        "from rft.sandbox import Sandbox\nwith Sandbox() as s:\n"
        f"    print(s.test({ADD!r}, {TESTS!r}).passed)\n"
        "    print(s.run('import os; os.fork(); print(os.getuid())').code)\n"
        '    print(s.run(\'open("/etc/x", "w")\').code)\n'
    )
    probe = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    readable = [
        p for p in (sys.executable, "/usr/bin/python3.11", "/usr/bin/python3.12") if _others_can_run(p)
    ]
    if not readable:
        pytest.skip("an unprivileged user can run no Python here")
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*probe, readable[0], "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert done.stdout.split() == ["2", "0", "1"], done.stderr


async def test_the_worker_pool_keeps_its_size(sandbox: Sandbox) -> None:
    config = RewardsConfig(
        functions=[RewardConfig(function="code", options={"timeout_s": 3.0, "cpu_s": 1, "verbose": False})],
        workers=2,
    )
    programs = [HOSTILE[k] for k in ("fork bomb", "os._exit(0)", "killing the parent", "memory hog")] + [ADD]
    async with RewardRunner(config) as runner:
        before = set(runner.pids)
        rewards = await runner.score([""] * 5, programs, {"tests": [TESTS] * 5})
        assert [r.value for r in rewards] == [0.0, 0.0, 0.0, 0.0, 1.0]
        assert set(runner.pids) == before
        assert len(before) == 2
    assert _jailed() == set()


async def test_a_program_does_not_outlive_its_killed_worker(sandbox: Sandbox) -> None:
    """Nor the runner, though it has cleared its parent-death signal."""
    config = RewardsConfig(
        functions=[
            RewardConfig(function="code", timeout_s=90, options={"timeout_s": 80.0, "verbose": False})
        ],
        on_error="drop",
        on_timeout="drop",
        workers=1,
    )
    program = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(70)"
    before = _jailed_pids()
    async with RewardRunner(config) as runner:
        scoring = asyncio.create_task(runner.score(["p"], [program], {"tests": [["assert f(1) == 2"]]}))
        while not (jailed := _jailed_pids() - before):
            await asyncio.sleep(0.05)
        os.kill(next(iter(runner.pids)), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while jailed & _jailed_pids() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert not jailed & _jailed_pids()
        scoring.cancel()


def _jailed_pids() -> set[int]:
    """Processes with a jailed user id that this process has started, or that nobody owns any more."""
    mine = set(descendants(os.getpid()))
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if entry.stat().st_uid >= 1_000_000_000 and (int(entry.name) in mine or parent == 1):
                found.add(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("c", '#include <stdio.h>\nint main(){int a,b;scanf("%d %d",&a,&b);printf("%d\\n",a+b);}'),
        ("cpp", "#include <iostream>\nint main(){int a,b;std::cin>>a>>b;std::cout<<a+b;}"),
        ("bash", "read a b; echo $((a+b))"),
        (
            "javascript",
            "const [a,b]=require('fs').readFileSync(0,'utf8').split(' ').map(Number);console.log(a+b)",
        ),
    ],
)
def test_translated_code(sandbox: Sandbox, language: str, source: str) -> None:
    try:
        reward = load_reward("translated_code", language=language)
    except SandboxError as error:
        pytest.skip(str(error))
    tests = [("1 2", "3"), ("5 6", "11")]
    scores = reward.score(
        [""] * 2, [f"```{language}\n{source}\n```", "```\nnonsense(\n```"], tests=[tests] * 2
    )  # type: ignore[attr-defined]
    assert [s.value for s in scores] == [1.0, 0.0], scores[0].detail


def test_hostile_sources_are_what_they_say() -> None:
    """A hostile program that does not even parse would prove nothing."""
    for name, source in HOSTILE.items():
        if name != "a syntax error":
            ast.parse(source)


def test_without_namespaces_the_rest_protects_and_the_gap_is_named() -> None:
    """A process that can make no namespace: refused by default, and what is left out is said."""
    code = (
        "from rft.sandbox import Sandbox, SandboxError\n"
        "try:\n    Sandbox()\nexcept SandboxError as error:\n    print('processes' in str(error))\n"
        "with Sandbox(require=['files', 'network', 'signals']) as s:\n"
        f"    print(s.test({ADD!r}, {TESTS!r}).passed, 'Landlock' in s.protections['files'])\n"
        '    for program in (\'open("/tmp/evil", "w")\', \'open("/etc/passwd")\',\n'
        "                    'import socket; socket.socket()', 'import os; os.kill(os.getppid(), 9)',\n"
        '                    \'open("mine", "w").write("x")\'):\n'
        "        print(s.run(program).code)\n"
    )
    bare = "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all --inh-caps -all "
    bare += "--ambient-caps -all --no-new-privs "
    command = ["unshare", "-r", "sh", "-c", f'{bare} "$0" -c "$1"', sys.executable, code]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if subprocess.run(["unshare", "-r", "true"], capture_output=True).returncode:
        pytest.skip("this machine has no user namespaces to take away")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if "no Landlock" in done.stderr or "cannot protect: files" in done.stderr:
        pytest.skip("this kernel has no Landlock")
    assert done.stdout.split() == ["True", "2", "True", "1", "1", "1", "1", "0"], done.stderr
