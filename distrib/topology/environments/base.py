"""The seam of an environment, and what several share: reading variables and checking that they agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from distrib.errors import TopologyError
from distrib.topology.topology import Rendezvous, Topology

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LAST_PORT = 65535


class Environment(ABC):
    """One way of being started. A new one is one file with a subclass and one line in `ENVIRONMENTS`.

    Both methods are pure functions of the variables, so a test needs no cluster.
    """

    source: ClassVar[str]
    """What to call it in messages and in the start-up line: "torchrun"."""

    @abstractmethod
    def detect(self, env: Mapping[str, str]) -> bool:
        """Whether this environment started the process."""

    @abstractmethod
    def read(self, env: Mapping[str, str]) -> Topology:
        """Return this process's place in the job.

        Raises:
            TopologyError: if a variable is missing or no number, or if variables contradict each other.
        """


@dataclass(frozen=True)
class Variables:
    """Environment variables with errors that name them. An empty variable counts as missing.

    Attributes:
        env: The variables.
        source: Who should have set them: "torchrun".
    """

    env: Mapping[str, str]
    source: str

    def __contains__(self, name: str) -> bool:
        return bool(self.env.get(name))

    def first(self, *names: str) -> str:
        """Return the first of `names` that is set; when none is, the first of all, for the error to name."""
        return next((name for name in names if name in self), names[0])

    def text(self, name: str) -> str:
        """Return the variable's value.

        Raises:
            TopologyError: if it is missing.
        """
        if name not in self:
            raise TopologyError(
                "D0201",
                f"{name} is not set, but {self.source} needs it; found {self._related()}",
                where=name,
                fix=f"set {name}, or start the script with `distrib launch`, which sets all of them",
            )
        return self.env[name]

    def integer(self, name: str, *, minimum: int = 0, maximum: int | None = None) -> int:
        """Return the variable as an integer.

        Raises:
            TopologyError: if it is missing, no integer, or outside `minimum` to `maximum`, both included.
        """
        value = self.text(name).strip()
        digits = value.removeprefix("-")
        number = int(value) if digits.isascii() and digits.isdigit() else None
        if number is None or number < minimum or (maximum is not None and number > maximum):
            upper = f"{minimum} to {maximum}" if maximum is not None else f"of at least {minimum}"
            raise TopologyError(
                "D0202",
                f"{name}={value!r} is not what {self.source} sets; expected an integer {upper}",
                where=name,
                fix=f"correct {name}, or unset it if another program left it behind",
            )
        return number

    def _related(self) -> str:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = [f"{name}={self.env[name]}" for name in names if name in self]
        return ", ".join(found) or "no variable of a launcher"


def read_common(env: Mapping[str, str], source: str) -> Topology:
    """Read the variables that every tool knows: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and so on.

    The node's index is GROUP_RANK or NODE_RANK, the number of nodes GROUP_WORLD_SIZE or NUM_NODES; they may
    be left out when all nodes have the same number of ranks in sequence. LOCAL_RANK and LOCAL_WORLD_SIZE may
    be left out when MASTER_ADDR is this machine's loopback address.

    Raises:
        TopologyError: if one is missing, no number, or contradicts another.
    """
    variables = Variables(env, source)
    world_size = variables.integer("WORLD_SIZE", minimum=1)
    if world_size == 1 and "RANK" not in variables:
        return Topology(source=source)
    rank = variables.integer("RANK")
    rendezvous = read_rendezvous(variables) if world_size > 1 else None
    local_rank, local_world_size = _local(variables, rank, world_size)
    _check_ranks(source, rank, world_size, local_rank, local_world_size)
    node_rank, num_nodes = _node(variables, rank, world_size, local_rank, local_world_size)
    return check_topology(
        Topology(rank, world_size, local_rank, local_world_size, node_rank, num_nodes, rendezvous, source)
    )


def read_rendezvous(variables: Variables) -> Rendezvous:
    """Return MASTER_ADDR and MASTER_PORT."""
    return Rendezvous(
        variables.text("MASTER_ADDR"), variables.integer("MASTER_PORT", minimum=1, maximum=_LAST_PORT)
    )


def check_same(variables: Variables, name: str, value: int, of: str, *, fix: str) -> None:
    """Refuse a number that a script has set on top of the launcher's: either could be meant.

    Raises:
        TopologyError: if `name` is set to something else than `value`, which `of` says (D0203).
    """
    if name in variables and variables.integer(name) != value:
        raise TopologyError(
            "D0203",
            f"the variables disagree: {name} is {variables.env[name]}, but {of} is {value}",
            where=name,
            fix=fix,
        )


def check_topology(topology: Topology) -> Topology:
    """Return `topology`, or raise an error that names the two values that contradict each other.

    Raises:
        TopologyError: if a rank is not below its size, or the sizes do not fit together (D0203).
    """
    t = topology
    _check_ranks(t.source, t.rank, t.world_size, t.local_rank, t.local_world_size)
    _agree(
        t.source,
        t.node_rank < t.num_nodes,
        f"node {t.node_rank} is not below the number of nodes {t.num_nodes}",
    )
    _agree(
        t.source,
        (t.num_nodes == 1) == (t.local_world_size == t.world_size) and t.num_nodes <= t.world_size,
        f"{t.num_nodes} nodes, {t.local_world_size} ranks on this one, world size {t.world_size}",
    )
    return topology


def _check_ranks(source: str, rank: int, world_size: int, local_rank: int, local_world_size: int) -> None:
    _agree(source, rank < world_size, f"rank {rank} is not below the world size {world_size}")
    _agree(
        source,
        local_rank < local_world_size,
        f"local rank {local_rank} is not below the number of ranks on the node, {local_world_size}",
    )
    _agree(
        source,
        local_world_size <= world_size,
        f"the node has {local_world_size} ranks, more than the world size {world_size}",
    )


def _agree(source: str, holds: bool, problem: str) -> None:  # noqa: FBT001 (reads like an assertion)
    if not holds:
        raise TopologyError(
            "D0203",
            f"the variables disagree: {problem}",
            where=f"environment of {source}",
            fix="unset what another launcher left behind, or start the script with `distrib launch`",
        )


def _local(variables: Variables, rank: int, world_size: int) -> tuple[int, int]:
    # An address that no other node can reach means that all ranks are here. Anything else would be a guess.
    one_node = world_size == 1 or variables.env.get("MASTER_ADDR") in _LOOPBACK
    local_rank = rank if one_node and "LOCAL_RANK" not in variables else variables.integer("LOCAL_RANK")
    if one_node and "LOCAL_WORLD_SIZE" not in variables:
        return local_rank, world_size
    return local_rank, variables.integer("LOCAL_WORLD_SIZE", minimum=1)


def _node(
    variables: Variables, rank: int, world_size: int, local_rank: int, local_world_size: int
) -> tuple[int, int]:
    index, number = (
        variables.first("GROUP_RANK", "NODE_RANK"),
        variables.first("GROUP_WORLD_SIZE", "NUM_NODES"),
    )
    even = world_size % local_world_size == 0 and rank % local_world_size == local_rank
    node_rank = rank // local_world_size if even and index not in variables else variables.integer(index)
    if even and number not in variables:
        return node_rank, world_size // local_world_size
    return node_rank, variables.integer(number, minimum=1)
