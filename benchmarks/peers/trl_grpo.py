"""GRPO steps with TRL's own trainer. Runs in TRL's environment:

    python trl_grpo.py SETTINGS.json RESULT.json

Writes when each step ended (seconds) and how long its completions were on average (tokens). Settings
that only cost time (gradient checkpointing, a log line a step) are off.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from step_reward import exact
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    s = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(s["threads"])
    rows = [json.loads(line) for line in Path(s["prompts"]).read_text().splitlines()]
    config = GRPOConfig(
        output_dir=s["work"],
        use_cpu=True,
        bf16=False,
        max_steps=s["steps"],
        per_device_train_batch_size=s["batch_size"] * s["num_generations"],
        num_generations=s["num_generations"],
        max_completion_length=s["max_completion_length"],
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=s["learning_rate"],
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=s["steps"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=s["model"],
        reward_funcs=exact,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
    )
    trainer.train()
    lengths = [
        log["completions/mean_length"]
        for log in trainer.state.log_history
        if "completions/mean_length" in log
    ]
    Path(sys.argv[2]).write_text(json.dumps({"ends": clock.ends, "length": lengths[-1]}))


if __name__ == "__main__":
    main()
