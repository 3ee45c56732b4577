"""Who started this process: one file per environment, asked in the order of this table."""

from __future__ import annotations

from distrib.registry import Registry
from distrib.topology.environments.base import Environment

__all__ = ["ENVIRONMENTS", "Environment"]

ENVIRONMENTS: Registry[type[Environment]] = Registry(
    "environment",
    "distrib.environments",
    {
        "launcher": "distrib.topology.environments.launcher:LauncherEnvironment",
        "torchelastic": "distrib.topology.environments.torchelastic:TorchElasticEnvironment",
        "mpi": "distrib.topology.environments.mpi:MpiEnvironment",
        "slurm": "distrib.topology.environments.slurm:SlurmEnvironment",
        "plain": "distrib.topology.environments.plain:PlainEnvironment",
        "tpu_pod": "distrib.topology.environments.tpu_pod:TpuPodEnvironment",
    },
)
