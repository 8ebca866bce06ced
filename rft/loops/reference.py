"""Reference log-probs computed once: kept in a file by the hash of all that they depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rft.batch import Batch, Completion, Group
from rft.utils.hashing import model_digest

Score = Callable[[Batch], Awaitable[Tensor]]


def cache_file(folder: Path, groups: Sequence[Group], model: str, dtype: str) -> Path:
    """Where the reference's log-probs of these groups are (or will be) kept: by the hash of the model's
    weights, of every token, and of the precision."""
    digest = hashlib.sha256(f"{model_digest(model)} {dtype}\n".encode())
    for group in groups:
        digest.update(repr((group.prompt.tokens, [(c.tokens, c.mask) for c in group.completions])).encode())
    return folder / f"reference-{digest.hexdigest()[:16]}.safetensors"


async def compute(file: Path, groups: Sequence[Group], size: int, share_prefix: bool, score: Score) -> None:
    """Score all groups, `size` at a time, and write the file; it appears by a rename, complete."""
    parts = []
    for start in range(0, len(groups), size):
        batch = Batch.build(groups[start : start + size], share_prefix=share_prefix)
        parts.append((await score(batch))[batch.mask])
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    save_file({"logps": torch.cat(parts)}, temporary)
    temporary.replace(file)


def attach(groups: Sequence[Group], file: Path) -> list[Group]:
    """The groups with `ref_logps` at each completion. Raises ValueError where the file does not fit."""
    logps = load_file(file)["logps"].tolist()
    values = iter(logps)
    wanted = sum(sum(_mask(c)) for g in groups for c in g.completions)
    if wanted != len(logps):
        raise ValueError(f"{file} holds {len(logps)} log-probs, the data have {wanted} tokens: delete it")
    return [replace(g, completions=tuple(_filled(c, values) for c in g.completions)) for g in groups]


def _mask(c: Completion) -> tuple[bool, ...]:
    return c.mask if c.mask is not None else (True,) * len(c.tokens)


def _filled(c: Completion, values: Iterator[float]) -> Completion:
    return replace(c, ref_logps=tuple(next(values) if trained else 0.0 for trained in _mask(c)))
