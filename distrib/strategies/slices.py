"""State of modules and optimizers as named slices.

What lies on a rank is the strategy's to say: by `SliceOf` for a tensor that is there, by `EmptyFor` for one that a
checkpoint is going to bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.errors import CheckpointError
from distrib.state import ShardedState, Slice, TensorSpec, TrainState, whole

WITHOUT_VALUES = "_distrib_without_values"  # attribute of a model whose forward is refused until it is loaded
_MOST_NAMES = 8

Names = Mapping[int, str]  # id of a parameter -> its name
SliceOf = Callable[[str, Tensor], Slice]  # logical name, tensor -> the part of it on this rank
EmptyFor = Callable[
    [TensorSpec, nn.Parameter], Tensor
]  # optimizer state of a parameter's shape, uninitialised


def module_prefix(index: int) -> str:
    """Return the folder of the model prepared as number `index`: "model/", "model_1/"."""
    return f"model_{index}/" if index else "model/"


def optimizer_prefix(index: int) -> str:
    """Return the folder of the optimizer prepared as number `index`: "optimizer/", "optimizer_1/"."""
    return f"optimizer_{index}/" if index else "optimizer/"


def plain_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "")


def listed(names: Sequence[str]) -> str:
    """Join names of parameters or modules as the plain module has them; many are cut short."""
    plain = [plain_name(name).lstrip(".") for name in names]
    more = len(plain) - _MOST_NAMES
    return ", ".join(plain[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def module_slices(module: nn.Module, prefix: str, slice_of: SliceOf = whole) -> ShardedState:
    """Describe the parameters and persistent buffers of a plain module; tied ones are stored once.

    What `state_dict` makes afresh (extra state, the work of hooks) is handed back by `load_state_dict`.
    """
    tensors: dict[str, tuple[Slice, ...]] = {}
    objects: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    live = {id(x) for x in (*module.parameters(), *module.buffers())}
    for key, value in module.state_dict(keep_vars=True).items():
        name = prefix + plain_name(key)
        if not isinstance(value, Tensor):
            objects[name] = value
        elif id(value) not in live:
            tensors[name] = (replace(slice_of(name, value.detach()), commit=_loader_of(module, key)),)
        elif id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = (slice_of(name, value.detach()),)
    return ShardedState(tensors, objects, aliases)


def _loader_of(module: nn.Module, key: str) -> Callable[[Any], None]:
    def load(value: Any) -> None:
        module.load_state_dict({key: value}, strict=False)

    return load


def parameter_names(models: Sequence[nn.Module]) -> dict[int, str]:
    """Return the plain name of every parameter of the models; names of later models carry their number."""
    names: dict[int, str] = {}
    for index, model in enumerate(models):
        for name, parameter in model.named_parameters():
            names.setdefault(
                id(parameter), f"model_{index}.{plain_name(name)}" if index else plain_name(name)
            )
    return names


def optimizer_slices(
    optimizer: Optimizer, names: Names, prefix: str, slice_of: SliceOf = whole
) -> ShardedState:
    """Describe an optimizer: state tensors as slices, param groups and other state by parameter names."""
    tensors: dict[str, tuple[Slice, ...]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters(optimizer, names):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                full = f"{prefix}{key}.{name}"
                tensors[full] = (slice_of(full, value),)
            else:
                scalars.setdefault(name, {})[key] = value
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": _names_of(group, names, index),
        }
        for index, group in enumerate(optimizer.param_groups)
    ]
    kind = type(optimizer).__name__
    return ShardedState(
        tensors, {prefix.rstrip("/"): {"kind": kind, "param_groups": groups, "state": scalars}}
    )


def named_parameters(optimizer: Optimizer, names: Names) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of all groups; one that belongs to no model is named by its place."""
    for index, group in enumerate(optimizer.param_groups):
        yield from zip(_names_of(group, names, index), group["params"], strict=True)


def _names_of(group: Mapping[str, Any], names: Names, index: int) -> list[str]:
    return [names.get(id(x), f"param_groups.{index}.{place}") for place, x in enumerate(group["params"])]


def joined(parts: Sequence[ShardedState]) -> ShardedState:
    """Return the union of states whose names differ."""
    tensors: dict[str, tuple[Slice, ...]] = {}
    objects: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    for part in parts:
        tensors.update(part.tensors)
        objects.update(part.objects)
        aliases.update(part.aliases)
    return ShardedState(tensors, objects, aliases)


@contextmanager
def loading_in_place(
    state: TrainState,
    models: Sequence[nn.Module],
    describe: Callable[[], ShardedState],
    names: Names,
    stored: Mapping[str, TensorSpec],
    objects: Mapping[str, Any],
    *,
    strict: bool,
    empty_for: EmptyFor | None = None,
) -> Iterator[ShardedState]:
    """Yield slices to fill, with the optimizer state that `stored` has; on leaving, restore what are no tensors.

    An error inside leaves the optimizers as they were. Without `strict`, groups that do not match keep their options.
    """
    for index, optimizer in enumerate(state.optimizers if strict else ()):
        _check_objects(optimizer, names, objects, optimizer_prefix(index).rstrip("/"))
    before = [dict(optimizer.state) for optimizer in state.optimizers]
    try:
        new: list[Tensor] = []
        for index, optimizer in enumerate(state.optimizers):
            new += _allocate(optimizer, names, stored, optimizer_prefix(index), empty_for or _empty_like)
        yield _marked(describe(), new)
        for index, model in enumerate(models):
            _restore_extra_state(model, module_prefix(index), objects)
            _has_values(model)
        for index, optimizer in enumerate(state.optimizers):
            _restore_objects(optimizer, names, objects, optimizer_prefix(index).rstrip("/"))
    except BaseException:
        for optimizer, old in zip(state.optimizers, before, strict=True):
            optimizer.state.clear()
            optimizer.state.update(old)
        raise


def _marked(state: ShardedState, new: Sequence[Tensor]) -> ShardedState:
    """Return `state` in which the slices of plain tensors that have just been made say so."""
    ids = {id(x) for x in new if type(x) is Tensor}
    if not ids:
        return state
    tensors = {
        name: tuple(replace(x, is_new=True) if id(x.get()) in ids else x for x in parts)
        for name, parts in state.tensors.items()
    }
    return replace(state, tensors=tensors)


def _has_values(model: nn.Module) -> None:
    """Let the forward of a model that was built without memory pass from now on."""
    handle = vars(model).pop(WITHOUT_VALUES, None)
    if handle is not None:
        handle.remove()


def _allocate(
    optimizer: Optimizer,
    names: Names,
    stored: Mapping[str, TensorSpec],
    prefix: str,
    empty_for: EmptyFor,
) -> list[Tensor]:
    """Give each parameter exactly the state tensors that the checkpoint has for it, with any values; return new ones.

    Tensors that are there already and fit are filled in place: fresh memory costs several times the reading.
    """
    new: list[Tensor] = []
    keys: dict[str, list[str]] = {}
    wanted = {name for name, _ in named_parameters(optimizer, names)}
    for full in stored:
        if full.startswith(prefix):
            key, _, name = full.removeprefix(prefix).partition(".")
            if name in wanted:
                keys.setdefault(name, []).append(key)
    for index, group in enumerate(optimizer.param_groups):
        for name, parameter in zip(_names_of(group, names, index), group["params"], strict=True):
            here = optimizer.state.get(parameter, {})
            wanted_here = {key: stored[f"{prefix}{key}.{name}"] for key in keys.get(name, ())}
            fitting = {
                key: here[key] if _fits(here.get(key), spec) else _empty(spec, parameter, group, empty_for)
                for key, spec in wanted_here.items()
            }
            new += [x for key, x in fitting.items() if x is not here.get(key)]
            if fitting:
                optimizer.state[parameter] = fitting
            else:
                optimizer.state.pop(parameter, None)
    return new


def _fits(value: object, spec: TensorSpec) -> bool:
    """Whether a value is a tensor with memory of its own for all of `spec`."""
    return (
        isinstance(value, Tensor)
        and (tuple(value.shape), value.dtype) == (tuple(spec.shape), spec.dtype)
        and value.is_contiguous()
    )


def _empty(
    spec: TensorSpec, parameter: nn.Parameter, group: Mapping[str, Any], empty_for: EmptyFor
) -> Tensor:
    if tuple(spec.shape) == tuple(parameter.shape) and spec.shape:
        return empty_for(spec, parameter)
    # As Optimizer.load_state_dict has it: a step counter stays on the CPU unless the step itself runs on the device.
    on_device = spec.shape or group.get("capturable") or group.get("fused")
    return torch.empty(spec.shape, dtype=spec.dtype, device=parameter.device if on_device else "cpu")


def _empty_like(spec: TensorSpec, parameter: nn.Parameter) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=parameter.device)


def _restore_extra_state(model: nn.Module, prefix: str, objects: Mapping[str, Any]) -> None:
    for key, value in model.state_dict(keep_vars=True).items():
        name = prefix + plain_name(key)
        if not isinstance(value, Tensor) and name in objects:
            _loader_of(model, key)(objects[name])


def _check_objects(optimizer: Optimizer, names: Names, objects: Mapping[str, Any], key: str) -> None:
    """Refuse the state of an optimizer of another class, or with other groups, before anything is changed."""
    stored = objects.get(key)
    if stored is None:
        return
    kind, groups = type(optimizer).__name__, stored["param_groups"]
    if stored["kind"] != kind:
        raise CheckpointError(
            "D0793",
            f"{key} is of class {kind}, the checkpoint has the state of a {stored['kind']}",
            fix="build the optimizer of the saved run",
        )
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            "D0790",
            f"{key} has {len(optimizer.param_groups)} parameter groups, the checkpoint has {len(groups)}",
            fix="build the optimizer with the groups of the saved run",
        )
    for index, (group, old) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        here, there = _names_of(group, names, index), list(old["params"])
        if here != there:
            raise CheckpointError(
                "D0791",
                f"{key}: parameter group {index} holds other parameters than in the checkpoint: {_apart(here, there)}",
                fix="build the optimizer with the groups of the saved run",
            )


def _apart(here: Sequence[str], there: Sequence[str]) -> str:
    """Say in what two different lists of parameters differ."""
    new, gone = ([x for x in one if x not in other] for one, other in ((here, there), (there, here)))
    parts = [f"{listed(found)} only {where}" for found, where in ((new, "here"), (gone, "there")) if found]
    return " and ".join(parts) or "the same ones in another order"


def _restore_objects(optimizer: Optimizer, names: Names, objects: Mapping[str, Any], key: str) -> None:
    stored = objects.get(key)
    if stored is None:
        return
    for index, (group, old) in enumerate(zip(optimizer.param_groups, stored["param_groups"], strict=False)):
        if _names_of(group, names, index) != list(old["params"]):
            continue  # checked before, if it matters
        group.update({name: value for name, value in old.items() if name != "params"})
    for name, parameter in named_parameters(optimizer, names):
        optimizer.state[parameter].update(stored["state"].get(name, {}))
