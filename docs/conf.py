"""Sphinx configuration of the documentation site: `make docs` builds it into build/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rft  # noqa: E402
from rft.api import inputs  # noqa: E402
from rft.tools import config_docs  # noqa: E402

project = "rft"
author = "the rft authors"
version = release = rft.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

linkcheck_ignore = [r"https?://"]  # local links only

html_theme = "furo"
html_title = f"rft {version}"
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["rft.css"]
html_theme_options = {"top_of_page_buttons": []}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
autodoc_type_aliases = {name: name for name in vars(inputs) if name.endswith("Argument") or name == "Rows"}
autodoc_default_options = {"members": True}
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True


class ConfigKeys(SphinxDirective):
    """Every config key, section by section: ```{config-keys}```."""

    def run(self) -> list[nodes.Node]:
        text = config_docs.markdown()
        return self.parse_text_to_nodes(text, allow_section_headings=True)


ENTRY = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")  # `name: meaning`, `name, name: meaning`
ERROR = re.compile(r"([A-Z]\w*): (?=\S)")  # in an indented section: `ConfigError: cause`


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring into reStructuredText: it is plain text in which `name: meaning` lines make a list."""
    result: list[str] = []
    in_entry, entry_indent = False, 0
    for line in lines:
        text, indent = _escape(line.strip()), len(line) - len(line.lstrip())
        entry = ENTRY.match(text) or (ERROR.match(text) if indent else None)
        if not text:
            in_entry = False
            result.append("")
        elif text.startswith("- ") or (entry and not (in_entry and indent > entry_indent)):
            if not in_entry:
                result.append("")
            in_entry, entry_indent = True, indent
            if entry and not text.startswith("- "):
                names = ", ".join(f"``{part}``" for part in entry[1].split(", "))
                text = f"- {names}: {text[entry.end() :]}"
            result.append(text)
        elif in_entry:
            result.append(f"  {text}")
        else:
            result.append(text)
            if text.endswith(":"):
                result.append("")
    lines[:] = result


def plain_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Show a type alias inside a union by its name alone (see `autodoc_type_aliases`)."""
    return signature and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature), returns


def _escape(text: str) -> str:
    """Inline markup of reStructuredText that plain text does not mean."""
    code = re.split(r"(`[^`]*`)", text)
    return "".join(
        f"`{part}`" if i % 2 else re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part) for i, part in enumerate(code)
    )


def break_long_code(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Let long code in a table break after a separator (see rft.css); other words stay whole."""
    for table in doctree.findall(nodes.table):
        for code in table.findall(nodes.literal):
            text = code.astext()
            if len(text) > 22:
                code["classes"].append("long")
                parts = re.findall(r"[^/._,=]*[/._,=]*", text)[:-1]
                code.children.clear()
                for part in parts:
                    code += [nodes.Text(part), nodes.raw("", "<wbr>", format="html")]


def caption_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Show the file name of a code block that is marked `run NAME` above it."""
    source[0] = re.sub(
        r"^(`{3,})(\w+) run (\S+)$", r"\1{code-block} \2\n:caption: \3", source[0], flags=re.MULTILINE
    )


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-keys", ConfigKeys)
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("source-read", caption_files)
    app.connect("doctree-resolved", break_long_code)
    return {"parallel_write_safe": True, "parallel_read_safe": True}
