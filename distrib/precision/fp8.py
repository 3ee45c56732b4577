"""Linear layers whose matrix products are in float8, by torchao (`torchao.float8`); all else computes in bfloat16.

Written from torchao's documentation and source, 0.18; it has not run on hardware that computes in float8 yet.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, Final

from torch import nn

from distrib.precision.policy import PrecisionPolicy

_MULTIPLE: Final = 16  # of which both sizes of a float8 matrix product have to be multiples
_GIVEN = "_distrib_given"  # attribute of a converted layer: the one that it replaced


def convert(model: nn.Module, policy: PrecisionPolicy) -> list[str]:
    """Let linear layers multiply in float8, in place: torchao's layers take their places and their parameters.

    Converted are layers of the class nn.Linear itself with both sizes a multiple of 16, but for the head, modules of
    `policy.fp32_modules` and a model that is just one layer.

    Args:
        model: Converted already or not; with parameters on any device, not sharded yet.
        policy: The run's.

    Returns:
        Names of the converted layers.
    """
    wanted = to_convert(model, policy)
    given = {name: model.get_submodule(name) for name in wanted}
    if given:
        _torchao()(model, module_filter_fn=lambda module, name: name in given and module is given[name])
    for name, plain in given.items():
        layer = model.get_submodule(name)
        assert layer.weight is plain.weight, "optimizers hold the parameters that were given"
        layer.train(plain.training)
        plain._parameters.update(dict.fromkeys(plain._parameters))  # whole ones would outlive sharding
        vars(layer)[_GIVEN] = plain  # not as a child
    return wanted


def restore(model: nn.Module) -> None:
    """Put the layers that `convert` replaced back, with the parameters of now."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            plain = vars(layer).get(_GIVEN)
            if plain is not None:
                plain._parameters.update(layer._parameters)
                setattr(parent, name, plain.train(layer.training))


def to_convert(model: nn.Module, policy: PrecisionPolicy) -> list[str]:
    """Return the names of the layers that `convert` converts, in the model's order."""
    head = head_of(model)
    left_out = {
        inner
        for name, module in model.named_modules()
        if name and any(fnmatchcase(name, pattern) for pattern in policy.fp32_modules)
        for inner in module.modules()
    }
    return [
        name
        for name, module in model.named_modules()
        if name and type(module) is nn.Linear and module is not head and module not in left_out
        if module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
    ]


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes the outputs, where rounding costs most: a transformers model's own, else the last linear."""
    own = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = own() if callable(own) else None
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return found if found is not None or not linear else linear[-1]


def _torchao() -> Any:
    return import_module(
        "torchao.float8"
    ).convert_to_float8_training  # an optional package, which takes seconds
