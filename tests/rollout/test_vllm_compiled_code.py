"""torch's cache of compiled code, which vLLM uses on CPU: one folder for each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from rft.rollout.vllm import compiled_code_folder
from tests.specs import needs_vllm

# The graph is that of vLLM's `batched_count_greater_than`, with the columns of the tiny model.
PROGRAM = """
import os, sys, torch
from rft.rollout.vllm import compiled_code_folder
if sys.argv[1] == "split":
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled_code_folder()

@torch.compile(dynamic=True)
def count(x, values):
    return (x >= values).sum(-1)

x = torch.arange(3 * 368.0).reshape(3, 368)
assert count(x, x[:, 100:101]).tolist() == [268] * 3
"""


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_the_folder_is_named_after_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert compiled_code_folder().endswith(f"/torchinductor-{os.getuid()}/{capability.lower()}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    folder = compiled_code_folder()
    assert folder == str(tmp_path / capability.lower())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)  # of a second engine, or a child process
    assert compiled_code_folder() == folder


def compile_in(folder: Path, how: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", PROGRAM, how]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a processor with AVX-512"
)
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_code_for_avx512_is_not_used_without_it(tmp_path: Path, capability: str) -> None:
    """Without the split, the second process takes the first one's code: it does not compile, or counts
    wrongly."""
    native = compile_in(tmp_path / "split", "split")
    assert native.returncode == 0, native.stderr
    emulated = compile_in(tmp_path / "split", "split", ATEN_CPU_CAPABILITY=capability)
    assert emulated.returncode == 0, emulated.stderr
    assert {p.name for p in (tmp_path / "split").iterdir()} >= {"avx512", capability}
    assert compile_in(tmp_path / "shared", "shared").returncode == 0
    wrong = compile_in(tmp_path / "shared", "shared", ATEN_CPU_CAPABILITY=capability)
    assert wrong.returncode != 0
    assert {"default": "vec_reduce_all", "avx2": "AssertionError"}[capability] in wrong.stderr


@needs_vllm
def test_log_probs_of_samples_compile_no_code() -> None:
    """vLLM would compile a count of each token's rank. The worker module replaces it; log-probs stay."""
    import_module("rft.sync.vllm_worker")
    from torch._dynamo.utils import counters
    from vllm.v1.sample.sampler import Sampler

    before = counters["stats"]["unique_graphs"]
    logps = torch.randn(3, 368, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    tokens = torch.tensor([5, 0, 367])
    gathered = Sampler.gather_logprobs(logps, 2, tokens)
    assert gathered.logprob_token_ids[:, 0].tolist() == tokens.tolist()
    assert torch.equal(gathered.logprobs[:, 0], logps[torch.arange(3), tokens])
    assert torch.equal(gathered.logprobs[:, 1:], logps.topk(2).values)
    assert gathered.selected_token_ranks.shape == (3,)
    assert counters["stats"]["unique_graphs"] == before
