"""The root cause among ranks that lose each other, with torch's process group between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.launching import launch, script

JOINED = """
    import os, signal, sys, time
    import torch
    from distrib.collectives.process_group import connect
    from distrib.topology import detect_topology

    topology = detect_topology(os.environ)
    group = connect(topology, "gloo", torch.device("cpu"), 60, 60)
    ones = group.all_reduce_(torch.ones(1))
    print("sum", ones.item())
"""


def joined(folder: Path, then: str) -> Path:
    return script(folder, JOINED + then)


@pytest.mark.timeout(60)
def test_ranks_meet_at_the_port_that_the_launcher_holds(tmp_path: Path) -> None:
    done = launch("-n", 2, "--cpu", joined(tmp_path, "    group.close()\n"), cwd=tmp_path)

    assert done.code == 0, done.err
    assert sorted(done.out.splitlines()) == ["[rank 0] sum 2.0", "[rank 1] sum 2.0"]


@pytest.mark.timeout(60)
def test_ranks_meet_when_the_script_joins_them_itself(tmp_path: Path) -> None:
    text = """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        ones = torch.ones(1)
        dist.all_reduce(ones)
        print("sum", ones.item())
        dist.destroy_process_group()
    """
    done = launch("-n", 2, "--cpu", script(tmp_path, text), cwd=tmp_path)

    assert sorted(done.out.splitlines()) == ["[rank 0] sum 2.0", "[rank 1] sum 2.0"], done.err


@pytest.mark.timeout(60)
def test_an_exception_is_shown_once_although_torch_prints_those_of_its_ranks(tmp_path: Path) -> None:
    then = """
    if topology.rank == 1:
        raise RuntimeError("injected failure")
    group.all_reduce_(ones)
"""
    done = launch("-n", 2, "--cpu", joined(tmp_path, then), cwd=tmp_path)

    assert done.code == 1
    assert done.err.count("RuntimeError: injected failure") == 1
    assert "Traceback" not in done.err
    assert done.report[0].startswith("distrib: rank 1 ")
    assert len(done.report) <= 25


@pytest.mark.timeout(60)
def test_a_rank_that_closes_its_group_while_it_fails_is_still_the_root_cause(tmp_path: Path) -> None:
    then = """
    try:
        if topology.rank == 1:
            raise ValueError("the true cause")
        group.all_reduce_(ones)
    finally:
        group.close()  # the other rank loses its peer here, before the exception has left the program
        time.sleep(0.3)
"""
    done = launch("-n", 2, "--cpu", joined(tmp_path, then), cwd=tmp_path)

    assert done.code == 1
    assert done.report[0].startswith("distrib: rank 1 ")
    assert done.report[0].endswith(" failed: ValueError")
    assert any(line.startswith("  rank 0 followed: lost its peer, at ") for line in done.report)


@pytest.mark.timeout(60)
def test_a_rank_that_ends_before_the_others_is_named(tmp_path: Path) -> None:
    then = """
    if topology.rank == 1:
        sys.exit(0)
    group.all_reduce_(ones)
    group.all_reduce_(ones)
"""
    done = launch("-n", 2, "--cpu", joined(tmp_path, then), cwd=tmp_path)

    assert done.code == 124
    assert any("rank 1 ended without them" in line for line in done.report)


@pytest.mark.timeout(60)
def test_a_collective_that_a_rank_does_not_join_in_time_ends_the_launch_with_124(tmp_path: Path) -> None:
    then = """
    if topology.rank == 0:
        group.all_reduce_(ones)
    time.sleep(60)
"""
    text = JOINED.replace("60, 60", "1, 60") + then
    done = launch("-n", 2, "--cpu", script(tmp_path, text), cwd=tmp_path)

    assert done.code == 124
    assert done.report[-1] == "exit code 124"
    assert done.report[0].startswith("distrib: rank 0 ")
    assert any("rank 1 had not failed" in line for line in done.report)
    assert any("fix: let every rank make this call" in line for line in done.report)


@pytest.mark.timeout(60)
def test_a_timeout_of_torch_itself_ends_the_launch_with_124(tmp_path: Path) -> None:
    text = """
        import os, time, torch
        from datetime import timedelta
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=timedelta(seconds=1))
        if os.environ["RANK"] == "1":
            time.sleep(60)
        dist.all_reduce(torch.ones(1))
    """
    assert launch("-n", 2, "--cpu", script(tmp_path, text), cwd=tmp_path).code == 124


@pytest.mark.timeout(60)
def test_a_call_that_the_ranks_do_not_agree_on_is_an_exception(tmp_path: Path) -> None:
    then = """
    group.reduce(ones) if topology.rank else group.gather(ones)
"""
    done = launch("-n", 2, "--cpu", joined(tmp_path, then), cwd=tmp_path)

    assert done.code == 1
    assert "D0401" in done.err


@pytest.mark.timeout(60)
def test_a_hook_that_the_script_sets_for_its_errors_is_called(tmp_path: Path) -> None:
    text = """
        import sys
        sys.excepthook = lambda kind, error, found: print("hook saw", kind.__name__)
        raise ValueError("for the hook")
    """
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert "hook saw ValueError" in done.out


@pytest.mark.timeout(60)
def test_an_exception_in_a_forked_child_is_printed_by_the_child(tmp_path: Path) -> None:
    text = """
        import os
        child = os.fork()
        if child == 0:
            raise ValueError("in the child")
        assert os.waitpid(child, 0)[1] != 0
    """
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert done.code == 0
    assert "ValueError: in the child" in done.err
