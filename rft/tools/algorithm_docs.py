"""Generate docs/algorithms.md: python -m rft.tools.algorithm_docs > docs/algorithms.md"""

from __future__ import annotations

import inspect
import json
import sys
import typing
from dataclasses import fields
from types import UnionType
from typing import Any, Literal

from rft.algorithms import ALGORITHMS, Algorithm
from rft.algorithms.base import default_of
from rft.algorithms.extras import compares_distributions

HEAD = """\
# Algorithms

Generated from the code by `python -m rft.tools.algorithm_docs > docs/algorithms.md`; a test compares the two.
In a config, name an algorithm with its settings: `algorithm: {name: grpo, beta: 0.01}`.
[Add an algorithm](add-an-algorithm.md) explains how to write one.
"""
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def page() -> str:
    """Return the page in Markdown."""
    parts = [HEAD, _overview()]
    for online, title in ((True, "Online: the policy samples"), (False, "Offline: a dataset")):
        parts.append(f"## {title}\n")
        parts += [_section(name, cls) for name, cls in ALGORITHMS.items() if cls.online is online]
    return "\n".join(parts)


def _overview() -> str:
    rows = ["| name | in a line | needs | unit | group |", "|---|---|---|---|---|"]
    for name, cls in ALGORITHMS.items():
        group = f"{cls.min_generations}+" if cls.online else ""
        rows.append(f"| [`{name}`](#{name}) | {_line(cls)} | {_needs(cls)} | {cls.unit} | {group} |")
    return "\n".join(rows) + "\n"


def _line(cls: type[Algorithm]) -> str:
    """Return the first line of the module docstring, or of the class if a module holds several algorithms."""
    alone = sum(other.__module__ == cls.__module__ for other in ALGORITHMS.values()) == 1
    doc = (sys.modules[cls.__module__].__doc__ if alone else cls.__doc__) or ""
    line = doc.strip().splitlines()[0].split(": ", 1)[-1]
    return line[0].upper() + line[1:]


def _needs(cls: type[Algorithm]) -> str:
    needs = cls().needs
    words = {"rewards": "rewards", "ref_logps": "reference", "values": "critic", "old_entropy": "entropy"}
    needed = [word for field, word in words.items() if field in needs]
    if compares_distributions(cls()):
        needed.append("vocabulary of the reference")
    return ", ".join(needed + (["demonstrations"] if cls.needs_demonstrations else []))


def _section(name: str, cls: type[Algorithm]) -> str:
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    hints = typing.get_type_hints(cls)
    for f in sorted(fields(cls), key=lambda f: f.name not in cls.__annotations__):
        doc = f.metadata.get("doc", "")
        rows.append(
            f"| `{f.name}` | {_value(default_of(f))} | {_values(hints[f.name], f.metadata)} | {doc} |"
        )
    module = cls.__module__.replace(".", "/")
    where = f"[{module}.py](../{module}.py)"
    text = inspect.cleandoc(cls.__doc__ or "").replace("\n\n    ", "\n\n")
    settings = "\n".join(rows) if fields(cls) else "No settings."
    return f"### {name}\n\n{where}\n\n{text}\n\n{settings}\n"


def _value(x: Any) -> str:
    if isinstance(x, str):
        return f"`{x}`" if x.strip() else f"`{json.dumps(x)}`"
    return f"`{json.dumps(x)}`"


def _values(hint: Any, bounds: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{v}`" for v in typing.get_args(hint))
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_values(h, bounds) for h in typing.get_args(hint))
    if hint is type(None):
        return "`null`"
    limits = ", ".join(f"{sign} {bounds[k]:g}" for k, sign in BOUNDS.items() if k in bounds)
    name = getattr(hint, "__name__", str(hint))
    return f"{name} {limits}".strip()


if __name__ == "__main__":
    sys.stdout.write(page())
