"""`rft prune MODEL --out OUT`: a model without a part of its MLP neurons, to train an adapter for MODEL on.

LoRAM (Zhang et al., "Train small, infer large", 2025, arXiv:2502.13533) with random structured pruning: of
each layer's neurons the pruned weight W_P = P(W_0) has a random part, the rows of gate_proj and up_proj and
the columns of down_proj. LoRA on W_P learns B_P A_P. Its recovery R has zeros where W_P has nothing, and
`rft merge loram MODEL OUT ADAPTER` writes W_0 + R(scale B_P A_P). The paper also prunes attention heads, and
trains the pruned model on general text first; both are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rft.errors import ConfigError
from rft.tools.model_files import PRUNING, ModelFiles, write_like
from rft.utils.files import folder_atomic
from rft.utils.hashing import hash64, model_digest

_MLP = re.compile(r"\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)$")
Kept = Mapping[str, list[int]]  # layer number to the neurons that are kept, in order


def prune(folder: str, name: str, out: Path, share: float, seed: int) -> str:
    """Write the pruned model of `folder`; return a line that describes it.

    name: the model as the user wrote it. share: part of each layer's MLP neurons that is kept. Raises
    ConfigError before anything is written.
    """
    model = ModelFiles(folder, name)
    width = model.config().get("intermediate_size")
    layers = sorted({found[1] for key in model.tensors if (found := _MLP.search(key))}, key=int)
    problems = []
    if not 0 < share < 1:
        problems.append(f"--share: {share:g} is not a share between 0 and 1")
    if not layers or not isinstance(width, int) or any(".experts." in key for key in model.tensors):
        problems.append(
            f"{name}: only models of dense MLPs with gate_proj, up_proj and down_proj, and one "
            "intermediate_size in config.json, can be pruned; train an adapter on the whole model, or on a "
            "quantised one (learner.adapter.quantize)"
        )
    if out.exists() and any(out.iterdir()):
        problems.append(f"{out} is not empty: choose another folder")
    if problems or not isinstance(width, int):
        raise ConfigError(problems)
    count = max(1, round(share * width))
    kept = {layer: _draw(width, count, hash64(f"prune/{seed}/{layer}")) for layer in layers}

    def pruned(key: str) -> Tensor:
        tensor = model.read(key)
        place = _place(key)
        return tensor if place is None else tensor.index_select(place[1], torch.tensor(kept[place[0]]))

    with folder_atomic(out) as temporary:
        write_like(model, temporary, pruned)
        config = {**model.config(), "intermediate_size": count}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        base = {"name": name, "weights": model_digest(folder)}
        facts = {"base": base, "share": share, "seed": seed, "kept": kept}
        (temporary / PRUNING).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return f"{name}: {count} of {width} MLP neurons in each of {len(layers)} layers kept"


def read_kept(folder: str, name: str, base: ModelFiles) -> Kept:
    """Return the neurons that a pruned model kept. Raises ConfigError unless it was pruned from `base`."""
    file = Path(folder) / PRUNING
    if not file.exists():
        raise ConfigError([f"{name}: it has no {PRUNING}; give the folder that `rft prune` wrote"])
    facts = json.loads(file.read_text(encoding="utf-8"))
    if (digest := model_digest(str(base.folder))) != facts["base"]["weights"]:
        raise ConfigError(
            [
                f"{name}: wrong base: it was pruned from {facts['base']['name']} with weights "
                f"{facts['base']['weights'][:12]}, and {base.name} has {digest[:12]}"
            ]
        )
    kept: Kept = facts["kept"]
    return kept


def recover(key: str, change: Tensor, shape: torch.Size, kept: Kept) -> Tensor:
    """Return R(change): the change of a pruned weight in the whole weight's shape, 0 where it was pruned."""
    place = _place(key)
    if place is None:
        return change
    return change.new_zeros(shape).index_copy(place[1], torch.tensor(kept[place[0]]), change)


def _place(key: str) -> tuple[str, int] | None:
    """Return the layer of a tensor that has MLP neurons, and their dimension; None for other tensors."""
    found = _MLP.search(key)
    if found is None or found.group(2, 3) == ("down", "bias"):
        return None
    return found[1], int(found[2] == "down")


def _draw(width: int, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed % 2**63)
    drawn: list[int] = torch.randperm(width, generator=generator)[:count].sort().values.tolist()
    return drawn
