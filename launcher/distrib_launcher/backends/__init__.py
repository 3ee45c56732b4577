"""Ways to turn a plan into processes, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from distrib.registry import Registry
from distrib_launcher.plan import LaunchPlan

Backend = Callable[
    [LaunchPlan, Mapping[str, str], str], int
]  # runs the plan to its end; returns the exit code

BACKENDS: Final = Registry[Backend](
    "backend", "distrib.backends", {"local": "distrib_launcher.backends.local:run"}
)
