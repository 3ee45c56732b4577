"""Who am I among the processes of this job? Immutable values, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet.

    Attributes:
        host: Address of the key-value store, reachable from every node.
        port: Its TCP port.
        hosted_by_agent: True when somebody else (torch elastic's agent) serves the store and rank 0 must not.
        prefix: Put before every key, so that attempts that share a store do not see each other's keys.
    """

    host: str
    port: int
    hosted_by_agent: bool = False
    prefix: str = ""


@dataclass(frozen=True)
class Topology:
    """This process's place in the job. Ranks count from 0; node sizes may differ.

    Attributes:
        rank: Global rank, in [0, world_size).
        world_size: Number of ranks of the job.
        local_rank: Rank on this node, in [0, local_world_size).
        local_world_size: Number of ranks on this node.
        node_rank: Index of this node, in [0, num_nodes).
        num_nodes: Number of nodes.
        rendezvous: Where the ranks meet; None for a single process.
        source: What said so, for the start-up line: "distrib launch", "torchrun", "Slurm".
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    rendezvous: Rendezvous | None = None
    source: str = "a single process"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.local_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the highest rank."""
        return self.rank == self.world_size - 1
