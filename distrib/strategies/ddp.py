"""Replicas on every rank, gradients averaged while they are computed (torch's DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distrib.state import TrainState
from distrib.strategies.base import Capabilities
from distrib.strategies.single import Single


class DDP(Single):
    """torch's DistributedDataParallel around each model that has something to train."""

    capabilities: ClassVar[Capabilities] = Capabilities(("cpu", "cuda", "xpu"))

    def prepare(self, state: TrainState) -> TrainState:
        state = super().prepare(state)
        return replace(state, models=tuple(map(self._wrap, state.models)))

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        model = self.place(model)
        with torch.no_grad():
            tensors = {name: x for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
            for name, value in self.runtime.collectives.broadcast(tensors).items():
                tensors[name].copy_(value)
        return model

    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        wrapped = [model for model in models if isinstance(model, DistributedDataParallel)]
        return nullcontext() if enabled or not wrapped else _no_sync(wrapped)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self.runtime.collectives.world_size == 1:
            return model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return self.prepare_for_evaluation(model)
        device = self.runtime.device
        return DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device.index],
            find_unused_parameters=self.options.get("find_unused_parameters") is True,
        )


@contextmanager
def _no_sync(models: Sequence[DistributedDataParallel]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.no_sync())
        yield
