"""Who and where this process is: topology, mesh and their detection. Loads no torch."""

from distrib.topology.detect import detect_topology
from distrib.topology.mesh import DATA_AXES, Mesh, resolve_mesh
from distrib.topology.threads import threads_per_rank, usable_cores
from distrib.topology.topology import Rendezvous, Topology

__all__ = [
    "DATA_AXES",
    "Mesh",
    "Rendezvous",
    "Topology",
    "detect_topology",
    "resolve_mesh",
    "threads_per_rank",
    "usable_cores",
]
