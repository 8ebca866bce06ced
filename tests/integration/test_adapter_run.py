"""A LoRA run from the command line: real actors, merged push, a stop, a resume, an export."""

from __future__ import annotations

import json
from pathlib import Path

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
