"""Whole SFT, DPO and GRPO steps (forward, backward, optimizer; reference for DPO) of rft and of TRL.

    python benchmarks/train_step.py [--peers] [--rounds 3] [--algorithms dpo ...] [--layers 4]

The model is Qwen3-0.6B's (width 1024, 16 heads, 8 of keys, MLP 3072) with random weights, 4 of its 28
layers and 32,768 of its 151,936 tokens, so that it fits a small machine and the head keeps about its share;
--layers 28 --vocabulary 151936 is the whole. Both libraries keep a process with the model
loaded, and take steps in turns on the same tokens, float32 on CPU; completions of GRPO are given.
Every row carries the relative difference of the two libraries' first gradient norms.
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
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, MatrixProduct, memory, merge_rows, seconds, write_result
from peers.make_env import peer_python
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Completion, Group, Prompt
from rft.learner.config import LearnerConfig
from rft.learner.learner import Learner, LearnerSpec
from rft.packing import shares_prefix

HERE = Path(__file__).resolve().parent
ALGORITHM_NAMES = ("sft", "dpo", "grpo")
LEARNING_RATE = 1e-6
GATES = {"grpo": 1.5}
EOS = 1
PAD_WORD = "<pad>"


def build(folder: Path, layers: int, vocabulary: int, width: int = 1024) -> None:
    """The model with a tokenizer for which token 17 reads "17", so that texts have the lengths wanted."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=128,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word(i): i for i in range(vocabulary)}, unk_token=PAD_WORD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=word(EOS), pad_token=PAD_WORD).save_pretrained(
        folder
    )


def make_groups(algorithm: str, vocabulary: int, prompt: int, completion: int) -> list[Group]:
    """GRPO: one group of 8, all of one length. DPO: 4 pairs. SFT: 8 answers. The last two of lengths within
    half of the given ones. Rewards alternate; every completion of SFT and DPO ends with the EOS."""
    dice = random.Random(0)

    def tokens(n: int, *end: int) -> tuple[int, ...]:
        return (*(dice.randrange(2, vocabulary) for _ in range(n)), *end)

    if algorithm == "grpo":
        samples = tuple(Completion(tokens(completion), reward=float(i % 2)) for i in range(8))
        return [Group(Prompt(0, tokens(prompt), ""), samples)]
    out = []
    for i in range(4 if algorithm == "dpo" else 8):
        lengths = [round(completion * dice.uniform(0.5, 1.5)) for _ in range(2 if algorithm == "dpo" else 1)]
        answers = tuple(
            Completion(tokens(n, EOS), finish="demonstration", reward=float(k == 0))
            for k, n in enumerate(lengths)
        )
        out.append(Group(Prompt(i, tokens(round(prompt * dice.uniform(0.5, 1.5))), ""), answers))
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
    """TRL's trainer in a process of its own, which takes a step whenever it is told to."""

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

    def __init__(self, algorithm: str, groups: list[Group], model: str, args: argparse.Namespace) -> None:
        config = LearnerConfig(learning_rate=LEARNING_RATE, entropy=False, tokens_per_micro_batch=4096)
        self.learner = Learner(
            LearnerSpec(
                model=model,
                tokenizer=model,
                algorithm=ALGORITHMS[algorithm](),
                config=config,
                device=args.device,
                threads=args.threads,
                seed=1,
                total_steps=1000,
                num_iterations=1,
                minibatches=1,
                max_completion_length=4 * args.completion,
                temperature=1.0,
                max_gap_mean=None,
                max_gap=None,
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


def measure(algorithm: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    groups = make_groups(algorithm, args.vocabulary, args.prompt, args.completion)
    model = str(work / "model")
    common = {
        "algorithm": algorithm,
        "model": model,
        "work": str(work / f"trl-{algorithm}"),
        "steps": args.rounds + 1,
        "learning_rate": LEARNING_RATE,
        "threads": args.threads,
        "device": args.device,
    }
    peer = Peer(peer_settings(algorithm, groups, common), work) if args.peers else None
    try:
        ours = Ours(algorithm, groups, model, args)
        contestants: dict[str, Any] = {"rft": ours} | ({"trl": peer} if peer else {})
        first = {name: c.step() for name, c in contestants.items()}
        yardstick = MatrixProduct()
        rates, times = [yardstick.rate()], {name: list[float]() for name in contestants}
        for _ in range(args.rounds):
            for name, contestant in contestants.items():
                times[name].append(contestant.step()["seconds"])
            rates.append(yardstick.rate())
        row: dict[str, Any] = {
            "algorithm": algorithm,
            "sequences": ours.batch.num_sequences,
            "tokens": sum(len(g.prompt.tokens) + len(c.tokens) for g in groups for c in g.completions),
            "packed_tokens": ours.batch.num_tokens,
            "shared": ours.shared,
            "seconds": {name: statistics.median(t) for name, t in times.items()},
            "peak_mb": {"rft": memory("VmHWM") / 1e6} | ({"trl": peer.peak_mb()} if peer else {}),
            "yardstick_gflops": [round(statistics.median(rates), 1), round(min(rates), 1)],
            "gate": GATES.get(algorithm),
        }
        if peer:
            a, b = first["rft"]["grad_norm"], first["trl"]["grad_norm"]
            row["grad_norm"] = a
            row["errors"] = {"gradient norm": abs(a - b) / b}
            row["gain"] = statistics.median(b / a for a, b in zip(times["rft"], times["trl"], strict=True))
            row["passed"] = row["gain"] >= (row["gate"] or 1.0)
        return row
    finally:
        if peer:
            peer.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHM_NAMES, default=list(ALGORITHM_NAMES))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", action="store_true", help="also TRL, in its own environment")
    parser.add_argument("--out", type=Path, default=RESULTS / "train-step-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    names = ("layers", "vocabulary", "width", "prompt", "completion", "rounds")
    settings = {k: getattr(args, k) for k in names}
    with tempfile.TemporaryDirectory(prefix="train-step-") as work:
        build(Path(work) / "model", args.layers, args.vocabulary, args.width)
        for algorithm in args.algorithms:
            row = measure(algorithm, args, Path(work))
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            rows = merge_rows(args.out, ("algorithm",), [row])
            write_result(args.out, settings | {"results": rows}, "trl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
