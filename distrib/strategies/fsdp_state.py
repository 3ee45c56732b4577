"""What torch's FSDP2 keeps to itself and we have to see to: which parameters are whole, and gradients not exchanged yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree


def begin(root: nn.Module) -> None:
    """Make `root` the root of its units now: else a part that is called before the whole would become one of its own."""
    if isinstance(root, FSDPModule):
        root._get_fsdp_state()._lazy_init()


def reshard(root: nn.Module) -> None:
    """Bring the shards back as the module's parameters: a forward without a backward leaves some whole."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prefetch(units: Sequence[Any], number: int) -> None:
    """Let each unit ask for so many that follow it, in the forward, and that come before it, in the backward.

    Args:
        units: Sharded modules in the order in which they compute; the first is the model itself, which is also the first
            in the backward.
        number: At least 1.
    """
    inner = units[1:]
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(inner[i : i + number])
        before = inner[max(i - 1 - number, 0) : i - 1] if i else inner[-number:]
        unit.set_modules_to_backward_prefetch(before[::-1])


def forget_aborted(root: nn.Module) -> None:
    """Let a model whose last forward or backward was ended by an exception start anew (torch 2.13 and later can)."""
    reset = getattr(root, "reset_iter_state", None)
    if isinstance(root, FSDPModule) and root._get_fsdp_state()._is_root and reset is not None:
        reset()


def unexchanged(root: nn.Module, wanted: Collection[int]) -> list[Tensor]:
    """Return the whole gradients that micro-steps have left on this rank, of the shards with these ids."""
    found = []
    for parameter in _parameters(root):
        if id(parameter.sharded_param) in wanted:
            whole = getattr(parameter, "_unsharded_param", None)
            found += [parameter.unsharded_accumulated_grad, None if whole is None else whole.grad]
    return [x for x in found if x is not None]


def forget_unexchanged(root: nn.Module, wanted: Collection[int]) -> None:
    """Drop the gradients that `unexchanged` returns."""
    for parameter in _parameters(root):
        if id(parameter.sharded_param) in wanted:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


class _NoView(torch.autograd.Function):
    """The same values in the same memory, to autograd a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004 (torch calls it so)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004 (torch calls it so)
        return gradients[0]


def without_views(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001 (a hook)
    """Return what a unit returns without tensors that are views, as linear layers return them.

    FSDP gathers a unit for the backward when a gradient reaches its output. An operation in place on a view (`logits /= 2`)
    would take that away in silence, and with it the exchange of gradients.
    """

    def own(x: Tensor) -> Tensor:
        return _NoView.apply(x) if x.requires_grad and x._is_view() else x  # type: ignore[no-untyped-call]

    return pytree.tree_map_only(Tensor, own, output)


@contextmanager
def whole_state_dicts(root: nn.Module) -> Iterator[None]:
    """Let `state_dict` and `load_state_dict` see parameters as they are; torch's hooks would bring the shards back."""
    groups = list(_groups(root))
    for group in groups:
        for handles in (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        ):
            for handle in handles.values():
                handle.remove()
            handles.clear()
        for parameter in group.fsdp_params:
            parameter._post_load_hook_handle.remove()
    try:
        yield
    finally:
        for group in groups:
            group._register_state_dict_hooks()
            for parameter in group.fsdp_params:
                _after_load(parameter)


def _after_load(parameter: Any) -> None:
    """Let torch look, after each `load_state_dict`, whether the shard is another tensor now, as it does itself."""
    module = parameter._module_info.module
    parameter._post_load_hook_handle = module.register_load_state_dict_post_hook(
        lambda *_, **__: parameter.reset_sharded_param()
    )


def _groups(root: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)  # torch 2.13 has several
            for group in several if several is not None else [state._fsdp_param_group]:
                if group is not None and id(group) not in seen:
                    seen.add(id(group))
                    yield group


def _parameters(root: nn.Module) -> Iterator[Any]:
    for group in _groups(root):
        yield from group.fsdp_params
