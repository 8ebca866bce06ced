"""rft's worker extension for a vLLM without a GPU: the import stands in for NCCL in that worker."""

from __future__ import annotations

from rft.sync.vllm_worker import Extension
from tests.sync import nccl_on_cpu

__all__ = ["Extension"]

nccl_on_cpu.install()
nccl_on_cpu.keep_matrices_plain()
