"""What every offline algorithm learns, all from the same warm-started model (see benchmarks/learning.py).

    python benchmarks/learning_offline.py                            # what is missing
    python benchmarks/learning_offline.py --only dpo,simpo --section pairs --seeds 1,2,3
    python benchmarks/learning_offline.py --section rates --seeds 100  # learning rates of section `learner`
    python benchmarks/learning_offline.py --list                     # the cases
    python benchmarks/learning_offline.py --collect                  # only the page anew

Runs take 5 to 60 seconds, so they are made in this process, by the plan, the learner and the loop of `rft
train`. After each one benchmarks/results/learning_offline.json is written, at the end
docs/learning_offline.md and docs/images/learning_offline.png.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from learning import rft, start
from learning_offline_measures import (
    HELD_OUT,
    demonstrations,
    embedded_pairs,
    held_out,
    learned_and_moved,
    memory,
    preferences,
    task,
)
from learning_offline_report import RESULTS, Row, load, merge, write_page

from rft.algorithms.extras import arrange
from rft.config.data import DataConfig
from rft.config.load import parse_config
from rft.data.rows import load_rows
from rft.learner.adapters.methods import previewed_sequences
from rft.loops.evaluate import HeldOut
from rft.loops.offline import OfflineLoop
from rft.loops.saver import Saver
from rft.metrics import Progress
from rft.plan import OfflinePlan, make_plan
from rft.tools.merge import Options
from rft.tools.merge import merge as merge_models
from rft.tools.prune import prune
from rft.work import shares_prefix

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.in_process import InProcessLearner  # noqa: E402

PAIRS = {"kind": "arithmetic_pairs", "limit": 4096}
REWARDED = {
    **PAIRS,
    "columns": {"reward": "label"},
    "numbers": ["reward"],
}  # single responses of reward 0 or 1
GSM8K = {
    "path": str(ROOT.parent / "shared/data/gsm8k/preferences.jsonl"),
    "holdout": HELD_OUT,
    "max_length": 768,
    "overlong": "skip",
}
# The same training pairs as single responses, right or wrong, which kto reads. {runs}: where `--runs` is.
LABELLED = {**GSM8K, "path": "{runs}/gsm8k-labelled.jsonl", "holdout": 0}
# Three demonstrated steps in ten are wrong, and the steps after them continue from the wrong value.
SLIPS = {"kind": "arithmetic", "limit": 8192, "options": {"styles": {"lines": 1.0}, "wrong_fraction": 0.3}}
MIXED = {"kind": "arithmetic", "limit": 16384}  # the data of the warm start: careful and hasty solutions
CLASSES = {
    **MIXED,
    "columns": {"source": "style"},
    "sources": {
        "lines": {"weight": 1.0, "prefix": "[careful] "},
        "chain": {"weight": 0.1, "prefix": "[hasty] "},
    },
    "eval_source": "lines",
}


# Right solutions in the format in which the start has seen half of the steps wrong.
CHAINS = {
    "kind": "arithmetic",
    "limit": 8192,
    "options": {"styles": {"chain": 1.0}, "wrong_fraction": 0.0},
}
PRUNED = {"loram": 0.5, "loram-0.9": 0.9}  # shares of the MLP neurons that are kept
EPSILON = "privacy/epsilon"


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    section: str
    algorithm: dict[str, Any]
    data: dict[str, Any]
    steps: int
    batch_size: int
    learning_rate: float
    fresh: bool = False  # from the untrained model instead of the start
    taught: bool = False  # with the model of `_teacher` as the reference
    learner: dict[str, Any] = field(default_factory=dict)  # more keys of the config's section `learner`
    pruned: float = 0.0  # share of the MLP neurons that is trained on (LoRAM); 0: the whole model


VARIANTS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo-hinge": {"loss_type": "hinge"},
    "dpo-ipo": {"loss_type": "ipo"},
    "dpo-cdpo": {"label_smoothing": 0.1},
    "dpo-robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "dpo-exo": {"loss_type": "exo", "label_smoothing": 0.001},
    "dpo-nca": {"loss_type": "nca"},
    "dpo-bco": {"loss_type": "bco"},
    "dpo-sppo": {"loss_type": "sppo_hard"},
    "dpo-aot": {"loss_type": "aot"},
    "dpo-apo_zero": {"loss_type": "apo_zero"},
    "dpo-apo_down": {"loss_type": "apo_down", "beta": 0.5},
    "dpo-discopop": {"loss_type": "discopop"},
    "dpo-discopop-tau": {"loss_type": "discopop", "tau": 1.0},
    "dpo-rpo": {"nll": 1.0},
    "dpo-length": {"length_normalized": True, "beta": 2.0},
    "dpo-ld": {"tail": 0.5},
    "dpo-forward_kl": {"divergence_type": "forward_kl"},
    "dpo-js": {"divergence_type": "js"},
    "dpo-wpo": {"weighting": "aligned"},
    "dpo-free": {"reference_free": True},
    "simpo": {},
    "orpo": {"beta": 1.0},
    "cpo": {},
    "kto": {},
    "bco": {},
}
# These move each response by itself; at the others' rate they lose their way on long responses.
GENTLE = ("dpo-apo_zero", "dpo-apo_down")
STEADY = tuple(name for name in VARIANTS if name not in (*GENTLE, "kto", "bco"))


LORA = {"method": "lora", "r": 4}
# Keys of the config's section `learner` by method, with the learning rates that were tried, the best first.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "adamw": ({}, (3e-3, 1e-3)),
    "muon": ({"optimizer": "muon"}, (3e-3, 1e-3)),
    "lift": ({"strategy": {"name": "lift", "share": 0.05, "rank": 8, "every": 25}}, (1e-2, 3e-3)),
    "saft": ({"strategy": {"name": "saft", "share": 0.01}}, (1e-2, 3e-3)),
    "lora": ({"adapter": LORA}, (1e-2, 3e-3)),
    "cola": ({"adapter": {**LORA, "restart_every": 34}}, (1e-2, 3e-3)),
    "eva-rho": (
        {"adapter": {"method": "eva", "r": 4, "options": {"eva_config": {"rho": 2.0}}}},
        (1e-2, 3e-3),
    ),
    "bone": ({"adapter": {"method": "bone", "r": 8}}, (1e-2, 3e-3)),
    "loram": ({"adapter": LORA}, (1e-2, 3e-3)),
    "loram-0.9": ({"adapter": LORA}, (1e-2, 3e-3)),
    "private": ({"adapter": LORA, "privacy": {"clip": 0.5, "noise": 0.8}}, (1e-2, 3e-3)),
}


def _method(name: str, section: str, rate: float) -> Case:
    """A case of METHODS; in the section `rates` it is named after its learning rate as well."""
    settings, pruned = METHODS[name][0], PRUNED.get(name, 0.0)
    case = f"{name}-{rate:g}" if section == "rates" else name
    data = (section, {"name": "sft"}, CHAINS, 100, 32)
    return Case(case, *data, rate, learner=settings, pruned=pruned)


def _preferences(section: str, names: Sequence[str], *setting: Any) -> list[Case]:
    """Cases of VARIANTS; `setting`: data, steps, batch size and learning rate."""
    return [Case(n, section, {"name": n.split("-")[0], **VARIANTS[n]}, *setting) for n in names]


CASES = [
    *_preferences("pairs", tuple(VARIANTS), PAIRS, 30, 32, 3e-4),
    Case("rwr", "pairs", {"name": "rwr", "tau": 0.5}, REWARDED, 30, 32, 3e-4),
    *_preferences("gsm8k", STEADY, GSM8K, 50, 16, 1e-3),
    *_preferences("gsm8k", GENTLE, GSM8K, 50, 16, 3e-4),
    *_preferences("gsm8k", ("kto",), LABELLED, 50, 32, 3e-4),
    *(
        Case(name, "slips", {"name": name.split("-")[0], **settings}, SLIPS, 150, 32, 1e-3)
        for name, settings in (
            ("sft", {}),
            ("dft", {}),
            ("asft", {"lam": 0.1}),
            ("asft-forward", {"lam": 0.1, "direction": "forward"}),
            ("token_cleaning", {"better": "policy", "warmup": 0.2}),
            ("q_tuning", {}),
            ("weak_to_strong", {}),
        )
    ),
    *(
        Case(name, "slips", {"name": name.split("-")[0], **settings}, SLIPS, 150, 32, 1e-3, taught=True)
        for name, settings in (
            ("token_cleaning-taught", {}),
            ("logit_distill", {}),
            ("logit_distill-reverse", {"beta": 1.0}),
            ("logit_distill-half", {"alpha": 0.5}),
        )
    ),
    Case("sft", "sources", {"name": "sft"}, MIXED, 600, 32, 5e-3, fresh=True),
    Case("c_rlft", "sources", {"name": "c_rlft"}, CLASSES, 600, 32, 5e-3, fresh=True),
    *(
        Case(name, "rewards", {"name": name, **settings}, {**PAIRS, "numbers": ["margin"]}, 150, 32, 1e-3)
        for name, settings in (
            ("reward_model", {"centre": 0.01}),
            ("reward_regression", {"heads": 2}),
            ("pairwise_reward", {}),
            ("process_reward", {}),
        )
    ),
    Case("reward_model", "loop", {"name": "reward_model", "centre": 0.01}, PAIRS, 150, 32, 1e-3),
    *(_method(name, "learner", rates[0]) for name, (_, rates) in METHODS.items()),
    *(_method(name, "rates", rate) for name, (_, rates) in METHODS.items() for rate in sorted(rates)),
]


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    wanted = [
        c
        for c in CASES
        if (not args.only or c.name in args.only.split(","))
        and (args.section == c.section or (not args.section and c.section != "rates"))
    ]
    if args.list:
        print("\n".join(f"{c.section:8} {c.name:16} {c.algorithm}" for c in CASES))
        return 0
    done = {(r["section"], r["case"], r["seed"]) for r in load()}
    for seed in [int(s) for s in args.seeds.split(",")]:
        for case in [] if args.collect else wanted:
            if args.again or (case.section, case.name, seed) not in done:
                began = time.perf_counter()
                row = carry_out(case, seed, args.runs)
                merge({**row, "seconds": round(time.perf_counter() - began, 1)})
                print(row, flush=True)
    write_page([(c.section, c.name) for c in CASES])
    print(RESULTS)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("learning_offline", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases by name, with commas")
    parser.add_argument("--section", default="", help="only this section of the table")
    parser.add_argument("--seeds", default="1", help="seeds of the data and their order, with commas")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="where the start is")
    parser.add_argument("--again", action="store_true", help="also what is in the results already")
    parser.add_argument("--collect", action="store_true", help="start no run, only write the page anew")
    parser.add_argument("--list", action="store_true", help="list the cases")
    return parser.parse_args(argv)


def run_sections(steps: int, learning_rate: float) -> dict[str, Any]:
    """Return the sections that the offline runs of the benchmarks share."""
    return {
        "learner": {
            "learning_rate": learning_rate,
            "betas": [0.9, 0.95],
            "warmup_steps": max(steps // 20, 3),
            "schedule": "cosine",
            "threads": 1,
            "entropy": False,
        },
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
    }


def carry_out(case: Case, seed: int, runs: Path) -> Row:
    """Train one case; return its section's measure before and after."""
    data = {**case.data, **({"seed": seed} if "kind" in case.data else {})}
    if case.data is LABELLED:
        data["path"] = str(_write_labelled(Path(data["path"].format(runs=runs))))
    sections = run_sections(case.steps, case.learning_rate)
    sections["learner"] |= case.learner
    begin = _start(case, runs)
    config = parse_config(
        {
            "name": case.name,
            "output_dir": str(runs),
            "seed": seed,
            "algorithm": case.algorithm,
            "model": {
                "path": _pruned(case, begin, seed, runs),
                **({"reference": _teacher(runs)} if case.taught else {}),
            },
            "data": data,
            "train": {"steps": case.steps, "batch_size": case.batch_size},
            **sections,
        }
    )
    plan = make_plan(config)
    learner = InProcessLearner(plan.learner_spec(), plan.channel_spec())
    if case.section in ("learner", "rates"):
        drifts = case.section == "learner"
        before = learned_and_moved(plan, begin, begin, drifts)
        last = train(plan, learner)
        with _trained(case, begin, plan, learner) as trained:
            after = learned_and_moved(plan, trained, begin, drifts)
        after |= memory(learner.actor.learner, begin)
        after |= {"epsilon": last[EPSILON]} if EPSILON in last else {}
    elif case.section == "loop":
        train(plan, learner)
        before, after = online(Path(learner.actor.export(str(runs / f"reward-model-{seed}"))), seed, runs)
    else:
        before = MEASURES[case.section](plan, learner.actor.learner)
        train(plan, learner)
        after = MEASURES[case.section](plan, learner.actor.learner)
    settings = {k: v for k, v in case.algorithm.items() if k != "name"}
    if case.section in ("learner", "rates"):
        settings |= {"learning_rate": case.learning_rate, **case.learner}
        settings |= {"share": case.pruned} if case.pruned else {}
    return {
        "section": case.section,
        "case": case.name,
        "seed": seed,
        "settings": settings,
        "steps": case.steps,
        "before": before,
        "after": after,
    }


def _pruned(case: Case, begin: str, seed: int, runs: Path) -> str:
    """The model that is trained: the start, or a part of it."""
    if not case.pruned:
        return begin
    folder = runs / f"pruned-{case.pruned:g}-{seed}"
    if not folder.exists():
        prune(begin, "start", folder, case.pruned, seed, heads=1.0)
    return str(folder)


@contextmanager
def _trained(case: Case, begin: str, plan: OfflinePlan, learner: InProcessLearner) -> Iterator[str]:
    """Yield the folder of the trained model: as exported, or the start with the adapter of its part."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = learner.actor.export(f"{scratch}/model")
        if case.pruned:
            models = {"start": begin, "pruned": plan.model, "adapter": f"{folder}/adapter"}
            folder = f"{scratch}/whole"
            merge_models("loram", models, Path(folder), Options(), None)
        yield folder


def gsm8k_pairs() -> DataConfig:
    """GSM8K's preference pairs, as the data of a run."""
    return parse_config({"algorithm": "dpo", "data": GSM8K}).data


def _write_labelled(file: Path) -> Path:
    """Write the training pairs as the labelled single responses of LABELLED."""
    labelled = [
        {"prompt": row["prompt"], "completion": row[role], "label": role == "chosen"}
        for row in load_rows(gsm8k_pairs(), "train")
        for role in ("chosen", "rejected")
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    return file


def _start(case: Case, runs: Path) -> str:
    """The model that a case starts from. For GSM8K it has first imitated the preferred training solutions."""
    if case.fresh:
        return "tiny"
    if case.section != "gsm8k":
        return str(start(1, runs))
    imitated = {**GSM8K, "columns": {"prompt": "prompt", "completion": "chosen"}}
    return _imitating(imitated, 120, 16, 5e-3, "tiny", runs / "start-gsm8k")


def _teacher(runs: Path) -> str:
    """A model that has imitated clean solutions of the embedded task, from the start."""
    clean = {
        "kind": "arithmetic",
        "limit": 8192,
        "options": {"styles": {"lines": 1.0}, "wrong_fraction": 0.0},
    }
    return _imitating(clean, 150, 32, 1e-3, str(start(1, runs)), runs / "teacher")


def _imitating(
    data: dict[str, Any], steps: int, batch_size: int, learning_rate: float, model: str, folder: Path
) -> str:
    """The folder of `model` after supervised tuning, which is done once."""
    if not (folder / "config.json").exists():
        config = parse_config(
            {
                "output_dir": str(folder.parent),
                "algorithm": "sft",
                "model": {"path": model},
                "data": data,
                "train": {"steps": steps, "batch_size": batch_size},
                "learner": {
                    "learning_rate": learning_rate,
                    "schedule": "cosine",
                    "threads": 1,
                    "entropy": False,
                },
                "eval": {"every": 0},
                "checkpoint": {"every": 0},
            }
        )
        plan = make_plan(config)
        learner = InProcessLearner(plan.learner_spec(), plan.channel_spec())
        train(plan, learner)
        learner.actor.export(str(folder))
    return str(folder)


def train(plan: OfflinePlan, learner: InProcessLearner) -> dict[str, float]:
    """The loop of an offline run, without evaluation and checkpoints; return the last step's metrics."""
    config, data = plan.config, plan.data
    share = shares_prefix(data.sample, config.learner.prefix_sharing, plan.shape.hidden)
    rearrange = partial(arrange, config.algorithm)
    with (
        tempfile.TemporaryDirectory() as nowhere,
        Progress(config.train.steps, config.name, display="quiet") as progress,
    ):
        loop = OfflineLoop(
            learner,
            data.source(config),
            config.train.steps,
            config.train.batch_size,
            share_prefix=share,
            progress=progress,
            saver=Saver(learner, Path(nowhere), config, progress, None),
            arrange=rearrange,
            save_last=False,
            preview=previewed_sequences(config.learner),
            by_source={
                name: HeldOut(list(rows), config.train.batch_size, share, rearrange)
                for name, rows in data.by_source.items()
            },
        )
        return asyncio.run(loop.run())


def online(reward_model: Path, seed: int, runs: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy before and after GRPO whose only reward is the model; `math` watches, with weight 0."""
    judge = f"{{function: reward_model, options: {{model: {reward_model}}}}}"
    rewards = f"rewards=[{{function: math, weight: 0}}, {judge}]"
    run = runs / f"reward-model-loop-{seed}"
    settings = [f"seed={seed}", f"output_dir={runs}", f"name={run.name}", "warm_start=null", rewards]
    settings += [f"model.path={start(1, runs)}", "train.steps=40", "eval.every=40", "eval.samples=1"]
    if code := rft(["train", "examples/online/grpo.yaml", *settings], minutes=12):
        raise SystemExit(f"{run.name} ended with exit code {code}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = ([r for r in rows if r.get("eval/accuracy") is not None][i] for i in (0, -1))
    reward = "reward/reward_model/mean"
    scores = [r[reward] for r in rows if r.get(reward) is not None]
    return (
        {"task": first["eval/accuracy"], "score": scores[0]},
        {"task": last["eval/accuracy"], "score": scores[-1]},
    )


MEASURES = {
    "pairs": embedded_pairs,
    "gsm8k": lambda plan, learner: preferences(plan, learner, gsm8k_pairs()),
    "slips": demonstrations,
    "sources": task,
    "rewards": held_out,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
