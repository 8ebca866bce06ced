"""The learner's predicted memory against a measured step, in a fresh process on CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rft.tasks.tiny import build_tiny
from tests.integration.conftest import ENV, ROOT

STEP = """
import json, sys, threading
import torch
from rft.learner.config import LearnerConfig
from rft.learner.learner import Learner, LearnerSpec
from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Completion, Group, Prompt
from rft.memory import ModelShape, learner_bytes, meta_network
from rft.learner.preflight import trained_parameters
from rft.config import ModelConfig

folder, raw = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
config = LearnerConfig(**raw, tokens_per_micro_batch=512, self_check="off")
spec = LearnerSpec(model=folder, tokenizer=folder, algorithm=ALGORITHMS["grpo"](), config=config,
    device="cpu", threads=1, seed=1, total_steps=4, num_iterations=1, minibatches=1, max_completion_length=64,
    temperature=1.0, max_gap_mean=None, max_gap=None)
tokens = lambda n, k: tuple((7 * i + k) % 250 + 6 for i in range(n))
groups = [Group(Prompt(g, tokens(8, g), "t"), tuple(Completion(tokens=tokens(56, g + k), logps=(-5.0,) * 56,
    versions=((0, 0, 56),), reward=float(k % 2)) for k in range(4))) for g in range(2)]
batch = Batch.build(groups)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

warm = torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()  # autograd's own threads and pools
import peft, bitsandbytes, transformers  # code is no part of the prediction
shape = ModelShape.of(folder, ModelConfig())
adapter = trained_parameters(meta_network(folder, False), config.adapter) if config.adapter else 0
before = anonymous()
learner = Learner(spec)
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

learner.step(batch, 0)
thread = threading.Thread(target=watch)
thread.start()
learner.step(batch, 1)
done.set()
thread.join()
predicted = learner_bytes(shape, config, reference=False, adapter=adapter, tokens=batch.num_tokens)
print(json.dumps({"measured": peak - before, "predicted": predicted}))
"""


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 M parameters: their states outweigh what the process holds besides."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    build_tiny(folder, hidden_size=768, layers=7, heads=12, intermediate_size=2048)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gradient_checkpointing": True},
        {"optimizer": "adamw_8bit"},
        {"adapter": {"method": "lora", "r": 16}},
        {"adapter": {"method": "lora", "r": 16}, "quantize": "nf4"},
    ],
    ids=["full", "checkpointing", "8-bit", "lora", "qlora"],
)
def test_prediction(middling: Path, config: dict) -> None:
    env = {**ENV, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}  # freed blocks go back at once
    args = [sys.executable, "-c", STEP, str(middling), json.dumps(config)]
    run = subprocess.run(args, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    ratio = found["predicted"] / found["measured"]
    print(config, {k: f"{v / 2**20:.0f} MiB" for k, v in found.items()}, f"{ratio:.3f}")
    assert 0.85 < ratio < 1.15, found
