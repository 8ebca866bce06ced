"""The documentation names what exists: links, files, config keys, errors and exit codes."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs_code import FENCE, ROOT, pages

PAGES = [str(page.relative_to(ROOT)) for page in pages()]
TREES = ("rft", "tests", "benchmarks", "examples", "docs", "scripts")


@cache
def prose(page: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("\n", (ROOT / page).read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule, which Sphinx is set to as well."""
    headings = re.findall(r"^#+ (.*)$", prose(str(page.relative_to(ROOT))), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_local_links_lead_somewhere(page: str) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.resolve())):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    named = re.findall(rf"`((?:{'|'.join(TREES)})/[\w./-]+)`", prose(page))
    examples = {"rft/algorithms/best_baseline.py", "examples/online/NAME.yaml"}
    assert [n for n in named if not (ROOT / n).exists() and n not in examples] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p != "docs/architecture.md"])  # it names modules
def test_config_keys_that_a_page_names_exist(page: str) -> None:
    from rft.algorithms import ALGORITHMS
    from rft.config.load import describe_fields

    keys = {key for key, _, _ in describe_fields()}
    keys |= {f"algorithm.{name}" for kind in ALGORITHMS.values() for name in kind.__dataclass_fields__}
    keys |= {
        "algorithm.name",
        "algorithm.gamma",
        *(f"learner.strategy.{n}" for n in ("name", "mask", "tuned")),
    }
    sections = {key.split(".")[0] for key in keys}
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?::[^`]*|=[^`]*)?`", prose(page))
    unknown = [n for n in named if n.split(".")[0] in sections and n not in keys]
    foreign = {n for n in unknown if page == "docs/coming-from.md" and is_foreign(n)}
    files = (".py", ".md", ".yaml", ".jsonl", ".json")
    assert [n for n in unknown if n not in foreign and not n.endswith(files)] == []


def is_foreign(key: str) -> bool:
    """Whether a key of verl or OpenRLHF is in the first column of its table."""
    rows = re.findall(r"^\|([^|]*)\|", prose("docs/coming-from.md"), re.MULTILINE)
    return any(key in row for row in rows)


# -- errors --------------------------------------------------------------------------------------------


@cache
def exceptions() -> set[str]:
    """The names of all exception classes in rft."""
    found = re.compile(r"^\s*class (\w+)\(([\w., ]+)\):", re.MULTILINE)
    bases: dict[str, list[str]] = {}
    for file in (ROOT / "rft").rglob("*.py"):
        for name, parents in found.findall(file.read_text(encoding="utf-8")):
            bases[name] = [parent.strip().split(".")[-1] for parent in parents.split(",")]

    def is_exception(name: str) -> bool:
        known: Any = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, BaseException):
            return True
        return any(is_exception(parent) for parent in bases.get(name, []))

    return {name for name in bases if is_exception(name)}


def test_every_exception_is_explained_and_every_explained_one_exists() -> None:
    text = prose("docs/troubleshooting.md")
    ending, _, inner = text.partition("## Exceptions that never end a run")
    explained = set(re.findall(r"^### (\w+)$", ending, re.MULTILINE))
    caught = {
        name
        for row in re.findall(r"^\| (`.*?`) \|", inner, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert explained | caught == exceptions()
    assert not explained & caught


@pytest.mark.parametrize(("section", "code"), [("During the run", 1), ("Faults of the machine", 76)])
def test_an_error_is_listed_under_its_exit_code(section: str, code: int) -> None:
    from rft.run_training import report_failure

    text = prose("docs/troubleshooting.md")
    (part,) = re.findall(rf"^## {section}: exit code {code}$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^### (\w+)$", part, re.MULTILINE)
    assert names
    for file in (ROOT / "rft").rglob("*.py"):
        for name in re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            if name in names:
                module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                kind = getattr(importlib.import_module(module), name)
                assert report_failure(kind.__new__(kind)) == code, name


def test_every_exit_code_is_explained() -> None:
    """The constants of the modules that decide on an exit code, and the returns of the command line."""
    named = r"^(?:STOPPED|DONE, FAILED, USER_ERROR, FAULT) = ([\d, ]+)"
    codes: set[int] = set()
    for file in (ROOT / "rft").rglob("*.py"):
        for numbers in re.findall(named, file.read_text(encoding="utf-8"), re.MULTILINE):
            codes |= {int(n) for n in numbers.split(",")}
    for node in ast.walk(ast.parse((ROOT / "rft" / "cli.py").read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Return)
            and isinstance(node.value, ast.Constant)
            and type(node.value.value) is int
        ):
            codes.add(node.value.value)
    page = {int(n) for n in re.findall(r"^\| (\d+) \|", prose("docs/troubleshooting.md"), re.MULTILINE)}
    assert page == codes


def test_every_guard_is_explained() -> None:
    from rft.config.metrics import GuardsConfig

    actions = {n for n, f in GuardsConfig.model_fields.items() if "action when" in (f.description or "")}
    guards = set(
        re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", prose("docs/troubleshooting.md"), re.MULTILINE)
    )
    assert actions <= guards
