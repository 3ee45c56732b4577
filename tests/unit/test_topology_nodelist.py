from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from distrib.errors import TopologyError
from distrib.topology.nodelist import expand_counts, expand_nodelist

NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,8}[a-z]", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
        ("rack[1-2]n[1-2]", ["rack1n1", "rack1n2", "rack2n1", "rack2n2"]),
        ("n[1,3]-ib.example.org", ["n1-ib.example.org", "n3-ib.example.org"]),
        ("a-1,a-2", ["a-1", "a-2"]),
    ],
)
def test_a_node_list_is_expanded_in_order(text: str, hosts: list[str]) -> None:
    assert list(expand_nodelist(text)) == hosts


@pytest.mark.parametrize(
    "text", ["", "n[", "n[1-]", "n[a-b]", "n]1", "a,,b", "n[]", "a,n[3-1]", "n[1-2", "a b"]
)
def test_what_is_no_node_list_is_quoted(text: str) -> None:
    with pytest.raises(TopologyError) as caught:
        expand_nodelist(text, where="SLURM_STEP_NODELIST")
    assert (caught.value.code, caught.value.where) == ("D0204", "SLURM_STEP_NODELIST")
    assert repr(text) in caught.value.problem


@given(st.lists(NAMES, min_size=1))
def test_names_without_brackets_are_kept(names: list[str]) -> None:
    assert list(expand_nodelist(",".join(names))) == names


@given(NAMES, st.integers(0, 10_000), st.integers(0, 50), st.integers(1, 6))
def test_a_range_gives_each_number_once_at_its_width(prefix: str, first: int, more: int, width: int) -> None:
    text = f"{prefix}[{first:0{width}d}-{first + more:0{width}d}]"
    assert list(expand_nodelist(text)) == [f"{prefix}{first + i:0{width}d}" for i in range(more + 1)]


def test_counts_are_repeated_for_the_nodes_they_cover() -> None:
    assert expand_counts("2(x3),1") == (2, 2, 2, 1)


@pytest.mark.parametrize("text", ["", "2(x)", "two", "2x3"])
def test_what_is_no_list_of_counts_is_refused(text: str) -> None:
    with pytest.raises(TopologyError, match="D0204"):
        expand_counts(text)
