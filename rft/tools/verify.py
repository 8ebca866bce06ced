"""`rft verify-resume`: check that a killed and resumed run equals an uninterrupted one.

The config runs three times from the command line, like a user's runs: to the end; until it is killed with
SIGKILL right after step K was logged; and again, to resume. Then the two run folders are compared.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rft import checkpoint
from rft.batch import Group
from rft.config.load import load_config
from rft.config.schema import Config
from rft.errors import ConfigError
from rft.metrics import record
from rft.metrics.names import is_reproducible
from rft.report.history import Run
from rft.utils.process import die_with_parent
from rft.utils.python import SAFE_PYTHON

Say = Callable[[str], None]
EXACT_GAP = (
    0.02  # nats that log-probs of the same ids may differ by in float32, as between engine and learner
)
START_S = 1800.0  # a run that does not reach its next step within this time hangs


@dataclass(frozen=True)
class Finding:
    """One comparison and its result. must: equality is guaranteed."""

    what: str
    equal: bool
    must: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """All comparisons, and whether the guarantee held."""

    promise: str
    findings: tuple[Finding, ...]
    resumed_at: int
    killed_at: int
    resume_s: float

    @property
    def kept(self) -> bool:
        return all(f.equal for f in self.findings if f.must)

    def lines(self) -> Iterator[str]:
        yield f"killed after step {self.killed_at}, resumed at step {self.resumed_at}: "
        yield f"the next step was done {self.resume_s:.1f} s after the restart"
        for f in self.findings:
            mark = "equal  " if f.equal else "DIFFERS" if f.must else "differs"
            yield f"  {mark}  {f.what:<18} {f.detail}"
        yield f"promised: {self.promise}"
        yield "verdict: " + ("kept: the resumed run equals the uninterrupted one" if self.kept else "BROKEN")


def verify_resume(
    config_file: str, overrides: Sequence[str], steps: int, kill_at: int, out: Path | None, say: Say
) -> Verdict:
    """Run, kill, resume, compare; run folders are `out`/whole and `out`/resumed (None: temporary ones).

    Raises ConfigError for settings that test nothing, RuntimeError if a run fails.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="rft-verify-") as folder:
            return verify_resume(config_file, overrides, steps, kill_at, Path(folder), say)
    if not 0 < kill_at < steps:
        raise ConfigError([f"--kill-at {kill_at}: write a step between 1 and --steps {steps}, exclusive"])
    for name in ("whole", "resumed"):
        if (out / name).exists():
            raise ConfigError([f"--out {out}: it contains an earlier test; choose an empty folder"])
    every = load_config(config_file, overrides).checkpoint.every
    ours = [
        f"output_dir={out}",
        f"train.steps={steps}",
        f"checkpoint.every={every if 0 < every <= kill_at else max(1, kill_at // 2)}",
        "tracking.sample_every=1",
        "tracking.samples_kept=64",
        "tracking.record_steps=null",
        "tracking.trackers=[]",
    ]
    config = load_config(config_file, [*overrides, *ours])

    def command(name: str) -> list[str]:
        return [config_file, *overrides, *ours, f"name={name}"]

    say(f"1 of 3: {steps} steps without interruption")
    _run_to_end(command("whole"))
    say(f"2 of 3: the same, killed after step {kill_at}")
    _run_and_kill(command("resumed"), out / "resumed", kill_at)
    killed_at = Run(out / "resumed").step
    say("3 of 3: resumed")
    began = time.time()
    _run_to_end(command("resumed"))
    run = Run(out / "resumed")
    opened = run.resumes()
    if not opened:
        raise RuntimeError("the run ended before it could be killed: choose a smaller --kill-at")
    resumed_at = max(int(opened[-1]["resumed_at"]), 0)
    after = [row["time/wall"] for row in run.metrics if row["time/wall"] > began]
    return compare(
        config, out / "whole", out / "resumed", resumed_at, killed_at, min(after, default=began) - began
    )


def compare(
    config: Config, whole: Path, resumed: Path, resumed_at: int, killed_at: int, resume_s: float
) -> Verdict:
    """Compare two run folders of the same config."""
    exact = not config.algorithm.online or (config.rollout.staleness == 0 and config.rollout.engine == "hf")
    synchronous = not config.algorithm.online or config.rollout.staleness == 0
    one, two = Run(whole), Run(resumed)
    findings = [_once(config, two)] if config.algorithm.online else []
    findings.append(_order(one, two, must=synchronous))
    findings.append(_rows("completions", _samples(one), _samples(two), must=exact))
    findings.append(_rows("metrics", _metrics(one), _metrics(two), must=exact))
    if config.algorithm.online and synchronous:
        findings.append(_calls(whole, resumed, exact=exact))
    findings += _states(whole, resumed, must=exact)
    if exact:
        promise = "synchronous, with an engine that computes each prompt separately: bit-equal"
    elif synchronous:
        promise = (
            "the same prompts in the same order, each trained on once (vLLM's numbers depend on batching)"
        )
    else:
        promise = "each prompt trained on once (asynchronous: requests in flight at a push depend on timing)"
    return Verdict(promise, tuple(findings), resumed_at, killed_at, resume_s)


# -- running -------------------------------------------------------------------------------------------


def _train(arguments: Sequence[str]) -> list[str]:
    return [*SAFE_PYTHON, "-m", "rft.cli", "train", *arguments]


def _run_to_end(arguments: Sequence[str]) -> None:
    done = subprocess.run(_train(arguments), capture_output=True, text=True, preexec_fn=die_with_parent)
    if done.returncode:
        raise RuntimeError(f"`rft train` ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")


def _run_and_kill(arguments: Sequence[str], folder: Path, step: int) -> None:
    """Start a run and SIGKILL it as soon as its metrics show `step`."""
    with (folder.parent / "killed.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(_train(arguments), stdout=log, stderr=log, preexec_fn=die_with_parent)
        try:
            seen, since = -1, time.monotonic()
            while seen < step:
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the run ended before step {step}:\n{log.read()[-4000:]}")
                if time.monotonic() - since > START_S:
                    raise RuntimeError(f"the run made no step for {START_S:.0f} s; its last step was {seen}")
                time.sleep(0.02)
                reached = Run(folder).step if (folder / "metrics.jsonl").exists() else -1
                if reached > seen:
                    seen, since = reached, time.monotonic()
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()


# -- comparing -----------------------------------------------------------------------------------------


def _trained(run: Run) -> dict[int, list[tuple[int, ...]]]:
    """Map each step to its training prompts; for a repeated step, the later one counts."""
    return {e["step"]: [tuple(key) for key in e["prompts"]] for e in run.of_kind("group/trained")}


def _once(config: Config, run: Run) -> Finding:
    """Check that no prompt was trained on twice, and that every step had a full batch."""
    steps = _trained(run)
    keys = [key for step in sorted(steps) for key in steps[step]]
    missing = sorted(set(range(1, config.train.steps + 1)) - set(steps)) if steps else []
    twice = len(keys) - len(set(keys))
    equal = not twice and not missing and all(len(k) == config.train.batch_size for k in steps.values())
    return Finding(
        "each prompt once", equal, True, f"{len(keys)} prompts, {twice} twice, steps without: {missing}"
    )


def _order(one: Run, two: Run, *, must: bool) -> Finding:
    a, b = _trained(one), _trained(two)
    if not a:
        return Finding("sample order", not b, must, "not recorded offline; compared by the weights")
    wrong = [step for step in sorted({*a, *b}) if a.get(step) != b.get(step)]
    detail = f"{sum(map(len, a.values()))} prompts" + (
        f"; first difference at step {wrong[0]}" if wrong else ""
    )
    return Finding("sample order", not wrong, must, detail)


Rows = dict[tuple[Any, ...], Mapping[str, Any]]


def _samples(run: Run) -> Rows:
    rows: Rows = {}
    for row in run.samples:
        place = sum(1 for key in rows if key[:2] == (row["step"], row["split"]))
        rows[(row["step"], row["split"], place)] = row
    return rows


def _metrics(run: Run) -> Rows:
    return {
        (row["step"],): {k: v for k, v in row.items() if k != "step" and is_reproducible(k)}
        for row in run.metrics
    }


def _rows(what: str, a: Rows, b: Rows, *, must: bool) -> Finding:
    """Compare two tables by key, value for value."""
    other = [(key, name) for key in a for name in a[key] if a[key][name] != b.get(key, {}).get(name)]
    other += [(key, "") for key in b if key not in a or set(b[key]) != set(a[key])]
    values = sum(len(row) for row in a.values())
    detail = f"{values} values in {len(a)} rows"
    if other:
        key, name = other[0]
        detail += f"; {len(other)} differ, first {name or 'row'} of step {key[0]}"
        detail += f": {a.get(key, {}).get(name)!r:.40} against {b.get(key, {}).get(name)!r:.40}"
    return Finding(what, not other, must, detail)


def _calls(whole: Path, resumed: Path, *, exact: bool) -> Finding:
    """Compare the recorded model calls, with all that the environment answered.

    exact: everything must be equal. Otherwise, because an engine's rounding depends on which calls it
    computes together: prompts and seeds of all steps, and the log-probs of calls with equal ids, up to the
    first step in which the runs sampled other ids. Its update makes the weights of later steps differ.
    """
    what = "recorded calls"
    records = [
        {step: record.read(path) for step, path in record.steps(run / record.FOLDER).items()}
        for run in (whole, resumed)
    ]
    one, two = records
    if not one or one.keys() != two.keys():
        return Finding(what, False, True, f"recorded steps: {[*one]} against {[*two]}")
    if exact:
        wrong = [
            n for n in one if repr((one[n].sources, one[n].groups)) != repr((two[n].sources, two[n].groups))
        ]
        count = sum(_count(g) for r in one.values() for g in r.groups)
        detail = f"{count} calls" + (f"; first difference at step {wrong[0]}" if wrong else "")
        return Finding(what, not wrong, True, detail)
    wrong = [n for n in one if one[n].sources != two[n].sources]
    same, other, largest, last = 0, 0, 0.0, 0
    for last in one:
        groups = zip(one[last].groups, two[last].groups, strict=False)
        for a, b in (pair for g, h in groups for pair in zip(g.completions, h.completions, strict=False)):
            if (a.tokens, a.branches, a.mask) != (b.tokens, b.branches, b.mask):
                other += 1
                continue
            same += 1
            gaps = (abs(x - y) for x, y in zip(a.logps or (), b.logps or (), strict=True))
            largest = max(largest, *gaps, 0.0)
        if other:
            break
    settings = one[last].config
    dtypes = {settings[section]["dtype"] for section in ("rollout", "learner")}
    bound = settings["sync"]["max_logp_gap"] or (EXACT_GAP if dtypes == {"float32"} else None)
    detail = (
        f"up to step {last} {same} of {same + other} completions have equal ids, and log-probs that differ "
    )
    detail += f"by {largest:.2g}" + (f"; different prompts or seeds at step {wrong[0]}" if wrong else "")
    return Finding(what, not wrong and (bound is None or largest <= bound), True, detail)


def _count(group: Group) -> int:
    return sum(len(c.turns) or 1 for c in group.completions)


def _states(whole: Path, resumed: Path, *, must: bool) -> Iterator[Finding]:
    """Compare the last checkpoints: weights, optimizer, random states, other learner state, run state."""
    a, b = (checkpoint.latest(run / "checkpoints") for run in (whole, resumed))
    if a is None or b is None:
        raise RuntimeError("a finished run left no sound checkpoint")
    left, right = (_leaves(one) for one in (a, b))
    for what in ("weights", "optimizer", "random states", "learner", "run state"):
        names = sorted(n for n in {*left, *right} if _kind(n) == what)
        other = [n for n in names if n not in left or n not in right or not _same(left[n], right[n])]
        far = [_distance(left[n], right[n]) for n in other if n in left and n in right]
        detail = f"{len(names)} values"
        if other:
            detail += (
                f"; {len(other)} differ, first {other[0]}, by up to {max(far, default=float('inf')):.3g}"
            )
        yield Finding(what, not other, must, detail)


def _leaves(loaded: checkpoint.Checkpoint) -> dict[str, Any]:
    """Map the path of every value in a checkpoint to the value."""
    leaves: dict[str, Any] = {}
    for file in sorted(p for p in loaded.path.rglob("*") if p.is_file() and p.name != checkpoint.MANIFEST):
        name = file.relative_to(loaded.path).as_posix()
        if file.suffix == ".safetensors":
            leaves |= {f"{name}/{key}": value for key, value in load_file(file).items()}
        elif file.suffix == ".pt":
            leaves |= _flat(torch.load(file, map_location="cpu", weights_only=True), name)
        else:
            leaves[name] = file.read_bytes()
    return leaves | _flat(json.loads(json.dumps(dict(loaded.meta))), "meta")


def _flat(node: Any, path: str) -> dict[str, Any]:
    if isinstance(node, Mapping):
        pairs = [(str(k), v) for k, v in node.items()]
    elif isinstance(node, list | tuple) and any(isinstance(v, Mapping | torch.Tensor) for v in node):
        pairs = [(str(i), v) for i, v in enumerate(node)]
    else:
        return {path: node}
    return {k: v for name, child in pairs for k, v in _flat(child, f"{path}/{name}").items()}


def _kind(name: str) -> str:
    if name.startswith("meta"):
        return "run state"
    if ".pt/" not in name:
        return "weights"
    words = name.split(".pt/")[1].lower()
    return "random states" if "rng" in words else "optimizer" if "optim" in words else "learner"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)


def _distance(a: Any, b: Any) -> float:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return abs(a - b) if isinstance(a, int | float) and isinstance(b, int | float) else float("inf")
