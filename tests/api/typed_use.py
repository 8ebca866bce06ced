"""How a typed program uses the API: mypy (`make lint`) sees the names, the arguments and the mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import rft


def reward(completions: list[str], answer: list[str]) -> list[float]:
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


class Watch(rft.Callback):
    def on_step_end(self, run: rft.Run, metrics: Mapping[str, float | None]) -> None:
        run.stop()


def use() -> None:
    run: rft.Run = rft.train(
        "x.yaml",
        model=Path("model"),
        data=[{"prompt": "1+1=", "answer": "2"}],
        rewards=[reward, "format", {"function": reward, "weight": 0.5}],
        algorithm=rft.algorithms.GRPO(epsilon_high=0.28),
        callbacks=[Watch()],
        train=rft.config.TrainConfig(batch_size=8),
        steps=60,
        rollout={"dtype": "bfloat16"},
    )
    path: Path | None = run.model_path
    config: rft.Config = run.config.replace({"train.steps": 60})
    steps: int = config.train.steps
    run.resume(rewards=[reward], steps=steps)
    accuracy: float = rft.evaluate("model", "rows.jsonl", "math")["eval/accuracy"]
    rft.train(steps="60")  # type: ignore[arg-type]
    rft.train(learnr={})  # type: ignore[call-arg]
    rft.train(callbacks=[print])  # type: ignore[list-item]
    rft.check(config).step  # type: ignore[union-attr]  # noqa: B018
    print(path, accuracy)
