"""The key-value store over which the ranks find each other."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

if TYPE_CHECKING:
    from distrib.topology import Rendezvous, Topology


def join_store(topology: Topology, rendezvous: Rendezvous, timeout: timedelta) -> Store:
    """Serve the job's store, if that is this rank's part, and connect to it.

    Args:
        topology: Who this rank is.
        rendezvous: Where the store is.
        timeout: How long to try.

    Raises:
        RuntimeError: of torch's own kinds, if it cannot be reached.
        OSError: if it cannot be served.
    """
    serves = topology.rank == 0 and not rendezvous.hosted_by_agent
    store: Store = TCPStore(
        rendezvous.host,
        rendezvous.port,
        topology.world_size,
        serves,
        timeout,
        wait_for_workers=False,
        master_listen_fd=_listen(rendezvous) if serves else None,
    )
    return PrefixStore(rendezvous.prefix, store) if rendezvous.prefix else store


def serve(listening: int) -> Store:
    """Serve a job's store for as long as the value returned lives. For a process beside the ranks.

    Args:
        listening: Descriptor of a TCP socket that listens at the job's rendezvous address.
    """
    with socket.socket(fileno=os.dup(listening)) as listener:
        host, port = listener.getsockname()[:2]
    return TCPStore(host, port, None, True, wait_for_workers=False, master_listen_fd=listening)


def _listen(rendezvous: Rendezvous) -> int:
    """Listen on the rendezvous address only, so that no other network reaches the store; return the descriptor."""
    for host in (rendezvous.host, ""):  # "": the name may lead to us through a translated address
        server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # shares the launcher's reserved port
        try:
            server.bind((host, rendezvous.port))
        except OSError:
            server.close()
            if not host:
                raise
            continue
        server.listen(4096)
        return server.detach()
    raise AssertionError("unreachable: the last bind returns or raises")
