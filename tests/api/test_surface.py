"""The public names of `rft`: which there are, that importing them is quick, and that they are typed."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import rft
from rft.algorithms import ALGORITHMS
from rft.api.inputs import SHORTHANDS, Arguments, Sections
from rft.config.load import describe_fields, model_of
from rft.config.schema import Config

ROOT = Path(__file__).parents[2]
NAMES = {
    "Callback": ["on_evaluate", "on_save", "on_step_end", "on_train_begin", "on_train_end"],
    "CallbackError": [],
    "Config": ["environments", "load", "replace", "run_dir", "single_turn", "to_dict"],
    "ConfigError": [],
    "Run": [
        "checkpoint", "config", "events", "export", "metrics", "model_path", "name", "report", "result",
        "resume", "samples", "state", "step", "stop", "to_pandas",
    ],
    "__version__": None,
    "algorithms": None,
    "check": None,
    "config": None,
    "evaluate": None,
    "load_reward": None,
    "rewards": None,
    "train": None,
}  # fmt: skip
SIGNATURES = {
    "train": "config model data eval_data rewards algorithm environment tools callbacks resume sections",
    "check": "config model data eval_data rewards algorithm environment tools sections",
    "evaluate": "model data rewards config sections",
    "load_reward": "spec base_dir options",
}


def test_the_public_names() -> None:
    assert sorted(rft.__all__) == sorted(NAMES)
    for name, methods in NAMES.items():
        value = getattr(rft, name)
        if methods is not None:
            hidden = {"model_config", *getattr(value, "model_fields", ())}
            assert sorted(m for m in {*vars(value)} - hidden if not m.startswith("_")) == methods, name
    assert {n: " ".join(inspect.signature(getattr(rft, n)).parameters) for n in SIGNATURES} == SIGNATURES


def test_every_public_function_is_documented_and_typed() -> None:
    for name, methods in NAMES.items():
        value = getattr(rft, name)
        for part in [value] if methods is None else [value, *(getattr(value, m) for m in methods)]:
            if not isinstance(part, str):
                assert part.__doc__, (name, part)
            if inspect.isfunction(part):
                parameters = inspect.signature(part).parameters.values()
                untyped = [p.name for p in parameters if p.annotation is p.empty]
                assert untyped in ([], ["self"]), part
    assert (ROOT / "rft" / "py.typed").exists()


def test_importing_rft_is_quick_and_a_name_loads_on_first_use() -> None:
    code = (
        "import sys, rft\n"
        "heavy = {'torch', 'ray', 'pydantic', 'transformers', 'pandas', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "rft.ConfigError; assert not heavy & set(sys.modules)\n"
        "assert rft.algorithms.GRPO(beta=0.5).beta == 0.5 and rft.train.__module__ == 'rft.api.training'\n"
        "assert rft.config.Config is rft.Config and callable(rft.train)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


def test_an_unknown_name_is_refused() -> None:
    try:
        rft.trian  # type: ignore[attr-defined]  # noqa: B018
    except AttributeError as error:
        assert "trian" in str(error)


def test_every_section_of_the_config_is_an_argument() -> None:
    named = {f.name for f in fields(Arguments)} - {"sections", "eval_data", "tools"}
    sections = set(get_type_hints(Sections))
    assert named | sections - set(SHORTHANDS) == set(Config.model_fields)
    assert sections >= set(SHORTHANDS)
    keys = {key for key, _, _ in describe_fields()}
    assert set(SHORTHANDS.values()) <= keys


def test_the_guide_lists_the_shorthands() -> None:
    guide = (ROOT / "docs" / "guides" / "python.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|$", guide, re.MULTILINE)) == SHORTHANDS


def test_every_section_has_an_exported_class() -> None:
    kinds = {model_of(info.annotation) for info in Config.model_fields.values()} - {None}
    assert len(kinds) >= 14 and all(getattr(rft.config, kind.__name__) is kind for kind in kinds)


def test_every_algorithm_is_exported() -> None:
    assert {kind.__name__ for kind in ALGORITHMS.values()} <= set(rft.algorithms.__all__)
