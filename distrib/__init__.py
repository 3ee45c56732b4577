"""Distributed training for plain PyTorch loops. Importing this package loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrib_launcher.functions import launch as launch, notebook_launcher as notebook_launcher

    from distrib import testing as testing, tracking as tracking
    from distrib.accelerator import Accelerator as Accelerator
    from distrib.config import RunConfig as RunConfig
    from distrib.errors import (
        CheckpointError as CheckpointError,
        CollectiveError as CollectiveError,
        ConfigError as ConfigError,
        DataError as DataError,
        DistribError as DistribError,
        LaunchError as LaunchError,
        NotBuiltError as NotBuiltError,
        StrategyError as StrategyError,
        TopologyError as TopologyError,
        TrainingError as TrainingError,
    )
    from distrib.local_sgd import LocalSGD as LocalSGD
    from distrib.logging import get_logger as get_logger
    from distrib.seeding import set_seed as set_seed
    from distrib.strategies.meta import init_empty as init_empty

__version__ = "0.1.0"

_WHERE = {
    "Accelerator": "distrib.accelerator",
    "RunConfig": "distrib.config",
    "LocalSGD": "distrib.local_sgd",
    "init_empty": "distrib.strategies.meta",
    "set_seed": "distrib.seeding",
    "get_logger": "distrib.logging",
    "DistribError": "distrib.errors",
    "ConfigError": "distrib.errors",
    "NotBuiltError": "distrib.errors",
    "TopologyError": "distrib.errors",
    "LaunchError": "distrib.errors",
    "CollectiveError": "distrib.errors",
    "DataError": "distrib.errors",
    "TrainingError": "distrib.errors",
    "CheckpointError": "distrib.errors",
    "StrategyError": "distrib.errors",
    "launch": "distrib_launcher.functions",
    "notebook_launcher": "distrib_launcher.functions",
}
_NOT_BUILT = ("find_executable_batch_size", "compat")
_MODULES = ("testing", "tracking")

__all__ = [*_WHERE, *_MODULES]  # noqa: PLE0604 (names come from the tables above)


def __getattr__(name: str) -> Any:
    """Import what a public name stands for when it is first used (PEP 562)."""
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"distrib.{name}")
    if name in _NOT_BUILT:
        from distrib.errors import NotBuiltError  # noqa: PLC0415 (only on this path)

        # No AttributeError: `from distrib import` would turn it into an ImportError that does not say why.
        raise NotBuiltError(f"distrib.{name}")
    raise AttributeError(f"module 'distrib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
