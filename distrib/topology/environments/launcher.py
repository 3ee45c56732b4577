"""Started by `distrib launch`: the variables that every tool knows, and one with the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from distrib.topology.environments.base import Environment, read_common
from distrib.topology.topology import Topology


class LauncherEnvironment(Environment):
    """Our launcher sets DISTRIB_CONFIG and every variable of `read_common`. It may serve the ranks' store itself."""

    source: ClassVar[str] = "distrib launch"

    def detect(self, env: Mapping[str, str]) -> bool:
        return "DISTRIB_CONFIG" in env and "RANK" in env

    def read(self, env: Mapping[str, str]) -> Topology:
        topology = read_common(env, self.source)
        if topology.rendezvous is None or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return topology
        return replace(topology, rendezvous=replace(topology.rendezvous, hosted_by_agent=True))
