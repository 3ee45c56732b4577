"""Started by torchrun, or by anything else that uses torch's elastic agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from distrib.topology.environments.base import Environment, Variables, read_common
from distrib.topology.topology import Topology


class TorchElasticEnvironment(Environment):
    """The agent may serve the store at MASTER_ADDR itself; each attempt's keys then have their own prefix."""

    source: ClassVar[str] = "torchrun"

    def detect(self, env: Mapping[str, str]) -> bool:
        return bool(env.get("TORCHELASTIC_RUN_ID"))

    def read(self, env: Mapping[str, str]) -> Topology:
        topology = read_common(env, self.source)
        if topology.rendezvous is None or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return topology
        # torch.distributed.rendezvous uses this very prefix, so a script of ours and one of torch's can meet.
        attempt = Variables(env, self.source).integer("TORCHELASTIC_RESTART_COUNT")
        rendezvous = replace(topology.rendezvous, hosted_by_agent=True, prefix=f"/worker/attempt_{attempt}")
        return replace(topology, rendezvous=rendezvous)
