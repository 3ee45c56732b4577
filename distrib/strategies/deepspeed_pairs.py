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

    Hooks are shared. `step` is not: schedulers have put a counter around the user's. State that the user's has from the
    start is dropped.
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


def exact_values(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return a model's float32 values, in host memory: DeepSpeed makes masters of what it has rounded to 16 bits.

    What is divided already was made in 16 bits, and is left out.
    """
    return {
        x: x.data.cpu()
        for x in model.parameters()
        if x.requires_grad and x.dtype is torch.float32 and not hasattr(x, "ds_id")
    }


def put_back(engine: Any, own: Optimizer) -> None:
    """Let an engine step the optimizer that it was made with, and that have the state which it has from the start.

    DeepSpeed 0.19 puts a new Adagrad in its place, which has lost the parameter groups.
    """
    if not isinstance(own, torch.optim.Adagrad):
        return
    own.state.update(torch.optim.Adagrad(own.param_groups, **own.defaults).state)
    zero = engine.optimizer
    if zero is not own:
        zero.optimizer = own
    if engine.zero_optimization_stage() in (1, 2):
        zero._link_all_hp_params()  # of all groups


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


def refuse_stepped(optimizer: Optimizer) -> None:
    """Refuse an optimizer with state (D0876), unless it is what an Adagrad has from the start."""
    if isinstance(optimizer, torch.optim.Adagrad) and all(x["step"] == 0 for x in optimizer.state.values()):
        optimizer.state.clear()
    if optimizer.state:
        raise StrategyError(
            "D0876",
            f"{type(optimizer).__name__} has state already, which DeepSpeed would lay out anew and lose",
            fix="prepare the optimizer before its first step, and load its state with load_state afterwards",
        )


def refuse_matrices(optimizer: Optimizer) -> None:
    """Refuse an optimizer that steps matrices as such, where parameters are stepped in flat parts (D0953)."""
    muon = getattr(torch.optim, "Muon", None)  # since torch 2.9
    if muon is not None and isinstance(optimizer, muon):
        raise StrategyError(
            "D0953",
            f"{type(optimizer).__name__} needs each matrix as a whole, but ZeRO steps flat parts of it",
            where="prepare",
            fix="set deepspeed.zero_stage: 0, or choose ddp",
        )


def refuse_begun(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state cannot go to a disk, since it is there before the first step (D0952)."""
    if isinstance(optimizer, torch.optim.Adagrad):
        raise StrategyError(
            "D0952",
            f"{type(optimizer).__name__} has state before its first step, for which DeepSpeed makes no file",
            where="deepspeed.offload_optimizer",
            fix="offload it to cpu, or take an optimizer such as AdamW",
        )


def refuse_wide(model: nn.Module) -> None:
    """Refuse parameters in a format that DeepSpeed would not keep (D0877)."""
    for name, parameter in model.named_parameters():
        if parameter.dtype is torch.float64:
            raise StrategyError(
                "D0877",
                f"{name} is in float64, which DeepSpeed keeps and exchanges in float32",
                fix="give prepare a float32 model (model.float()), or choose ddp or fsdp",
            )


def refuse_sparse(model: nn.Module) -> None:
    """Refuse modules whose gradients are sparse, which ZeRO cannot divide (D0950)."""
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and module.sparse
            and module.weight.requires_grad
        ):
            raise StrategyError(
                "D0950",
                f"{name or 'the model'} is {type(module).__name__}(sparse=True), whose gradients ZeRO cannot divide",
                where="prepare",
                fix="make it with sparse=False, set deepspeed.zero_stage: 0, or choose ddp",
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
