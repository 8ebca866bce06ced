"""Every code block of the documentation works. The word after its language says how it is tested.

run     Python is executed and prints its `# ...` lines; `rft` commands succeed. With a file name the block is
        written to that file first. `text run` holds lines that the command above it prints
check   YAML is a valid part of a config; commands, options, files and keys exist; `json check KIND` is read
shown   output and diagrams: not tested. A block without a language counts as shown
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL
)
MARKS = ("run", "check", "shown")


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of the first line of the text
    language: str
    mark: str
    argument: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """All pages that are written for readers."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> Iterator[Block]:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            language, mark, argument, *_ = [*match["info"].split(), "", "", ""]
            if language.startswith("{"):  # a Sphinx directive
                continue
            line = text[: match.start("text")].count("\n") + 1
            name = str(page.relative_to(ROOT))
            yield Block(name, line, language, mark if language else "shown", argument, match["text"])


BLOCKS = list(blocks())


def marked(mark: str, *languages: str) -> Any:
    """Parametrize a test with the blocks of a mark and of these languages."""
    chosen = [b for b in BLOCKS if b.mark == mark and b.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=[b.id for b in chosen])


@pytest.mark.parametrize("block", BLOCKS, ids=[b.id for b in BLOCKS])
def test_a_block_is_marked_run_check_or_shown(block: Block) -> None:
    assert block.mark in MARKS, f"write ```{block.language} {'|'.join(MARKS)}"
    known = {"run": {"python", "bash", "json", "yaml", "text"}, "check": {"yaml", "bash", "json"}}
    assert block.language in known.get(block.mark, {block.language})


def test_the_page_of_rewards_has_an_example_for_each_family() -> None:
    text = "\n".join(b.text for b in BLOCKS if b.page == "docs/rewards.md" and b.language == "python")
    families = ("math", "code", "translated_code", "format", "judge", "process", "combine", "verl:")
    assert [name for name in (*families, "short_and_right") if name not in text] == []


# -- run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Run the blocks of all pages in one process, in a folder per page: {id: {"stdout", "error"}}."""
    top, jobs = tmp_path_factory.mktemp("pages"), []
    for block in BLOCKS:
        folder = top / block.page.replace("/", "-")
        if block.mark != "run" or block.language == "text":
            continue
        if not folder.exists():
            folder.mkdir()
            (folder / "examples").symlink_to(ROOT / "examples")
        if block.argument:
            (folder / block.argument).write_text(block.text, encoding="utf-8")
        else:
            jobs.append({"id": block.id, "folder": str(folder), "line": block.line, "text": block.text})
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=env,
        timeout=580,  # a busy machine takes minutes for the runs
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)  # the first of them runs the blocks of all pages
@marked("run", "python", "bash")
def test_a_block_runs_and_prints_what_it_says(block: Block, results: dict[str, dict[str, str]]) -> None:
    if block.argument:
        compile(block.text, block.id, "exec")
        return
    result = results[block.id]
    if "this machine cannot protect" in result["error"]:
        pytest.skip("no sandbox on this machine: " + result["error"].strip().splitlines()[-1])
    assert not result["error"], result["error"]
    if block.language == "python":
        assert result["stdout"].splitlines() == re.findall(r"^# (.*)$", block.text, re.MULTILINE)


@pytest.mark.timeout(600)
@marked("run", "text")
def test_shown_output_is_what_the_command_above_prints(
    block: Block, results: dict[str, dict[str, str]]
) -> None:
    above = [b for b in BLOCKS if b.page == block.page and b.mark == "run" and b.line < block.line]
    printed = results[above[-1].id]["stdout"].splitlines()
    assert [line for line in block.text.splitlines() if line not in printed] == []


def run_jobs() -> None:
    """The child process: run each job of stdin in its folder, then print all results as one line of JSON."""
    import traceback

    from rft.cli import main
    from rft.utils.ray_cluster import ray_cluster

    results = {}
    cluster = ExitStack()
    cluster.enter_context(ray_cluster(None, 0.3))  # one for all runs
    for job in json.loads(sys.stdin.read()):
        stdout, error = io.StringIO(), ""
        os.chdir(job["folder"])
        try:
            with redirect_stdout(stdout):
                if job["text"].startswith("rft "):
                    for command in commands(job["text"]):
                        assert command[0] == "rft", f"only rft commands are run, not {command[0]}"
                        assert main(command[1:]) == 0, f"{shlex.join(command)} failed"
                else:
                    code = compile("\n" * (job["line"] - 1) + job["text"], job["id"], "exec")
                    exec(code, {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
        results[job["id"]] = {"stdout": stdout.getvalue(), "error": error}
    cluster.close()
    print(json.dumps(results))


# -- check ---------------------------------------------------------------------------------------------


@marked("check", "yaml")
def test_yaml_is_a_valid_part_of_a_config(block: Block) -> None:
    from rft.config.load import parse_config
    from rft.utils import yaml_files

    parse_config({"algorithm": "grpo", **yaml_files.parse(block.text)})


@marked("check", "bash")
def test_commands_exist(block: Block) -> None:
    for command in commands(block.text):
        check_command(command)


@marked("check", "json")
def test_rows_are_read(block: Block, tmp_path: Path) -> None:
    from rft.config.data import DataConfig
    from rft.data import load_groups, load_prompts
    from tests.cases.families import TOOLS, make_tokenizer

    file = tmp_path / "rows.jsonl"
    file.write_text(block.text, encoding="utf-8")
    config, count = DataConfig(path=str(file)), len(block.text.splitlines())
    kind: Any = block.argument
    tokenizer = make_tokenizer(TOOLS) if kind == "tools" else make_tokenizer()
    if kind == "prompts":
        assert len(load_prompts(config, tokenizer)) == count
        return
    groups = load_groups(config, tokenizer, "sft" if kind == "tools" else kind)
    assert len(groups) == count
    if kind == "sft":  # the trained part of every example is the answer 4
        for completion in (c for group in groups for c in group.completions):
            mask = completion.mask or [True] * len(completion.tokens)
            trained = [t for t, m in zip(completion.tokens, mask, strict=True) if m]
            assert tokenizer.decode(trained) == "4<|im_end|>"


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, as words; comments are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(command: list[str]) -> None:
    """Raise where a program, target, option, file or config key does not exist."""
    program, *rest = command
    while re.match(r"[A-Z_]+=", program):  # environment variables
        program, *rest = rest
    if program in ("rft", ".venv/bin/rft"):
        check_rft(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [w for w in rest if "=" not in w and w not in targets] == []
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {extra for word in rest for extra in re.findall(r"\.\[(.*)\]", word)}
        assert [
            e for e in ",".join(extras).split(",") if e and e not in project["optional-dependencies"]
        ] == []
    elif program in ("python", ".venv/bin/python", ".venv/bin/pytest", "pytest", "bash"):
        files = [w for w in rest if w.endswith((".py", ".sh")) or w.startswith("tests/")]
        modules = [b for a, b in pairwise(rest) if a == "-m" and b.startswith("rft.")]
        paths = [w.split("::")[0] for w in files] + [m.replace(".", "/") + ".py" for m in modules]
        assert [p for p in paths if not (ROOT / p).exists()] == []
    else:
        assert program in ("git", "cd", "ray", "docker", "pre-commit", ".ci/run"), f"unknown: {program}"


def check_rft(words: list[str]) -> None:
    from rft.cli import _arguments
    from rft.config.load import apply_overrides, load_config, parse_config

    args = _arguments(words)  # raises SystemExit for an unknown command or option
    if not hasattr(args, "config"):
        return
    if args.config.startswith("examples/"):
        load_config(ROOT / args.config, args.overrides)
    else:  # a config that the reader writes
        parse_config(apply_overrides({"algorithm": "grpo"}, args.overrides))


if __name__ == "__main__":
    run_jobs()
