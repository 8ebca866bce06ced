"""Whole training steps with TRL's own trainers, one for each line on stdin. Runs in TRL's environment:

    python trl_step.py SETTINGS.json

Prints `STEP {"seconds": ..., "loss": ..., "grad_norm": ...}` after each. A step is the trainer's from the
begin of its forward to the end of its optimizer step; completions of GRPO are given instead of
generated. Settings that only cost time (gradient checkpointing) are off.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


class Turns(TrainerCallback):
    """Waits for a line before each step, and says what the step took."""

    def __init__(self, threads: int) -> None:
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.start = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not sys.stdin.readline():
            control.should_training_stop = True
            raise SystemExit(0)
        self.start = self.clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = self.clock() - self.start

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "grad_norm" in logs:
            found = {k: float(logs[k]) for k in ("loss", "grad_norm")}
            print("STEP " + json.dumps({"seconds": self.seconds, **found}), flush=True)


def trainer(s: dict[str, Any]) -> Any:
    rows = s["rows"]
    common = {
        "output_dir": s["work"],
        "use_cpu": s["device"] == "cpu",
        "bf16": s["device"] != "cpu",
        "max_steps": s["steps"],
        "learning_rate": s["learning_rate"],
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }
    turns = [Turns(s["threads"])]
    if s["algorithm"] == "sft":
        config = SFTConfig(
            per_device_train_batch_size=len(rows), max_length=None, completion_only_loss=True, **common
        )
        return SFTTrainer(s["model"], args=config, train_dataset=Dataset.from_list(rows), callbacks=turns)
    if s["algorithm"] == "dpo":
        config = DPOConfig(per_device_train_batch_size=len(rows), beta=0.1, max_length=None, **common)
        return DPOTrainer(s["model"], args=config, train_dataset=Dataset.from_list(rows), callbacks=turns)
    config = GRPOConfig(
        per_device_train_batch_size=len(s["completion_ids"]),
        num_generations=len(s["completion_ids"]) // len(rows),
        max_completion_length=max(map(len, s["completion_ids"])),
        beta=0.0,
        loss_type="dapo",
        **common,
    )

    def given(prompts: list[str], _: Any) -> dict[str, Any]:
        return {k: s[k] for k in ("prompt_ids", "completion_ids")} | {"logprobs": None}

    def alternate(completions: list[str], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    return GRPOTrainer(
        s["model"],
        reward_funcs=alternate,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=turns,
        rollout_func=given,
    )


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    trainer(settings).train()
