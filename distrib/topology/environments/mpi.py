"""Started by mpirun or mpiexec: one MPI process is one rank. MPI itself is not used."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import ClassVar, Final, NamedTuple

from distrib.topology.environments.base import Environment, Variables, check_same, read_common
from distrib.topology.topology import Topology

# Below the ephemeral ports, which begin at 32768 on Linux, so that no outgoing connection holds it by chance.
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")  # a name that all ranks of a job have, and no other job


class _Names(NamedTuple):
    """What one implementation calls rank, world size, local rank and ranks of the node."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_KINDS: Final = (
    _Names(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Names(*(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


class MpiEnvironment(Environment):
    """Open MPI, MVAPICH2, and MPICH and Intel MPI (Hydra), with ranks laid out node by node.

    On one node the ranks meet at its loopback address, with Open MPI at a port that follows from the job's name. On
    several, MASTER_ADDR and MASTER_PORT have to be set, since no variable says where rank 0 runs.
    """

    source: ClassVar[str] = "MPI"

    def detect(self, env: Mapping[str, str]) -> bool:
        return _kind(env) is not None

    def read(self, env: Mapping[str, str]) -> Topology:
        names = _kind(env)
        assert names is not None, "detect has said so"
        variables = Variables(env, self.source)
        rank, size = variables.integer(names.rank), variables.integer(names.size, minimum=1)
        local_size = variables.integer(names.local_size, minimum=1)
        fix = f"unset it, or {names.rank}, where one MPI process starts several ranks"
        check_same(variables, "RANK", rank, names.rank, fix=fix)
        check_same(variables, "WORLD_SIZE", size, names.size, fix=fix)
        common = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(variables.integer(names.local_rank)),
            "LOCAL_WORLD_SIZE": str(local_size),
            **(_meeting_here(env) if local_size == size else {}),
        }
        kept = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NUM_NODES")
        return read_common({**common, **{name: env[name] for name in kept if env.get(name)}}, self.source)


def _kind(env: Mapping[str, str]) -> _Names | None:
    """Return the first kind of which rank, size and local rank are set: srun sets some of PMI's, and has its own."""
    return next((kind for kind in _KINDS if all(env.get(name) for name in kind[:3])), None)


def _meeting_here(env: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks of one node meet. Without a name of the job, the port would be that of every job."""
    job = next((env[name] for name in _JOB if env.get(name)), "")
    port = {"MASTER_PORT": str(_FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS)} if job else {}
    return {"MASTER_ADDR": "127.0.0.1", **port}
