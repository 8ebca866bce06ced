"""Adapters that begin as the data say see more than the first batch, and the order of the data stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rft.config.learner import AdapterConfig
from rft.learner.adapters.methods import peft_config
from rft.learner.learner import Learner
from tests.test_offline import ROWS, Run, plan_of


def test_corda_previews_the_task_by_default() -> None:
    def method(**options: Any) -> str:
        config = peft_config(AdapterConfig(method="corda", options=options))
        return str(config.corda_config.corda_method)

    assert method() == "ipm"
    assert method(corda_config={"corda_method": "kpm"}) == "kpm"


@pytest.mark.parametrize("method", ["corda", "eva", "lora"])
def test_it_sees_a_pass_over_small_data_before_the_first_step(
    method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty pairs in batches of four: forty sequences, each once, and then the steps as ever."""
    seen: list[int] = []
    trained: list[list[int]] = []
    score, step = Learner._score_previewed, Learner.step

    def noted(self: Learner, batch: Any) -> None:
        seen.extend(int(b.num_sequences) for b in (batch, *self.previewed))
        score(self, batch)

    def stepped(self: Learner, batch: Any, number: int) -> dict[str, float]:
        trained.append(batch.tokens.tolist())
        return step(self, batch, number)

    monkeypatch.setattr(Learner, "_score_previewed", noted)
    monkeypatch.setattr(Learner, "step", stepped)
    learner = {"learning_rate": 3e-3, "threads": 1, "adapter": {"method": method, "r": 4}}
    plan = plan_of(tiny_folder, tmp_path, learner=learner, train={"steps": 2, "batch_size": 4})
    Run(plan, "run").carry_out()
    if method == "lora":
        assert not seen
    else:
        assert sum(seen[:5]) == 2 * len(ROWS)
    plain = plan_of(tiny_folder, tmp_path, train={"steps": 2, "batch_size": 4})
    Run(plain, "plain").carry_out()
    assert trained[:2] == trained[2:]
