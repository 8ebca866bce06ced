"""`rft compare A B`: two models or runs side by side: weights, problems solved and broken, texts, metrics,
configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from rft.config.data import DataConfig
from rft.config.load import differences, parse_config
from rft.data import DataError, load_groups
from rft.errors import ConfigError, ModelError
from rft.learner.load import load_tokenizer
from rft.metrics.evaluation import Evaluation, Problem, flips, paired_test, read_evaluation
from rft.report.page import STYLE
from rft.tools.export import start_of
from rft.tools.model_files import ModelFiles, local_folder, shape_problems, tokenizer_problems
from rft.tools.weight_changes import mask_overlap, weight_changes
from rft.utils import yaml_files

SHOWN = 20  # flipped problems, matrices and config keys on the page


@dataclass(frozen=True)
class Wins:
    """Problems whose mean reward is higher with B (wins), equal (ties) and lower (losses)."""

    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Texts:
    """Both models on the same texts. kl_ab, kl_ba: KL(A || B) and KL(B || A) over the vocabulary, nats per
    token; nll_a, nll_b: mean -log p of the texts' tokens."""

    rows: int
    tokens: int
    kl_ab: float
    kl_ba: float
    nll_a: float
    nll_b: float


def compare(
    a: str,
    b: str,
    scratch: Path,
    *,
    start: str | None = None,
    data: str | None = None,
    limit: int = 64,
    spectra: bool = True,
    problems: Sequence[str] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the comparison as plain JSON. Parts for which A or B has nothing are left out.

    start: the model that both began at (None: that of their configs, if it is one; else B is compared with
    A). data: rows for KL and likelihood, at most `limit` of them. spectra: also ranks and intruder
    dimensions. problems: folders with the evaluations of A and B (None: A and B themselves). Raises
    ConfigError if the models do not fit each other.
    """
    result: dict[str, Any] = {"a": a, "b": b}
    models = [ModelFiles(local_folder(t, scratch / str(i)), t) for i, t in enumerate((a, b))]
    configs = [_config(target) for target in (a, b)]
    origin = start or _common_start(configs)
    if origin is not None:
        models.append(ModelFiles(local_folder(origin, scratch / "start"), origin))
    if misfits := shape_problems(models):
        raise ConfigError(misfits)
    result["weights"] = _weights(models, spectra, note)
    one, two = (read_evaluation(Path(target)) for target in problems or (a, b))
    if one is not None and two is not None:
        result["sets"] = compare_evaluations(one, two)
    if data is not None:
        if misfits := tokenizer_problems(models[:2]):
            raise ConfigError(misfits)
        result["texts"] = asdict(compare_texts(models[0].folder, models[1].folder, data, limit))
    metrics = [_last_metrics(Path(target)) for target in (a, b)]
    if all(metrics):
        names = [name for name in metrics[0] if name in metrics[1] and name.startswith("eval/")]
        result["metrics"] = {name: [metrics[0][name], metrics[1][name]] for name in names}
    if configs[0] and configs[1]:
        result["config"] = [{"key": k, "a": x, "b": y} for k, x, y in differences(configs[0], configs[1])]
    return result


def _weights(models: Sequence[ModelFiles], spectra: bool, note: Callable[[str], None]) -> dict[str, Any]:
    a, b, *rest = models
    if not rest:
        return {"changes": [asdict(weight_changes(a, b, spectra=spectra, note=note))]}
    changes = [asdict(weight_changes(rest[0], m, spectra=spectra, note=note)) for m in (a, b)]
    return {"changes": changes, "overlap": asdict(mask_overlap(rest[0], a, b))}


# -- problems --------------------------------------------------------------------------------------------


def compare_evaluations(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """Return flips from A to B, the paired test and wins of the last evaluations, by set with the same
    prompts."""
    result: dict[str, Any] = {}
    for name in a.same(b):
        one, two = a.sets[name], b.sets[name]
        changed = flips(one, two)
        part: dict[str, Any] = {
            "steps": [a.step, b.step],
            "compared": changed.compared,
            "negative": list(changed.negative),
            "positive": list(changed.positive),
            "wins": asdict(wins(one, two)),
        }
        try:
            part["test"] = asdict(paired_test(one, two))
        except ValueError:
            part["test"] = None  # nothing was judged by both
        result[name] = part
    return result


def wins(a: Sequence[Problem], b: Sequence[Problem]) -> Wins:
    """Count the problems by the mean reward of their samples."""
    before = {p.id: _mean_reward(p) for p in a}
    pairs = [(before.get(p.id), _mean_reward(p)) for p in b]
    gains = [y - x for x, y in pairs if x is not None and y is not None]
    return Wins(sum(g > 0 for g in gains), sum(g == 0 for g in gains), sum(g < 0 for g in gains))


def _mean_reward(problem: Problem) -> float | None:
    values = [s.reward for s in problem.samples if s.reward is not None]
    return sum(values) / len(values) if values else None


# -- texts -----------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_texts(a: Path, b: Path, data: str, limit: int) -> Texts:
    """Score the completions of a dataset with both models, in float32, one row at a time. Raises
    ConfigError."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(a))
    try:
        groups = load_groups(DataConfig(path=data, limit=limit), tokenizer, "sft").groups
    except (DataError, ValueError) as error:
        raise ConfigError([f"--data: {error}"]) from None
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (a, b)]
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for group in groups:
        prompt, completion = group.prompt.tokens, group.completions[0]
        ids = torch.tensor([[*prompt, *completion.tokens]])
        mask = torch.tensor(completion.mask or [True] * len(completion.tokens))
        if not prompt:  # the first token has no prediction
            mask[0] = False
        first = max(len(prompt), 1) - 1
        logs = []
        for model in models:
            logits = model(ids).logits[0, first:-1]
            logs.append(torch.log_softmax(logits.double(), dim=-1)[mask[-len(logits) :]])
        targets = torch.tensor(completion.tokens)[-len(mask) :][mask]
        p, q = logs
        sums += torch.stack(
            [
                (p.exp() * (p - q)).sum(),
                (q.exp() * (q - p)).sum(),
                -p.gather(1, targets[:, None]).sum(),
                -q.gather(1, targets[:, None]).sum(),
            ]
        )
        count += len(targets)
    if not count:
        raise ConfigError([f"--data: {data} has no completion with a token to score"])
    return Texts(len(groups), count, *(sums / count).tolist())


# -- runs ------------------------------------------------------------------------------------------------


def _config(target: str) -> dict[str, Any]:
    file = Path(target) / "config.yaml"
    return yaml_files.read(file) if file.exists() else {}


def _common_start(configs: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the model folder that both runs began at; None if A or B is not a run, or they began at two."""
    if not all(configs):
        return None
    try:
        first, second = (start_of(parse_config(dict(config))) for config in configs)
    except (ConfigError, ModelError, OSError, ValueError):
        return None  # a run of another version, or a model that was moved
    return first if first == second and (Path(first) / "config.json").exists() else None


def _last_metrics(run: Path) -> dict[str, float]:
    file = run / "result.json"
    if not file.exists():
        return {}
    raw = json.loads(file.read_text(encoding="utf-8"))
    return {name: value for name, value in raw.items() if isinstance(value, int | float)}


# -- the page --------------------------------------------------------------------------------------------


def write_page(result: Mapping[str, Any], out: Path) -> None:
    """Write a comparison as one self-contained HTML page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(PAGE).render(style=STYLE, shown=SHOWN, **{**_EMPTY, **result})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")


_EMPTY: dict[str, Any] = {"weights": {}, "sets": {}, "texts": None, "metrics": {}, "config": []}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ a }} and {{ b }} · rft compare</title>
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<header><h1>A: {{ a }}</h1><h1>B: {{ b }}</h1></header>
{% for name, set in sets.items() %}
<h2>Problems{{ " of " + name if name else "" }}</h2>
<table class="card">
  <tr><th></th><th>problems</th><th>rows</th></tr>
  <tr><td>only A solves</td><td class="number">{{ set.negative | length }} of {{ set.compared }}</td>
    <td class="text">{{ set.negative[:shown] | join(", ") }}</td></tr>
  <tr><td>only B solves</td><td class="number">{{ set.positive | length }} of {{ set.compared }}</td>
    <td class="text">{{ set.positive[:shown] | join(", ") }}</td></tr>
  <tr><td>higher reward: B / equal / A</td>
    <td class="number">{{ set.wins.wins }} / {{ set.wins.ties }} / {{ set.wins.losses }}</td><td></td></tr>
{% if set.test %}
  <tr><td>accuracy of B minus A, 95 % interval</td>
    <td class="number">{{ "%+.1f" | format(set.test.difference * 100) }} points
    ({{ "%+.1f" | format(set.test.low * 100) }} to {{ "%+.1f" | format(set.test.high * 100) }})</td>
    <td>McNemar p = {{ "%.3g" | format(set.test.p) }}</td></tr>
{% endif %}
</table>
{% endfor %}
{% if metrics %}
<h2>Evaluation</h2>
<table class="card"><tr><th>metric</th><th>A</th><th>B</th></tr>
{% for name, pair in metrics.items() %}
  <tr><td><code>{{ name }}</code></td><td class="number">{{ "%.4g" | format(pair[0]) }}</td>
    <td class="number">{{ "%.4g" | format(pair[1]) }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if texts %}
<h2>The same texts</h2>
<p>{{ texts.rows }} rows, {{ texts.tokens }} tokens. KL(A || B) {{ "%.4g" | format(texts.kl_ab) }}, KL(B || A)
{{ "%.4g" | format(texts.kl_ba) }} nats per token; -log p per token {{ "%.4g" | format(texts.nll_a) }} (A),
{{ "%.4g" | format(texts.nll_b) }} (B).</p>
{% endif %}
<h2>Weights</h2>
{% for change in weights.changes %}
<p>From {{ change.start }} to {{ change.model }}: {{ "%.2f" | format(change.changed * 100) }} % of
{{ "{:,}".format(change.weights) }} weights changed in bfloat16
{%- if change.rank is not none %}; mean rank of the updates {{ "%.1f" | format(change.rank * 100) }} %
of the full one; {{ change.intruders }} intruder dimensions{% endif %}.</p>
{% endfor %}
{% if weights.overlap %}
<p>Of the weights that A changed, B changed {{ "%.1f" | format(weights.overlap.of_a * 100) }} % (by chance
{{ "%.1f" | format(weights.overlap.chance_a * 100) }} %); of those that B changed, A changed
{{ "%.1f" | format(weights.overlap.of_b * 100) }} % (by chance
{{ "%.1f" | format(weights.overlap.chance_b * 100) }} %).</p>
{% endif %}
{% for change in weights.changes %}
<details class="card"><summary>Tensors of {{ change.model }}</summary><table>
  <tr><th>tensor</th><th>weights</th><th>changed</th><th>relative norm</th><th>rank</th><th>values for 99
  %</th>
    <th>intruders</th></tr>
{% for row in change.tensors %}
  <tr><td class="text"><code>{{ row.name }}</code></td><td class="number">{{ "{:,}".format(row.size) }}</td>
    <td class="number">{{ "%.2f" | format(row.changed * 100) }} %</td>
    <td class="number">{{ "%.2e" | format(row.norm) }}</td>
    <td class="number">{{ "" if row.rank is none else "%.1f %%" | format(row.rank * 100) }}</td>
    <td class="number">{{ "" if row.energy is none else row.energy }}</td>
    <td class="number">{{ "" if row.intruders is none else row.intruders }}</td></tr>
{% endfor %}
</table></details>
{% endfor %}
{% if config %}
<h2>Settings that differ</h2>
<table class="card"><tr><th>key</th><th>A</th><th>B</th></tr>
{% for row in config %}
  <tr><td><code>{{ row.key }}</code></td><td class="text">{{ row.a }}</td><td class="text">{{ row.b
  }}</td></tr>
{% endfor %}
</table>
{% endif %}
</main>
</body>
</html>
"""
