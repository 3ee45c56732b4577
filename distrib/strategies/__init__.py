"""How parameters, gradients and optimizer state lie over the ranks. A new strategy is one file and one line here."""

from __future__ import annotations

from distrib.errors import StrategyError
from distrib.registry import Registry
from distrib.strategies.base import Capabilities, StepResult, Strategy

__all__ = ["STRATEGIES", "Capabilities", "StepResult", "Strategy", "choose_strategy"]

STRATEGIES: Registry[type[Strategy]] = Registry(
    "strategy",
    "distrib.strategies",
    {
        "single": "distrib.strategies.single:Single",
        "ddp": "distrib.strategies.ddp:DDP",
        "fsdp": "distrib.strategies.fsdp:FSDP",
        "deepspeed": "distrib.strategies.deepspeed:DeepSpeed",
        "xla": "distrib.strategies.xla:Xla",
    },
)
_OF_DEVICE = {"xla": "xla"}  # devices on which one strategy runs, whatever the number of ranks


def choose_strategy(
    requested: str, world_size: int, device: str, *, where: str | None = None
) -> tuple[str, type[Strategy], str]:
    """Return the name and class of the strategy, and the reason for an automatic choice.

    Args:
        requested: A registered name, or "auto".
        world_size: Number of ranks.
        device: Name of the device.
        where: Place to name in an error.

    Raises:
        StrategyError: if it does not run on this device or at this world size.
    """
    automatic = requested == "auto"
    of_device = _OF_DEVICE.get(device)
    name = (of_device or ("ddp" if world_size > 1 else "single")) if automatic else requested
    reason = (
        f"auto, {f'device {device}' if of_device else _processes(world_size)}"
        if automatic
        else f"asked for by {where}"
    )
    cls = STRATEGIES.get(name)
    if device not in cls.capabilities.devices:
        raise StrategyError(
            "D0802",
            f"strategy {name} does not run on device {device}; it runs on {', '.join(cls.capabilities.devices)}",
            where=where,
            fix="choose another device or strategy",
        )
    most = cls.capabilities.max_world_size
    if most is not None and world_size > most:
        raise StrategyError(
            "D0803",
            f"strategy {name} runs in {most} process, but the world size is {world_size}",
            where=where,
            fix="use strategy: ddp, or start one process",
        )
    return name, cls, reason


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"
