"""What a person writes without us, for each strategy: the measure of how often ranks may talk."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from distrib.strategies.deepspeed_ops import adopt_process_group, load_deepspeed


def sharded(model: nn.Module) -> nn.Module:
    for layer in model:
        if layer.out_features > 1:
            fully_shard(layer)
    return fully_shard(model)


WRAPPED_BY_HAND = {"single": lambda model: model, "ddp": DistributedDataParallel, "fsdp": sharded}
BY_HAND = (*WRAPPED_BY_HAND, "deepspeed")


def wide_model() -> nn.Module:
    """About 30 MB of parameters, so that gradients travel in several buckets."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(7)), nn.Linear(1000, 1))


def counted(work) -> int:
    """Return how many operations of the process group `work()` makes on this rank."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return sum(event.count for event in seen.key_averages() if event.key.startswith(("gloo:", "nccl:")))


def with_deepspeed(accumulation: int, clip: bool) -> int:
    """Return the operations of one step of stage 2 as DeepSpeed's own examples write it, after one that warms up."""
    deepspeed = load_deepspeed(os.environ, "cpu")
    adopt_process_group(deepspeed)  # it would compile an operation that it does not use
    model = wide_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0 if clip else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": 2,
                "reduce_bucket_size": sum(x.numel() for x in model.parameters()),
                "compute_grad_norm": clip,
            },
        },
    )

    def step():
        for _ in range(accumulation):
            engine.backward(engine(torch.ones(2, 1000)).mean())
            engine.step()

    step()
    return counted(step)


def by_hand(strategy: str, accumulation: int, clip: bool) -> int:
    """Return the operations of one optimizer step, after one that warms up."""
    if strategy == "deepspeed":
        dist.init_process_group("gloo")
        return with_deepspeed(accumulation, clip)
    if strategy != "single":
        dist.init_process_group("gloo")
    model = WRAPPED_BY_HAND[strategy](wide_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        for micro_step in range(accumulation):
            last = micro_step == accumulation - 1
            with nullcontext() if last or strategy != "ddp" else model.no_sync():
                if strategy == "fsdp":
                    model.set_requires_gradient_sync(last)
                (model(torch.ones(2, 1000)).mean() / accumulation).backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if strategy == "fsdp":
                norm.full_tensor()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return counted(step)
