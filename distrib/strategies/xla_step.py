"""Optimizer steps that run in one graph, which stays the same however their numbers change; and a word when it does not."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.collectives.trees import tensors
from distrib.devices.xla_runtime import upload
from distrib.errors import StrategyError
from distrib.logging import notice

# Optimizers of torch whose `capturable` runs on XLA, and whether their learning rate may then be a tensor that is not
# read (torch 2.9). A Python number becomes a parameter of the graph too, but equal numbers share one: a rate that meets
# another number of the step, such as 1 - beta, would make it another graph.
_CAPTURABLE: Final[Mapping[str, bool]] = {
    "Adam": True, "AdamW": True, "NAdam": True, "RAdam": True, "Adamax": True, "ASGD": True,
    "RMSprop": False, "Rprop": False,
}  # fmt: skip
_SETTLED: Final = 2  # steps after which everything has been compiled: the first makes the optimizer's state
_MANY: Final = 5
_MOST_SHAPES: Final = 4

Shapes = tuple[tuple[int, ...], ...]


class DeviceStep:
    """Steps optimizers whose counters and learning rates are tensors of the device meanwhile.

    Outside of the step the user's optimizer is as it was: learning rates are numbers, for schedulers and checkpoints.

    Args:
        device: The run's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rates: weakref.WeakKeyDictionary[Optimizer, dict[int, tuple[float, Tensor]]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, optimizer: Optimizer) -> None:
        """Record a step."""
        takes_tensor = _takes_tensor(optimizer)
        if takes_tensor is None:
            optimizer.step()
            return
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.is_cpu and not value.shape:
                    state[key] = upload(value, self._device)
        with self._on_device(optimizer, rate_too=takes_tensor):
            optimizer.step()

    @contextmanager
    def _on_device(self, optimizer: Optimizer, *, rate_too: bool) -> Iterator[None]:
        before = [dict(group) for group in optimizer.param_groups]
        rates = self._rates.setdefault(optimizer, {})
        for index, group in enumerate(optimizer.param_groups):
            group.update(capturable=True, foreach=False)
            if rate_too:
                group["lr"] = self._rate(rates, index, group["lr"])
        try:
            yield
        finally:
            for group, old in zip(optimizer.param_groups, before, strict=True):
                group.update({key: old[key] for key in ("capturable", "foreach", "lr")})

    def _rate(self, rates: dict[int, tuple[float, Tensor]], index: int, rate: Any) -> Tensor:
        if isinstance(rate, Tensor):
            return rate if not rate.is_cpu else upload(rate, self._device)
        if index not in rates or rates[index][0] != rate:
            rates[index] = rate, upload(torch.tensor(rate, dtype=torch.float32, device="cpu"), self._device)
        return rates[index][1]


def refuse_fused(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose kernels are not those of XLA.

    Raises:
        StrategyError: D0897.
    """
    if any(group.get("fused") for group in optimizer.param_groups):
        raise StrategyError(
            "D0897",
            f"{type(optimizer).__name__} has fused=True, but torch has no fused kernel for XLA, which fuses by itself",
            fix="leave fused out",
        )


def _takes_tensor(optimizer: Optimizer) -> bool | None:
    """Return whether an optimizer's rate may be a tensor; None for one that knows no `capturable` on XLA."""
    kind = next((x for x in type(optimizer).__mro__ if x.__module__.startswith("torch.optim.")), Optimizer)
    if not all({"capturable", "foreach"} <= set(group) for group in optimizer.param_groups):
        return None
    return _CAPTURABLE.get(kind.__name__)


class Recompilations:
    """Counts the steps in which something was compiled although nothing is new; the fifth is told of, once.

    Args:
        say: Whether this rank tells.
    """

    def __init__(self, *, say: bool) -> None:
        self.count = 0  # steps that compiled, beyond the first ones
        self._say, self._step = say, 0
        self._inputs: list[Shapes] = []  # of the forwards since the last step
        self._seen: dict[tuple[Shapes, ...], None] = {}

    def watch(self, model: nn.Module) -> None:
        """Note the shapes of what a model gets."""
        model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)

    def note(self, compiled: int) -> None:
        """Note that a step has been taken, and how many graphs it has compiled."""
        self._step += 1
        shapes, self._inputs = tuple(self._inputs), []
        if not compiled or self._step <= _SETTLED:
            return
        self.count += 1
        self._seen[shapes] = None
        if self.count == _MANY and self._say:
            notice(self._many())

    def _note_inputs(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._inputs.append(tuple(tuple(x.shape) for x in tensors((args, kwargs))))

    def _many(self) -> str:
        shapes = list(dict.fromkeys(shape for step in self._seen for shape in step))
        listed = "; ".join(", ".join(map(str, inputs)) for inputs in shapes[:_MOST_SHAPES])
        more = f" and {len(shapes) - _MOST_SHAPES} more" if len(shapes) > _MOST_SHAPES else ""
        what = (
            f"the model got inputs of the shapes {listed}{more}. Keep shapes equal: data.tail pad fills up an epoch's "
            "last batch, and sequences can be filled up to a few lengths"
            if len(shapes) > 1
            else f"the model's inputs had the shapes {listed or 'of no tensor'} each time, so something else changes: a "
            "number that decides what is computed, or a value that is read at different places of the loop"
        )
        return f"warning: xla: step {self._step} was compiled anew, the {self.count}th time since step {_SETTLED}; {what}"
