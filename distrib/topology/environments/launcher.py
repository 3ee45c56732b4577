"""Started by `distrib launch`: the variables that every tool knows, and one with the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distrib.topology.environments.base import Environment, read_common
from distrib.topology.topology import Topology


class LauncherEnvironment(Environment):
    """Our launcher sets DISTRIB_CONFIG and every variable of `read_common`."""

    source: ClassVar[str] = "distrib launch"

    def detect(self, env: Mapping[str, str]) -> bool:
        return "DISTRIB_CONFIG" in env and "RANK" in env

    def read(self, env: Mapping[str, str]) -> Topology:
        return read_common(env, self.source)
