"""A whole run in a folder whose files are called like modules of Python and of installed packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORDS = """
json random numbers types logging torch numpy transformers ray vllm datasets statistics tempfile
string socket queue select copy enum inspect token code yaml pydantic
"""
CONFIG = """
name: g
output_dir: runs
model: {{path: {model}}}
data: {{path: two.jsonl}}
algorithm: {{name: grpo}}
train: {{steps: 1, batch_size: 2, num_generations: 2}}
rewards:
  functions:
    - {{function: "my_reward.py:reward"}}
    - {{function: "my_reward.py:reward", name: actor, actor: {{num_cpus: 0}}}}
rollout: {{engine: hf, threads: 1, sampling: {{max_prompt_length: 128, max_completion_length: 4}}}}
learner: {{threads: 1}}
eval: {{every: 0}}
checkpoint: {{every: 0}}
tracking: {{display: plain}}
"""
REWARD = """
import json, helper

def reward(completions, answer):
    assert json.dumps([helper.HERE]) == "[true]"
    return [float(len(c)) for c in completions]
"""


@pytest.mark.slow
def test_a_run_among_files_called_like_modules(tiny_folder: Path, tmp_path: Path) -> None:
    for name in WORDS.split():
        (tmp_path / f"{name}.py").write_text("raise ImportError(f'{__file__} is not the real one')\n")
    (tmp_path / "helper.py").write_text("HERE = True\n")
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "two.jsonl").write_text('{"prompt": "q", "answer": "4"}\n{"prompt": "r", "answer": "5"}\n')
    (tmp_path / "c.yaml").write_text(CONFIG.format(model=tiny_folder))
    command = [str(Path(sys.executable).with_name("rft")), "train", "c.yaml", "--restarts", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "g" / "model" / "config.json").exists()


def test_python_m_among_files_called_like_modules(tmp_path: Path) -> None:
    for name in set(WORDS.split()) - {"types"}:  # Python itself imports it, before rft can do anything
        (tmp_path / f"{name}.py").write_text("raise ImportError(f'{__file__} is not the real one')\n")
    command = [sys.executable, "-m", "rft.cli", "config", "train.steps"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("train.steps")
