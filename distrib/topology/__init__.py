"""Who and where this process is: topology, mesh and their detection. Loads no torch."""

from distrib.topology.mesh import Mesh, resolve_mesh
from distrib.topology.topology import Rendezvous, Topology

__all__ = ["Mesh", "Rendezvous", "Topology", "resolve_mesh"]
