"""Local SGD: ranks step by themselves and average their parameters now and then, where the network is slow."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn

from distrib.errors import StrategyError

if TYPE_CHECKING:
    from distrib.accelerator import Accelerator


class LocalSGD:
    """A context in which every rank trains on its own gradients; parameters are averaged every few steps and at the end.

    Stich, "Local SGD Converges Fast and Communicates Little" (2019). Call `step` after each `optimizer.step()`. Optimizer
    state stays the rank's own.

    Args:
        accelerator: The run.
        model: A prepared model.
        local_sgd_steps: Optimizer steps between two averages, at least 1.
        enabled: False trains as without it.

    Raises:
        StrategyError: D0840, if the ranks do not hold whole replicas, compute in fp16, whose loss scale has to be the same
            on all ranks, or `local_sgd_steps` is below 1.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, local_sgd_steps: int, enabled: bool = True  # noqa: FBT001, FBT002
    ) -> None:  # fmt: skip
        self._accelerator, self._model, self._every = accelerator, model, local_sgd_steps
        self._enabled = enabled and accelerator.num_processes > 1
        self._steps = 0
        self._quiet: AbstractContextManager[None] | None = None
        if local_sgd_steps < 1:
            raise StrategyError(
                "D0840",
                f"local_sgd_steps is {local_sgd_steps}; expected at least 1",
                fix="give such a number",
            )
        if self._enabled:
            _check(accelerator)

    def __enter__(self) -> LocalSGD:
        if self._enabled:
            self._quiet = self._accelerator.no_sync(self._model)
            self._quiet.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None
        if self._enabled and error[0] is None:
            self._average()

    def step(self) -> None:
        """Count an optimizer step; average when it is time. Collective then."""
        if not self._enabled or not self._accelerator.sync_gradients:
            return
        self._steps += 1
        if self._steps % self._every == 0:
            self._average()

    @torch.no_grad()
    def _average(self) -> None:
        plain = self._accelerator.unwrap_model(self._model)
        parameters = {name: x for name, x in plain.named_parameters() if x.requires_grad}
        for name, mean in self._accelerator.reduce(parameters, "mean").items():
            parameters[name].copy_(mean)


def _check(accelerator: Accelerator) -> None:
    if accelerator._strategy.capabilities.whole_replicas and accelerator.scaler is None:
        return
    reason = (
        "in fp16 all ranks share one loss scale" if accelerator.scaler else "this strategy divides parameters"
    )
    raise StrategyError(
        "D0840",
        f"LocalSGD needs ranks that train whole replicas by themselves, but {reason}",
        fix="use strategy: ddp with mixed_precision bf16 or no",
    )
