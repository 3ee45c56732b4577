from __future__ import annotations

import pytest

from distrib.errors import TopologyError
from distrib.topology import Rendezvous, Topology, detect_topology

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_NODE_RANK": "3",  # the rank on its node, whatever its name says
    "PMIX_NAMESPACE": "prterun-host-123@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {f"MV2_COMM_WORLD_{name}": value for name, value in (("RANK", "0"), ("SIZE", "2"))}
MVAPICH |= {"MV2_COMM_WORLD_LOCAL_RANK": "0", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}
PORT = {"MASTER_PORT": "21000"}
TWO_NODES = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "rank", "size"),
    [(OPEN_MPI, 3, 4), ({**HYDRA, **PORT}, 1, 2), ({**MVAPICH, **PORT}, 0, 2)],
    ids=["open", "hydra", "mvapich"],
)
def test_a_process_of_one_node_is_a_rank(env: dict[str, str], rank: int, size: int) -> None:
    found = detect_topology(env)

    assert (found.rank, found.world_size, found.local_rank, found.num_nodes) == (rank, size, rank, 1)
    assert found.source == "MPI"
    assert found.rendezvous is not None
    assert found.rendezvous.host == "127.0.0.1"
    assert 20_000 <= found.rendezvous.port < 32_000


def test_all_ranks_of_a_job_agree_on_the_port_and_jobs_differ() -> None:
    ports = [
        detect_topology(
            {
                **OPEN_MPI,
                "PMIX_NAMESPACE": job,
                "OMPI_COMM_WORLD_RANK": rank,
                "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            }
        )
        for job in ("a", "b")
        for rank in ("0", "1", "2")
    ]

    assert len({each.rendezvous for each in ports[:3]}) == 1
    assert ports[0].rendezvous != ports[3].rendezvous


def test_several_nodes_meet_where_the_user_says() -> None:
    expected = Topology(3, 4, 1, 2, 1, 2, Rendezvous("node1", 29500), "MPI")
    assert detect_topology({**TWO_NODES, **MASTER}) == expected


def test_several_nodes_without_a_meeting_place_are_refused() -> None:
    with pytest.raises(TopologyError, match=r"D0201.*MASTER_ADDR"):
        detect_topology(TWO_NODES)


def test_a_job_without_a_name_needs_a_port() -> None:
    with pytest.raises(TopologyError, match=r"D0201.*MASTER_PORT"):
        detect_topology(HYDRA)


def test_a_rank_set_on_top_of_mpis_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"D0203.*RANK is 0, but OMPI_COMM_WORLD_RANK is 3"):
        detect_topology({**OPEN_MPI, "RANK": "0"})


def test_mpi_wins_over_the_slurm_variables_of_its_helpers() -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert detect_topology({**OPEN_MPI, **slurm}).world_size == 4


def test_srun_with_pmi_is_slurms() -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    slurm |= {"SLURM_STEP_NODELIST": "node1", "SLURM_JOB_ID": "7", "PMI_RANK": "1", "PMI_SIZE": "2"}
    assert detect_topology(slurm).source == "Slurm"
