"""Checkpoints: atomic under kill -9, damage found, a full disk survived, the last k kept."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from rft import checkpoint
from rft.checkpoint import latest, load, save, save_in_background, scan
from rft.errors import CheckpointError
from rft.utils.seeds import rng_state, set_rng_state

MODULE = Path(checkpoint.__file__)
# What a child process starts with: this one module, by its file, so that it starts in milliseconds.
CHILD = f"""
import importlib.util, os, random, resource, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("checkpoint", {str(MODULE)!r})
checkpoint = importlib.util.module_from_spec(spec)
sys.modules["checkpoint"] = checkpoint
spec.loader.exec_module(checkpoint)
root = Path(sys.argv[1])

def write_step(step, size=1):
    def write(folder):
        (folder / "sub").mkdir()
        for name in ("a.bin", "sub/b.bin", "sub/c.bin"):
            (folder / name).write_bytes(f"{{step}} {{name}} ".encode() * size)
    return write
"""


def write_step(step: int, size: int = 1) -> checkpoint.Write:
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        for name in ("a.bin", "sub/b.bin", "sub/c.bin"):
            (folder / name).write_bytes(f"{step} {name} ".encode() * size)

    return write


def is_whole(found: checkpoint.Checkpoint, size: int = 1) -> bool:
    names = ("a.bin", "sub/b.bin", "sub/c.bin")
    return all((found.path / n).read_bytes() == f"{found.step} {n} ".encode() * size for n in names)


def run_child(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def hidden(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name.startswith(".") and p.name != ".lock")


def steps(root: Path) -> list[str]:
    return sorted(p.name for p in root.glob("step-*"))


# -- what is written -------------------------------------------------------------------------------


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    config = {"b": 1, "a": {"x": 0.5}}
    meta = {"cursor": 7, "by_id": {10: 1, 9: 2}}
    path = save(tmp_path, 30, write_step(30), keep=2, meta=meta, config=config)
    found = latest(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.order) == (path, 30, 1)
    assert found.meta == {"cursor": 7, "by_id": {"10": 1, "9": 2}}
    assert found.config_hash == checkpoint.config_hash({"a": {"x": 0.5}, "b": 1})
    assert found.versions["torch"] == version("torch")
    assert is_whole(found)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin", "sub/c.bin"}
    assert manifest["files"]["a.bin"]["size"] == len("30 a.bin ")


def test_nothing_there(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert scan(tmp_path / "absent") == (None, [])
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load(tmp_path / "step-00000001")


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_k_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step, write_step(step), keep=keep, meta={})
    assert steps(tmp_path) == [f"step-{s:08d}" for s in range(6 - keep, 6)]
    assert hidden(tmp_path) == []


def test_a_run_set_back_goes_on_from_where_it_then_got_to(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, write_step(step), keep=5, meta={"try": 1})
    save(tmp_path, 20, write_step(20), keep=5, meta={"try": 2})
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, found.meta, found.path.name) == (20, {"try": 2}, "step-00000020.2")


def test_everything_is_flushed_before_the_rename_and_the_root_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    lock, real_fsync, real_rename = threading.Lock(), os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        with lock:
            events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(a: Path, b: Path) -> None:
        events.append("rename")
        real_rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 1, write_step(1), keep=1, meta={})
    at = events.index("rename")
    before = {Path(e).name for e in events[:at]}
    temporary = {name for name in before if name.startswith(".writing-")}
    assert before - temporary == {"a.bin", "b.bin", "c.bin", "sub", "manifest.json"}
    assert len(temporary) == 1
    assert events[at + 1 :] == [str(tmp_path)]


@pytest.mark.parametrize(
    ("write", "meta", "message"),
    [
        (lambda folder: None, {}, "wrote no file"),
        (lambda folder: (folder / "link").symlink_to("x"), {}, "link"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), {}, "another name"),
        (write_step(1), {"x": float("nan")}, "not plain JSON"),
        (write_step(1), {"x": object()}, "not plain JSON"),
    ],
)
def test_what_cannot_be_a_checkpoint_is_refused(
    tmp_path: Path, write: checkpoint.Write, meta: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, write, keep=1, meta=meta)
    assert steps(tmp_path) == hidden(tmp_path) == []


def test_keep_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep must be at least 1"):
        save(tmp_path, 1, write_step(1), keep=0, meta={})


# -- damage ----------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: flip_bit(p / "sub/b.bin"), "SHA-256"),
        (lambda p: os.truncate(p / "a.bin", 3), "bytes instead of"),
        (lambda p: (p / "sub/c.bin").unlink(), "is missing"),
        (lambda p: (p / "manifest.json").unlink(), "half-written"),
        (lambda p: os.truncate(p / "manifest.json", 40), "cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "the hash in it"),
        (
            lambda p: (p / "manifest.json").write_text(
                (p / "manifest.json").read_text().replace('"step": 2', '"step": 9')
            ),
            "the hash in it",
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_reason(
    tmp_path: Path, damage: object, reason: str
) -> None:
    assert callable(damage)
    for step in (1, 2):
        save(tmp_path, step, write_step(step), keep=5, meta={})
    damage(tmp_path / "step-00000002")
    found, rejected = scan(tmp_path)
    assert found is not None and found.step == 1
    assert [r.path.name for r in rejected] == ["step-00000002"]
    assert reason in rejected[0].reason
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "step-00000002")


def test_a_damaged_checkpoint_costs_no_good_one_its_place(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, write_step(step), keep=2, meta={})
    os.truncate(tmp_path / "step-00000002" / "a.bin", 1)
    save(tmp_path, 3, write_step(3), keep=2, meta={})
    flip_bit(tmp_path / "step-00000003" / "a.bin")
    found, rejected = scan(tmp_path)
    assert found is not None and found.step == 1
    assert sorted(r.path.name for r in rejected) == ["step-00000002", "step-00000003"]


# -- kill -9 ---------------------------------------------------------------------------------------


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    """A process dies by SIGKILL at its n-th file operation of a save, for every n."""
    code = """
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "fcntl.lockf"}
count, fatal = 0, None
def hook(event, args):
    global count
    if fatal is not None and event in EVENTS:
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
killed, n = True, 0
while killed:
    n += 1
    checkpoint.save(root / str(n), 1, write_step(1), keep=1, meta={})
    child = os.fork()
    if child == 0:
        fatal = n
        checkpoint.save(root / str(n), 2, write_step(2), keep=1, meta={})
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""
    result = run_child(code, tmp_path)
    assert result.returncode == 0, result.stderr
    roots = sorted(tmp_path.iterdir())
    assert len(roots) > 20
    seen = set()
    for root in roots:
        found, rejected = scan(root)
        assert found is not None and is_whole(found) and rejected == []
        seen.add(found.step)
        save(root, 3, write_step(3), keep=1, meta={})  # and the next save clears up
        assert steps(root) == ["step-00000003"] and hidden(root) == []
    assert seen == {1, 2}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """A real writer is killed 25 times at random moments; no acknowledged checkpoint is ever lost."""
    code = """
found = checkpoint.latest(root)
step = found.step if found else 0
while True:
    step += 1
    checkpoint.save(root, step, write_step(step, 20_000), keep=2, meta={"step": step})
    print(step, flush=True)
"""
    chance = random.Random(0)
    acknowledged = interrupted = 0
    for _ in range(25):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD + code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        lines = [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        acknowledged = int(lines[-1]) if lines else acknowledged
        interrupted += any(name.startswith(".writing-") for name in hidden(tmp_path))
        found, rejected = scan(tmp_path)
        assert found is not None and rejected == []
        assert found.step in (acknowledged, acknowledged + 1)
        assert found.meta == {"step": found.step} and is_whole(found, 20_000)
    assert interrupted >= 5  # or this test would not have tested what it says


# -- a full disk -----------------------------------------------------------------------------------


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """Writing fails with the kernel's own error: the old one is intact and nothing is left behind."""
    code = """
checkpoint.save(root, 1, write_step(1), keep=1, meta={})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(root, 2, write_step(2, 20_000), keep=1, meta={})
except checkpoint.CheckpointError as error:
    print(error)
"""
    result = run_child(code, tmp_path)
    assert "the checkpoint of step 2 was not written" in result.stdout, result.stderr
    assert "ulimit -f" in result.stdout
    assert steps(tmp_path) == ["step-00000001"] and hidden(tmp_path) == []
    found = latest(tmp_path)
    assert found is not None and is_whole(found)


def test_a_full_disk(tiny_disk: Path) -> None:
    save(tiny_disk, 1, write_step(1, 1000), keep=3, meta={})

    def too_much(folder: Path) -> None:
        torch.save({"w": torch.zeros(400_000)}, folder / "model.pt")  # 1.6 MB; torch has its own error for it

    with pytest.raises(CheckpointError, match="MiB free on that disk") as error:
        save(tiny_disk, 2, too_much, keep=3, meta={})
    assert "free space, or keep fewer checkpoints" in str(error.value)
    assert steps(tiny_disk) == ["step-00000001"] and hidden(tiny_disk) == []
    found = latest(tiny_disk)
    assert found is not None and is_whole(found, 1000)
    save(tiny_disk, 3, write_step(3, 1000), keep=3, meta={})  # there is room for a small one


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be stored"):
        save(tmp_path / "file" / "checkpoints", 1, write_step(1), keep=1, meta={})


# -- one writer, in the background -----------------------------------------------------------------


def test_two_processes_do_not_write_under_one_root(tmp_path: Path) -> None:
    code = """
try:
    checkpoint.save(root, 2, write_step(2), keep=1, meta={})
except checkpoint.CheckpointError as error:
    print(error)
"""
    said: list[str] = []

    def write(folder: Path) -> None:
        (folder / "a").write_text("a")
        said.append(run_child(code, tmp_path).stdout)

    save(tmp_path, 1, write, keep=1, meta={})
    assert "another process is writing checkpoints" in said[0]
    assert steps(tmp_path) == ["step-00000001"]
    run_child(code, tmp_path)  # and the lock is free again
    assert steps(tmp_path) == ["step-00000002"]


def test_a_background_save_does_not_hold_the_caller(tmp_path: Path) -> None:
    go = threading.Event()

    def slow(folder: Path) -> None:
        assert go.wait(30)
        write_step(1)(folder)

    saving = save_in_background(tmp_path, 1, slow, keep=2, meta={"n": 1})
    assert not saving.done() and latest(tmp_path) is None
    go.set()
    assert saving.result() == tmp_path / "step-00000001"
    save_in_background(tmp_path, 2, write_step(2), keep=2, meta={}, config={"a": 1}).result()
    found = latest(tmp_path)
    assert found is not None and found.step == 2 and is_whole(found)


def test_an_error_in_the_background_is_the_futures(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    saving = save_in_background(tmp_path, 1, broken, keep=1, meta={})
    with pytest.raises(CheckpointError, match="step 1 was not written"):
        saving.result()
    save_in_background(tmp_path, 3, write_step(3), keep=1, meta={}).result()
    assert steps(tmp_path) == ["step-00000003"]


# -- random states ---------------------------------------------------------------------------------


def draw() -> tuple[float, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    )


def test_random_states_come_back(tmp_path: Path) -> None:
    draw()  # leaves a cached Gaussian behind in each generator, which must come back too
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draw() != expected[0]
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_random_states_of_other_devices_are_refused() -> None:
    state = rng_state()
    state["cuda"] = [*state["cuda"], torch.get_rng_state()]
    with pytest.raises(CheckpointError, match="same number of devices"):
        set_rng_state(state)
