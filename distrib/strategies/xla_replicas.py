"""One process for each XLA device, each with the whole model: gradients are averaged between them."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.devices.xla_runtime import Graph, upload, xla_model
from distrib.errors import StrategyError
from distrib.state import Runtime, Slice, TensorSpec
from distrib.strategies import slices
from distrib.strategies.xla_state import take_over

_BITS: Final = 62  # of a 64-bit integer that carries marks


class Replicas:
    """How models lie, and what ranks exchange.

    Args:
        runtime: The run's.
        graph: The device's.
        on_host: Whether gradients travel through host memory.
    """

    def __init__(self, runtime: Runtime, graph: Graph, *, on_host: bool) -> None:
        self.runtime, self._graph, self._on_host = runtime, graph, on_host
        self.alone = runtime.collectives.world_size == 1
        # whether every rank uses every parameter of a model; not there before its first step
        self._all_used: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def equalise(self, model: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers. Collective."""
        if not self.alone:
            take_over(dict(model.state_dict(keep_vars=True)), self.runtime.collectives)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is."""
        return model

    def annotate(self, model: nn.Module) -> None:
        """Do nothing: each device has all of it."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is."""
        return model

    def average(self, model: nn.Module) -> None:
        """Average the gradients of a model. Collective.

        What has been averaged before is equal on all ranks, so that averaging it again changes nothing.
        """
        if self.alone:
            return
        wanted = [x for x in model.parameters() if x.requires_grad]
        self._agree_on_used(model, wanted)
        gradients = [x.grad for x in wanted if x.grad is not None]
        if self._on_host:
            self._average_on_host(gradients)
        else:
            self._average_on_device(gradients)

    def spread_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers: they are what the run goes on with. Collective."""
        if not self.alone:
            take_over(dict(model.named_buffers()), self.runtime.collectives)

    def parts_to_save(self, part: Slice, value: Tensor) -> tuple[Slice, ...] | None:
        """Return None: every rank holds the whole tensor."""
        return None

    parts_to_fill = parts_to_save

    def empty_for(self, spec: TensorSpec, parameter: nn.Parameter) -> Tensor:
        """Return memory for optimizer state of a parameter's shape."""
        return torch.empty(spec.shape, dtype=spec.dtype, device=parameter.device)

    @contextmanager
    def open(self, model: nn.Module) -> Iterator[None]:
        """Let the body see whole parameters, which they are."""
        yield

    def _average_on_device(self, gradients: Sequence[Tensor]) -> None:
        model = xla_model()
        scale = 1 / self.runtime.collectives.world_size
        sent = [x.to(self.runtime.precision.reduce or x.dtype) for x in gradients]
        model.all_reduce(model.REDUCE_SUM, sent, scale=scale)
        for gradient, averaged in zip(gradients, sent, strict=True):
            if averaged is not gradient:
                gradient.copy_(averaged)

    def _average_on_host(self, gradients: Sequence[Tensor]) -> None:
        self._graph.run()  # one graph for all of them, not one for each that is read
        kinds = dict.fromkeys(x.dtype for x in gradients)
        for kind in kinds:
            alike = [x for x in gradients if x.dtype is kind]
            flat = torch.cat([x.detach().cpu().reshape(-1) for x in alike])
            flat = flat.to(self.runtime.precision.reduce or kind)
            flat = self.runtime.collectives.all_reduce_(flat, "mean").to(kind)
            parts = torch.split(flat, [x.numel() for x in alike])
            for gradient, part in zip(alike, parts, strict=True):
                gradient.copy_(upload(part.view(gradient.shape), gradient.device))

    def _agree_on_used(self, model: nn.Module, wanted: Sequence[nn.Parameter]) -> None:
        """Let ranks average the same gradients: zeros stand for those that only other ranks have.

        If every rank uses every parameter in the first step, nothing is exchanged in those that follow.

        Raises:
            StrategyError: D0898, if a later step leaves some out.
        """
        used = [x.grad is not None for x in wanted]
        all_used = self._all_used.get(model)
        if all_used and all(used):
            return
        if all_used:
            names = slices.parameter_names([model])
            missing = [names[id(x)] for x, is_used in zip(wanted, used, strict=True) if not is_used]
            raise StrategyError(
                "D0898",
                f"the last backward gave no gradient to {slices.listed(missing)} on this rank, but the first step used "
                "every parameter, so the other ranks would average without it",
                fix="use every parameter in every step, or leave one unused in the first step too: then each step looks",
            )
        marks = [
            sum(1 << i for i, x in enumerate(used[start : start + _BITS]) if x)
            for start in range(0, len(used), _BITS)
        ]
        everyone = self.runtime.collectives.exchange(marks)
        anywhere = [any(row[i // _BITS] >> i % _BITS & 1 for row in everyone) for i in range(len(used))]
        for parameter, is_used, is_anywhere in zip(wanted, used, anywhere, strict=True):
            if is_anywhere and not is_used:
                parameter.grad = torch.zeros_like(parameter)
        self._all_used.setdefault(model, all(row == everyone[0] for row in everyone) and all(used))


def refuse_strays(optimizer: Optimizer, averaged: Container[nn.Parameter]) -> None:
    """Refuse to step with gradients that nobody has averaged.

    Raises:
        StrategyError: D0812.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter not in averaged:
                raise StrategyError(
                    "D0812",
                    f"a parameter of shape {tuple(parameter.shape)} of the {type(optimizer).__name__} has a gradient, "
                    "but it is in no prepared model: the ranks would step with gradients of their own",
                    fix="make it part of a model that is prepared",
                )
