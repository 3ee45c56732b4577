"""Run by test_torchrun_environment.py: detect, connect, gather every rank's number, write it down.

Arguments: the folder for the results; the attempt (0, 1, ...) that fails after it has met.
"""

import json
import os
import signal
import sys
from pathlib import Path

from distrib.collectives import connect_ranks
from distrib.devices import choose_device
from distrib.topology import detect_topology

LIMIT_S = 60  # torchrun starts its workers in sessions of their own, so each also ends itself


def main() -> None:
    signal.alarm(LIMIT_S)
    results, failing_attempt = Path(sys.argv[1]), sys.argv[2]
    topology = detect_topology(os.environ)
    backend, _ = choose_device("cpu", topology.local_world_size)
    ranks = connect_ranks(topology, backend, backend.bind(topology.local_rank), timeout_s=30)
    met = ranks.gather_object(topology.rank)
    ranks.close()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == failing_attempt:
        sys.exit(7)
    assert topology.rendezvous is not None
    found = {"source": topology.source, "hosted_by_agent": topology.rendezvous.hosted_by_agent, "met": met}
    (results / f"{topology.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
