"""Models without memory: built on torch's meta device, given memory and values when they are laid out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distrib.collectives.base import Collectives
from distrib.errors import StrategyError
from distrib.strategies.slices import WITHOUT_VALUES, listed, plain_name

Put = Callable[[nn.Parameter, Tensor], None]  # a parameter, and all its values: fills what lies on this rank


@contextmanager
def init_empty() -> Iterator[None]:
    """Let modules that are made inside have their parameters on the meta device: shapes and dtypes, no memory.

    Buffers stay real. `Accelerator.prepare` gives the parameters memory, under sharding only for the rank's own part,
    and initial values: by each module's `reset_parameters`, by a transformers model's own weight initialisation, or by
    the checkpoint that `load_state` loads next.
    """
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        plain(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def is_empty(model: nn.Module) -> bool:
    """Whether any parameter of `model` has no memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def materialise(
    root: nn.Module, device: torch.device, collectives: Collectives, put: Put | None = None
) -> None:
    """Give parameters on the meta device memory and their initial values, the same at every world size. Collective.

    Values are drawn module by module in the model's order, whole and on the CPU, from rank 0's generator: so they are
    those of a model that was built plainly under the same seed, where modules draw in `reset_parameters` only. One
    module's parameters are whole at a time. What no module can initialise has to come from a checkpoint: until then the
    model's forward is refused.

    Args:
        root: The model; sharded already, if it is going to be.
        device: Where the memory is.
        collectives: The ranks that hold the model.
        put: Takes over the rank's part of a parameter's values; by default all of them.

    Raises:
        StrategyError: D0831, from the forward of a model with parameters that have no values.
    """
    empty = {module: [n for n, x in _own(module) if x.is_meta] for module in root.modules()}
    _give_memory(root, device)
    state = collectives.broadcast(torch.get_rng_state())
    torch.set_rng_state(state)
    initialise = partial(_initialise, root)
    done: set[int] = set()
    without: list[tuple[nn.Module, str]] = []
    for module, names in empty.items():
        fresh = [name for name in names if id(module._parameters[name]) not in done]  # not tied to one before
        if fresh and not _fill(module, fresh, initialise, put or _put_whole):
            without += [(module, name) for name in fresh]
        done |= {id(module._parameters[name]) for name in fresh}
    if without:
        _refuse_forward(root, without)


def _give_memory(root: nn.Module, device: torch.device) -> None:
    """Give every parameter on the meta device memory; tied ones stay tied, which torch's `to_empty` would not see to."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in root.modules():
        for name, parameter in _own(module):
            places.setdefault(id(parameter), []).append((module, name))
    root._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)  # type: ignore[no-untyped-call]
    for (first, name), *others in places.values():
        for module, other in others:
            module._parameters[other] = first._parameters[name]


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, x) for name, x in module._parameters.items() if x is not None]


@torch.no_grad()
def _fill(module: nn.Module, names: list[str], initialise: Callable[[nn.Module], bool], put: Put) -> bool:
    """Let a module initialise whole parameters, and keep the rank's part of them."""
    kept: Mapping[str, Any] = {name: module._parameters[name] for name in names}
    for name, parameter in kept.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        module._parameters[name] = nn.Parameter(whole, parameter.requires_grad)
    try:
        if not initialise(module):
            return False
        for name, parameter in kept.items():
            value = module._parameters[name]
            assert value is not None, "it was put there above"
            put(parameter, value.detach())
        return True
    finally:
        module._parameters.update(kept)


def _initialise(root: nn.Module, module: nn.Module) -> bool:
    """Call what initialises a module's own parameters: transformers' `_init_weights` of the model, else its own method."""
    of_model = getattr(root, "_init_weights", None)
    if callable(of_model):
        of_model(module)
        return True
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()
        return True
    return False


def _put_whole(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


def _refuse_forward(root: nn.Module, without: list[tuple[nn.Module, str]]) -> None:
    paths = {module: path for path, module in root.named_modules()}
    names = [plain_name(f"{paths[module]}.{name}".lstrip(".")) for module, name in without]

    def refuse(*_: Any) -> None:
        raise StrategyError(
            "D0831",
            f"the model was built without memory, and nothing has given values to {listed(names)}",
            fix="load a checkpoint before the first forward, or give their modules a method reset_parameters",
        )

    vars(root)[WITHOUT_VALUES] = root.register_forward_pre_hook(refuse, prepend=True)
