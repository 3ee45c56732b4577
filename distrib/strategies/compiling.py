"""`torch.compile` of a module's forward, and a word when the same one is compiled again and again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn

from distrib.collectives.trees import tensors
from distrib.errors import StrategyError, did_you_mean
from distrib.logging import notice
from distrib.strategies.caches import without_empty_caches

Forward = Callable[..., Any]  # of a module, which is its first argument
Shapes = Mapping[str, tuple[tuple[int, ...], ...]]  # argument -> shapes of the tensors in it

_MANY: Final = 8  # torch's own limit for one piece of code, unless it is set lower
_MOST_SHAPES: Final = 4


def compiling(
    forward: Forward, options: Mapping[str, Any], names: Mapping[int, str], *, say: bool
) -> Forward:
    """Return a forward that torch compiles when it is called; hooks of the module stay outside.

    Args:
        forward: A module's, unbound. Modules that are alike share what was compiled.
        options: `backend`, `mode` and `dynamic` of `torch.compile`.
        names: id of a module -> its name in the model.
        say: Whether this rank tells of a forward that is compiled again and again.

    Raises:
        StrategyError: D0850, if there is no such backend.
    """
    from torch._dynamo.utils import counters  # noqa: PLC0415 (a second that only runs that compile should wait)

    _check_backend(options["backend"])
    watch = Compilations(forward, names, say=say)
    # torch's own default; a backend that is not inductor knows no mode
    mode = None if options["mode"] == "default" else options["mode"]
    compiled = torch.compile(forward, backend=options["backend"], mode=mode, dynamic=options["dynamic"])

    @functools.wraps(forward, updated=())
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(self, *args, **kwargs)
        args, kwargs, _ = without_empty_caches(self, args, kwargs)
        before = counters["stats"]["unique_graphs"]
        result = compiled(self, *args, **kwargs)
        if counters["stats"]["unique_graphs"] != before:
            watch.note(self, args, kwargs)
        return result

    return run


class Compilations:
    """Counts the calls in which one forward was compiled; the eighth is told of, once.

    Args:
        forward: A module's, unbound.
        names: id of a module -> its name in the model.
        say: Whether this rank tells.
    """

    def __init__(self, forward: Forward, names: Mapping[int, str], *, say: bool) -> None:
        self.count = 0
        self._signature = inspect.signature(forward)
        self._names, self._say = names, say
        self._seen: list[Shapes] = []

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Count a call of `module` in which something was compiled."""
        self.count += 1
        self._seen.append(self._shapes(module, args, kwargs))
        limit = getattr(torch._dynamo.config, "recompile_limit", _MANY)
        if self.count == min(_MANY, limit) and self._say:
            notice(self._many(module))

    def _shapes(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes:
        bound = self._signature.bind(module, *args, **kwargs).arguments
        return {name: tuple(tuple(x.shape) for x in tensors(value)) for name, value in bound.items()}

    def _many(self, module: nn.Module) -> str:
        name = self._names.get(id(module)) or "the model"
        return (
            f"compile: the forward of {name} ({type(module).__name__}) was compiled {self.count} times, and torch soon "
            f"runs it uncompiled; {_changing(self._seen)}"
        )


def _changing(seen: list[Shapes]) -> str:
    """Say which shapes are not always the same, and what to do about it."""
    found = []
    for argument in dict.fromkeys(name for shapes in seen for name in shapes):
        different = dict.fromkeys(shapes[argument] for shapes in seen if argument in shapes)
        if len(different) > 1:
            texts = [" and ".join(map(str, shapes)) or "no tensor" for shapes in different]
            more = f" and {len(texts) - _MOST_SHAPES} more" if len(texts) > _MOST_SHAPES else ""
            found.append(f"{argument} was {', '.join(texts[:_MOST_SHAPES])}{more}")
    if not found:
        return "its shapes did not change: TORCH_LOGS=recompiles prints what did"
    return (
        f"{'; '.join(found)}. Set compile.dynamic: true, or keep shapes equal: data.tail pad or drop does so for "
        "an epoch's last batch"
    )


def _check_backend(name: str) -> None:
    known = torch._dynamo.list_backends(exclude_tags=())
    if name not in known:
        raise StrategyError(
            "D0850",
            f"torch.compile has no backend {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}",
            where="compile.backend",
            fix="set compile.backend to one of them, or leave it out",
        )
