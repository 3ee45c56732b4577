"""What a DeepSpeed engine can be made of: a model, and an optimizer that trains it and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from distrib.errors import StrategyError
from distrib.state import TrainState

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def pairs_of(state: TrainState) -> list[tuple[nn.Module, Optimizer]]:
    """Return each optimizer's model.

    Raises:
        StrategyError: D0874, D0875, unless each optimizer trains parameters of exactly one model, and no other does.
    """
    pairs: list[tuple[nn.Module, Optimizer]] = []
    for optimizer in state.optimizers:
        stepped = {id(x) for group in optimizer.param_groups for x in group["params"]}
        models = [m for m in state.models if not stepped.isdisjoint(map(id, m.parameters()))]
        if not models:
            raise StrategyError(
                "D0874",
                f"{type(optimizer).__name__} steps no parameter of the models in this call; DeepSpeed needs a model and "
                "its optimizer together",
                where="prepare",
                fix="model, optimizer = accelerator.prepare(model, optimizer)",
            )
        taken = any(models[0] is model for model, _ in pairs)
        if len(models) > 1 or taken or stepped - {id(x) for x in models[0].parameters()}:
            what = (
                f"steps {len(models)} models"
                if len(models) > 1
                else f"is a second one for {type(models[0]).__name__}"
                if taken
                else f"steps parameters that are not in {type(models[0]).__name__}"
            )
            raise StrategyError(
                "D0875",
                f"{type(optimizer).__name__} {what}; a DeepSpeed engine has one model and one optimizer",
                where="prepare",
                fix="give each model one optimizer of its own, with its parameters only, or choose fsdp or ddp",
            )
        pairs.append((models[0], optimizer))
    return pairs


def copy_for_engine(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer like the user's that DeepSpeed may take apart: its groups get other parameters.

    Hooks are shared. `step` is not: schedulers have put a counter around the user's.
    """
    own: Optimizer = object.__new__(type(optimizer))
    vars(own).update({key: x for key, x in vars(optimizer).items() if key != "step"})
    own.state = type(optimizer.state)(dict)
    trained = [[x for x in group["params"] if x.requires_grad] for group in optimizer.param_groups]
    own.param_groups = [
        {**group, "params": parameters}
        for group, parameters in zip(optimizer.param_groups, trained, strict=True)
        if parameters
    ]
    return own


def match_norms(model: nn.Module) -> None:
    """Let normalizations take what comes in the format of their weights: on the CPU, autocast does not see to it."""

    def narrowed(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        weight = module.weight
        assert isinstance(weight, Tensor), "it was looked at below"
        if not weight.is_cpu:
            return inputs
        return tuple(
            x.to(weight.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
        )

    for module in model.modules():
        if isinstance(module, _NORMS) and isinstance(module.weight, Tensor):
            module.register_forward_pre_hook(narrowed)


def refuse_wide(model: nn.Module) -> None:
    """Refuse parameters in a format that DeepSpeed would not keep (D0877)."""
    for name, parameter in model.named_parameters():
        if parameter.dtype is torch.float64:
            raise StrategyError(
                "D0877",
                f"{name} is in float64, which DeepSpeed keeps and exchanges in float32",
                fix="give prepare a float32 model (model.float()), or choose ddp or fsdp",
            )


def refuse_batchnorm(model: nn.Module) -> None:
    """Refuse batch normalization in a model whose parameters are going to be in 16 bits (D0879)."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise StrategyError(
                "D0879",
                f"{name or 'the model'} is a {type(module).__name__}, whose weights would be in 16 bits and its statistics in "
                "float32, which torch does not compute with",
                where="mixed_precision",
                fix="set mixed_precision: no or deepspeed.zero_stage: 0, where autocast is used, or choose ddp or fsdp",
            )
