"""Rewrite the line counts of the reading lists in docs/architecture.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"


def count(section: str) -> str:
    """Fill in the lines of every listed file, and the totals."""
    counts: list[int] = []

    def row(match: re.Match[str]) -> str:
        counts.append(len((ROOT / match[2]).read_text(encoding="utf-8").splitlines()))
        return f"{match[1]}`{match[2]}` | {counts[-1]:,} |"

    section = re.sub(r"^(\| *\d+ *\| *)`(rft/[\w/]+\.py)` *\| *[\d,]* *\|", row, section, flags=re.MULTILINE)
    total = f"**{len(counts)} files, {sum(counts):,} lines**"
    return re.sub(r"\*\*[\d,]+ files, [\d,]+ lines\*\*", total, section)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for path in ("online", "offline"):
        start = page.index(f"<!-- reading list: {path} -->")
        end = page.index("<!-- end -->", start)
        page = page[:start] + count(page[start:end]) + page[end:]
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
