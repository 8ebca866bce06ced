"""Write every config key as Markdown, for the documentation site."""

from __future__ import annotations

from rft.config.load import describe_fields


def markdown() -> str:
    """Return a heading and a definition list of keys per top-level section, in the order of `rft config`."""
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, default, meaning in describe_fields():
        sections.setdefault(key.split(".")[0], []).append((key, default, meaning))
    top_level = [rows[0] for rows in sections.values() if len(rows) == 1]
    lines = ["## Top level", "", *map(_entry, top_level)]
    for name, ((_, _, meaning), *rows) in sections.items():
        if rows:
            lines += [f"## {name}", "", f"{meaning[:1].upper()}{meaning[1:]}.", "", *map(_entry, rows)]
    return "\n".join(lines)


def _entry(row: tuple[str, str, str]) -> str:
    key, default, meaning = row
    shown = {"": "", "required": " (required)"}.get(default, f" = `{default}`")
    return f"`{key}`{shown}\n: {meaning}\n"
