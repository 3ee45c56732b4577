"""Local SGD and DiLoCo: ranks step by themselves and agree now and then, where the network is slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from distrib.errors import StrategyError

if TYPE_CHECKING:
    from distrib.accelerator import Accelerator


class LocalSGD:
    """A context in which every rank trains on its own gradients; parameters are averaged every few steps and at the end.

    Stich, "Local SGD Converges Fast and Communicates Little" (2019). Call `step` after each `optimizer.step()`. Optimizer
    state stays the rank's own.

    With an outer optimizer the averaged change since the ranks last agreed is its gradient, instead of being taken as it is:
    Douillard et al., "DiLoCo" (2023). It then acts in one process too, so that a run is the same at any number of them.

    Args:
        accelerator: The run.
        model: A prepared model.
        local_sgd_steps: Optimizer steps between two averages, at least 1.
        enabled: False trains as without it.
        outer_optimizer: Makes one from parameters, such as `partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)`,
            the paper's. None averages parameters.

    Attributes:
        outer_optimizer: The one that was made, for schedules; None without.

    Raises:
        StrategyError: D0840, if the ranks do not hold whole replicas, compute in fp16, whose loss scale has to be the same
            on all ranks, or `local_sgd_steps` is below 1; D0858, if `outer_optimizer` cannot be called.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        local_sgd_steps: int,
        enabled: bool = True,  # noqa: FBT001, FBT002
        *,
        outer_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        self._accelerator, self._model, self._every = accelerator, model, local_sgd_steps
        self._enabled = enabled and (accelerator.num_processes > 1 or outer_optimizer is not None)
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
        self._agreed: dict[
            str, nn.Parameter
        ] = {}  # what the ranks last agreed on, where there is an outer optimizer
        self.outer_optimizer: Optimizer | None = None
        if self._enabled and outer_optimizer is not None:
            self.outer_optimizer = self._make(outer_optimizer)

    def __enter__(self) -> LocalSGD:
        if self._enabled:
            if self.in_sync:
                self._remember()
            self._quiet = self._accelerator.no_sync(self._model)
            self._quiet.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None
        if self._enabled and error[0] is None and not (self.in_sync and self._agreed):
            self._average()
            self._steps = 0

    def step(self) -> None:
        """Count an optimizer step; average when it is time. Collective then."""
        if not self._enabled or not self._accelerator.sync_gradients:
            return
        self._steps += 1
        if self._steps % self._every == 0:
            self._average()

    @property
    def in_sync(self) -> bool:
        """Whether the ranks agree on the parameters now: the moment for a checkpoint."""
        return not self._enabled or self._steps % self._every == 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a run goes on with, for `register_for_checkpointing`: the outer optimizer's state is the same on all ranks."""
        outer = self.outer_optimizer
        return {
            "steps": self._steps,
            "agreed": {name: x.detach().clone() for name, x in self._agreed.items()},
            "outer": None if outer is None else outer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, of a run with or without an outer optimizer."""
        self._steps = state["steps"]
        for name, value in state["agreed"].items():
            if name in self._agreed:
                self._agreed[name].copy_(value)
        if self.outer_optimizer is not None and state["outer"] is not None:
            self.outer_optimizer.load_state_dict(state["outer"])

    def _make(self, outer_optimizer: Callable[[list[nn.Parameter]], Optimizer]) -> Optimizer:
        if not callable(outer_optimizer):
            raise StrategyError(
                "D0858",
                f"outer_optimizer is a {type(outer_optimizer).__name__}; expected a function that makes an optimizer of a "
                "list of parameters",
                where="LocalSGD",
                fix="give functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), or the like",
            )
        self._agreed = {name: nn.Parameter(x.detach().clone()) for name, x in self._parameters().items()}
        return outer_optimizer(list(self._agreed.values()))

    def _parameters(self) -> dict[str, nn.Parameter]:
        plain = self._accelerator.unwrap_model(self._model)
        return {name: x for name, x in plain.named_parameters() if x.requires_grad}

    @torch.no_grad()
    def _remember(self) -> None:
        parameters = self._parameters() if self._agreed else {}
        for name, agreed in self._agreed.items():
            agreed.copy_(parameters[name])

    @torch.no_grad()
    def _average(self) -> None:
        parameters = self._parameters()
        means = self._accelerator.reduce(parameters, "mean")
        if self.outer_optimizer is not None:
            for name, agreed in self._agreed.items():
                agreed.grad = agreed - means[name]
            self.outer_optimizer.step()
            self.outer_optimizer.zero_grad()
            means = self._agreed
        for name, mean in means.items():
            parameters[name].copy_(mean)


def _check(accelerator: Accelerator) -> None:
    divided = "sequences (mesh.context)" if accelerator.mesh.size("context") > 1 else "parameters"
    whole = accelerator._strategy.capabilities.whole_replicas and divided == "parameters"
    if whole and accelerator.scaler is None:
        return
    reason = "in fp16 all ranks share one loss scale" if whole else f"this run divides {divided}"
    raise StrategyError(
        "D0840",
        f"LocalSGD needs ranks that train whole replicas by themselves, but {reason}",
        fix="use strategy: ddp with mixed_precision bf16 or no",
    )
