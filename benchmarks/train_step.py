"""Whole SFT, DPO and GRPO steps (forward, backward, optimizer; reference for DPO) of rft and of TRL.

    python benchmarks/train_step.py [--peers] [--rounds 3] [--cases dpo ...] [--model whole] [--scale 8]

The model is Qwen3-0.6B with random weights: all widths its own, but a quarter of its 28 layers and of its
151,936 tokens, so that it fits a small machine and the head keeps its share. Both libraries keep a process
with the model loaded, and take steps in turns on the same tokens, float32 on CPU; completions of GRPO are
given. Every row carries the relative difference of the two libraries' first gradient norms, and each
process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    MatrixProduct,
    forget_peak,
    memory,
    merge_rows,
    peer_versions,
    seconds,
    write_result,
)
from peers.make_env import peer_python
from shapes import QWEN3_600M, TOY, Shape
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.learner import LearnerConfig
from rft.config.rollout import SamplingConfig
from rft.config.schema import ModelConfig, TrainConfig
from rft.learner.learner import Learner
from rft.learner.spec import LearnerSpec
from rft.work import shares_prefix

HERE = Path(__file__).resolve().parent
LEARNING_RATE = 1e-6
GENERATIONS = 8
EOS = 1
PAD_WORD = "<pad>"
MODELS = {
    "whole": QWEN3_600M,
    "quarter": replace(QWEN3_600M, layers=7, vocabulary=37_984),
    "toy": TOY,
}


@dataclass(frozen=True)
class Case:
    """Tokens of a prompt and of a completion, and how many times faster than TRL rft must be."""

    algorithm: str
    prompt: int
    completion: int
    gate: float = 1.0

    def scaled(self, by: float) -> Case:
        prompt, completion = round(self.prompt * by), round(self.completion * by)
        return replace(self, prompt=prompt, completion=completion)


CASES = {
    "sft": Case("sft", 192, 64),
    "dpo": Case("dpo", 192, 64),
    "grpo-equal": Case("grpo", 128, 128, gate=1.5),
    "grpo-long-prompt": Case("grpo", 256, 64, gate=1.5),
}


def build(folder: Path, shape: Shape) -> None:
    """The model with a tokenizer for which token 17 reads "17", so that texts have the lengths wanted."""
    model = shape.build()
    model.config.eos_token_id, model.config.pad_token_id = EOS, 0
    model.save_pretrained(folder)
    words = {word(i): i for i in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=word(EOS), pad_token=PAD_WORD)
    fast.save_pretrained(folder)


def make_groups(case: Case, vocabulary: int) -> list[Group]:
    """GRPO: one group of 8, all of one length. DPO: 4 pairs. SFT: 8 answers. The last two of lengths within
    half of the given ones. Rewards alternate; every completion of SFT and DPO ends with the EOS."""
    dice = random.Random(0)

    def tokens(n: int, *end: int) -> tuple[int, ...]:
        return (*(dice.randrange(2, vocabulary) for _ in range(n)), *end)

    if case.algorithm == "grpo":
        samples = [Completion(tokens(case.completion), reward=float(i % 2)) for i in range(GENERATIONS)]
        return [Group(Prompt(0, tokens(case.prompt), ""), tuple(samples))]
    sides = 2 if case.algorithm == "dpo" else 1
    out = []
    for i in range(GENERATIONS // sides):
        lengths = [round(case.completion * dice.uniform(0.5, 1.5)) for _ in range(sides)]
        answers = tuple(
            Completion(tokens(n, EOS), finish="demonstration", reward=float(k == 0))
            for k, n in enumerate(lengths)
        )
        prompt = tokens(round(case.prompt * dice.uniform(0.5, 1.5)))
        out.append(Group(Prompt(i, prompt, ""), answers))
    return out


def word(token: int) -> str:
    return {0: PAD_WORD, EOS: "<end>"}.get(token, str(token))


def text(tokens: Sequence[int]) -> str:
    return " ".join(map(word, tokens))


def peer_settings(algorithm: str, groups: list[Group], common: dict[str, Any]) -> dict[str, Any]:
    """What `trl_step.py` reads. Texts end with the EOS, so that TRL appends none."""
    if algorithm == "grpo":
        (group,) = groups
        return common | {
            "rows": [{"prompt": text(group.prompt.tokens)}],
            "prompt_ids": [list(group.prompt.tokens)] * len(group.completions),
            "completion_ids": [list(c.tokens) for c in group.completions],
        }
    names = ("chosen", "rejected") if algorithm == "dpo" else ("completion",)
    rows = [
        {"prompt": text(g.prompt.tokens)}
        | {n: " " + text(c.tokens) for n, c in zip(names, g.completions, strict=True)}
        for g in groups
    ]
    return common | {"rows": rows}


class Peer:
    """TRL's trainer in a separate process, which takes a step on request."""

    def __init__(self, settings: dict[str, Any], work: Path) -> None:
        file = work / f"{settings['algorithm']}.json"
        file.write_text(json.dumps(settings))
        command = [str(peer_python("trl")), str(HERE / "peers" / "trl_step.py"), str(file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                found: dict[str, float] = json.loads(line.removeprefix("STEP "))
                return found
        raise RuntimeError(f"TRL's process ended with exit code {self.process.wait()}: see above")

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(x for x in status if x.startswith("VmHWM")).split()[1]) / 1000

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Ours:
    """rft's learner on the same groups."""

    def __init__(self, case: Case, groups: list[Group], model: str, threads: int, device: str) -> None:
        config = LearnerConfig(
            learning_rate=LEARNING_RATE, entropy=False, tokens_per_micro_batch=4096, threads=threads
        )
        self.learner = Learner(
            LearnerSpec(
                algorithm=ALGORITHMS[case.algorithm](),
                model=ModelConfig(path=model),
                config=config,
                train=TrainConfig(steps=1000),
                sampling=SamplingConfig(max_completion_length=4 * case.completion),
                device=device,
                seed=1,
            )
        )
        width = self.learner.policy.model.config.hidden_size
        self.shared = shares_prefix(groups, "auto", width)
        self.batch = Batch.build(groups, share_prefix=self.shared)
        self.steps = 0

    def step(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        taken = seconds(lambda: metrics.update(self.learner.step(self.batch, self.steps)))
        self.steps += 1
        return {"seconds": taken, "loss": metrics["train/loss"], "grad_norm": metrics["train/grad_norm"]}


def measure(name: str, case: Case, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    groups = make_groups(case, MODELS[args.model].vocabulary)
    model = str(work / "model")
    common = {
        "algorithm": case.algorithm,
        "model": model,
        "work": str(work / f"trl-{name}"),
        "steps": args.rounds + 1,
        "learning_rate": LEARNING_RATE,
        "threads": args.threads,
        "device": args.device,
    }
    peer = Peer(peer_settings(case.algorithm, groups, common), work) if args.peers else None
    try:
        forget_peak()
        ours = Ours(case, groups, model, args.threads, args.device)
        contestants: dict[str, Any] = {"rft": ours} | ({"trl": peer} if peer else {})
        first = {who: c.step() for who, c in contestants.items()}
        baseline = MatrixProduct()
        rates, times = [baseline.rate()], {who: list[float]() for who in contestants}
        for _ in range(args.rounds):
            for who, contestant in contestants.items():
                times[who].append(contestant.step()["seconds"])
            rates.append(baseline.rate())
        row: dict[str, Any] = {
            "case": name,
            **asdict(case),
            "sequences": ours.batch.num_sequences,
            "tokens": sum(len(g.prompt.tokens) + len(c.tokens) for g in groups for c in g.completions),
            "packed_tokens": ours.batch.num_tokens,
            "shared": ours.shared,
            "seconds": {who: statistics.median(t) for who, t in times.items()},
            "spread": {who: round(max(t) / min(t) - 1, 3) for who, t in times.items()},
            "peak_mb": {"rft": memory("VmHWM") / 1e6} | ({"trl": peer.peak_mb()} if peer else {}),
            "baseline_gflops": [round(statistics.median(rates), 1), round(min(rates), 1)],
        }
        if peer:
            a, b = first["rft"]["grad_norm"], first["trl"]["grad_norm"]
            row["grad_norm"] = a
            row["errors"] = {"gradient norm": abs(a - b) / b}
            row["gain"] = statistics.median(b / a for a, b in zip(times["rft"], times["trl"], strict=True))
            row["passed"] = row["gain"] >= case.gate
            row["peers"] = peer_versions("trl", "trl")
        return row
    finally:
        if peer:
            peer.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=MODELS, default="quarter", help="how much of Qwen3-0.6B")
    parser.add_argument("--scale", type=float, default=1.0, help="times the lengths of all texts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", action="store_true", help="also TRL, in its own environment")
    parser.add_argument("--out", type=Path, default=RESULTS / "train-step-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape = MODELS[args.model]
    settings = {"model": args.model, "shape": asdict(shape), "rounds": args.rounds}
    with tempfile.TemporaryDirectory(prefix="train-step-") as work:
        build(Path(work) / "model", shape)
        for name in args.cases:
            row = measure(name, CASES[name].scaled(args.scale), args, Path(work))
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            rows = merge_rows(args.out, ("case",), [row])
            write_result(args.out, settings | {"results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
