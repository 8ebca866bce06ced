"""Read and write the weights of model folders shard by shard, and check that models may be combined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rft.errors import ConfigError, ModelError
from rft.preflight.gguf import PACKAGED, packaged_folder
from rft.utils.weight_files import INDEX, SINGLE, TensorInfo, stored_tensors, weight_files

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # config, tokenizer and chat template of a model
PRUNING = "pruning.json"  # of `rft prune`: the base, and the neurons and heads that are kept
_ALL_BUT = (INDEX, "merge.json", "lineage.json", PRUNING)


class ModelFiles:
    """The weights of a folder in safetensors files, read one tensor at a time.

    Files are memory-mapped: a tensor's pages are read when it is. Raises ConfigError for a folder without
    such weights, and for a damaged file.
    """

    def __init__(self, folder: Path | str, name: str = "", single: str = SINGLE) -> None:
        self.folder, self.name = Path(folder), name or str(folder)
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self.shards = weight_files(self.folder, single)
            for shard in self.shards:
                self.tensors |= stored_tensors(self.folder, shard)
        except ModelError as error:
            raise ConfigError([f"{self.name}: {error}"]) from None
        if not self.shards:
            raise ConfigError(
                [f"{self.name}: it has no {single}; give a model folder with weights in safetensors files"]
            )

    def read(self, name: str) -> Tensor:
        """Return a stored tensor, unconverted."""
        with safe_open(self.folder / self.tensors[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def of_shard(self, shard: str) -> list[str]:
        """Return the names of a shard's tensors."""
        return [name for name, info in self.tensors.items() if info.file == shard]

    def config(self) -> dict[str, Any]:
        """Return the model's config.json; {} if it has none. Raises ConfigError for a damaged one."""
        file = self.folder / "config.json"
        return read_object(file, self.name) if file.exists() else {}


def read_object(file: Path, name: str, *needed: str) -> dict[str, Any]:
    """Return the JSON object of a model's file. Raises ConfigError if it is damaged or lacks a key."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError([f"{name}: {file} is damaged: {error}"]) from None
    lacking = [key for key in needed if not isinstance(value, dict) or key not in value]
    if not isinstance(value, dict) or lacking:
        what = f"it has no {', '.join(lacking)}" if lacking else "it is not an object"
        raise ConfigError([f"{name}: {file} is damaged: {what}"])
    return value


def write_like(base: ModelFiles, out: Path, tensor: Callable[[str], Tensor]) -> None:
    """Write a model into the folder `out` with the shards, config and tokenizer of `base`, and the values of
    `tensor(name)`. One shard is in memory at a time."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED:
        for file in base.folder.glob(pattern):
            if file.name not in _ALL_BUT:
                shutil.copy2(file, out / file.name)
    for shard in base.shards:
        values = {name: tensor(name).contiguous() for name in base.of_shard(shard)}
        save_file(values, out / shard, {"format": "pt"})
        del values
    if base.shards != [SINGLE]:
        sizes = sum(info.file in base.shards for info in base.tensors.values())
        index = {"metadata": {"tensors": sizes}, "weight_map": {n: i.file for n, i in base.tensors.items()}}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def folder_problems(out: Path) -> list[str]:
    """Return why a new model cannot be written to `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return [f"{out} is not an empty folder: choose another one"]
    return []


# -- do models fit each other? --------------------------------------------------------------------------


def shape_problems(models: Sequence[ModelFiles]) -> list[str]:
    """Return the reasons why the models cannot be combined tensor by tensor: other names, shapes or quantised
    weights."""
    first, *others = models
    problems = [problem for m in models for problem in quantised_problems(m, "combined")][:1]
    for other in others:
        for one, two in ((first, other), (other, first)):
            lacking = [name for name in one.tensors if name not in two.tensors]
            if lacking:
                problems.append(
                    f"{two.name} lacks {lacking[0]} ({len(lacking)} such tensors), which {one.name} has: "
                    "models of different shapes cannot be combined"
                )
        for name, info in first.tensors.items():
            if name in other.tensors and other.tensors[name].shape != info.shape:
                problems.append(
                    f"{name} has shape {list(info.shape)} in {first.name} and "
                    f"{list(other.tensors[name].shape)} in {other.name}: models of different shapes cannot "
                    "be combined"
                )
                break
    return problems


def quantised_problems(model: ModelFiles, done: str) -> list[str]:
    """Return the first tensor of a model that is quantised. done: "combined", "pruned"."""
    return [
        f"{model.name}: {name} is stored as {info.dtype}; quantised weights cannot be {done}: give the model "
        "in bfloat16, float16 or float32"
        for name, info in model.tensors.items()
        if info.dtype not in ("BF16", "F16", "F32", "F64")
    ][:1]


def tokenizer_problems(models: Sequence[ModelFiles]) -> list[str]:
    """Return which tokenizers differ from the first one's, and by which token."""
    first, *others = models
    vocabulary = _vocabulary(first.folder)
    problems = []
    for other in others:
        theirs = _vocabulary(other.folder)
        if theirs == vocabulary:
            continue
        different = sorted(k for k in {*vocabulary, *theirs} if vocabulary.get(k) != theirs.get(k))
        token = different[0]
        problems.append(
            f"the tokenizers of {first.name} and {other.name} differ in {len(different)} entries: {token!r} "
            f"has the id {vocabulary.get(token, 'none')} and {theirs.get(token, 'none')}; combine models "
            "with one tokenizer"
        )
    return problems


def _vocabulary(folder: Path) -> Mapping[str, Any]:
    """Return token -> id of a folder's tokenizer, with the merges of a BPE as further entries."""
    file = folder / "tokenizer.json"
    if not file.exists():
        from rft.learner.load import load_tokenizer

        vocabulary: dict[str, Any] = load_tokenizer(str(folder)).get_vocab()
        return vocabulary
    raw = json.loads(file.read_text(encoding="utf-8"))
    model = raw["model"]
    entries = model.get("vocab") or {}
    known = dict(entries) if isinstance(entries, dict) else {token: i for i, (token, _) in enumerate(entries)}
    known |= {token["content"]: token["id"] for token in raw.get("added_tokens", ())}
    merges = {f"merge {_pair(pair)}": rank for rank, pair in enumerate(model.get("merges") or ())}
    return known | merges


def _pair(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def local_folder(target: str, scratch: Path) -> str:
    """Return the folder with the weights of a model folder, a run, a packaged or a hub model.

    scratch: an empty folder for a copy, where one is made. Raises ConfigError naming the model.
    """
    from rft.tools.export import weights_of

    scratch.mkdir(parents=True, exist_ok=True)
    path = Path(weights_of(target, scratch)[0])
    if path.is_dir():
        return str(path)
    if target in PACKAGED:
        return str(packaged_folder(target, scratch))
    if target.startswith((".", "/", "~")) or path.suffix:
        raise ConfigError([f"{target}: no such folder; give a model folder, a run folder or a hub name"])
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(target, allow_patterns=["*.safetensors", *COPIED])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError([f"{target}: neither a folder nor a model on the hub: {error}"]) from None
