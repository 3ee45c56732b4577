from __future__ import annotations

from collections.abc import Mapping

import pytest

from distrib.errors import TopologyError
from distrib.topology import Rendezvous, Topology, detect_topology
from distrib.topology.environments.tpu_pod import TpuWorker, read_tpu_worker

# As GKE's device plugin sets them in a pod of a v5e slice of 16 chips.
GKE = {
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_TOPOLOGY": "4x4",
    "TPU_HOST_BOUNDS": "2,2,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    "TPU_WORKER_ID": "2",
    "TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc,job-2.svc,job-3.svc",
}
# Part of what the metadata server of a Cloud TPU VM of a v4-32 answers.
METADATA = {
    "tpu-env": "ACCELERATOR_TYPE: 'v4-32'\nALT: 'false'\nCHIPS_PER_HOST_BOUNDS: '2,2,1'\nHOST_BOUNDS: '1,1,4'\n"
    "INJECT_SLICE_BUILDER_FAULT: ''\nTPU_CHIPS_PER_PROCESS_BOUNDS: '2,2,1'\nTPU_PROCESS_BOUNDS: '1,1,4'\n"
    "TPU_RUNTIME_METRICS_PORTS: '8431,8432,8433,8434'\nWORKER_ID: '3'\nZONE: 'us-central2-b'\n",
    "agent-worker-number": "3",
    "accelerator-type": "v4-32",
    "worker-network-endpoints": "unknown:unknown:10.130.0.1,unknown:unknown:10.130.0.2,"
    "unknown:unknown:10.130.0.3,unknown:unknown:10.130.0.4",
}
FIVE_HOSTS = "a,b,c,d,e"


def nobody_asks(attribute: str) -> str:
    raise AssertionError(f"{attribute} was asked for")


def test_a_pod_of_gke_knows_its_place_without_metadata() -> None:
    worker = read_tpu_worker(GKE, nobody_asks)

    assert worker == TpuWorker(
        index=2,
        hosts=("job-0.svc", "job-1.svc", "job-2.svc", "job-3.svc"),
        accelerator="v5litepod-16",
        host_bounds=(2, 2, 1),
        chip_bounds=(2, 2, 1),
        source="TPU_WORKER_HOSTNAMES",
    )
    assert (worker.node_rank, worker.num_nodes, worker.main_host, worker.generation) == (2, 4, "job-0.svc", 5)


def test_a_cloud_tpu_vm_knows_its_place_from_metadata() -> None:
    worker = read_tpu_worker({"PATH": "/bin"}, METADATA.get)

    assert worker == TpuWorker(
        index=3,
        hosts=("10.130.0.1", "10.130.0.2", "10.130.0.3", "10.130.0.4"),
        accelerator="v4-32",
        host_bounds=(1, 1, 4),
        chip_bounds=(2, 2, 1),
        source="the metadata server",
    )


def test_older_images_have_separate_attributes() -> None:
    old = {name: text for name, text in METADATA.items() if name != "tpu-env"}

    worker = read_tpu_worker({}, old.get)

    assert (worker.index, worker.accelerator, worker.host_bounds) == (3, "v4-32", None)


def test_the_environment_wins_over_metadata() -> None:
    worker = read_tpu_worker({"TPU_WORKER_ID": "1"}, METADATA.get)

    assert (worker.index, worker.accelerator) == (1, "v4-32")


def test_metadata_are_not_asked_for_where_libtpu_does_not_ask_either() -> None:
    env = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8"}

    assert read_tpu_worker(env, nobody_asks).accelerator == "v4-8"


@pytest.mark.parametrize("hosts", ["localhost", "10.0.0.7", ""])
def test_a_machine_alone_is_localhost_to_itself(hosts: str) -> None:
    worker = read_tpu_worker({"TPU_WORKER_HOSTNAMES": hosts, "TPU_ACCELERATOR_TYPE": "v4-8"})

    assert (worker.hosts, worker.node_rank, worker.num_nodes) == (("localhost",), 0, 1)


@pytest.mark.parametrize("name", ["TPU_WORKER_ID", "CLOUD_TPU_TASK_ID", "JOB_COMPLETION_INDEX"])
def test_the_workers_number_goes_by_several_names(name: str) -> None:
    assert read_tpu_worker({"TPU_WORKER_HOSTNAMES": FIVE_HOSTS, name: "4"}).node_rank == 4


@pytest.mark.parametrize(
    ("hosts", "worker_id", "rank"), [("b0,b1", "1", 5), ("b0", "0", 2), ("b0,b1", "0", 4)]
)
def test_several_slices_count_one_after_the_other(hosts: str, worker_id: str, rank: int) -> None:
    env = {
        "TPU_WORKER_HOSTNAMES": hosts,
        "TPU_WORKER_ID": worker_id,
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "slice-0.svc:8080",
    }

    topology = detect_topology(env)

    assert (topology.rank, topology.world_size) == (rank, 3 * len(hosts.split(",")))
    assert topology.rendezvous == Rendezvous("slice-0.svc", 29500)


def test_a_script_on_every_worker_is_one_rank_of_each() -> None:
    assert detect_topology(GKE) == Topology(
        rank=2,
        world_size=4,
        node_rank=2,
        num_nodes=4,
        rendezvous=Rendezvous("job-0.svc", 29500),
        source="TPU pod",
    )


def test_a_named_port_is_taken() -> None:
    assert detect_topology({**GKE, "MASTER_PORT": "1234"}).rendezvous == Rendezvous("job-0.svc", 1234)


@pytest.mark.parametrize(
    "env",
    [
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"},
        {"PJRT_DEVICE": "TPU"},
        {"MEGASCALE_NUM_SLICES": "1"},
    ],
)
def test_a_worker_alone_is_a_single_process(env: Mapping[str, str]) -> None:
    assert detect_topology(env) == Topology()


def test_ranks_of_our_launcher_are_those_that_it_says() -> None:
    launched = {"DISTRIB_CONFIG": "{}", "RANK": "0", "WORLD_SIZE": "1"}

    assert detect_topology({**GKE, **launched}).source == "distrib launch"


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"TPU_WORKER_ID": ""}, "D0201", "TPU_WORKER_ID"),
        ({"TPU_WORKER_ID": "two"}, "D0202", "'two'"),
        ({"TPU_WORKER_ID": "4"}, "D0203", "4 hosts in TPU_WORKER_HOSTNAMES"),
        ({"TPU_HOST_BOUNDS": "2,2"}, "D0202", "'2,2'"),
        ({"TPU_CHIPS_PER_HOST_BOUNDS": "2,0,1"}, "D0202", "'2,0,1'"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "D0201", "MEGASCALE_SLICE_ID"),
        (
            {
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "a",
            },
            "D0203",
            "2 slices",
        ),
        ({"MASTER_PORT": "70000"}, "D0202", "70000"),
    ],
)
def test_a_variable_that_is_wrong_is_named(changes: Mapping[str, str], code: str, named: str) -> None:
    with pytest.raises(TopologyError) as caught:
        detect_topology({**GKE, **changes})

    assert caught.value.code == code
    assert named in caught.value.problem
