"""GRPO steps with TRL's own trainer. Runs in TRL's environment:

    python trl_grpo.py SETTINGS.json RESULT.json

Settings: model, prompts (a file of rows), steps, batch_size, num_generations, max_completion_length,
learning_rate, threads, reward (a function of step_reward.py), dtype (float32; bfloat16: autocast over
float32 weights; bfloat16 weights: everything in bfloat16) and work (a folder). Writes the seconds at which
training began and each step ended, and the average tokens of a completion. Settings that only cost time
(gradient checkpointing, a log line a step) are off.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import step_reward
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Notes when training began and when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    s = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(s["threads"])
    rows = [json.loads(line) for line in Path(s["prompts"]).read_text().splitlines()]
    config = GRPOConfig(
        output_dir=s["work"],
        use_cpu=True,
        bf16=s["dtype"] == "bfloat16",
        max_steps=s["steps"],
        per_device_train_batch_size=s["batch_size"] * s["num_generations"],
        num_generations=s["num_generations"],
        max_completion_length=s["max_completion_length"],
        model_init_kwargs={"dtype": "bfloat16" if s["dtype"] == "bfloat16 weights" else "float32"},
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=s["learning_rate"],
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=s["steps"],  # one log line, with the average over all steps
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=s["model"],
        reward_funcs=getattr(step_reward, s["reward"]),
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "completions/mean_length" in log]
    result = {"ends": clock.ends, "completion_length": logs[-1]["completions/mean_length"]}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
