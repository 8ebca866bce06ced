"""The rows that docs/data.md shows are read as it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rft.config.data import DataConfig
from rft.data import load_groups, load_prompts
from tests.cases.families import TOOLS, make_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```json (\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("kind", "rows"), BLOCKS, ids=[kind for kind, _ in BLOCKS])
def test_every_row_of_the_page_is_read(kind: Any, rows: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows, encoding="utf-8")
    config, count = DataConfig(path=str(file)), len(rows.splitlines())
    if kind == "prompts":
        assert len(load_prompts(config, make_tokenizer())) == count
        return
    tokenizer = make_tokenizer(TOOLS) if kind == "tools" else make_tokenizer()
    groups = load_groups(config, tokenizer, "sft" if kind == "tools" else kind)
    assert len(groups) == count
    if kind == "sft":
        trained = [
            tokenizer.decode(
                [t for t, m in zip(c.tokens, c.mask or [True] * len(c.tokens), strict=True) if m]
            )
            for g in groups
            for c in g.completions
        ]
        assert trained == ["4<|im_end|>"] * count


def test_the_page_has_a_block_of_each_kind() -> None:
    assert [kind for kind, _ in BLOCKS] == ["prompts", "sft", "tools", "preference"]
