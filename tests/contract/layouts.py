"""Ways to lay a run out over ranks, by name: what a contract test runs under. A new one is one line."""

from __future__ import annotations

from typing import Any

from distrib.strategies import STRATEGIES

_HALVES = {"plan": ("0=colwise", "2=rowwise")}
# name -> settings, and the world sizes that they fit
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "fsdp, gradients only": ({"strategy": "fsdp", "fsdp": {"reshard_after_forward": False}}, (2,)),
    "fsdp, offloaded": ({"strategy": "fsdp", "fsdp": {"cpu_offload": True}}, (2,)),
    "fsdp, reducing each micro-step": ({"strategy": "fsdp", "fsdp": {"reduce_each_micro_step": True}}, (2,)),
    "fsdp, one unit per layer": ({"strategy": "fsdp", "fsdp": {"wrap": ("Linear",)}}, (3,)),
    "fsdp, 2 replicas of 2 shards": ({"strategy": "fsdp", "mesh": {"replicate": 2}}, (4,)),
    "fsdp, 2 shards, replicated": ({"strategy": "fsdp", "mesh": {"shard": 2}}, (4,)),
    "tensor 2": ({"strategy": "fsdp", "mesh": {"tensor": 2}, "tensor_parallel": _HALVES}, (2,)),
    "2 shards x tensor 2": ({"strategy": "fsdp", "mesh": {"tensor": 2}, "tensor_parallel": _HALVES}, (4,)),
    "2 replicas x tensor 2": (
        {"strategy": "fsdp", "mesh": {"replicate": 2, "shard": 1, "tensor": 2}, "tensor_parallel": _HALVES},
        (4,),
    ),
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
    return world_size // settings_of(layout).get("mesh", {}).get("tensor", 1)


PLAIN = [(name, size) for name in STRATEGIES for size in world_sizes(name)]
VARIED = [(name, size) for name in VARIANTS for size in world_sizes(name)]
