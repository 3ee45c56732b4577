"""Which modules of a model are gathered and sharded on their own: the units of fully sharded training.

A unit's parameters are whole on every rank only while the unit computes, so units should be the repeated blocks of a
model: small next to the whole, large enough to be worth a collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distrib.errors import StrategyError, did_you_mean

_LARGE = 2**19  # elements; what a leaf such as a large linear layer needs to be a unit
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Units:
    """The modules to shard on their own, outermost first, and why these.

    Attributes:
        names: Their names in the model; the model itself, which takes what is left, is not among them.
        reason: What chose them.
    """

    names: tuple[str, ...]
    reason: str


def find_units(model: nn.Module, wanted: Sequence[str] | None = None) -> Units:
    """Choose the units of a model.

    Asked for by class names, else the classes that a Hugging Face model says must not be split, else the blocks that a
    `ModuleList`, `Sequential` or `ModuleDict` repeats. A module that shares a parameter with what is outside of it is
    no unit: tied weights have to be gathered together, so they are left to the unit around both.

    Args:
        model: A plain module.
        wanted: Names of module classes; None to find them.

    Raises:
        StrategyError: D0830, if the model has no module of a class that was asked for.
    """
    if wanted is not None:
        names, reason = _of_classes(model, _known(model, wanted)), f"fsdp.wrap {', '.join(wanted)}"
    elif classes := _not_to_be_split(model):
        names, reason = _of_classes(model, classes), f"{', '.join(sorted(classes))}: not to be split"
    else:
        names, reason = list(_repeated(model, "")), "repeated blocks"
    return Units(tuple(without_shared(model, names)), reason if names else "no repeated blocks")


def refuse_unshardable(model: nn.Module, units: Units) -> None:
    """Refuse what would be lost or fail late under sharding; lay parameters out in memory as sharding needs them.

    Raises:
        StrategyError: D0838, naming the parameter or module.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            if module.max_norm is not None:
                raise unshardable(
                    name, "it changes its weight in its forward (max_norm)", "normalise outside of it"
                )
            if module.sparse:
                raise unshardable(name, "its gradients are sparse", "make it with sparse=False")
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            raise unshardable(name, "it has no dimension to divide", "give it the shape (1,)")
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise unshardable(name, "it has hooks, which its shard would not", "register them after prepare")
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    for name in (*units.names, ""):
        _check_dtypes(model, name, set(units.names) - {name})


def _check_dtypes(model: nn.Module, unit: str, others: set[str]) -> None:
    """Refuse trained parameters of several dtypes in one unit: they travel in one buffer."""
    first: dict[torch.dtype, str] = {}
    root = model.get_submodule(unit)
    inner = [
        f"{name[len(unit) + 1 if unit else 0 :]}."
        for name in others
        if name.startswith(f"{unit}." if unit else "")
    ]
    for name, parameter in root.named_parameters():
        if parameter.requires_grad and not any(name.startswith(prefix) for prefix in inner):
            first.setdefault(parameter.dtype, f"{unit}.{name}".lstrip("."))
    if len(first) > 1:
        listed = " and ".join(
            f"{name} ({str(dtype).removeprefix('torch.')})" for dtype, name in first.items()
        )
        raise unshardable(
            unit or "the model", f"trained parameters in one unit have several dtypes: {listed}",
            "keep them in one format, or make the module with the other one a unit of its own (fsdp.wrap)",
        )  # fmt: skip


def unshardable(what: str, why: str, fix: str) -> StrategyError:
    """Return the error that `what` cannot be sharded."""
    return StrategyError("D0838", f"{what} cannot be sharded: {why}", fix=fix)


def _known(model: nn.Module, wanted: Sequence[str]) -> set[str]:
    classes = {type(module).__name__ for module in model.modules()}
    for name in wanted:
        if name not in classes:
            raise StrategyError(
                "D0830",
                f"{type(model).__name__} has no module of class {name!r}{did_you_mean(name, classes)}",
                where="fsdp.wrap",
                fix="name classes of its modules, or set fsdp.wrap: auto",
            )
    return set(wanted)


def _not_to_be_split(model: nn.Module) -> set[str]:
    """Return the classes that transformers' models name, as far as the model has such modules."""
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return named & {type(module).__name__ for module in model.modules()}


def _of_classes(model: nn.Module, classes: set[str]) -> list[str]:
    return [name for name, module in model.named_modules() if name and type(module).__name__ in classes]


def _repeated(module: nn.Module, path: str) -> Iterator[str]:
    """Yield the outermost children of containers that are one of several of their class."""
    children = list(module.named_children())
    blocks = {id(child) for _, child in children if _is_block(child, children)}
    for name, child in children:
        inner = f"{path}.{name}" if path else name
        if isinstance(module, _CONTAINERS) and id(child) in blocks:
            yield inner
        else:
            yield from _repeated(child, inner)


def _is_block(child: nn.Module, siblings: Sequence[tuple[str, nn.Module]]) -> bool:
    if isinstance(child, _CONTAINERS) or sum(type(other) is type(child) for _, other in siblings) < 2:
        return False
    parameters = list(child.parameters())
    return (any(child.children()) and bool(parameters)) or sum(x.numel() for x in parameters) >= _LARGE


def is_never_called(model: nn.Module, name: str) -> bool:
    """Whether what is around a module uses its parameters without calling it, as torch's attention does."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def without_shared(model: nn.Module, names: Sequence[str]) -> Iterator[str]:
    """Leave out what shares a parameter with the outside; a module used under several names counts as one."""
    uses: dict[int, int] = {}
    for module in set(model.modules()):
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name in names:
        inside: dict[int, int] = {}
        for module in set(model.get_submodule(name).modules()):
            for parameter in module.parameters(recurse=False):
                inside[id(parameter)] = inside.get(id(parameter), 0) + 1
        if all(uses[key] == count for key, count in inside.items()):
            yield name
