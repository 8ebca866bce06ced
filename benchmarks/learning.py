"""What every algorithm learns on the embedded task, all from the same warm-started model.

    python benchmarks/learning.py                                   # what is missing, one run after the other
    python benchmarks/learning.py --only grpo,ppo --seeds 1 --minutes 5
    python benchmarks/learning.py --list                            # the cases
    python benchmarks/learning.py --collect                         # no run, only the results anew

Every run is an ordinary `rft train` of an example with a few overrides. Finished runs are left alone and
a run that was cut short goes on from its checkpoint, so the table can be filled run by run. After each one
benchmarks/results/learning.json, docs/learning.md and docs/images/learning.png are written anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from learning_report import AGAIN, SECONDS, merge, summarise, write_page

ROOT = Path(__file__).resolve().parent.parent
ONLINE = ROOT / "examples" / "online"


@dataclass(frozen=True)
class Case:
    """One line of the table: an example, its overrides, and its section."""

    name: str
    section: str
    config: str
    overrides: tuple[str, ...] = ()
    teacher: str = ""  # a case of the same section and seed whose final model is the reference
    start: str = ""  # of STARTS
    shift: int = 0  # added to the seed of the run, not to that of its start


# The example that provides the warm start, and its overrides. `hasty`: chains in which every step is
# wrong, and one careful solution in a thousand.
STARTS = {
    "": ("examples/arithmetic.yaml", ()),
    "hasty": (
        "examples/arithmetic.yaml",
        (
            "warm_start.data={kind: arithmetic, limit: 83200, options: "
            "{styles: {lines: 0.001, chain: 0.999}, wrong_fraction: {lines: 0.01, chain: 1.0}}}",
        ),
    ),
    # Knows sums and products well, and of the stories what the plain start knows.
    "claims": (
        "examples/arithmetic.yaml",
        (
            "warm_start.data={kind: mixture, limit: 41600, mixture: {stories: {kind: arithmetic}, products: "
            "{kind: arithmetic, options: {form: expression, operators: ['+', '-', '*'], styles: {lines: 1}, "
            "wrong_fraction: 0}}}}",
        ),
    ),
    "unsure": ("examples/arithmetic.yaml", ("warm_start.steps=800",)),
    "directions": ("examples/dpa.yaml", ()),
    "calculator": ("examples/calculator.yaml", ()),
    "guess": ("examples/guess.yaml", ()),
}
# Demonstrations in the format of the warm start, with three steps in ten wrong.
HARD = ("data.options={styles: {chain: 1}, wrong_fraction: 0.3}", "train.steps=100", "eval.every=50")
# As many prompts as the others see, each with its demonstration.
SUPERVISED = (
    "algorithm=sft",
    "train={steps: 100, batch_size: 32}",
    "learner.learning_rate=1.0e-3",
    "eval={every: 50, problems: 256, generate: true}",
)
# The budget of examples/online, for an example that is elsewhere.
LIKE_ONLINE = (
    "train.steps=60",
    "eval={every: 60, problems: 256, samples: 4}",
    "checkpoint={every: 0}",
)
# A critic on the policy's trunk, at the policy's learning rate, against the example's separate model.
VALUE_HEAD = (
    "algorithm={name: ppo, critic: head, critic_rate: 1.0, critic_warmup: 5}",
    "learner.learning_rate=3.0e-4",
    "train.minibatches=2",
)
# At the others' learning rate, so that all have the same chance to settle on a format.
FAST = (
    "algorithm={name: ppo, critic_rate: 10, critic_warmup: 5}",
    "learner.learning_rate=3.0e-4",
)
# A budget at which the calculator's task is also learned in a program that is started for each session.
SHORT = (
    "train={steps: 40, batch_size: 8, num_generations: 8}",
    "eval={every: 40, problems: 128, samples: 2}",
)
# Sixteen samples of each held-out problem, so that pass@8 is an average over many choices of eight.
EXPLORE = ("train.steps=40", "eval={every: 20, problems: 256, samples: 16}")
# Algorithms that are in the section `exploration` only; `grpo`, `max_rl` and `mml` are in both.
COMPARED_AT_PASS_K = (
    "sapo",
    "vespo",
    "dppo",
    "gmpo",
    "m2po",
    "topr",
    "clip_cov",
    "kl_cov",
    "luspo",
    "trajectory_balance",
)
EXPLORING = ("grpo", "max_rl", "mml", *COMPARED_AT_PASS_K)
# Settings of GRPO that keep it exploring.
SETTINGS = {
    "entropy_bonus": "{name: grpo, entropy_coef: 0.03}",
    "strong_entropy_bonus": "{name: grpo, entropy_coef: 0.2}",
    "entropy_target": "{name: grpo, entropy_target: 0.25, entropy_coef: 0.02}",
    "top_entropy": "{name: grpo, top_entropy: 0.2}",
    "entropy_advantage": "{name: grpo, entropy_advantage: 0.4}",
}
STYLE = "benchmarks/learning_style.py:written_in"
STYLES = (
    "rewards=[{function: math}, "
    + ", ".join(
        f'{{function: "{STYLE}", name: {s}, weight: 0, options: {{style: {s}}}}}' for s in ("lines", "chain")
    )
    + "]"
)


def online(name: str, section: str, *overrides: str, case: str = "", start: str = "", shift: int = 0) -> Case:
    """A case made of an example of examples/online."""
    return Case(case or name, section, f"examples/online/{name}.yaml", overrides, start=start, shift=shift)


CASES: list[Case] = [
    *(
        Case(p.stem, "online", f"examples/online/{p.name}", teacher="grpo" if p.stem == "distill" else "")
        for p in sorted(ONLINE.glob("*.yaml"))
        if p.stem not in ("base", "distill_endpoint", *COMPARED_AT_PASS_K)  # one needs a server
    ),
    online("ppo", "online", *VALUE_HEAD, case="ppo_head"),
    Case("dpa", "online", "examples/dpa.yaml", LIKE_ONLINE, start="directions"),
    *(online(name, "exploration", *EXPLORE, start="unsure") for name in EXPLORING),
    online("grpo", "exploration", *EXPLORE, case=AGAIN, start="unsure", shift=100),
    *(
        online("grpo", "exploration", *EXPLORE, f"algorithm={settings}", case=name, start="unsure")
        for name, settings in SETTINGS.items()
    ),
    Case("sft", "hard", "examples/online/base.yaml", (*HARD, *SUPERVISED), start="hasty"),
    *(online(name, "hard", *HARD, start="hasty") for name in ("grpo", "luffy")),
    online("prefix_rft", "hard", *HARD, "algorithm={name: prefix_rft, hybrids: 2}", start="hasty"),
    online("ppo", "echo", STYLES, *FAST),
    *(online(name, "echo", STYLES) for name in ("grpo", "expert_iteration")),
    Case("calculator", "agents", "examples/calculator.yaml", start="calculator"),
    *(
        Case(f"calculator_{name}", "agents", config, SHORT, start="calculator")
        for name, config in (
            ("short", "examples/calculator.yaml"),
            ("program", "examples/agents/calculator.yaml"),
        )
    ),
    Case("guess", "agents", "examples/guess.yaml", start="guess"),
    Case("guess_no_credit", "agents", "examples/guess.yaml", ("algorithm={name: grpo}",), start="guess"),
]


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    cases = [
        c
        for c in CASES
        if (not args.only or c.name in args.only.split(",")) and args.section in ("", c.section)
    ]
    if args.list or not cases:
        print("\n".join(f"{c.section:8} {c.name:18} {c.config} {' '.join(c.overrides)}" for c in CASES))
        return 0 if cases else 2
    failed = []
    for seed in [int(s) for s in args.seeds.split(",")]:
        for case in cases:
            run = args.runs / f"{case.section}-{case.name}-{seed}"
            if not args.collect and not (run / "result.json").exists():
                code = carry_out(case, seed, run, args.runs, args.minutes)
                failed += [run.name] if code else []
            if (run / "result.json").exists():
                row = summarise(run, case.section, case.name, seed, case.config, case.overrides)
                merge(row | seconds_of(start_folder(seed, args.runs, case.start)))
    write_page([(c.section, c.name) for c in CASES])
    if failed:
        print(f"not finished: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("learning", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases by name, with commas")
    parser.add_argument("--section", default="", help="only this section of the table")
    parser.add_argument("--seeds", default="1", help="seeds, with commas")
    parser.add_argument("--minutes", type=float, default=10, help="longest a run may take; it can be resumed")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="where run folders are")
    parser.add_argument("--collect", action="store_true", help="start no run, only write the results anew")
    parser.add_argument("--list", action="store_true", help="list the cases")
    return parser.parse_args(argv)


def carry_out(case: Case, seed: int, run: Path, runs: Path, minutes: float) -> int:
    """Train one case from the start of its seed; returns rft's exit code (75: cut short, resumable)."""
    overrides = [*case.overrides, f"seed={seed + case.shift}", f"output_dir={runs}", f"name={run.name}"]
    overrides += ["warm_start=null"]
    overrides += [f"model.path={start(seed, runs, case.start)}", "model.options={}"]
    if case.teacher:
        teacher = runs / f"{case.section}-{case.teacher}-{seed}" / "model"
        if not (teacher / "config.json").exists():
            print(f"{run.name} needs {teacher}: run {case.teacher} first", file=sys.stderr)
            return 2
        overrides.append(f"model.reference={teacher}")
    print(f"== {run.name}", flush=True)
    code = rft(["train", case.config, *overrides], minutes)
    if code == 0 and not _evaluated(run):
        shown = subprocess.run(
            [sys.executable, "-m", "rft.cli", "eval", case.config, *overrides, "--model", str(run / "model")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        (run / "eval.json").write_text(shown.stdout)
    return code


def _evaluated(run: Path) -> bool:
    """True if the run measured held-out accuracy itself."""
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last).get("eval/accuracy") is not None


def rft(command: Sequence[str], minutes: float) -> int:
    """Run rft; past the time it is asked to save and stop."""
    process = subprocess.Popen([sys.executable, "-m", "rft.cli", *command], cwd=ROOT)
    try:
        return process.wait(minutes * 60)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait()


def start_folder(seed: int, runs: Path, kind: str) -> Path:
    return runs / "-".join(filter(None, ("start", kind, str(seed))))


def seconds_of(folder: Path) -> dict[str, float]:
    """How long a start took to train, if that is known."""
    path = folder / SECONDS
    return {"start_minutes": round(int(path.read_text()) / 60, 2)} if path.exists() else {}


def start(seed: int, runs: Path, kind: str = "") -> Path:
    """The model that all runs of a seed start from: one of STARTS."""
    folder = start_folder(seed, runs, kind)
    name = folder.name
    if not (folder / "config.json").exists():
        cache, began = runs / f".{name}", time.time()
        settings = [f"seed={seed}", f"output_dir={cache}", "name=run", f"warm_start.cache={cache}/made"]
        short = ["train.steps=1", "eval.every=0", "rollout.engine=hf"]
        config, changes = STARTS[kind]
        if rft(["train", config, *settings, *changes, *short], minutes=60):
            raise SystemExit(f"the {name} failed")
        (made,) = (cache / "made").glob("warm-start-*")
        shutil.copytree(made, folder)
        (folder / SECONDS).write_text(f"{time.time() - began:.0f}\n")
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
