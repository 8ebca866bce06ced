"""What every offline algorithm learns, all from the same warm-started model (see benchmarks/learning.py).

    python benchmarks/learning_offline.py                            # what is missing
    python benchmarks/learning_offline.py --only dpo,simpo --section pairs --seeds 1,2,3
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from learning import rft, start
from learning_offline_report import RESULTS, Row, load, merge, write_page
from transformers import AutoModelForCausalLM

from rft.algorithms import ALGORITHMS
from rft.algorithms.asft import ASFT
from rft.algorithms.offline_preference import preference
from rft.batch import Batch, Group
from rft.config import parse_config
from rft.data import load_groups, load_prompts
from rft.data.rows import load_rows
from rft.learner.forward import PolicyModel
from rft.learner.learner import Learner
from rft.local import LocalActor
from rft.metrics import Progress
from rft.offline import OfflineLoop
from rft.packing import shares_prefix
from rft.plan import Plan, make_plan
from rft.rewards import load_reward
from rft.run import learner_spec

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS, HELD_OUT = 256, 187
PAIRS = {"kind": "arithmetic_pairs", "limit": 4096}
GSM8K = {
    "path": str(ROOT.parent / "shared/data/gsm8k/preferences.jsonl"),
    "holdout": 187,
    "max_length": 768,
    "overlong": "skip",
}
# The same training pairs as single responses, right or wrong, which kto reads; held out are the pairs.
LABELLED = {**GSM8K, "path": str(Path(tempfile.gettempdir()) / "rft-gsm8k-labelled.jsonl"), "holdout": 0}
# Three demonstrated steps in ten are wrong, and are followed by what follows from them.
SLIPS = {"kind": "arithmetic", "limit": 8192, "options": {"styles": {"lines": 1.0}, "wrong_fraction": 0.3}}
MIXED = {"kind": "arithmetic", "limit": 16384}  # what the start was trained on: careful and hasty solutions
CLASSES = {
    **MIXED,
    "columns": {"source": "style"},
    "sources": {
        "lines": {"weight": 1.0, "prefix": "[careful] "},
        "chain": {"weight": 0.1, "prefix": "[hasty] "},
    },
    "eval_source": "lines",
}


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
    more: dict[str, Any] = field(default_factory=dict)


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
}
# These move each response by itself; at the others' rate they lose their way on long responses.
GENTLE = {"dpo-apo_zero", "dpo-apo_down", "kto"}


def _preferences(section: str, data: dict[str, Any], steps: int, batch_size: int, rate: float) -> list[Case]:
    cases = []
    for name, settings in VARIANTS.items():
        algorithm = {"name": name.split("-")[0], **settings}
        slower = 0.3 if section == "gsm8k" and name in GENTLE else 1.0
        labelled = section == "gsm8k" and name == "kto"
        of = (LABELLED, steps, 2 * batch_size) if labelled else (data, steps, batch_size)
        cases.append(Case(name, section, algorithm, *of, rate * slower))
    return cases


CASES = [
    *_preferences("pairs", PAIRS, 30, 32, 3e-4),
    *_preferences("gsm8k", GSM8K, 50, 16, 1e-3),
    *(
        Case(name, "slips", {"name": name.split("-")[0], **settings}, SLIPS, 150, 32, 1e-3)
        for name, settings in (
            ("sft", {}),
            ("dft", {}),
            ("asft", {"lam": 0.1}),
            ("asft-forward", {"lam": 0.1, "direction": "forward"}),
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
]


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    wanted = [
        c
        for c in CASES
        if (not args.only or c.name in args.only.split(",")) and args.section in ("", c.section)
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


def carry_out(case: Case, seed: int, runs: Path) -> Row:
    """Train one case; what its section is about, before and after."""
    config = parse_config(
        {
            "name": case.name,
            "output_dir": str(runs),
            "seed": seed,
            "algorithm": case.algorithm,
            "model": {"path": _start(case, runs)},
            "data": {**case.data, **({"seed": seed} if "kind" in case.data else {})},
            "train": {"steps": case.steps, "batch_size": case.batch_size},
            "learner": {
                "learning_rate": case.learning_rate,
                "betas": [0.9, 0.95],
                "warmup_steps": max(case.steps // 20, 3),
                "schedule": "cosine",
                "threads": 1,
                "entropy": False,
            },
            "eval": {"every": 0},
            **case.more,
        }
    )
    plan = make_plan(config)
    learner = Learner(learner_spec(plan))
    if case.section == "loop":
        train(plan, learner)
        before, after = online(Path(learner.export(str(runs / f"reward-model-{seed}"))), seed, runs)
    else:
        before = MEASURES[case.section](plan, learner)
        train(plan, learner)
        after = MEASURES[case.section](plan, learner)
    settings = {k: v for k, v in case.algorithm.items() if k != "name"}
    return {
        "section": case.section,
        "case": case.name,
        "seed": seed,
        "settings": settings,
        "steps": case.steps,
        "before": before,
        "after": after,
    }


def _write_labelled() -> None:
    """Write the file of LABELLED."""
    labelled = [
        {"prompt": row["prompt"], "completion": row[role], "label": role == "chosen"}
        for row in load_rows(parse_config({"algorithm": "dpo", "data": GSM8K}).data, "train")
        for role in ("chosen", "rejected")
    ]
    Path(str(LABELLED["path"])).write_text("".join(json.dumps(row) + "\n" for row in labelled))


def _start(case: Case, runs: Path) -> str:
    """The model that a case starts from. For GSM8K it has first imitated the preferred training solutions."""
    if case.fresh:
        return "tiny"
    if case.section != "gsm8k":
        return str(start(1, runs))
    _write_labelled()
    folder = runs / "start-gsm8k"
    if not (folder / "config.json").exists():
        config = parse_config(
            {
                "output_dir": str(runs),
                "algorithm": "sft",
                "data": {**GSM8K, "columns": {"prompt": "prompt", "completion": "chosen"}},
                "train": {"steps": 120, "batch_size": 16},
                "learner": {"learning_rate": 5e-3, "schedule": "cosine", "threads": 1, "entropy": False},
                "eval": {"every": 0},
            }
        )
        plan = make_plan(config)
        learner = Learner(learner_spec(plan))
        train(plan, learner)
        learner.export(str(folder))
    return str(folder)


def train(plan: Plan, learner: Learner) -> None:
    """The loop of an offline run, without evaluation and checkpoints."""
    config, data = plan.config, plan.offline
    assert data is not None
    with (
        tempfile.TemporaryDirectory() as nowhere,
        Progress(config.train.steps, config.name, display="quiet") as progress,
    ):
        loop = OfflineLoop(
            LocalActor(learner),
            data.source(config),
            config.train.steps,
            config.train.batch_size,
            share_prefix=shares_prefix(data.sample, config.learner.prefix_sharing, plan.shape.hidden),
            timeout_s=3600,
            progress=progress,
            checkpoints=Path(nowhere),
            arrange=config.algorithm.arrange,
            save_last=False,
        )
        asyncio.run(loop.run())


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


# -- what is measured ------------------------------------------------------------------------------------


@torch.no_grad()
def preferences(plan: Plan, learner: Learner) -> dict[str, float]:
    """Of held-out pairs: how often the policy finds the preferred response likelier, in all and per token,
    and by how many nats; and how often its log-ratio to the start favours it (DPO's implicit reward;
    a tie counts half). The same yardsticks for every loss."""
    data = plan.config.data
    if data.path == LABELLED["path"]:
        data = parse_config({"algorithm": "dpo", "data": GSM8K}).data
    data = data.model_copy(update={"eval_limit": HELD_OUT})
    groups = load_groups(data, plan.tokenizer, "preference", "test").groups
    batch = Batch.build(groups, share_prefix=True)
    logps = learner.score(batch)["logps"]
    first, second = batch.pairs()
    total, mean = batch.sum_by_sequence(logps), batch.mean_by_sequence(logps)
    whole = preference(total[first] - total[second])
    start = batch.sum_by_sequence(_base(plan).run(batch, frozenset({"logps"})).logps)
    gained = (total - start)[first] - (total - start)[second]
    gained = preference(gained.masked_fill(gained.abs() < 1e-3, 0))  # rounding, where nothing was learnt
    found = {
        "reward_accuracy": float(gained["preference_accuracy"].mean()),
        "accuracy": float(whole["preference_accuracy"].mean()),
        "accuracy_per_token": float(preference(mean[first] - mean[second])["preference_accuracy"].mean()),
        "margin": float(whole["preference_margin"].mean()),
        "chosen_nll": -float(mean[first].mean()),
    }
    if plan.config.data.resolved_kind == "arithmetic_pairs":
        found["task"] = solved(plan, learner)
    return found


def _base(plan: Plan) -> PolicyModel:
    """The model that the run started from."""
    model = AutoModelForCausalLM.from_pretrained(plan.model, dtype=torch.float32).eval()
    return PolicyModel(model, temperature=1.0, compute_dtype=torch.float32)


@torch.no_grad()
def solved(plan: Plan, learner: Learner) -> float:
    """Share of held-out problems of the embedded task that one sample solves, at temperature 1."""
    data = plan.config.data.model_copy(update={"eval_limit": PROBLEMS, "seed": 0})
    prompts = load_prompts(data, plan.tokenizer, "test").prompts
    longest = max(len(p.tokens) for p in prompts)
    pad = plan.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p.tokens)) + list(p.tokens) for p in prompts])
    model = learner.policy.model.eval()
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=(ids != pad).long(), max_new_tokens=28, do_sample=True, top_k=0, temperature=1.0
    )
    model.train()
    texts = plan.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    answers = [p.columns["answer"] for p in prompts]
    scores = load_reward("math")([p.text for p in prompts], texts, answer=answers)
    return sum(score == 1.0 for score in scores) / len(scores)


def demonstrations(plan: Plan, learner: Learner) -> dict[str, float]:
    """Accuracy on the task, and how far the policy is from the start: KL(policy || start) and its reverse
    over the vocabulary, mean over the tokens of clean held-out solutions, in nats."""
    clean = {"kind": "arithmetic", "options": {"styles": {"lines": 1.0}, "wrong_fraction": 0.0}}
    data = parse_config({"algorithm": "sft", "data": {**clean, "eval_limit": HELD_OUT}}).data
    groups = load_groups(data, plan.tokenizer, "sft", "test").groups
    base = _base(plan)
    return {
        "task": solved(plan, learner),
        "kl": drift(learner.policy, base, groups, ASFT(direction="reverse")),
        "kl_forward": drift(learner.policy, base, groups, ASFT(direction="forward")),
    }


@torch.no_grad()
def drift(policy: PolicyModel, base: PolicyModel, groups: list[Group], anchor: ASFT) -> float:
    """The mean divergence over response tokens, in nats."""
    batch = Batch.build(groups)
    kl = policy.run(batch, frozenset({"kl"}), algorithm=anchor, reference=base).kl
    assert kl is not None
    return float(kl[batch.mask].mean())


def task(plan: Plan, learner: Learner) -> dict[str, float]:
    """Accuracy on the task alone."""
    return {"task": solved(plan, learner)}


def held_out(plan: Plan, learner: Learner) -> dict[str, float]:
    """The algorithm's own held-out measures."""
    data = plan.config.data.model_copy(update={"eval_limit": HELD_OUT})
    groups = load_groups(data, plan.tokenizer, ALGORITHMS[plan.config.name].data, "test").groups
    sums = learner.evaluate(Batch.build(groups, share_prefix=True), plan.config.train.steps - 1)
    return {name: total / count for name, (total, count) in sums.items()}


MEASURES = {
    "pairs": preferences,
    "gsm8k": preferences,
    "slips": demonstrations,
    "sources": task,
    "rewards": held_out,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
