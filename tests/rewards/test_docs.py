"""Every Python example of docs/rewards.md and docs/sandbox.md runs and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = [
    block
    for page in ("rewards.md", "sandbox.md")
    for block in re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE
    )
]


def test_the_page_has_an_example_for_each_family() -> None:
    text = "\n".join(BLOCKS)
    for name in (
        "math",
        "code",
        "translated_code",
        "format",
        "judge",
        "process",
        "combine",
        "short_and_right",
        "verl:",
    ):
        assert name in text


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_prints_what_it_says(block: str, tmp_path: Path) -> None:
    expected = re.findall(r"^# (.*)$", block, re.MULTILINE)
    script = tmp_path / "example.py"
    script.write_text(block)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, env=env)
    if "this machine cannot protect" in done.stderr:
        pytest.skip("no sandbox on this machine: " + done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected
