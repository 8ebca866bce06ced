"""`rft merge METHOD MODEL... --out OUT`: combine models of one shape in weight space, one shard at a time.

The first model gives config, tokenizer and dtype; arithmetic is done in float32. With task vectors
t_i = model_i - base, where the first model is the base:

soup         mean of all models (Wortsman et al. 2022)
greedy       mean of the models that, in order of their accuracy, do not lower the mean's (there, recipe 1)
wise-ft      (1 - alpha) * start + alpha * tuned (Wortsman et al. 2022b)
lines        base + sum_i w_i * (alpha + beta * l / (L - 1)) * t_i in layer l = 0 ... L - 1; with alpha before
             the layers, with alpha + beta behind them (LiNeS, Wang et al. 2024)
difference   onto + alpha * (to - from), models in the order FROM TO ONTO (PortLLM, Khan et al. 2024)
adapter      base + scale * B A, models in the order BASE ADAPTER (LoRA)
loram        base + R(scale * B A), models in the order BASE PRUNED ADAPTER (LoRAM, see `rft.tools.prune`)

mergekit (the extra `mergekit`) does the others:

linear       sum_i w_i * model_i / sum_i w_i
arithmetic   base + sum_i w_i * t_i; a negative weight removes what was learned (Ilharco et al. 2023)
ties         base + alpha * weighed mean of the trimmed t_i with the elected sign (TIES, Yadav et al. 2023)
dare         base + sum_i w_i * mask_i * t_i with random masks, each scaled to its former sum of magnitudes
             (DARE, Yu et al. 2023, who divide by the density: equal in expectation)
breadcrumbs  base + sum_i w_i * t_i without the share gamma of the largest values and with the next share
             density of them only (Davari and Belilovsky 2023)
stock        base + r * mean of the N vectors t_i, r = N c / (1 + (N - 1) c) in each tensor, c the mean cosine
             between two of them (Model Stock, Jang et al. 2024)
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft.errors import ConfigError
from rft.tools.model_files import (
    ModelFiles,
    folder_problems,
    read_object,
    shape_problems,
    tokenizer_problems,
    write_like,
)
from rft.tools.prune import Kept, read_kept, recover
from rft.utils.did_you_mean import did_you_mean_or_list
from rft.utils.files import folder_atomic
from rft.utils.hashing import model_digest
from rft.utils.signals import StopRequests
from rft.utils.tensor_names import layer_number

MERGEKIT = {  # method to mergekit's name of it
    "linear": "linear",
    "arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare": "dare_linear",
    "breadcrumbs": "breadcrumbs",
    "stock": "model_stock",
}
METHODS = ("soup", "greedy", "wise-ft", "lines", "difference", "adapter", "loram", *MERGEKIT)
MERGE_FILE = "merge.json"  # in the merged folder: method, options, and digests of the models' weights
DENSITY = {"ties": 0.2, "dare": 0.1, "breadcrumbs": 0.9}  # share of each task vector that is kept
SHARD = 2**30  # bytes that mergekit holds before it writes them
_NUMBER = {
    "wise-ft": (2, "START TUNED"),
    "difference": (3, "FROM TO ONTO"),
    "adapter": (2, "BASE ADAPTER"),
    "loram": (3, "BASE PRUNED ADAPTER"),
}


@dataclass(frozen=True)
class Options:
    """Options of the methods; None: the method's default."""

    weights: Sequence[float] | None = None
    alpha: float | None = None
    beta: float | None = None
    density: float | None = None
    gamma: float | None = None
    seed: int = 0


# -- the equations, for one tensor --------------------------------------------------------------------------


def soup(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean, float32."""
    return sum_of(tensors, [1 / len(tensors)] * len(tensors))


def sum_of(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of `weights[i] * tensors[i]`, float32."""
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total


def layer_scale(layer: int | None, layers: int, alpha: float, beta: float, behind: bool) -> float:
    """Return LiNeS's scale: alpha in the first layer, alpha + beta in the last one. layer None: a tensor
    outside the layers; behind: it follows them (final norm, head)."""
    if layer is None:
        return alpha + beta if behind else alpha
    return alpha + beta * layer / (layers - 1) if layers > 1 else alpha


def lora_delta(a: Tensor, b: Tensor, scale: float, transposed: bool = False) -> Tensor:
    """Return scale * B A, [out, in] (transposed: [in, out], as Conv1D stores its weight). a: [r, in], b:
    [out, r]."""
    delta = scale * (b.float() @ a.float())
    return delta.T if transposed else delta


# -- models ------------------------------------------------------------------------------------------------


def merge(
    method: str, folders: Mapping[str, str], out: Path, options: Options, score: Callable[[str], float] | None
) -> list[str]:
    """Merge models into the new folder `out`; return lines that describe the work.

    folders: name of each model, as the user wrote it, to its folder. score: accuracy of a model folder, for
    greedy. Raises ConfigError with all problems before anything is written.
    """
    names = list(folders)
    check_request(method, names, out, options, score is not None)
    if method in ("adapter", "loram"):
        base = ModelFiles(folders[names[0]], names[0])
        adapter = Adapter(Path(folders[names[-1]]), names[-1])
        trained_on, kept = base, None
        if method == "loram":
            kept = read_kept(folders[names[1]], names[1], base)
            trained_on = ModelFiles(folders[names[1]], names[1])
        if problems := adapter.problems(trained_on):
            raise ConfigError(problems)
        with folder_atomic(out) as temporary:
            write_like(base, temporary, lambda name: adapter.merged(name, base.read(name), kept))
            _write_lineage(temporary, method, folders, options, names)
        return [f"merged {len(adapter.modules)} matrices of {names[-1]} into {names[0]}"]
    models = [ModelFiles(folder, name) for name, folder in folders.items()]
    if problems := shape_problems(models) or tokenizer_problems(models):
        raise ConfigError(problems)
    lines: list[str] = []
    used = names
    if method == "greedy":
        assert score is not None
        models, lines = _greedy(models, out, score)
        used = [m.name for m in models]
    like = models[2] if method == "difference" else models[0]
    with folder_atomic(out) as temporary:
        if method in MERGEKIT:
            _merge_with_mergekit(method, models, options, temporary)
        else:
            write_like(like, temporary, partial(_merged, method, models, options, like))
        _write_lineage(temporary, method, folders, options, used)
    by = ", by mergekit" if method in MERGEKIT else ""
    return [*lines, f"{method}{by}: {len(like.tensors)} tensors of {', '.join(used)}"]


def _merged(method: str, models: Sequence[ModelFiles], o: Options, like: ModelFiles, name: str) -> Tensor:
    """Return a merged tensor in the dtype of `like`."""
    tensors = [m.read(name) for m in models]
    dtype = tensors[models.index(like)].dtype
    base, *others = [t.float() for t in tensors]
    if method in ("soup", "greedy"):
        merged = soup(tensors)
    elif method == "wise-ft":
        alpha = 0.5 if o.alpha is None else o.alpha
        merged = sum_of(tensors, [1 - alpha, alpha])
    elif method == "difference":
        alpha = 1.0 if o.alpha is None else o.alpha
        merged = tensors[2].float() + alpha * (others[0] - base)
    else:
        vectors = [t - base for t in others]
        total = sum_of(vectors, o.weights or [1.0] * len(vectors))
        merged = base + _lines_scale(name, models[0], o) * total
    return merged.to(dtype)


def _lines_scale(name: str, base: ModelFiles, o: Options) -> float:
    numbers = [n for tensor in base.tensors if (n := layer_number(tensor)) is not None]
    layers, layer = max(numbers, default=-1) + 1, layer_number(name)
    behind = not any(word in name for word in ("embed", "wte", "wpe"))
    alpha, beta = 0.0 if o.alpha is None else o.alpha, 1.0 if o.beta is None else o.beta
    return layer_scale(layer, layers, alpha, beta, behind)


def _greedy(
    models: list[ModelFiles], out: Path, score: Callable[[str], float]
) -> tuple[list[ModelFiles], list[str]]:
    """Return the models of the greedy soup, and a line about each."""
    scored = sorted(((score(str(m.folder)), m) for m in models), key=lambda pair: -pair[0])
    best, first = scored[0]
    chosen, lines = [first], [f"{first.name}: {best:.4f}, the best model"]
    for alone, model in scored[1:]:
        with tempfile.TemporaryDirectory(prefix="rft-merge-", dir=_existing(out)) as scratch:
            trial, candidate = [*chosen, model], Path(scratch) / "soup"
            write_like(first, candidate, partial(_merged, "soup", trial, Options(), first))
            value = score(str(candidate))
        verdict = "kept" if value >= best else "left out"
        lines.append(f"{model.name}: {alone:.4f}; the soup with it {value:.4f}: {verdict}")
        if value >= best:
            best, chosen = value, trial
    return chosen, lines


def accuracy_by(config_file: str, signals: StopRequests) -> Callable[[str], float]:
    """Return a function that measures `eval/accuracy` of a model folder with a config, as `rft eval` does;
    without an unnamed set, the mean accuracy of the named ones."""
    from rft.config.load import load_config
    from rft.plan import make_plan
    from rft.tools.evaluate import evaluate_model

    config = load_config(config_file)

    def accuracy(folder: str) -> float:
        metrics = asyncio.run(evaluate_model(make_plan(config, model=folder, evaluate=True), signals))
        named = [v for name, v in metrics.items() if name.startswith("eval/") and name.endswith("/accuracy")]
        return metrics.get("eval/accuracy", sum(named) / max(len(named), 1))

    return accuracy


def _existing(path: Path) -> Path:
    """Return the nearest existing folder above a path."""
    return next(p for p in path.absolute().parents if p.is_dir())


def _write_lineage(
    out: Path, method: str, folders: Mapping[str, str], o: Options, used: Sequence[str]
) -> None:
    given = {k: v for k, v in vars(o).items() if v is not None}
    digests = {name: model_digest(folder) for name, folder in folders.items()}
    parts = [{"name": name, "weights": digest, "used": name in used} for name, digest in digests.items()]
    lineage = {"method": method, "options": given, "models": parts}
    (out / MERGE_FILE).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")


def check_request(method: str, names: Sequence[str], out: Path, o: Options, scores: bool) -> None:
    """Raise ConfigError with all that is wrong with a merge before a model is read.

    scores: there is a config that measures accuracy.
    """
    if method not in METHODS:
        raise ConfigError([f"merge: unknown method {method!r}{did_you_mean_or_list(method, METHODS)}"])
    averages = method in ("soup", "greedy", "linear")
    least, shape = _NUMBER.get(method, (2, "MODEL MODEL..." if averages else "BASE MODEL..."))
    count, problems = len(names), []
    problems += [f"{name}: it is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += folder_problems(out)
    if count < least or (method in _NUMBER and count > least):
        problems.append(f"{method}: it takes {shape}, not {count} model{'s' if count != 1 else ''}")
    weighed = {
        "linear": count,
        **dict.fromkeys(("lines", "ties", "dare", "breadcrumbs", "arithmetic"), count - 1),
    }
    takes = {
        "weights": tuple(weighed),
        "alpha": ("wise-ft", "lines", "ties", "difference"),
        "beta": ("lines",),
        "density": tuple(DENSITY),
        "gamma": ("breadcrumbs",),
    }
    for option, methods in takes.items():
        if getattr(o, option) is not None and method not in methods:
            problems.append(f"--{option}: {method} does not use it, only {', '.join(methods)}; remove it")
    if o.weights is not None and method in weighed and len(o.weights) != weighed[method]:
        given, needed = len(o.weights), weighed[method]
        problems.append(f"--weights: {given} numbers, but {method} of {count} models needs {needed}")
    elif o.weights is not None and method == "linear" and not sum(o.weights):
        problems.append("--weights: they sum to 0; linear divides by their sum")
    for option in ("weights", "alpha", "beta"):
        given = getattr(o, option)
        if not all(map(math.isfinite, given if isinstance(given, Sequence) else [given or 0.0])):
            problems.append(f"--{option}: {given} is not finite")
    if o.density is not None and not 0 < o.density <= 1:
        problems.append(f"--density: {o.density:g} is not a share above 0, up to 1")
    if o.gamma is not None and not 0 <= o.gamma < 1:
        problems.append(f"--gamma: {o.gamma:g} is not a share below 1")
    if method == "breadcrumbs":
        density, gamma = DENSITY[method] if o.density is None else o.density, o.gamma or 0.0
        if density + gamma > 1:
            problems.append(f"breadcrumbs: --density {density:g} and --gamma {gamma:g} sum to more than 1")
    if method == "stock" and count == 2:
        problems.append(
            "stock: it takes BASE MODEL MODEL..., since it needs the angle between two tuned models"
        )
    if method == "greedy" and not scores:
        problems.append("greedy: name a config that measures accuracy (rewards, held-out rows): `--config`")
    if method in MERGEKIT and find_spec("mergekit") is None:
        problems.append(f"{method}: mergekit does it, and it is not installed: pip install 'rft[mergekit]'")
    if problems:
        raise ConfigError(problems)


# -- mergekit ----------------------------------------------------------------------------------------------


def mergekit_config(method: str, folders: Sequence[str], o: Options) -> dict[str, Any]:
    """Return the merge as mergekit's configuration; its defaults are not relied on."""
    base, tuned = (None, folders) if method == "linear" else (folders[0], folders[1:])
    if method == "linear":
        shared: dict[str, bool | float] = {"normalize": True}
    elif method == "stock":
        shared = {"filter_wise": False}
    else:  # dare scales what is kept, ties divides by the weights that agree
        alpha = 1.0 if o.alpha is None else o.alpha
        shared = {"normalize": method == "ties", "rescale": method == "dare", "lambda": alpha}
    each: dict[str, float] = {}
    if method in DENSITY:
        each["density"] = DENSITY[method] if o.density is None else o.density
    if method == "breadcrumbs":
        each["gamma"] = 0.01 if o.gamma is None else o.gamma
    parts = []
    for folder, weight in zip(tuned, o.weights or [1.0] * len(tuned), strict=True):
        weighed = each if method == "stock" else {**each, "weight": weight}
        parts.append({"model": _path(folder), "parameters": weighed})
    config = {"merge_method": MERGEKIT[method], "models": parts, "parameters": shared, "dtype": "float32"}
    return config if base is None else {**config, "base_model": _path(base)}


def _path(folder: str) -> dict[str, dict[str, str]]:
    """Return mergekit's reference to a folder; of a string, `@` and `+` would begin a revision or adapter."""
    return {"model": {"path": folder}}


def _merge_with_mergekit(method: str, models: Sequence[ModelFiles], o: Options, out: Path) -> None:
    """Write mergekit's result in the shards and dtypes of the first model."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    config = mergekit_config(method, [str(m.folder) for m in models], o)
    options = MergeOptions(
        out_shard_size=SHARD,
        copy_tokenizer=False,
        write_model_card=False,
        quiet=True,
        random_seed=o.seed if method == "dare" else None,
    )
    with tempfile.TemporaryDirectory(prefix="rft-merge-", dir=_existing(out)) as scratch:
        try:
            run_merge(MergeConfiguration.model_validate(config), scratch, options)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigError([f"{method}: mergekit cannot merge these models: {error}"]) from error
        merged, first = ModelFiles(scratch, "mergekit's result"), models[0]
        if lacking := [name for name in first.tensors if name not in merged.tensors]:
            raise ConfigError([f"{method}: mergekit does not know the tensor {lacking[0]} of {first.name}"])
        write_like(first, out, lambda name: merged.read(name).to(first.read(name).dtype))


# -- adapters ----------------------------------------------------------------------------------------------


class Adapter:
    """A LoRA adapter as peft saves it: adapter_config.json and adapter_model.safetensors."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        file = folder / "adapter_config.json"
        if not file.exists():
            raise ConfigError([f"{name}: it has no adapter_config.json; give the folder of an adapter"])
        plain = read_object(file, name).get("peft_type") == "LORA"
        self.config = read_object(file, name, *(("r", "lora_alpha") if plain else ()))
        self.files = ModelFiles(folder, name, "adapter_model.safetensors")
        stems = {
            key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            for key in self.files.tensors
            if ".lora_A." in key
        }
        self.modules = {f"{stem}.weight": stem for stem in stems}
        lineage = folder / "lineage.json"
        self.base = read_object(lineage, name).get("base") if lineage.exists() else None

    def problems(self, base: ModelFiles) -> list[str]:
        """Return the reasons why the adapter cannot be merged into a base."""
        kind = self.config.get("peft_type")
        unknown = [k for k in self.files.tensors if ".lora_A." not in k and ".lora_B." not in k]
        if kind != "LORA" or self.config.get("use_dora") or unknown:
            kind = "DoRA" if kind == "LORA" else kind
            what = f"it has the tensor {unknown[0]}" if unknown else f"it is {kind}"
            return [
                f"{self.name}: only plain LoRA is merged by files, and {what}; use `rft export` on its run"
            ]
        problems, wrong = [], f"{self.name}: wrong base:"
        for weight, stem in self.modules.items():
            changed = [self._info(stem, "B")[0], self._info(stem, "A")[1]]
            if weight not in base.tensors:
                problems.append(f"{wrong} {base.name} has no {weight}, which the adapter changes")
            elif sorted(changed) != sorted(base.tensors[weight].shape):
                problems.append(
                    f"{wrong} {weight} has shape {list(base.tensors[weight].shape)} in {base.name}, and the "
                    f"adapter changes one of {changed}"
                )
        if not problems and self.base and self.base["weights"] != (digest := model_digest(str(base.folder))):
            problems.append(
                f"{wrong} it was trained on {self.base['name']} with weights {self.base['weights'][:12]}, "
                f"and {base.name} has {digest[:12]}"
            )
        return problems[:3]

    def _key(self, stem: str, part: str) -> str:
        return f"base_model.model.{stem}.lora_{part}.weight"

    def _info(self, stem: str, part: str) -> tuple[int, ...]:
        return self.files.tensors[self._key(stem, part)].shape

    def merged(self, name: str, weight: Tensor, kept: Kept | None = None) -> Tensor:
        """Return a weight of the base with the adapter's change, in the base's dtype.

        kept: the parts of the pruned model that the adapter was trained on; None: that was the base.
        """
        stem = self.modules.get(name)
        if stem is None:
            return weight
        a, b = self.files.read(self._key(stem, "A")), self.files.read(self._key(stem, "B"))
        rank = int(self.config.get("rank_pattern", {}).get(stem, self.config["r"]))
        alpha = float(self.config.get("alpha_pattern", {}).get(stem, self.config["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        delta = lora_delta(a, b, scale, bool(self.config.get("fan_in_fan_out")))
        if kept is not None:
            delta = recover(name, delta, weight.shape, kept)
        return (weight.float() + delta).to(weight.dtype)
