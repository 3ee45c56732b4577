"""Started by hand or by a tool we do not know, with the variables that torch defines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distrib.topology.environments.base import Environment, read_common
from distrib.topology.topology import Topology


class PlainEnvironment(Environment):
    """RANK or WORLD_SIZE is set. LOCAL_RANK and LOCAL_WORLD_SIZE may be left out on a single node."""

    source: ClassVar[str] = "RANK and WORLD_SIZE"

    def detect(self, env: Mapping[str, str]) -> bool:
        return bool(env.get("RANK") or env.get("WORLD_SIZE"))

    def read(self, env: Mapping[str, str]) -> Topology:
        return read_common(env, self.source)
