"""What `distrib launch` plans on a machine with TPU chips, told by --dry-run."""

from __future__ import annotations

from pathlib import Path

import pytest
from distrib_launcher import tpu
from distrib_launcher.accelerators import may_use_xla
from distrib_launcher.cli import run
from distrib_launcher.plan import LaunchPlan, Machine, Program
from distrib_launcher.planning import make_plan
from distrib_launcher.tpu import Chips

from distrib import RunConfig
from distrib.topology import detect_topology

GKE = {
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_ACCELERATOR_TYPE": "v4-16",
    "TPU_HOST_BOUNDS": "1,1,2",
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "h0,h1",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()


@pytest.fixture
def chips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have four chips, and torch_xla."""
    monkeypatch.setattr(tpu, "find_chips", lambda: Chips(4, ("/dev/accel0",)))
    monkeypatch.setattr(tpu, "xla_is_installed", lambda: True)


def shown(capfd: pytest.CaptureFixture[str], env: dict[str, str], *words: str) -> str:
    code = run(["launch", *words, "--dry-run", "train.py"], env)
    out, err = capfd.readouterr()
    assert code == 0, err
    return out


def test_a_machine_of_a_slice_starts_its_part_of_all_ranks(
    capfd: pytest.CaptureFixture[str], chips: None
) -> None:
    out = shown(capfd, GKE)

    lines = out.splitlines()
    assert "processes: 4 (one for each TPU chip: 4)" in lines
    assert "machines: ranks 4 to 7 of 8: machine 1 of 2 (TPU_WORKER_HOSTNAMES)" in lines
    last = lines[lines.index("rank 7:") :]
    for line in (
        "RANK=7",
        "WORLD_SIZE=8",
        "LOCAL_RANK=3",
        "LOCAL_WORLD_SIZE=4",
        "GROUP_RANK=1",
        "GROUP_WORLD_SIZE=2",
        "MASTER_ADDR=h0",
        "MASTER_PORT=29500",
        "PJRT_DEVICE=TPU",
        "CLOUD_TPU_TASK_ID=7",
        "TPU_VISIBLE_CHIPS=3",
        "TPU_PROCESS_BOUNDS=2,2,2",
    ):
        assert f"  {line}" in last


def test_with_one_node_the_machine_is_on_its_own(capfd: pytest.CaptureFixture[str], chips: None) -> None:
    out = shown(capfd, GKE, "--nnodes", "1")

    assert "rank 3:" in out
    assert "rank 4:" not in out
    assert "machines:" not in out
    assert "  TPU_PROCESS_BOUNDS=2,2,1\n" in out
    assert "  TPU_WORKER_HOSTNAMES=localhost\n" in out


def test_pjrt_device_cpu_is_honoured(capfd: pytest.CaptureFixture[str], chips: None) -> None:
    out = shown(capfd, {"PJRT_DEVICE": "CPU"})

    assert "processes: 1 (PJRT_DEVICE=CPU)" in out
    assert "TPU_VISIBLE_CHIPS" not in out


def test_the_cpu_is_used_without_asking_anybody_about_the_tpu(
    capfd: pytest.CaptureFixture[str], chips: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpu, "metadata_server", lambda env: pytest.fail("asked"))

    out = shown(capfd, {}, "--cpu")

    assert "processes: 1 (one for device cpu)" in out


def test_too_few_processes_are_refused_before_anything_starts(
    capfd: pytest.CaptureFixture[str], chips: None
) -> None:
    code = run(["launch", "-n", "2", "train.py"], GKE)

    assert (code, "error[D0912]" in capfd.readouterr().err) == (2, True)


def test_a_rank_that_only_another_machine_has_can_be_shown(
    capfd: pytest.CaptureFixture[str], chips: None
) -> None:
    assert "rank 4:" in shown(capfd, GKE, "--show-ranks", "0")
    assert run(["launch", "--show-ranks", "8", "train.py"], GKE) == 2
    assert "no rank 8 among 8" in capfd.readouterr().err


def test_the_mesh_spans_all_machines(capfd: pytest.CaptureFixture[str], chips: None) -> None:
    assert "rank 4:" in shown(capfd, GKE, "--set", "mesh.replicate=8")
    assert run(["launch", "--set", "mesh.replicate=3", "train.py"], GKE) == 2
    assert "the world size is 8" in capfd.readouterr().err


def test_a_chip_that_is_held_stops_the_launch_but_not_its_description(
    capfd: pytest.CaptureFixture[str], chips: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chip = tmp_path / "accel0"
    monkeypatch.setattr(tpu, "find_chips", lambda: Chips(4, (str(chip),)))

    with chip.open("w"):
        code = run(["launch", "--nnodes", "1", "train.py"], GKE)
        err = capfd.readouterr().err
        described = shown(capfd, GKE, "--nnodes", "1")

    assert (code, f"error[D0910] {chip}: {chip} is held by process" in err) == (2, True)
    assert "TPU_VISIBLE_CHIPS=3" in described


def test_restarts_on_several_machines_are_not_built(capfd: pytest.CaptureFixture[str], chips: None) -> None:
    code = run(["launch", "--max-restarts", "1", "train.py"], GKE)

    assert (code, "error[D0901] --max-restarts" in capfd.readouterr().err) == (2, True)


def test_under_spmd_the_mesh_is_one_of_devices(capfd: pytest.CaptureFixture[str], chips: None) -> None:
    out = shown(capfd, GKE, "--set", "xla.spmd=true", "--set", "mesh.shard=8")

    assert "machines: ranks 1 to 1 of 2: machine 1 of 2" in out


def test_a_function_stays_on_its_machine(chips: None) -> None:
    plan, _ = make_plan(Program("function", "f"), RunConfig(), GKE, stays_alone=True)

    assert (plan.num_processes, plan.world_size, plan.machine) == (4, 4, Machine())


@pytest.mark.parametrize(
    ("device", "env", "expected"),
    [
        ("xla", {}, True),
        ("auto", {}, True),
        ("auto", {"PJRT_DEVICE": "CPU"}, True),
        ("cpu", {"PJRT_DEVICE": "CPU"}, False),
        ("cuda", {}, False),
    ],
)
def test_xla_is_asked_for_or_found(chips: None, device: str, env: dict[str, str], expected: bool) -> None:
    assert may_use_xla(device, env) is expected


def test_without_torch_xla_auto_is_another_device(chips: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "xla_is_installed", lambda: False)

    assert not may_use_xla("auto", {"PJRT_DEVICE": "CPU"})


@pytest.mark.parametrize("machine", [Machine(), Machine(1, 3, "test", "h0")])
def test_what_each_rank_is_told_is_a_topology(machine: Machine) -> None:
    plan = LaunchPlan(Program("script", "t.py"), 2, 1, machine.main_host, 29500, "{}", 10.0, machine=machine)

    found = [detect_topology(spec.env) for spec in plan.workers({"TPU_WORKER_HOSTNAMES": "a,b"})]

    assert [topology.rank for topology in found] == list(plan.ranks)
    assert [topology.local_rank for topology in found] == [0, 1]
    assert {(t.world_size, t.node_rank, t.num_nodes) for t in found} == {
        (2 * machine.count, machine.index, machine.count)
    }
