"""`dtype: auto`: what is chosen, why, and that a resumed run keeps it on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rft import run_dir
from rft.config.dtypes import dtypes_of
from rft.config.load import parse_config
from rft.config.schema import Config
from rft.errors import ConfigError
from rft.plan import make_plan
from rft.preflight import dtype
from rft.preflight.dtype import LARGE, ProductRates, measure_product_rates, resolve_dtypes

LARGE_MODEL = {"hidden_size": 512, "layers": 18}
OLD_PROCESSOR = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}


def config(folder: Path | str = "runs", **more: Any) -> Config:
    raw = {"algorithm": "grpo", "output_dir": str(folder), "name": "r", "rewards": [{"function": "math"}]}
    return parse_config({**raw, "data": {"kind": "arithmetic", "limit": 64}, **more})


def measured(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    monkeypatch.setattr(dtype, "measure_product_rates", lambda: ProductRates(1e11, ratio * 1e11))


@pytest.mark.parametrize(("ratio", "chosen"), [(1.49, "float32"), (1.5, "bfloat16"), (4.1, "bfloat16")])
def test_a_large_model_on_cpu_follows_the_measurement(
    monkeypatch: pytest.MonkeyPatch, ratio: float, chosen: str
) -> None:
    measured(monkeypatch, ratio)
    warm = {"learner": {"learning_rate": 1e-4}}
    resolved, why = resolve_dtypes(config(warm_start=warm), "cpu", LARGE + 1)
    assert dtypes_of(resolved) == dict.fromkeys(("learner", "rollout", "warm_start.learner"), chosen)
    assert why.startswith(f"{chosen} for learner, rollout, warm_start.learner: ") and f"{ratio:.1f}x" in why


def test_small_models_and_gpus_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "measure_product_rates", lambda: pytest.fail("measured"))
    small, why = resolve_dtypes(config(), "cpu", LARGE)
    assert dtypes_of(small) == {"learner": "float32", "rollout": "float32"} and "20 M" in why
    on_gpu, _ = resolve_dtypes(config(), "cuda", LARGE + 1)
    assert dtypes_of(on_gpu) == {"learner": "bfloat16", "rollout": "bfloat16"}


def test_a_given_dtype_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 4.0)
    given = config(learner={"dtype": "float32"}, rollout={"dtype": "float16"})
    assert resolve_dtypes(given, "cpu", LARGE + 1) == (given, "")
    half, why = resolve_dtypes(config(learner={"dtype": "float32"}), "cpu", LARGE + 1)
    assert dtypes_of(half) == {"learner": "float32", "rollout": "bfloat16"}
    assert why.startswith("bfloat16 for rollout: ")


def test_the_plan_bounds_the_gap_by_the_chosen_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    big = config(model={"path": "tiny", "options": LARGE_MODEL})
    measured(monkeypatch, 1.0)
    plan = make_plan(big, starts=False)
    assert plan.shape.parameters > LARGE
    assert (plan.engine_spec().dtype, plan.learner_spec().config.dtype) == ("float32", "float32")
    assert plan.gap_bounds() == (1e-3, 0.02)
    measured(monkeypatch, 4.0)
    plan = make_plan(big, starts=False)
    assert (plan.engine_spec().dtype, plan.learner_spec().config.dtype) == ("bfloat16", "bfloat16")
    assert plan.channel_spec().wire_dtype == "bfloat16"
    assert plan.gap_bounds() == (0.1, None)
    assert dtypes_of(plan.config) == {"learner": "bfloat16", "rollout": "bfloat16"}  # goes to the run folder


def test_a_resumed_run_keeps_its_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 4.0)
    given = config(tmp_path)
    run_dir.write_config(tmp_path / "r", resolve_dtypes(given, "cpu", LARGE + 1)[0])
    measured(monkeypatch, 1.0)
    kept = run_dir.keep_dtypes(given, "auto")
    assert dtypes_of(kept) == {"learner": "bfloat16", "rollout": "bfloat16"}
    assert resolve_dtypes(kept, "cpu", LARGE + 1) == (kept, "")
    assert run_dir.claim(kept, "auto").notes == ()
    other = run_dir.keep_dtypes(config(tmp_path, learner={"dtype": "float32"}), "auto")
    with pytest.raises(ConfigError, match=r"learner\.dtype: was 'bfloat16', now 'float32'"):
        run_dir.claim(other, "auto")


def test_a_run_from_a_checkpoint_of_another_run_keeps_its_dtype(tmp_path: Path) -> None:
    first = config(tmp_path, learner={"dtype": "bfloat16"})
    run_dir.write_config(tmp_path / "r", first)
    folder = tmp_path / "r" / "checkpoints" / "step-7"
    branch = run_dir.keep_dtypes(config(tmp_path, name="branch"), str(folder))
    assert dtypes_of(branch) == {"learner": "bfloat16", "rollout": "auto"}


def test_the_measurement_finds_native_bfloat16() -> None:
    rates = measure_product_rates()
    assert 1e8 < rates.float32 < 1e14
    limited = "ONEDNN_MAX_CPU_ISA" in os.environ  # oneDNN multiplies as on a weaker processor
    if not limited and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        assert rates.ratio >= dtype.FASTER
    here = "from rft.preflight.dtype import *; print(measure_product_rates().ratio)"
    environment = {**os.environ, **OLD_PROCESSOR}
    done = subprocess.run(
        [sys.executable, "-c", here], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < dtype.FASTER


def test_a_run_resumed_on_an_older_processor_keeps_bfloat16(tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    big = config(tmp_path, model={"path": "tiny", "options": LARGE_MODEL})
    file.write_text(yaml.safe_dump(big.to_dict()))

    def checked() -> str:
        """The dtype line of `rft check` on an older processor."""
        done = subprocess.run(
            [sys.executable, "-m", "rft.cli", "check", str(file)],
            env={**os.environ, **OLD_PROCESSOR},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("dtype "))

    assert checked().startswith("dtype        learner float32, engines float32 (auto: float32 for learner")
    dtypes = {"learner": "bfloat16", "rollout": "bfloat16"}
    run_dir.write_config(tmp_path / "r", dtype.fill_in_dtypes(big, dtypes))  # begun where bfloat16 is fast
    assert checked() == "dtype        learner bfloat16, engines bfloat16"
