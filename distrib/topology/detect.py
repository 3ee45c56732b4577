"""Which environment are we in, and what does it say about this process?"""

from __future__ import annotations

from collections.abc import Mapping

from distrib.topology.environments import ENVIRONMENTS
from distrib.topology.topology import Topology


def detect_topology(env: Mapping[str, str]) -> Topology:
    """Return this process's place in the job, from environment variables alone.

    The first of `ENVIRONMENTS` that recognises `env` is read; if none does, this is a single process.

    Args:
        env: The process's environment variables.

    Raises:
        TopologyError: if variables are missing (D0201), no numbers (D0202) or contradict each other (D0203).
    """
    for name in ENVIRONMENTS:
        environment = ENVIRONMENTS.get(name)()
        if environment.detect(env):
            return environment.read(env)
    return Topology()
