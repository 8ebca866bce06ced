"""`rft merge METHOD MODEL... --out OUT`: combine models of one shape in weight space, one shard at a time.

The first model gives config, tokenizer and dtype; arithmetic is done in float32. With task vectors
t_i = model_i - base, where the first model is the base:

soup         mean of all models, weighed (Wortsman et al. 2022)
greedy       mean of the models that, in order of their accuracy, do not lower the mean's (there, recipe 1)
wise-ft      (1 - alpha) * start + alpha * tuned (Wortsman et al. 2022b)
lines        base + sum_i w_i * (alpha + beta * l / (L - 1)) * t_i in layer l = 0 ... L - 1; with alpha before
             the layers, with alpha + beta behind them (LiNeS, Wang et al. 2024)
ties         base + alpha * mean of the trimmed t_i that have the elected sign (TIES, Yadav et al. 2023)
dare         base + sum_i w_i * mask_i * t_i / density, random masks (DARE, Yu et al. 2023)
stock        base + r * mean of the N vectors t_i, r = N c / (1 + (N - 1) c) in each tensor, c the mean cosine
             between two of them (Model Stock, Jang et al. 2024)
breadcrumbs  base + sum_i w_i * t_i without the share gamma of the largest values and with the next share
             density of them only (Davari and Belilovsky 2023)
arithmetic   base + sum_i w_i * t_i; a negative weight removes what was learned (Ilharco et al. 2023)
difference   onto + alpha * (to - from), models in the order FROM TO ONTO (PortLLM, Khan et al. 2024)
adapter      base + scale * B A, models in the order BASE ADAPTER (LoRA)
loram        base + R(scale * B A), models in the order BASE PRUNED ADAPTER (LoRAM, see `rft.tools.prune`)
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft.errors import ConfigError
from rft.tools.model_files import (
    ModelFiles,
    layer_number,
    shape_problems,
    tokenizer_problems,
    write_like,
)
from rft.tools.prune import Kept, read_kept, recover
from rft.utils.files import folder_atomic
from rft.utils.hashing import hash64, model_digest
from rft.utils.signals import StopRequests

METHODS = (
    "soup", "greedy", "wise-ft", "lines", "ties", "dare", "stock", "breadcrumbs", "arithmetic", "difference",
    "adapter", "loram",
)  # fmt: skip
MERGE_FILE = "merge.json"  # in the merged folder: method, options, and digests of the models' weights
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


def soup(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the mean, weighed."""
    return sum_of(tensors, [w / sum(weights) for w in weights])


def sum_of(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of `weights[i] * tensors[i]`, float32."""
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total


def trimmed(vector: Tensor, density: float) -> Tensor:
    """Return the vector with all but the share `density` of its largest values, by magnitude, set to 0."""
    keep = math.ceil(density * vector.numel())
    if keep >= vector.numel():
        return vector
    magnitudes = vector.abs().reshape(-1)
    chosen = torch.topk(magnitudes, keep).indices
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    mask[chosen] = True
    return vector * mask.view_as(vector)


def ties(vectors: Sequence[Tensor], density: float, weights: Sequence[float]) -> Tensor:
    """Return the merged task vector of TIES: trim each, elect the sign of the greater total, average the
    values of that sign. Trimming is by tensor, not over the whole model."""
    parts = torch.stack([trimmed(v, density) * w for v, w in zip(vectors, weights, strict=True)])
    sign = torch.sign(parts.sum(dim=0))
    agrees = (torch.sign(parts) == sign) & (sign != 0)
    return (parts * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def dare(vector: Tensor, density: float, seed: int) -> Tensor:
    """Return the vector with a random share 1 - density of its values set to 0, and the rest divided by
    density."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(vector.shape, generator=generator) < density
    return vector * mask / density


def stock(vectors: Sequence[Tensor]) -> Tensor:
    """Return the merged task vector of Model Stock: the mean of the vectors, shortened by their angle. Where
    they point apart on average (a negative cosine), it is 0."""
    flat = torch.stack([v.reshape(-1) for v in vectors])
    units, n = torch.nn.functional.normalize(flat, dim=1), len(vectors)
    cosine = float(((units @ units.T).sum() - (units * units).sum()) / (n * (n - 1)))
    ratio = max(n * cosine / (1 + (n - 1) * cosine), 0.0) if cosine > 0 else 0.0
    return ratio * flat.mean(dim=0).view_as(vectors[0])


def breadcrumbs(vector: Tensor, density: float, gamma: float) -> Tensor:
    """Return the vector without the share `gamma` of its largest values, by magnitude, and with the next
    share `density` of them only."""
    order = vector.abs().reshape(-1).argsort(descending=True)
    first, last = round(gamma * len(order)), round((gamma + density) * len(order))
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[first:last]] = True
    return vector * mask.view_as(vector)


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
    problems = _option_problems(method, names, options, score is not None)
    if out.exists() and any(out.iterdir()):
        problems.append(f"{out} is not empty: choose another folder")
    if problems:
        raise ConfigError(problems)
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
        write_like(like, temporary, partial(_merged, method, models, options, like))
        _write_lineage(temporary, method, folders, options, used)
    return [*lines, f"{method}: {len(like.tensors)} tensors of {', '.join(used)}"]


def _merged(method: str, models: Sequence[ModelFiles], o: Options, like: ModelFiles, name: str) -> Tensor:
    """Return a merged tensor in the dtype of `like`."""
    tensors = [m.read(name) for m in models]
    dtype = tensors[models.index(like)].dtype
    base, *others = [t.float() for t in tensors]
    if method in ("soup", "greedy"):
        merged = soup(tensors, o.weights or [1.0] * len(tensors))
    elif method == "wise-ft":
        alpha = 0.5 if o.alpha is None else o.alpha
        merged = sum_of(tensors, [1 - alpha, alpha])
    elif method == "difference":
        alpha = 1.0 if o.alpha is None else o.alpha
        merged = tensors[2].float() + alpha * (others[0] - base)
    else:
        vectors = [t - base for t in others]
        weights = o.weights or [1.0] * len(vectors)
        merged = base + _task_vector(method, vectors, weights, name, o, models[0])
    return merged.to(dtype)


def _task_vector(
    method: str, vectors: Sequence[Tensor], weights: Sequence[float], name: str, o: Options, base: ModelFiles
) -> Tensor:
    alpha, density = o.alpha, o.density
    if method == "ties":
        return (1.0 if alpha is None else alpha) * ties(vectors, 0.2 if density is None else density, weights)
    if method == "dare":
        seeds = [hash64(f"{o.seed}/{i}/{name}") % 2**63 for i in range(len(vectors))]
        kept = 0.1 if density is None else density
        return sum_of([dare(v, kept, s) for v, s in zip(vectors, seeds, strict=True)], weights)
    if method == "stock":
        return stock(vectors)
    if method == "breadcrumbs":
        kept, gamma = 0.9 if density is None else density, 0.01 if o.gamma is None else o.gamma
        return sum_of([breadcrumbs(v, kept, gamma) for v in vectors], weights)
    total = sum_of(vectors, weights)
    if method == "arithmetic":
        return total
    numbers = [n for tensor in base.tensors if (n := layer_number(tensor)) is not None]
    layers, layer = max(numbers, default=-1) + 1, layer_number(name)
    behind = not any(word in name for word in ("embed", "wte", "wpe"))
    alpha, beta = 0.0 if alpha is None else alpha, 1.0 if o.beta is None else o.beta
    return layer_scale(layer, layers, alpha, beta, behind) * total


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


def _option_problems(method: str, names: Sequence[str], o: Options, scores: bool) -> list[str]:
    least, shape = _NUMBER.get(method, (2, "MODEL MODEL..."))
    count, problems = len(names), []
    if count < least or (method in _NUMBER and count > least):
        problems.append(f"{method}: it takes {shape}, not {count} model{'s' if count != 1 else ''}")
    weighed = {
        "soup": count,
        **dict.fromkeys(("lines", "ties", "dare", "breadcrumbs", "arithmetic"), count - 1),
    }
    takes = {
        "weights": tuple(weighed),
        "alpha": ("wise-ft", "lines", "ties", "difference"),
        "beta": ("lines",),
        "density": ("ties", "dare", "breadcrumbs"),
        "gamma": ("breadcrumbs",),
    }
    for option, methods in takes.items():
        if getattr(o, option) is not None and method not in methods:
            problems.append(f"--{option}: {method} does not use it, only {', '.join(methods)}; remove it")
    if o.weights is not None and method in weighed and len(o.weights) != weighed[method]:
        given, needed = len(o.weights), weighed[method]
        problems.append(f"--weights: {given} numbers, but {method} of {count} models needs {needed}")
    elif o.weights is not None and method == "soup" and not sum(o.weights):
        problems.append("--weights: they sum to 0; soup divides by their sum")
    if o.density is not None and not 0 < o.density <= 1:
        problems.append(f"--density: {o.density:g} is not a share above 0, up to 1")
    if o.gamma is not None and not 0 <= o.gamma < 1:
        problems.append(f"--gamma: {o.gamma:g} is not a share below 1")
    if method == "stock" and count == 2:
        problems.append(
            "stock: it takes BASE MODEL MODEL..., since it needs the angle between two tuned models"
        )
    if method == "greedy" and not scores:
        problems.append("greedy: name a config that measures accuracy (rewards, held-out rows): `--config`")
    return problems


# -- adapters ----------------------------------------------------------------------------------------------


class Adapter:
    """A LoRA adapter as peft saves it: adapter_config.json and adapter_model.safetensors."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        file = folder / "adapter_config.json"
        if not file.exists():
            raise ConfigError([f"{name}: it has no adapter_config.json; give the folder of an adapter"])
        self.config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        self.files = ModelFiles(folder, name, "adapter_model.safetensors")
        stems = {
            key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            for key in self.files.tensors
            if ".lora_A." in key
        }
        self.modules = {f"{stem}.weight": stem for stem in stems}
        lineage = folder / "lineage.json"
        self.base = json.loads(lineage.read_text(encoding="utf-8")).get("base") if lineage.exists() else None

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

        kept: the neurons of the pruned model that the adapter was trained on; None: that was the base.
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
