from __future__ import annotations

import http.server
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from distrib_launcher import tpu
from distrib_launcher.tpu import Chips, find_chips, find_worker, refuse_if_held, share_chips
from hypothesis import given, strategies as st

from distrib.errors import LaunchError, TopologyError
from distrib.topology.environments.tpu_pod import TpuWorker

FOUR = Chips(4, tuple(f"/dev/accel{i}" for i in range(4)))
V4_8 = TpuWorker(accelerator="v4-8", host_bounds=(1, 1, 1), chip_bounds=(2, 2, 1))
V4_32 = TpuWorker(
    index=1,
    hosts=("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"),
    accelerator="v4-32",
    host_bounds=(1, 1, 4),
    chip_bounds=(2, 2, 1),
)


def machine(root: Path, *ids: tuple[str, str], accel: int = 0, vfio: int = 0) -> Path:
    """Make what a machine shows in /sys and /dev; of each PCI device vendor and device."""
    for number, (vendor, device) in enumerate(ids):
        folder = root / f"sys/bus/pci/devices/0000:00:{number:02x}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    (root / "dev/vfio").mkdir(parents=True)
    for name in [
        *(f"accel{i}" for i in range(accel)),
        *(f"vfio/{i}" for i in range(vfio)),
        "vfio/vfio",
        "null",
    ]:
        (root / "dev" / name).touch()
    return root


GOOGLE, NVIDIA = "0x1ae0", "0x10de"


def test_a_v4_machine_has_a_file_for_each_chip(tmp_path: Path) -> None:
    root = machine(tmp_path, *[(GOOGLE, "0x005e")] * 4, accel=4)

    assert find_chips(root) == Chips(4, tuple(f"{root}/dev/accel{i}" for i in range(4)))


def test_a_container_has_the_chips_whose_files_it_sees(tmp_path: Path) -> None:
    assert find_chips(machine(tmp_path, *[(GOOGLE, "0x005e")] * 4, accel=1)).count == 1


def test_newer_chips_are_counted_on_the_bus_and_held_through_vfio(tmp_path: Path) -> None:
    root = machine(tmp_path, *[(GOOGLE, "0x0063")] * 8, (NVIDIA, "0x2330"), (GOOGLE, "0x001f"), vfio=8)

    found = find_chips(root)

    assert (found.count, len(found.files)) == (8, 8)


def test_other_machines_have_none_even_with_vfio(tmp_path: Path) -> None:
    assert find_chips(machine(tmp_path, (NVIDIA, "0x2330"), vfio=1)) == Chips(0, ())


@pytest.mark.parametrize(
    ("env", "spmd", "expected"),
    [
        ({}, False, (4, "one for each TPU chip: 4")),
        ({"PJRT_DEVICE": "TPU"}, False, (4, "one for each TPU chip: 4")),
        ({}, True, (1, "xla.spmd: one for all TPU chips of the machine")),
        ({"PJRT_DEVICE": "CPU"}, False, (1, "PJRT_DEVICE=CPU")),
        ({"TPU_VISIBLE_CHIPS": "2"}, False, (1, "TPU_VISIBLE_CHIPS=2")),
    ],
)
def test_auto_is_one_process_for_each_chip(
    env: Mapping[str, str], spmd: bool, expected: tuple[int, str]
) -> None:
    assert tpu.count_processes(env, FOUR, spmd=spmd) == expected


@pytest.mark.parametrize(
    ("env", "reason"),
    [({}, "no TPU was found"), ({"PJRT_DEVICE": "TPU"}, "PJRT_DEVICE=TPU, but no TPU chip was found")],
)
def test_without_chips_there_is_one_process(env: Mapping[str, str], reason: str) -> None:
    assert tpu.count_processes(env, Chips(0, ()), spmd=False) == (1, reason)


def test_each_process_of_a_machine_gets_one_chip_and_a_port() -> None:
    share = share_chips(V4_8, FOUR, 4, {}, spmd=False, is_cut=False)

    assert share.files == FOUR.files
    assert share.variables[3] == {
        "PJRT_DEVICE": "TPU",
        "PJRT_LOCAL_PROCESS_RANK": "3",
        "PJRT_LOCAL_PROCESS_COUNT": "4",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": "2,2,1",
        "TPU_PROCESS_ADDRESSES": "localhost:8476,localhost:8477,localhost:8478,localhost:8479",
        "CLOUD_TPU_TASK_ID": "3",
        "TPU_PROCESS_PORT": "8479",
        "TPU_VISIBLE_CHIPS": "3",
    }


def test_processes_of_a_slice_know_those_of_all_its_machines() -> None:
    mine = share_chips(V4_32, FOUR, 4, {}, spmd=False, is_cut=False).variables[2]

    addresses = mine["TPU_PROCESS_ADDRESSES"].split(",")
    task = int(mine["CLOUD_TPU_TASK_ID"])
    assert (task, mine["TPU_PROCESS_BOUNDS"], len(addresses)) == (6, "2,2,4", 16)
    assert addresses[task] == f"10.0.0.2:{mine['TPU_PROCESS_PORT']}"


@given(st.sampled_from([1, 4, 8]), st.integers(2, 6), st.data())
def test_every_process_of_a_slice_has_an_address_of_its_own(
    chips: int, hosts: int, data: st.DataObject
) -> None:
    bounds = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[chips]
    names = tuple(f"h{i}" for i in range(hosts))
    index = data.draw(st.integers(0, hosts - 1))
    worker = TpuWorker(index, names, "v5litepod-x", (hosts, 1, 1), bounds)
    share = share_chips(worker, Chips(chips, ()), chips, {}, spmd=False, is_cut=False)

    for local_rank, mine in enumerate(share.variables):
        addresses = mine["TPU_PROCESS_ADDRESSES"].split(",")
        assert len(set(addresses)) == len(addresses) == chips * hosts
        assert math.prod(map(int, mine["TPU_PROCESS_BOUNDS"].split(","))) == chips * hosts
        assert addresses[int(mine["CLOUD_TPU_TASK_ID"])] == f"{names[index]}:{mine['TPU_PROCESS_PORT']}"
        assert mine["TPU_VISIBLE_CHIPS"] == str(local_rank)


def test_under_spmd_one_process_has_all_chips_and_libtpu_finds_the_others() -> None:
    share = share_chips(V4_32, FOUR, 1, {}, spmd=True, is_cut=False)

    assert share.variables == (
        {"PJRT_DEVICE": "TPU", "PJRT_LOCAL_PROCESS_RANK": "0", "PJRT_LOCAL_PROCESS_COUNT": "1"},
    )


def test_a_machine_cut_from_its_slice_is_told_that_it_is_alone() -> None:
    gke = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    worker, is_cut = find_worker(gke, lambda _: None, stays_alone=True)

    share = share_chips(worker, FOUR, 1, gke, spmd=True, is_cut=is_cut)

    assert (worker.num_nodes, is_cut) == (1, True)
    assert share.variables[0] == {
        "PJRT_DEVICE": "TPU",
        "PJRT_LOCAL_PROCESS_RANK": "0",
        "PJRT_LOCAL_PROCESS_COUNT": "1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "CLOUD_TPU_TASK_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }


def test_one_process_of_several_chips_takes_the_first_unless_told_otherwise() -> None:
    first = share_chips(V4_8, FOUR, 1, {}, spmd=False, is_cut=False).variables[0]
    third = share_chips(V4_8, FOUR, 1, {"TPU_VISIBLE_CHIPS": "2"}, spmd=False, is_cut=False).variables[0]

    assert (first["TPU_VISIBLE_CHIPS"], first["TPU_PROCESS_BOUNDS"]) == ("0", "1,1,1")
    assert "TPU_VISIBLE_CHIPS" not in third


def test_a_chip_of_two_dies_adds_a_dimension() -> None:
    worker = TpuWorker(accelerator="tpu7x-8", host_bounds=(1, 1, 1), chip_bounds=(2, 2, 1))

    share = share_chips(worker, Chips(8, ()), 8, {}, spmd=False, is_cut=False)

    assert share.variables[0]["TPU_PROCESS_BOUNDS"] == "2,2,1,2"


@pytest.mark.parametrize(
    ("worker", "count", "env", "spmd", "code", "named"),
    [
        (V4_8, 2, {}, False, "D0912", "expected 1 or 4"),
        (V4_8, 5, {}, False, "D0912", "expected 1 or 4"),
        (V4_32, 1, {}, False, "D0912", "expected 4,"),
        (V4_8, 4, {}, True, "D0912", "xla.spmd"),
        (V4_8, 4, {"TPU_VISIBLE_CHIPS": "0,1"}, False, "D0913", "TPU_VISIBLE_CHIPS=0,1"),
        (V4_8, 4, {"TPU_PROCESS_PORT": "9"}, False, "D0913", "TPU_PROCESS_PORT=9"),
        (TpuWorker(accelerator="v3-8"), 4, {}, False, "D0915", "v3-8"),
        (TpuWorker(accelerator="v2-8"), 1, {}, False, "D0915", "v2-8"),
    ],
)
def test_what_chips_cannot_be_shared_like_is_refused(
    worker: TpuWorker, count: int, env: Mapping[str, str], spmd: bool, code: str, named: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        share_chips(worker, FOUR, count, env, spmd=spmd, is_cut=False)

    assert caught.value.code == code
    assert named in caught.value.problem


@pytest.mark.parametrize(
    "worker",
    [
        TpuWorker(accelerator="v4-8", chip_bounds=(2, 4, 1)),  # not four chips
        TpuWorker(1, ("a", "b"), "v4-16", None, (2, 2, 1)),  # two machines and no bounds of theirs
        TpuWorker(1, ("a", "b"), "v4-16", (1, 1, 4), (2, 2, 1)),
    ],
)
def test_bounds_that_do_not_fit_the_chips_are_refused(worker: TpuWorker) -> None:
    with pytest.raises(TopologyError, match="D0914"):
        share_chips(worker, FOUR, 4, {}, spmd=False, is_cut=False)


def test_a_tpu_that_nobody_describes_is_no_guess() -> None:
    with pytest.raises(TopologyError, match="D0914"):
        find_worker({}, lambda _: None)


def refuses(_: str) -> str:
    raise OSError("timed out")


def test_a_metadata_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(TopologyError, match="does not answer: timed out"):
        find_worker({}, refuses)


def test_who_stays_alone_needs_no_answer() -> None:
    assert find_worker({}, refuses, stays_alone=True) == (TpuWorker(source="launch.nnodes"), False)


def test_variables_of_several_hosts_count_on_any_device() -> None:
    worker, _ = find_worker({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, None)

    assert (worker.node_rank, worker.num_nodes) == (1, 2)


class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/computeMetadata/v1/instance/attributes/accelerator-type"
        self.send_response(200 if known and self.headers["Metadata-Flavor"] == "Google" else 404)
        self.end_headers()
        self.wfile.write(b"v4-8")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_the_metadata_server_is_asked_as_google_wants_it(server: str) -> None:
    fetch = tpu.metadata_server({"GCE_METADATA_HOST": server})

    assert (fetch("accelerator-type"), fetch("tpu-env")) == ("v4-8", None)


def test_a_closed_port_is_no_metadata_server() -> None:
    with pytest.raises(OSError):
        tpu.metadata_server({"GCE_METADATA_HOST": "127.0.0.1:1"})("tpu-env")


def test_a_process_that_holds_a_chip_is_named_with_its_command(tmp_path: Path) -> None:
    chip = str(tmp_path / "dev/accel2")
    process = tmp_path / "proc/4321"
    (process / "fd").mkdir(parents=True)
    (process / "fd/7").symlink_to(chip)
    (process / "cmdline").write_bytes(b"python\0old_run.py\0")

    with pytest.raises(LaunchError) as caught:
        refuse_if_held((str(tmp_path / "dev/accel0"), chip), tmp_path)

    assert caught.value.code == "D0910"
    assert "held by process 4321 (python old_run.py)" in caught.value.problem
    assert caught.value.fix == "end that process: kill 4321"


def test_our_own_open_files_are_found_in_the_true_process_table(tmp_path: Path) -> None:
    chip = tmp_path / "accel0"
    with chip.open("w"), pytest.raises(LaunchError, match=f"process {os.getpid()} .*\n.*notebook"):
        refuse_if_held((str(chip),))

    refuse_if_held((str(chip),))


def test_another_users_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "tmp/libtpu_lockfile"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != lock)  # root may write everything

    with pytest.raises(LaunchError, match="sudo rm") as caught:
        refuse_if_held(("/dev/accel0",), tmp_path)

    assert caught.value.code == "D0911"


def test_a_lock_of_our_own_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/libtpu_lockfile").touch()

    refuse_if_held(("/dev/accel0",), tmp_path)
