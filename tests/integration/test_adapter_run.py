"""A LoRA run from the command line: real actors, merged push, a stop, a resume, an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integration.conftest import rft
from tests.integration.test_train import SMALL, rows

LORA = [
    "rollout.engine=hf",
    "warm_start=null",
    "learner.adapter={method: lora, r: 4}",
    "learner.learning_rate=0.01",
    "algorithm={name: grpo, beta: 0.05}",
    "data.options.min_operands=2",
    "data.options.max_operands=2",
    "data.options.largest=9",
]


@pytest.mark.slow
def test_a_lora_run(tmp_path: Path) -> None:
    args = ["train", "examples/arithmetic.yaml", f"output_dir={tmp_path}", "name=lora", *SMALL, *LORA]
    rft(*args, timeout=250)
    run = tmp_path / "lora"
    metrics = rows(run)
    assert [r["step"] for r in metrics] == list(range(5))
    assert max(r["sync/logp_gap"] for r in metrics[1:]) < 1e-4, "the merged weights did not arrive"
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert not (checkpoint / "model").exists(), "the checkpoint holds the whole model"
    saved = torch.load(checkpoint / "learner.pt", weights_only=True)
    assert saved["part"] and all("lora_" in name for name in saved["part"])
    config = json.loads((run / "model" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["peft_type"] == "LORA"

    # The final model, and what `rft export` makes of the checkpoint alone, are the same plain folder.
    final = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    (run / "model").rename(run / "kept")
    rft("export", str(run), str(tmp_path / "out"), timeout=120)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.allclose(t, exported[n], atol=1e-6) for n, t in final.items())


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(("method", "transport"), [("lora", "adapter"), ("dora", "gloo")])
def test_vllm_samples_from_the_adapter_of_each_step(tmp_path: Path, method: str, transport: str) -> None:
    """The factors alone, which vLLM computes beside its base; and merged, for what vLLM has no layers for."""
    args = ["train", "examples/arithmetic.yaml", f"output_dir={tmp_path}", f"name={method}", *SMALL, *LORA]
    more = ["rollout.engine=vllm", "rollout.update=wait", "train.steps=3", f"sync.transport={transport}"]
    rft(*args, *more, f"learner.adapter={{method: {method}, r: 4}}", timeout=480)
    metrics = rows(tmp_path / method)
    assert [r["step"] for r in metrics] == [0, 1, 2, 3]
    assert max(r["sync/logp_gap"] for r in metrics[1:]) < 1e-3
    assert all(r["sync/version"] == r["step"] for r in metrics[1:])
    weights = metrics[1]["sync/bytes"]
    final = AutoModelForCausalLM.from_pretrained(tmp_path / method / "model")
    parameters = sum(p.numel() for p in final.parameters())
    assert weights < 2 * parameters if transport == "adapter" else weights >= 4 * parameters
