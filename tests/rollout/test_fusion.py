"""Logits of several models added at sampling time, on the hf engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.config.load import parse_config
from rft.errors import ConfigError
from rft.plan import make_plan
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.hf import HFEngine
from rft.tasks.tiny import build_tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two further models with the vocabulary of `tiny_folder`."""
    top = tmp_path_factory.mktemp("others")
    for seed in (1, 2):
        build_tiny(top / str(seed), seed=seed, **SIZES)
    return [top / "1", top / "2"]


def config(tiny_folder: Path, where: Path, fusion: dict[str, float], **changes: Any) -> Any:
    raw: dict[str, Any] = {
        "output_dir": str(where),
        "algorithm": "grpo",
        "model": {"path": str(tiny_folder)},
        "data": {"kind": "arithmetic", "limit": 64, "eval_limit": 4},
        "rewards": ["math"],
        "train": {"batch_size": 4},
        "rollout": {"engine": "hf", "dtype": "float32", "threads": 1, "fusion": fusion},
    }
    return parse_config({**raw, **changes})


def test_samples_follow_the_sum_of_the_logits(tiny_folder: Path, others: list[Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fusion = {str(others[0]): 1.0, str(others[1]): -0.5}
    spec = make_plan(config(tiny_folder, tmp_path, fusion), evaluate=True).engine_spec()
    prompt = (5, 6, 7)

    async def sampled(spec: Any, sampling: Sampling, scores: bool) -> Generated:
        engine = HFEngine(spec)
        await engine.start()
        (generated,) = await engine.generate(Request("x", prompt, sampling, scores_prompt=scores))
        return generated

    greedy = asyncio.run(sampled(spec, Sampling(1, 6, temperature=0.0), True))
    drawn = asyncio.run(sampled(spec, Sampling(1, 6, temperature=1.0, seed=3), False))
    weights = {str(tiny_folder): 1.0, **fusion}
    models = [(AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32), w) for p, w in weights.items()]
    for generated in (greedy, drawn):
        ids = torch.tensor([[*prompt, *generated.tokens]])
        with torch.no_grad():
            logits = sum(w * model(ids).logits[0] for model, w in models)
        assert isinstance(logits, torch.Tensor)
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert torch.allclose(
            logps.gather(1, torch.tensor(generated.tokens)[:, None])[:, 0],
            torch.tensor(generated.logps),
            atol=1e-4,
        )
        if generated is greedy:
            assert logps.argmax(-1).tolist() == list(greedy.tokens)
            told = [token.logp for token in greedy.prompt]
            expected = logits.log_softmax(-1)[torch.arange(2), torch.tensor(prompt[1:])]
            assert told == pytest.approx(expected.tolist(), abs=1e-4)
    alone = asyncio.run(sampled(replace(spec, fusion=()), Sampling(1, 6, temperature=0.0), False))
    assert alone.tokens != greedy.tokens or alone.logps != greedy.logps, "the fused models change nothing"


def test_where_models_cannot_be_fused_is_named(tiny_folder: Path, others: list[Path], tmp_path: Path) -> None:
    def refused(fusion: dict[str, float], evaluate: bool = True, **changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            make_plan(config(tiny_folder, tmp_path, fusion, **changes), evaluate=evaluate)
        return "\n".join(error.value.problems)

    fusion = {str(others[0]): 1.0}
    assert "rollout.fusion: a run trains one model" in refused(fusion, evaluate=False)
    vllm = {"engine": "vllm", "fusion": fusion}
    assert "rollout.fusion: vllm samples from one model; set rollout.engine: hf" in refused({}, rollout=vllm)
    import json
    import shutil

    shutil.copytree(others[1], tmp_path / "wide")
    raw = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**raw, "vocab_size": raw["vocab_size"] + 8}))
    assert "has a vocabulary of" in refused({str(tmp_path / "wide"): 1.0})
    assert "rollout.fusion: './gone'" in refused({"./gone": 1.0}) or "gone" in refused({"./gone": 1.0})
