"""List the safetensors files of a model folder, and read their headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rft.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Place, shape and dtype (safetensors' name, `F32`) of a stored tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(folder: Path, single: str = SINGLE) -> list[str]:
    """Return the names of the files with a model's weights: `single`, or else those that its index lists, as
    transformers chooses them; [] if the folder has neither.

    Raises ModelError for a damaged index, and for a file that it lists and the folder lacks.
    """
    index = folder / INDEX
    if (folder / single).is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        lacking = [name for name in names if not (folder / name).is_file()]
    except OSError as error:
        raise ModelError(f"{index} cannot be read: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged ({error}); copy it again") from None
    if not names:
        raise ModelError(f"{index} lists no weights; copy it again")
    if lacking:
        raise ModelError(f"{folder} lacks {lacking[0]}, which {INDEX} lists; copy it there")
    return names


def stored_tensors(folder: Path, file: str) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name, from its header. Raises ModelError if it is damaged.

    Uses no torch, which `rft check` loads only where it is needed.
    """
    try:
        with safe_open(folder / file, framework="np") as stored:
            parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            return {n: TensorInfo(file, tuple(p.get_shape()), p.get_dtype()) for n, p in parts.items()}
    except OSError as error:
        raise ModelError(f"{folder / file} cannot be read: {error}") from None
    except SafetensorError as error:
        raise ModelError(f"{folder / file} is damaged ({error}); copy it again") from None
