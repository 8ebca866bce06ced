"""The docs pages say what the code does."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from worlds import chosen, hand_batch, hand_policy

from rft.algorithms import ALGORITHMS
from rft.tools.algorithm_docs import page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_algorithms_is_fresh() -> None:
    stale = "docs/algorithms.md is stale; run: python -m rft.tools.algorithm_docs > docs/algorithms.md"
    assert (ROOT / "docs" / "algorithms.md").read_text() == page(), stale


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_and_setting_is_explained(name: str) -> None:
    cls = ALGORITHMS[name]
    assert len(cls.__doc__ or "") > 40 and not (cls.__doc__ or "").startswith(f"{cls.__name__}(")
    missing = [f.name for f in fields(cls) if not f.metadata.get("doc")]
    assert not missing


def test_the_example_of_an_algorithm_works(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "add-an-algorithm.md").read_text()
    assert len(text.splitlines()) < 60
    (code,) = re.findall(r"```python run\n(.*?)```", text, flags=re.DOTALL)
    module = types.ModuleType("best_baseline")
    monkeypatch.setitem(sys.modules, "best_baseline", module)
    exec(compile(code, "add-an-algorithm.md", "exec"), module.__dict__)
    algorithm = module.BestBaseline(scale=0.5)
    batch = algorithm.prepare(hand_batch())
    # a is the best: 0. b: 0.5 * (0 - 1), times its log-prob -3, negated.
    loss = chosen(algorithm.loss(hand_policy(batch), batch), batch)
    assert loss.tolist() == [0.0, 0.0, -1.5]
    assert torch.equal(chosen(batch.advantages, batch), torch.tensor([0.0, 0.0, -0.5]))


def test_algorithms_import_only_torch_and_rft() -> None:
    """Invariant of the house: the math stays readable and testable without the rest."""
    allowed = {"torch", "rft"} | set(sys.stdlib_module_names)
    for path in (ROOT / "rft" / "algorithms").rglob("*.py"):
        found = re.findall(
            r"^\s*(?:from|import) ([a-z_]+(?:\.[a-z_]+)*)", path.read_text(), flags=re.MULTILINE
        )
        strangers = {name for name in found if name.split(".")[0] not in allowed}
        inner = {n for n in found if n.startswith("rft.") and not re.match(r"rft\.(algorithms|batch)", n)}
        assert not strangers and not inner, path.name
        assert len(path.read_text().splitlines()) <= 400
