"""Read and write YAML strictly: UTF-8 text, no duplicate keys, scalars as expected in a config."""

from __future__ import annotations

import codecs
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class YamlError(ValueError):
    """Text that is not YAML, or that has a duplicate key; the message names the lines."""


# YAML 1.1 (PyYAML) reads `1e-6` as text, `2026-11-29` as a date, `010` as 8 and `1:30` as 90.
# In a config the first is a number, the second and the last are names, and `010` is 10 (as in YAML 1.2).
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$")
_REPLACED = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
_RESOLVERS = {
    first: [entry for entry in entries if entry[0] not in _REPLACED]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _first in "-+.0123456789":
    _RESOLVERS[_first].append(("tag:yaml.org,2002:float", _FLOAT))
    _RESOLVERS[_first].append(("tag:yaml.org,2002:int", _INT))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but duplicate keys are an error: PyYAML would drop the first."""

    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, identity = key.start_mark.line + 1, (key.tag, key.value)
            if identity in lines:
                first = lines[identity]
                where = f"in line {first} and in line {line}" if first != line else f"both in line {line}"
                raise YamlError(
                    f"key {key.value!r} is given twice, {where}; keep one, with all that belongs under it"
                )
            lines[identity] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "").lower()
        base = {"0x": 16, "0o": 8, "0b": 2}.get(text.lstrip("+-")[:2], 10)
        return int(text, base)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise YamlError(
                f"line {node.start_mark.line + 1}: half of a surrogate pair is not a character; "
                "write the character itself"
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values of a node with its aliases expanded. Raises YamlError beyond the bound."""
    known = counted.get(id(node))
    line = node.start_mark.line + 1
    if known == 0:
        raise YamlError(
            f"line {line}: the value contains itself (an alias to one of its parents); write it out"
        )
    if known is not None:
        return known
    counted[id(node)] = 0  # being counted
    total = 1
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            for part in item if isinstance(item, tuple) else (item,):
                total += _count_values(part, counted)
    if total > MOST_VALUES:
        raise YamlError(
            f"line {line}: its aliases (*name), written out, hold more than {MOST_VALUES:,} values; "
            "use fewer aliases"
        )
    counted[id(node)] = total
    return total


class _Dumper(yaml.SafeDumper):
    """Quote text that `_Loader` would read as a number."""

    yaml_implicit_resolvers = _RESOLVERS


MOST_VALUES = 1_000_000


def parse(text: str) -> Any:
    """Parse a YAML text. Raises YamlError, also if aliases make it larger than `MOST_VALUES`."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        where = f"line {at.line + 1}, column {at.column + 1}: " if at else ""
        raise YamlError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise YamlError(" ".join(str(error).split())) from None
    except (ValueError, TypeError) as error:  # a scalar that only looks like a number; a list as a key
        raise error if isinstance(error, YamlError) else YamlError(str(error)) from None


def read(path: Path) -> Any:
    """Parse a YAML file (UTF-8, with or without a byte order mark). Raises OSError, YamlError."""
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return parse(raw.decode("utf-16"))
    try:
        return parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise YamlError(
            f"line {line} is not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None


def dump(value: Any, *, flow: bool = False) -> str:
    """Write plain data as YAML that `parse` reads back unchanged; keys keep their order; `flow`: one line."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow))
