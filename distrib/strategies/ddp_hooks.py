"""How gradients are compressed on their way between replicas: communication hooks of DistributedDataParallel."""

# No `from __future__ import annotations` here: torch compares a hook's annotations with its classes, not with texts.
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
POWERSGD_RANK = 1  # torch's own default, as is the next
POWERSGD_START = 1000  # steps that are averaged in full before the first compressed one
_PLAIN_STEPS = 2  # DDP rebuilds its buckets after the first step, and the state is kept per bucket
_EPSILON = 1e-8  # keeps a gradient of zeros from becoming NaN when it is normalized

Gradients = torch.futures.Future[torch.Tensor]


def average_as(dtype: torch.dtype, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients over all ranks, in `dtype` on the wire; in their own where that is no smaller.

    Each rank divides before it rounds, so the sum overflows only where the average does. Float64 gradients stay as
    they are: whoever computes in it wants its digits.
    """
    gradients = bucket.buffer()
    share = gradients / dist.get_world_size()
    if is_compressed(gradients.dtype, dtype) and not gradients.is_sparse:
        share = share.to(dtype)
    sent = dist.all_reduce(share, async_op=True)

    def widen(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        average = done.value()[0]
        return average if average.is_sparse else gradients.copy_(average)

    future: Gradients = sent.get_future().then(widen)
    return future


def power_sgd(state: PowerSGDState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients by torch's PowerSGD (https://arxiv.org/abs/1905.13727).

    It starts further operations when the first has come back. On the CPU that happens at any time, in another
    thread, and the order of two buckets would differ between ranks; so a bucket is waited for there.
    """
    future: Gradients = powerSGD_hook(state, bucket)
    if bucket.buffer().is_cpu:
        future.wait()
    return future


def power_sgd_state() -> PowerSGDState:
    """Return the state of a run that begins."""
    return PowerSGDState(
        None,
        matrix_approximation_rank=POWERSGD_RANK,
        start_powerSGD_iter=POWERSGD_START,
        orthogonalization_epsilon=_EPSILON,
    )


def resume_power_sgd(state: PowerSGDState, steps: int) -> None:
    """Go on after `steps` averaged steps: what was left out so far is forgotten, and compression begins anew."""
    for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        memory.clear()
    state.iter = steps
    state.start_powerSGD_iter = max(POWERSGD_START, steps + _PLAIN_STEPS)


def register_hook(model: DistributedDataParallel, name: str) -> PowerSGDState | None:
    """Let a wrapped model average its gradients by the hook that the setting names.

    Returns:
        The state that the hook keeps, if it keeps any.
    """
    if name in FORMATS:
        model.register_comm_hook(FORMATS[name], average_as)
        return None
    state = power_sgd_state()
    model.register_comm_hook(state, power_sgd)
    return state


def is_compressed(dtype: torch.dtype, wire: torch.dtype) -> bool:
    """Whether gradients of `dtype` travel in the format `wire`: narrower for float32, wider for what is narrower."""
    if wire is torch.float32:
        return dtype in (torch.bfloat16, torch.float16)
    return dtype is torch.float32 and wire.itemsize < dtype.itemsize


def left_alone(model: nn.Module, name: str) -> list[str]:
    """Return the names of trained parameters whose gradients the hook `name` does not make smaller."""
    wire = FORMATS.get(name)
    sparse = {f"{module}.weight".lstrip(".") for module in sparse_modules(model)}
    return [
        key
        for key, parameter in model.named_parameters()
        if wire is not None
        and parameter.requires_grad
        and (key in sparse or not is_compressed(parameter.dtype, wire))
    ]


def sparse_modules(model: nn.Module) -> list[str]:
    """Return the names of modules whose gradients are sparse, which PowerSGD cannot factor."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and module.sparse]
