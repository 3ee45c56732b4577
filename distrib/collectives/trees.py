"""Nested containers of tensors: take the tensors out, put others in, describe the structure.

Handles mappings (dict, OrderedDict, UserDict and what derives from them), dataclasses, named tuples, lists and
tuples. Anything else that is no tensor is a constant and stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch

Tree = TypeVar("Tree")


def tensors(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of `tree` in a fixed order."""
    return list(_walk(tree))


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Tree) -> Tree:
    """Return a copy of `tree` with `function` applied to each tensor; containers keep their types."""
    if isinstance(tree, torch.Tensor):
        return cast("Tree", function(tree))
    children = _children(tree)
    if children is None:
        return tree
    return cast(
        "Tree", _rebuild(tree, {key: map_tensors(function, child) for key, child in children.items()})
    )


def replace_tensors(tree: Tree, new: Iterator[torch.Tensor]) -> Tree:
    """Return a copy of `tree` whose tensors are drawn from `new`, in the order of `tensors`."""
    return map_tensors(lambda _: next(new), tree)


def constants(tree: Any) -> list[Any]:
    """Return what is neither a tensor nor a container, in the order of `tensors`."""
    children = _children(tree)
    if children is None:
        return [] if isinstance(tree, torch.Tensor) else [tree]
    return [x for child in children.values() for x in constants(child)]


def structure(tree: Any, *, ragged: bool = False, sizes: bool = True) -> str:
    """Describe containers, dtypes and shapes in a few words; equal text means compatible trees.

    Args:
        tree: What to describe.
        ragged: Whether dim 0 may differ between ranks, so that it is written as "*".
        sizes: False writes "*" for every dim.
    """
    if isinstance(tree, torch.Tensor):
        return _tensor_text(tree, ragged=ragged, sizes=sizes)
    children = _children(tree)
    if children is None:
        return type(tree).__name__
    inside = ", ".join(
        f"{_key_text(key)}: {structure(child, ragged=ragged, sizes=sizes)}" for key, child in children.items()
    )
    return f"{type(tree).__name__}[{inside}]"


def described(tree: Any, *, ragged: bool = False, sizes: bool = True, path: str = "") -> dict[str, str]:
    """Return the text of each leaf by its path, such as "batch.ids": "int64(4, 3)"; "" is a tree that is one leaf."""
    children = _children(tree)
    if children is None or not children:
        return {path: structure(tree, ragged=ragged, sizes=sizes)}
    found: dict[str, str] = {}
    for key, child in children.items():
        inner = f"{path}.{_key_text(key)}" if path else _key_text(key)
        found.update(described(child, ragged=ragged, sizes=sizes, path=inner))
    return found


def _tensor_text(x: torch.Tensor, *, ragged: bool, sizes: bool) -> str:
    shape = [str(n) if sizes else "*" for n in x.shape]
    if ragged:
        shape = ["*", *shape[1:]]
    return f"{str(x.dtype).removeprefix('torch.')}({', '.join(shape)})"


def _key_text(key: Any) -> str:
    """Write a key so that no other key, and no other tree, has the same text."""
    return key if isinstance(key, str) and key.isidentifier() else repr(key)


def _walk(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
        return
    for child in (_children(tree) or {}).values():
        yield from _walk(child)


def _children(tree: Any) -> Mapping[Any, Any] | None:
    """Return key -> child of a container, None for a constant."""
    if isinstance(tree, Mapping):
        return tree
    if isinstance(tree, (list, tuple)):
        return dict(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return None


def _rebuild(tree: Any, children: Mapping[Any, Any]) -> Any:
    if isinstance(tree, Mapping):
        return _rebuild_mapping(tree, children)
    if isinstance(tree, (list, tuple)):
        values = list(children.values())
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    new = copy.copy(tree)
    for name, value in children.items():
        object.__setattr__(new, name, value)  # frozen dataclasses too
    return new


def _rebuild_mapping(tree: Mapping[Any, Any], children: Mapping[Any, Any]) -> Any:
    if not hasattr(tree, "__setitem__"):
        return dict(children)
    # A copy keeps what the constructor would not: default factories, encodings, attributes.
    if isinstance(tree, (dict, UserDict)):
        new: Any = copy.copy(tree)
    else:  # a shallow copy may share the items; the memo keeps the children themselves from being copied
        new = copy.deepcopy(tree, {id(child): child for child in tree.values()})
    for key, value in children.items():
        new[key] = value
    return new
