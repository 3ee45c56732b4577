"""Ways to lay a run out over ranks, by name: what a contract test runs under. A new one is one line."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from distrib.strategies import STRATEGIES

_HALVES = {"plan": ("0=colwise", "2=rowwise")}
INSTALLED = [
    name
    for name in STRATEGIES
    if "cpu" in STRATEGIES.get(name).capabilities.devices and (name != "deepspeed" or find_spec("deepspeed"))
]
# name -> settings, and the world sizes that they fit
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "fsdp, gradients only": ({"strategy": "fsdp", "fsdp": {"reshard_after_forward": False}}, (2,)),
    "fsdp, offloaded": ({"strategy": "fsdp", "fsdp": {"cpu_offload": True}}, (2,)),
    "fsdp, reducing each micro-step": ({"strategy": "fsdp", "fsdp": {"reduce_each_micro_step": True}}, (2,)),
    "fsdp, one unit per layer": ({"strategy": "fsdp", "fsdp": {"wrap": ("Linear",)}}, (3,)),
    "fsdp, asking for 2 units ahead": (
        {"strategy": "fsdp", "fsdp": {"wrap": ("Linear",), "prefetch": 2}},
        (3,),
    ),
    "fsdp, 2 replicas of 2 shards": ({"strategy": "fsdp", "mesh": {"replicate": 2}}, (4,)),
    "fsdp, 2 shards, replicated": ({"strategy": "fsdp", "mesh": {"shard": 2}}, (4,)),
    "ddp, context 2": ({"strategy": "ddp", "mesh": {"context": 2}}, (2,)),
    "fsdp, context 2": ({"strategy": "fsdp", "mesh": {"context": 2}}, (4,)),
    "tensor 2": ({"strategy": "fsdp", "mesh": {"tensor": 2}, "tensor_parallel": _HALVES}, (2,)),
    "2 shards x tensor 2": ({"strategy": "fsdp", "mesh": {"tensor": 2}, "tensor_parallel": _HALVES}, (4,)),
    "2 replicas x tensor 2": (
        {"strategy": "fsdp", "mesh": {"replicate": 2, "shard": 1, "tensor": 2}, "tensor_parallel": _HALVES},
        (4,),
    ),
}

if "deepspeed" in INSTALLED:
    VARIANTS |= {
        f"deepspeed, stage {stage}": (
            {"strategy": "deepspeed", "deepspeed": {"zero_stage": stage}},
            (1, 2, 3),
        )
        for stage in range(4)
    } | {
        f"deepspeed, stage {stage}, context 2": (
            {"strategy": "deepspeed", "deepspeed": {"zero_stage": stage}, "mesh": {"context": 2}},
            (4,),
        )
        for stage in range(4)
    }


def settings_of(layout: str) -> dict[str, Any]:
    """Return the settings of a layout: of a variant, or just a strategy's name."""
    return VARIANTS[layout][0] if layout in VARIANTS else {"strategy": layout}


def world_sizes(layout: str, sizes: tuple[int, ...] = (1, 2, 3)) -> tuple[int, ...]:
    """Return which of `sizes` a layout runs on; a variant has sizes of its own."""
    if layout in VARIANTS:
        return VARIANTS[layout][1]
    most = STRATEGIES.get(layout).capabilities.max_world_size
    return tuple(size for size in sizes if most is None or size <= most)


def readers(layout: str, world_size: int) -> int:
    """Return how many of the ranks read different samples."""
    mesh = settings_of(layout).get("mesh", {})
    return world_size // (mesh.get("tensor", 1) * mesh.get("context", 1))


def dtype_of(layout: str) -> torch.dtype:
    """Return the format in which a layout is compared with a plain loop: the widest that it keeps."""
    return torch.float32 if settings_of(layout)["strategy"] == "deepspeed" else torch.float64


def tolerances(layout: str) -> dict[str, float]:
    """Return how far the parameters of a layout may be from those of a plain loop of the same dtype."""
    return {"rtol": 0, "atol": 2e-5} if dtype_of(layout) is torch.float32 else {}


_QUICK = {("deepspeed, stage 2", 2), ("deepspeed, stage 3", 3)}


def in_each(pairs: list[tuple[str, int]]) -> list[Any]:
    """Return parameters of a test for pairs of a layout and a world size; DeepSpeed starts slowly, so few of its are quick."""
    return [
        pytest.param(
            name,
            size,
            id=f"{name}-W{size}",
            marks=pytest.mark.slow if name.startswith("deepspeed") and (name, size) not in _QUICK else (),
        )
        for name, size in pairs
    ]


PLAIN = [(name, size) for name in INSTALLED for size in world_sizes(name)]
VARIED = [(name, size) for name in VARIANTS for size in world_sizes(name)]
