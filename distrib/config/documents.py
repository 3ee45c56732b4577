"""YAML and JSON texts as trees in which every value knows its line.

YAML is read by version 1.2's core rules, so that only `true` and `false` are booleans, `no` is a text and `1:2` is no
number. Anchors, tags of other types and repeated keys are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from distrib.errors import ConfigError

_TAG: Final = "tag:yaml.org,2002:"
# https://yaml.org/spec/1.2.2/#1032-tag-resolution
_CORE: Final = {
    "null": re.compile(r"(null|Null|NULL|~|)\Z"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    # Longer ones are texts, which no number may be: Python does not write them back, and as a float they are infinite.
    "int": re.compile(r"([-+]?[0-9]{1,999}|0o[0-7]{1,999}|0x[0-9a-fA-F]{1,999})\Z"),
    "float": re.compile(
        r"(?![-+]?[0-9]{1000})([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
    ),
}


_SYNTAX_FIX: Final = "correct the file there"


@dataclass(frozen=True)
class Located:
    """A value and its line; inside a list or mapping are `Located` again."""

    value: Any
    line: int


@dataclass(frozen=True)
class Document:
    """What a file says, and which of its keys it says twice."""

    entries: Mapping[str, Located]
    problems: tuple[ConfigError, ...] = ()


class _Refusal(yaml.MarkedYAMLError):
    """Correct YAML that a configuration has no use for."""


class _CoreRules:
    """Decides by YAML 1.2 which type a scalar without a tag has, for reading and writing alike."""

    def resolve(self, kind: type[Node], value: str | None, implicit: Any) -> str:
        if kind is ScalarNode:
            return _TAG + (_core_type(value or "") if implicit[0] else "str")
        return _TAG + ("seq" if kind is SequenceNode else "map")


class _Loader(_CoreRules, yaml.BaseLoader):
    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _Refusal(problem="aliases (*name) are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(_CoreRules, yaml.SafeDumper):
    def represent_scalar(self, tag: str, value: str, style: str | None = None) -> ScalarNode:
        # Outside double quotes a line separator would be read back as a space.
        return super().represent_scalar(tag, value, style or (None if value.isprintable() else '"'))


def parse(text: str, path: Path) -> Document:
    """Read a whole file; a `.json` one must be JSON, any other is YAML.

    Raises:
        ConfigError: if the text cannot be understood, with the line.
    """
    if path.suffix == ".json":
        _check_json(text, path)
        text = _as_yaml(text)
    problems: list[ConfigError] = []
    try:
        root = yaml.compose(text, Loader=_Loader)
        tree = Located(None, 1) if root is None else _located(root, path, problems)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, path) from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = (
            "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        )
        raise ConfigError("D0103", f"not YAML: {reason}", where=str(path), fix=_SYNTAX_FIX) from None
    if tree.value is None:
        return Document({})
    if not isinstance(tree.value, dict):
        raise ConfigError(
            "D0103",
            f"the file holds {'a list' if isinstance(tree.value, list) else 'one value'}; expected keys with values",
            where=f"{path}:{tree.line}",
            fix="write one 'key: value' a line; docs/config.md lists every key",
        )
    return Document(tree.value, tuple(problems))


def parse_scalar(text: str) -> Any:
    """Read the text of a flag or variable as a file would read it; what is not YAML is the text itself."""
    problems: list[ConfigError] = []
    try:
        root = yaml.compose(text, Loader=_Loader)
        value = None if root is None else plain(_located(root, Path(), problems))
    except (yaml.YAMLError, RecursionError):
        return text
    return text if problems else value


def plain(located: Located) -> Any:
    """Drop the lines from a tree."""
    if isinstance(located.value, dict):
        return {name: plain(inner) for name, inner in located.value.items()}
    if isinstance(located.value, list):
        return [plain(inner) for inner in located.value]
    return located.value


def dump(tree: Mapping[str, Any]) -> str:
    """Write a tree as YAML that `parse` reads back to the same values."""
    if not tree:
        return ""
    return str(yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def _located(node: Node, path: Path, problems: list[ConfigError]) -> Located:
    line, tag = node.start_mark.line + 1, node.tag.removeprefix(_TAG)
    if isinstance(node, SequenceNode) and tag == "seq":
        return Located([_located(inner, path, problems) for inner in node.value], line)
    if isinstance(node, MappingNode) and tag == "map":
        return Located(_mapping(node, path, problems), line)
    if isinstance(node, ScalarNode) and (tag == "str" or (tag in _CORE and _CORE[tag].match(node.value))):
        return Located(_scalar(str(node.value), tag), line)
    raise _Refusal(problem=f"the tag {node.tag} is not supported here", problem_mark=node.start_mark)


def _mapping(node: MappingNode, path: Path, problems: list[ConfigError]) -> dict[str, Located]:
    found: dict[str, Located] = {}
    first: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            raise _Refusal(problem="a key must be a name", problem_mark=key.start_mark)
        name, line = str(key.value), key.start_mark.line + 1
        if name in found:
            problems.append(
                ConfigError(
                    "D0104",
                    f"key {name!r} stands here again; it was given at line {first[name]}",
                    where=f"{path}:{line}",
                    fix="remove one of them",
                )
            )
            continue
        first[name], inner = line, _located(value, path, problems)
        # The key's own line, not that of a value that starts further down.
        found[name] = Located(inner.value, line)
    return found


def _scalar(text: str, kind: str) -> str | int | float | bool | None:
    if kind == "int":
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if kind == "bool":
        return text.lower() == "true"
    return None if kind == "null" else _joined(text)


def _joined(text: str) -> str:
    """Join the two halves as which JSON writes a character beyond 16 bits."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _core_type(text: str) -> str:
    return next((name for name, pattern in _CORE.items() if pattern.match(text)), "str")


def _check_json(text: str, path: Path) -> None:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        problem = f"not JSON: {error.msg} at column {error.colno}"
        raise ConfigError("D0103", problem, where=where, fix=_SYNTAX_FIX) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("D0103", f"not JSON: {error}", where=str(path), fix=_SYNTAX_FIX) from None


def _as_yaml(text: str) -> str:
    """Rewrite correct JSON so that YAML reads the same: no tabs (between values), all else in ASCII (in texts)."""
    plain_text = text.replace("\t", " ").encode("ascii", "backslashreplace").decode("ascii")
    return plain_text.replace("\x7f", "\\x7f")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _syntax_error(error: yaml.MarkedYAMLError, path: Path) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = error.problem or error.context or "cannot be read"
    if isinstance(error, _Refusal):
        return ConfigError("D0103", problem, where=where, fix="write the value itself")
    is_tab = "'\\t'" in problem
    return ConfigError(
        "D0103",
        f"not YAML: {problem}",
        where=where,
        fix="indent with spaces: YAML does not allow tabs" if is_tab else _SYNTAX_FIX,
    )
