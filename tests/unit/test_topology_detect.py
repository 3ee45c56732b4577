from __future__ import annotations

import pickle

import pytest
from hypothesis import given, strategies as st

from distrib.errors import TopologyError
from distrib.topology import Rendezvous, Topology, detect_topology

PAIR = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHED = {**PAIR, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "DISTRIB_CONFIG": "{}"}


def error_of(env: dict[str, str]) -> TopologyError:
    with pytest.raises(TopologyError) as caught:
        detect_topology(env)
    return caught.value


def test_no_variables_are_a_single_process() -> None:
    assert detect_topology({}) == Topology()


def test_the_launchers_variables_are_read() -> None:
    expected = Topology(1, 2, 1, 2, 0, 1, Rendezvous("127.0.0.1", 29500), "distrib launch")
    assert detect_topology(LAUNCHED) == expected


def test_a_configuration_without_ranks_is_a_single_process() -> None:
    assert detect_topology({"DISTRIB_CONFIG": "{}"}) == Topology()


def test_our_launcher_wins_over_what_surrounds_it() -> None:
    around = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "TORCHELASTIC_RUN_ID": "x"}
    assert detect_topology({**LAUNCHED, **around}).source == "distrib launch"


def test_plain_variables_on_one_node_need_no_local_ranks() -> None:
    topology = detect_topology(PAIR)
    assert (topology.local_rank, topology.local_world_size, topology.num_nodes) == (1, 2, 1)


def test_a_world_size_of_one_is_a_single_process_without_rendezvous() -> None:
    assert detect_topology({"WORLD_SIZE": "1"}) == Topology(source="RANK and WORLD_SIZE")
    assert detect_topology({"WORLD_SIZE": "1", "RANK": "0"}).rendezvous is None


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    error = error_of({key: value for key, value in PAIR.items() if key != name})
    assert (error.code, error.where) == ("D0201", name)


def test_an_empty_variable_is_missing() -> None:
    assert error_of({**PAIR, "RANK": ""}).code == "D0201"


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_local_ranks_are_not_guessed_when_other_nodes_may_exist(name: str) -> None:
    env = {**LAUNCHED, "MASTER_ADDR": "node1"}
    del env[name], env["DISTRIB_CONFIG"]
    assert error_of(env).where == name


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "one"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "2.0"), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536")],
)  # fmt: skip
def test_a_variable_that_is_no_fitting_integer_is_quoted(name: str, value: str) -> None:
    error = error_of({**PAIR, name: value})
    assert (error.code, error.where) == ("D0202", name)
    assert repr(value) in error.problem


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "2"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"},
        {"GROUP_RANK": "1"},
        {"GROUP_WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"},
    ],
)
def test_variables_that_disagree_are_refused(changes: dict[str, str]) -> None:
    assert error_of({**LAUNCHED, **changes}).code == "D0203"


def test_an_error_has_a_fix_and_survives_pickling() -> None:
    error = error_of({**PAIR, "RANK": "7"})
    assert error.fix
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_nodes_of_different_size_say_which_node_they_are() -> None:
    env = {**LAUNCHED, "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    topology = detect_topology({**env, "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"})
    assert (topology.node_rank, topology.num_nodes) == (1, 2)


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_even_nodes_need_no_node_index(nodes: int, ranks: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, nodes * ranks - 1))
    env = {**LAUNCHED, "RANK": str(rank), "WORLD_SIZE": str(nodes * ranks)}
    topology = detect_topology({**env, "LOCAL_RANK": str(rank % ranks), "LOCAL_WORLD_SIZE": str(ranks)})
    assert (topology.node_rank, topology.num_nodes) == (rank // ranks, nodes)


@given(
    st.dictionaries(st.sampled_from([*LAUNCHED, "GROUP_RANK", "TORCHELASTIC_RUN_ID"]), st.text(max_size=3))
)
def test_any_variables_give_a_valid_topology_or_a_topology_error(env: dict[str, str]) -> None:
    try:
        topology = detect_topology(env)
    except TopologyError as error:
        assert error.fix  # noqa: PT017 (only some of the drawn variables are wrong)
    else:
        assert 0 <= topology.rank < topology.world_size
        assert (topology.rendezvous is None) == (topology.world_size == 1)
