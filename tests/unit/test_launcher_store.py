"""A store that the launcher's side serves, and how the ranks learn of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
from distrib_launcher.plan import LaunchPlan, Program
from distrib_launcher.rendezvous import HOST, ReservedPort

from distrib.collectives.store import join_store, serve
from distrib.topology import Rendezvous, Topology
from distrib.topology.environments.launcher import LauncherEnvironment

SECONDS = timedelta(seconds=20)


@pytest.fixture
def port() -> Iterator[ReservedPort]:
    port = ReservedPort()
    yield port
    port.release()


def plan(*, serves_store: bool) -> LaunchPlan:
    program = Program("script", "train.py")
    return LaunchPlan(program, 2, 1, HOST, 29400, '{"settings": []}', 10.0, serves_store=serves_store)


@pytest.mark.parametrize("serves_store", [True, False])
def test_the_ranks_know_from_the_plan_who_they_are_and_who_serves_the_store(serves_store: bool) -> None:
    env = plan(serves_store=serves_store).variables(1)
    environment = LauncherEnvironment()

    assert environment.detect(env)
    assert environment.read(env) == Topology(
        rank=1,
        world_size=2,
        local_rank=1,
        local_world_size=2,
        rendezvous=Rendezvous(HOST, 29400, hosted_by_agent=serves_store),
        source="distrib launch",
    )


def test_a_rank_is_in_no_launch_of_ours_without_our_variables() -> None:
    env = plan(serves_store=True).variables(0)

    for name in ("DISTRIB_CONFIG", "RANK"):
        assert not LauncherEnvironment().detect({k: v for k, v in env.items() if k != name})


def test_another_launcher_s_word_for_a_served_store_does_not_reach_the_ranks() -> None:
    (rank, _) = plan(serves_store=False).workers({"TORCHELASTIC_USE_AGENT_STORE": "True", "HOME": "/h"})

    assert "TORCHELASTIC_USE_AGENT_STORE" not in rank.env
    assert rank.env["HOME"] == "/h"


def test_ranks_meet_at_a_store_that_none_of_them_serves(port: ReservedPort) -> None:
    served = serve(os.dup(port.listen()))  # the store closes what it is given
    rendezvous = Rendezvous(HOST, port.port, hosted_by_agent=True)
    zero, one = (
        join_store(Topology(rank=rank, world_size=2, local_rank=rank), rendezvous, SECONDS)
        for rank in range(2)
    )

    one.set("key", "value")

    assert zero.get("key") == b"value"
    del served


def test_who_comes_before_the_store_is_served_waits_instead_of_being_refused(port: ReservedPort) -> None:
    listening = port.listen()
    early = socket.create_connection((HOST, port.port), timeout=20)

    early.close()
    served = serve(os.dup(listening))
    store = join_store(Topology(), Rendezvous(HOST, port.port, hosted_by_agent=True), SECONDS)
    store.set("key", "value")

    assert store.get("key") == b"value"
    del served
