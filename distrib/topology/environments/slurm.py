"""Started by srun: one Slurm task is one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distrib.errors import TopologyError
from distrib.topology.environments.base import (
    Environment,
    Variables,
    check_same,
    check_topology,
    read_rendezvous,
)
from distrib.topology.nodelist import expand_counts, expand_nodelist
from distrib.topology.topology import Rendezvous, Topology

# Steps above this number are the batch script, a salloc shell and the like: one process, not a set of ranks
# (slurm.h: SLURM_BATCH_SCRIPT is 0xfffffffb).
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0

# Below the ephemeral ports, which begin at 32768 on Linux, so that no outgoing connection holds it by chance.
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000


class SlurmEnvironment(Environment):
    """Inside a job step. An allocation without srun (a salloc shell, a batch script) is one process."""

    source: ClassVar[str] = "Slurm"

    def detect(self, env: Mapping[str, str]) -> bool:
        step = env.get("SLURM_STEP_ID", "")
        return bool(env.get("SLURM_PROCID")) and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP

    def read(self, env: Mapping[str, str]) -> Topology:
        variables = Variables(env, self.source)
        rank = variables.integer("SLURM_PROCID")
        world_size = variables.integer(variables.first("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), minimum=1)
        for name, value, of in (
            ("RANK", rank, "SLURM_PROCID"),
            ("WORLD_SIZE", world_size, "SLURM_STEP_NUM_TASKS"),
        ):
            fix = f"unset {name}, or unset SLURM_PROCID where one Slurm task starts several ranks"
            check_same(variables, name, value, of, fix=fix)
        node_rank = variables.integer("SLURM_NODEID")
        num_nodes = variables.integer(variables.first("SLURM_STEP_NUM_NODES", "SLURM_NNODES"), minimum=1)
        return check_topology(
            Topology(
                rank=rank,
                world_size=world_size,
                local_rank=variables.integer("SLURM_LOCALID"),
                local_world_size=_tasks_on(variables, node_rank),
                node_rank=node_rank,
                num_nodes=num_nodes,
                rendezvous=_rendezvous(variables) if world_size > 1 else None,
                source=self.source,
            )
        )


def derived_port(job_id: int, step_id: int) -> int:
    """Return the port that all ranks of a step agree on without talking: 20000 to 31999."""
    return _FIRST_PORT + (job_id + 1009 * step_id) % _NUM_PORTS


def _tasks_on(variables: Variables, node_rank: int) -> int:
    name = variables.first("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    counts = expand_counts(variables.text(name), where=name)
    if node_rank < len(counts):
        return counts[node_rank]
    raise TopologyError(
        "D0203",
        f"the variables disagree: SLURM_NODEID is {node_rank}, but {name} lists {len(counts)} nodes",
        where="SLURM_NODEID",
        fix="start the script with srun, and pass Slurm's variables on unchanged",
    )


def _rendezvous(variables: Variables) -> Rendezvous:
    if "MASTER_ADDR" in variables and "MASTER_PORT" in variables:
        return read_rendezvous(variables)
    hosts = variables.first("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    own = {
        "MASTER_ADDR": variables.env.get("MASTER_ADDR")
        or expand_nodelist(variables.text(hosts), where=hosts)[0],
        "MASTER_PORT": variables.env.get("MASTER_PORT") or str(_port(variables)),
    }
    return read_rendezvous(Variables(own, variables.source))


def _port(variables: Variables) -> int:
    job = variables.integer(variables.first("SLURM_JOB_ID", "SLURM_JOBID"))
    return derived_port(job, variables.integer("SLURM_STEP_ID"))
