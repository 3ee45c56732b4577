"""The library's own sources, read as syntax trees."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def source_files() -> list[Path]:
    """Return every module of both packages."""
    return sorted([*(ROOT / "distrib").rglob("*.py"), *(ROOT / "launcher").rglob("*.py")])


def place(file: Path) -> str:
    """Return a path as the repository names it: "distrib/errors.py"."""
    return file.relative_to(ROOT).as_posix()


def below(*folders: str) -> tuple[Path, ...]:
    """Return the modules of a package's folders."""
    return tuple(file for file in source_files() if place(file).startswith(folders))


@functools.cache
def tree_of(file: Path) -> ast.Module:
    """Parse a module, once."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def compared_strings(tree: ast.AST) -> Iterator[str]:
    """Yield each string constant that something is compared with: by ==, in, or a case of match."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                yield from _strings(side)
        elif isinstance(node, ast.MatchValue):
            yield from _strings(node.value)


def _strings(node: ast.expr) -> Iterator[str]:
    elements = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    for element in elements:
        if isinstance(element, ast.Constant) and isinstance(element.value, str):
            yield element.value


def names_used(tree: ast.AST) -> Iterator[str]:
    """Yield each identifier and each dotted name: "torch", "torch.cuda", "torch.cuda.is_available"."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield dotted(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def dotted(node: ast.expr) -> str:
    """Return "a.b.c" of nested attributes; what is no name at the root becomes "?"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"
