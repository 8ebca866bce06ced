"""The transports under one contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sync.wires import NCCL


@pytest.fixture
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A transport's name (the parameter). Where it would need NCCL, the place of that is taken, and pushes
    travel in several parts."""
    name: str = request.param
    if name not in NCCL:
        yield name
        return
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer import sparse_nccl_engine

    from tests.sync import nccl_on_cpu, vllm_ends

    nccl_on_cpu.install(monkeypatch.setattr)
    monkeypatch.setattr("rft.sync.nccl.PACKED_BYTES", 20_000)
    monkeypatch.setattr("rft.contrib.sparse_sync.sparse_nccl.PART_BYTES", 40_000)
    alone = vllm_ends.one_at_a_time(sparse_nccl_engine.load_checkpoint_weight_patches)
    monkeypatch.setattr(sparse_nccl_engine, "load_checkpoint_weight_patches", alone)
    yield name
    nccl_on_cpu.abort_all()
