"""A vocabulary sharded over two processes gives what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rft.kernels.logprob import token_logps
from rft.kernels.logprob_sharded import sharded_token_logps
from tests.kernels.rounding import tolerance

pytestmark = pytest.mark.numerics

VOCAB, CUT = 41, 17  # uneven shards


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.manual_seed(0)
        h, w, b = torch.randn(9, 6).to(dtype), torch.randn(VOCAB, 6).to(dtype), torch.randn(VOCAB).to(dtype)
        b[CUT:] = b[CUT:] - 3 * (name == "float32")  # unequal shares
        y = torch.randint(VOCAB, (9,))
        g = torch.randn(2, 9)
        rows = slice(0, CUT) if rank == 0 else slice(CUT, VOCAB)
        found = []
        for sharded in (True, False):
            x = [a.clone().requires_grad_() for a in ((h, w[rows], b[rows]) if sharded else (h, w, b))]
            if sharded:
                out = sharded_token_logps(x[0], x[1], y, bias=x[2], temperature=0.8, softcap=4.0)
            else:
                out = token_logps(
                    x[0], x[1], y, bias=x[2], entropy=True, temperature=0.8, softcap=4.0, backend="reference"
                )
            grads = torch.autograd.grad(out, x, [a.to(out[0].dtype) for a in g])
            if not sharded:
                grads = (grads[0], grads[1][rows], grads[2][rows])
            found.append([*out, *grads])
        allowed = tolerance(dtype, h, w, 1 / 0.8, float(b.abs().max()))
        for got, wanted in zip(*found, strict=True):
            error = (got - wanted).norm() / wanted.norm()
            assert error < allowed, (name, error)
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.40"):
        sharded_token_logps(h, w[rows], torch.full((9,), VOCAB))
    Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    assert all((tmp_path / f"done{rank}").exists() for rank in range(2))
