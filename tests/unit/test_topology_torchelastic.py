from __future__ import annotations

import pytest

from distrib.errors import TopologyError
from distrib.topology import Rendezvous, detect_topology

AGENT = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}


def test_the_agents_store_is_joined_under_the_prefix_of_the_attempt() -> None:
    expected = Rendezvous("node1", 29400, hosted_by_agent=True, prefix="/worker/attempt_2")
    assert detect_topology(AGENT).rendezvous == expected


def test_without_the_agents_store_rank_0_serves_a_fresh_one() -> None:
    env = {**AGENT, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert detect_topology(env).rendezvous == Rendezvous("node1", 29400)


def test_the_place_in_the_job_is_the_agents() -> None:
    topology = detect_topology(AGENT)
    assert (topology.rank, topology.local_rank, topology.node_rank, topology.num_nodes) == (3, 1, 1, 2)
    assert topology.source == "torchrun"


def test_torchrun_inside_a_slurm_step_is_torchrun() -> None:
    step = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}
    assert detect_topology({**AGENT, **step}).source == "torchrun"


def test_a_run_id_without_ranks_is_an_error() -> None:
    with pytest.raises(TopologyError, match="WORLD_SIZE is not set"):
        detect_topology({"TORCHELASTIC_RUN_ID": "none"})
