from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from distrib.errors import TopologyError
from distrib.topology import Rendezvous, Topology, detect_topology
from distrib.topology.environments.slurm import derived_port

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_NODELIST": "node[01-09]",
}


def error_of(env: dict[str, str]) -> TopologyError:
    with pytest.raises(TopologyError) as caught:
        detect_topology(env)
    return caught.value


def test_a_task_of_a_step_is_a_rank() -> None:
    expected = Topology(2, 3, 0, 1, 1, 2, Rendezvous("node07", derived_port(4711, 0)), "Slurm")
    assert detect_topology(STEP) == expected


def test_an_allocation_without_srun_is_a_single_process() -> None:
    assert detect_topology({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}) == Topology()


@pytest.mark.parametrize("step", ["4294967290", "4294967291"])
def test_the_shell_and_the_batch_script_are_single_processes(step: str) -> None:
    assert detect_topology({**STEP, "SLURM_STEP_ID": step}) == Topology()


def test_the_job_answers_where_the_step_is_silent() -> None:
    env = {key: value for key, value in STEP.items() if "STEP_N" not in key and "STEP_T" not in key}
    job = {"SLURM_NTASKS": "3", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "2,1"}
    topology = detect_topology({**env, **job})
    assert (topology.world_size, topology.local_world_size, topology.num_nodes) == (3, 1, 2)
    assert topology.rendezvous is not None
    assert topology.rendezvous.host == "node01"


def test_a_step_of_one_task_has_no_rendezvous() -> None:
    one = {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    assert detect_topology({**STEP, **one, "SLURM_STEP_TASKS_PER_NODE": "1"}) == Topology(source="Slurm")


def test_the_users_address_and_port_win() -> None:
    env = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert detect_topology(env).rendezvous == Rendezvous("10.0.0.1", 1234)
    assert detect_topology({**STEP, "MASTER_PORT": "1234"}).rendezvous == Rendezvous("node07", 1234)


@pytest.mark.parametrize(
    "name", ["SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID"]
)
def test_a_missing_variable_is_named(name: str) -> None:
    error = error_of({key: value for key, value in STEP.items() if key != name})
    assert (error.code, error.where) == ("D0201", name)


def test_no_node_list_and_no_address_is_an_error() -> None:
    env = {key: value for key, value in STEP.items() if "NODELIST" not in key}
    assert error_of(env).where == "SLURM_STEP_NODELIST"


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "6"},
        {"SLURM_NODEID": "2"},
        {"SLURM_PROCID": "3"},
        {"SLURM_LOCALID": "1"},
    ],
)
def test_variables_that_disagree_are_refused(changes: dict[str, str]) -> None:
    assert error_of({**STEP, **changes}).code == "D0203"


@given(st.integers(1, 2**31), st.integers(0, 1000))
def test_the_derived_port_is_free_for_users_and_not_ephemeral(job: int, step: int) -> None:
    assert 1024 < derived_port(job, step) < 32768


def test_jobs_and_steps_beside_each_other_have_different_ports() -> None:
    ports = [derived_port(job, step) for job in range(100, 105) for step in range(5)]
    assert len(set(ports)) == len(ports)
