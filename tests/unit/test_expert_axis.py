"""Experts have no axis of the mesh: what is said instead."""

from __future__ import annotations

import pytest

from distrib import RunConfig, StrategyError
from distrib.startup import _mesh
from distrib.strategies import STRATEGIES


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_axis_of_experts_is_refused_with_where_they_lie_instead(strategy):
    config = RunConfig(mesh={"expert": 2})
    with pytest.raises(StrategyError) as refused:
        _mesh(config, strategy, STRATEGIES.get(strategy).capabilities, 4)
    text = str(refused.value)
    assert text.startswith("error[D0859] ")
    assert "mesh.expert is 2, but experts have no axis of their own" in text
    assert "fix: leave it out: under fsdp every expert is sharded over mesh.shard" in text


def test_an_axis_of_one_rank_is_as_good_as_none():
    mesh = _mesh(RunConfig(mesh={"expert": 1}), "ddp", STRATEGIES.get("ddp").capabilities, 4)
    assert mesh.size("replicate") == 4
