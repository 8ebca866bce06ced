"""A judge over a real vLLM server that it starts and ends itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from rft.rewards import Outcome, load_reward
from rft.rewards.types import RewardError
from rft.tasks.tiny import build_tiny

ENGINE = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "enable_chunked_prefill": False}
ENGINE |= {"max_num_batched_tokens": 4096}
# A model of random weights would fill the room between the fields with blanks.
ENGINE |= {"structured_outputs_config": '{"backend": "xgrammar", "disable_any_whitespace": true}'}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_local_judge_gives_verdicts_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model knows nothing; the schema alone makes what it says a verdict."""
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        monkeypatch.setenv(name, value)
    build_tiny(tmp_path / "model")
    reward: Any = load_reward(
        "local_judge", model=str(tmp_path / "model"), engine_args=ENGINE, max_tokens=1600, temperature=1.0
    )
    scores = reward.score(["2+2=?", "3+3=?"], ["4", "7"], answer=["4", "6"])
    assert all(s.outcome in (Outcome.correct, Outcome.wrong) for s in scores), scores
    assert all(0 <= s.value <= 1 and "judge: " in s.detail for s in scores)
    children = [p for p in psutil.Process().children(recursive=True) if "vllm" in " ".join(p.cmdline())]
    assert children, "the server is a child of the reward's process"
    reward.inner.server.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_server_that_does_not_come_up_tells_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RewardError, match=r"vllm serve .* ended with exit code 1\. Its last output:"):
        load_reward("local_judge", model=os.fspath(tmp_path))
