from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from distrib_launcher import numa
from distrib_launcher.numa import (
    Binding,
    Gpus,
    Node,
    bindings,
    cores_per_rank,
    format_numbers,
    lines,
    machine_bindings,
    parse_numbers,
    read_gpus,
    read_nodes,
)
from hypothesis import given, strategies as st

GIB = 1 << 30
TWO = (Node(0, (0, 1, 4, 5), GIB), Node(1, (2, 3, 6, 7), GIB))
ALL = range(512)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def machine(root: Path, nodes: Mapping[int, str], gpus: Mapping[str, int] | None = None) -> Path:
    """Lay out a machine: node -> its cores, bus id of a GPU -> its node."""
    for number, cores in nodes.items():
        folder = root / f"sys/devices/system/node/node{number}"
        write(folder / "cpulist", cores)
        write(
            folder / "meminfo", f"\nNode {number} MemTotal:       {1 << 20} kB\nNode {number} MemFree:  7 kB"
        )
    for name in ("has_cpu", "online", "possible"):
        write(root / "sys/devices/system/node" / name, "0")
    for index, (bus, node) in enumerate((gpus or {}).items()):
        gpu(root, bus, node)
        write(root / f"dev/nvidia{index}", "")
    write(root / "dev/nvidiactl", "")
    return root


def gpu(
    root: Path, bus: str, node: int, *, vendor: str = "0x10de", kind: str = "0x030200", model: str = "0x2330"
) -> None:
    for name, text in {"numa_node": node, "vendor": vendor, "class": kind, "device": model}.items():
        write(root / f"sys/bus/pci/devices/{bus}" / name, str(text))  # fmt: skip


FOUR_GPUS = {"0000:17:00.0": 1, "0000:3b:00.0": 1, "0000:9a:00.0": 0, "0000:bb:00.0": 0}


def test_nodes_come_with_their_cores_and_memory_by_number(tmp_path: Path) -> None:
    machine(tmp_path, {10: "8-9", 2: "4-5,12-13", 0: "0-3"})

    assert read_nodes(ALL, tmp_path) == (
        Node(0, (0, 1, 2, 3), GIB),
        Node(2, (4, 5, 12, 13), GIB),
        Node(10, (8, 9), GIB),
    )


def test_only_usable_cores_count_and_a_node_without_any_is_left_out(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-3", 1: "4-7", 2: ""})

    assert read_nodes([2, 3, 9], tmp_path) == (Node(0, (2, 3), GIB),)


def test_a_system_that_shows_no_nodes_has_none(tmp_path: Path) -> None:
    assert read_nodes(ALL, tmp_path) == ()


def test_this_machine_s_nodes_have_exactly_the_usable_cores() -> None:
    found = read_nodes(os.sched_getaffinity(0))

    assert {core for node in found for core in node.cores} == os.sched_getaffinity(0)
    assert all(node.memory_bytes > 0 for node in found)


@given(st.sets(st.integers(0, 300)))
def test_the_kernel_s_list_format_goes_both_ways(cores: set[int]) -> None:
    assert parse_numbers(format_numbers(cores) + "\n") == cores


@pytest.mark.parametrize(
    ("text", "cores"), [("", set()), ("\n", set()), ("x-3,5", {5}), ("0-1,7", {0, 1, 7}), ("3-", {3})]
)
def test_what_is_no_list_of_cores_names_none(text: str, cores: set[int]) -> None:
    assert parse_numbers(text) == cores


def test_gpus_are_numbered_by_bus_id(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-3", 1: "4-7"}, dict(reversed(FOUR_GPUS.items())))

    assert read_gpus({}, tmp_path) == Gpus((1, 1, 0, 0), "the node of its GPU")


@pytest.mark.parametrize(
    ("visible", "nodes"),
    [("3,0", (0, 1)), (" 1 , 2", (1, 0)), ("2,-1,3", (0,)), ("0,9,1", (1,)), ("0,x", (1,))],
)
def test_cuda_visible_devices_chooses_and_orders(
    tmp_path: Path, visible: str, nodes: tuple[int, ...]
) -> None:
    machine(tmp_path, {0: "0-3", 1: "4-7"}, FOUR_GPUS)

    assert read_gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path).nodes == nodes


@pytest.mark.parametrize(
    ("visible", "reason"),
    [("GPU-8932f937", "is no list of plain numbers"), ("0,MIG-1/2", "is no list of plain numbers"), ("", "no GPU is visible")],
)  # fmt: skip
def test_gpus_that_are_named_otherwise_are_not_guessed(tmp_path: Path, visible: str, reason: str) -> None:
    machine(tmp_path, {0: "0-3", 1: "4-7"}, FOUR_GPUS)
    found = read_gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path)

    assert found.nodes is None
    assert reason in found.reason


def test_other_devices_on_the_bus_are_no_gpus(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-3", 1: "4-7"}, {"0000:9a:00.0": 0})
    gpu(tmp_path, "0000:01:00.0", 1, vendor="0x1a03")  # the board's own display
    gpu(tmp_path, "0000:9a:00.1", 1, kind="0x040300")  # a GPU's sound

    assert read_gpus({}, tmp_path).nodes == (0,)


def test_a_gpu_whose_node_the_kernel_does_not_know_is_not_guessed(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-3", 1: "4-7"}, {"0000:17:00.0": 1, "0000:3b:00.0": -1})

    assert read_gpus({}, tmp_path) == Gpus(None, "the system does not say at which node each GPU is")
    assert read_gpus({"CUDA_VISIBLE_DEVICES": "0"}, tmp_path).nodes == (1,)


def test_in_a_container_the_driver_s_list_says_which_gpus_of_the_bus_count(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-3", 1: "4-7"}, {"0000:9a:00.0": 0})
    gpu(tmp_path, "0000:17:00.0", 1)

    assert "2 GPUs are on the PCI bus, but 1 in /dev" in read_gpus({}, tmp_path).reason

    (tmp_path / "proc/driver/nvidia/gpus/0000:9a:00.0").mkdir(parents=True)
    assert read_gpus({}, tmp_path).nodes == (0,)


def test_the_order_of_different_gpus_is_known_only_if_it_was_asked_for(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-3", 1: "4-7"}, FOUR_GPUS)
    gpu(tmp_path, "0000:17:00.0", 1, model="0x1db6")

    assert read_gpus({}, tmp_path).nodes is None
    assert read_gpus({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, tmp_path).nodes == (1, 1, 0, 0)


def nodes_of(*counts: int) -> tuple[Node, ...]:
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    return tuple(
        Node(number, tuple(range(first, first + count)), GIB)
        for number, (first, count) in enumerate(zip(firsts, counts, strict=True))
    )


@given(counts=st.lists(st.integers(1, 9), min_size=2, max_size=8), num_ranks=st.integers(2, 40))
def test_ranks_lie_over_the_nodes_in_order_and_use_every_core(counts: list[int], num_ranks: int) -> None:
    nodes = nodes_of(*counts)
    bound = bindings(nodes, num_ranks)

    assert [each.local_rank for each in bound] == list(range(num_ranks))
    assert [each.cores[0] for each in bound] == [
        nodes[rank * len(nodes) // num_ranks].cores[0] for rank in range(num_ranks)
    ]
    assert {core for each in bound for core in each.cores} == {core for node in nodes for core in node.cores}


@given(counts=st.lists(st.integers(1, 9), min_size=2, max_size=8), data=st.data())
def test_the_ranks_of_the_nodes_differ_by_one_at_most(counts: list[int], data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(len(counts), 40))
    placed = [each.node for each in bindings(nodes_of(*counts), num_ranks)]
    sizes = [placed.count(number) for number in range(len(counts))]

    assert sum(sizes) == num_ranks
    assert max(sizes) - min(sizes) <= 1


def test_ranks_of_one_node_share_its_cores() -> None:
    bound = bindings(TWO, 4)

    assert [(each.node, each.cores) for each in bound] == [
        (0, (0, 1, 4, 5)),
        (0, (0, 1, 4, 5)),
        (1, (2, 3, 6, 7)),
        (1, (2, 3, 6, 7)),
    ]
    assert cores_per_rank(bound) == 2


def test_a_rank_gets_its_gpu_s_node() -> None:
    bound = bindings(TWO, 2, [1, 0, 0], gpu_reason="the node of its GPU")

    assert [each.node for each in bound] == [1, 0]
    assert {each.reason for each in bound} == {"the node of its GPU"}


def test_one_rank_with_a_gpu_is_bound_and_one_without_is_not() -> None:
    assert bindings(TWO, 1, [1])[0].cores == (2, 3, 6, 7)
    assert bindings(TWO, 1) == (Binding(0, None, (), "one rank uses all 2 NUMA nodes"),)


@pytest.mark.parametrize(
    ("gpu_nodes", "reason"),
    [
        (None, "2 ranks evenly over 2 nodes: why not"),
        ([1], "2 ranks evenly over 2 nodes: fewer GPUs than ranks"),
        ([1, 5], "2 ranks evenly over 2 nodes: no usable core at some GPU's node"),
    ],
)
def test_without_the_gpus_nodes_the_division_is_even_and_says_why(
    gpu_nodes: list[int] | None, reason: str
) -> None:
    bound = bindings(TWO, 2, gpu_nodes, gpu_reason="why not")

    assert [(each.node, each.reason) for each in bound] == [(0, reason), (1, reason)]


def test_fewer_ranks_than_nodes_use_several_each_and_no_one_memory() -> None:
    bound = bindings(nodes_of(1, 1, 1, 1), 2)

    assert [(each.node, each.cores) for each in bound] == [(None, (0, 1)), (None, (2, 3))]


def test_a_node_without_memory_is_not_asked_for_it() -> None:
    bound = bindings((TWO[0], Node(1, (2, 3), 0)), 2)

    assert [(each.node, each.cores) for each in bound] == [(0, (0, 1, 4, 5)), (None, (2, 3))]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [((), "the system shows no NUMA nodes"), (TWO[1:], "all usable cores are at one NUMA node, 1")],
)
def test_with_less_than_two_nodes_nothing_is_bound(nodes: tuple[Node, ...], reason: str) -> None:
    bound = bindings(nodes, 2, [0, 1])

    assert bound == (Binding(0, None, (), reason), Binding(1, None, (), reason))
    assert cores_per_rank(bound) is None
    assert lines(bound) == [f"numa: nothing is bound: {reason}"]


def test_threads_are_those_of_the_fullest_node() -> None:
    assert cores_per_rank(bindings(TWO, 3)) == 2
    assert cores_per_rank(bindings(nodes_of(1, 1), 8)) == 1


def test_the_lines_tell_ranks_cores_memory_and_reason(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-23,48-71", 1: "24-47,72-95"}, FOUR_GPUS)

    assert lines(machine_bindings(4, {}, gpus=True, usable=range(96), root=tmp_path)) == [
        "numa: ranks 0-1: cores 24-47,72-95 and memory of node 1 (the node of its GPU)",
        "numa: ranks 2-3: cores 0-23,48-71 and memory of node 0 (the node of its GPU)",
    ]
    assert lines(machine_bindings(2, {}, gpus=False, usable=[1, 2, 30], root=tmp_path)) == [
        "numa: rank 0: cores 1-2 and memory of node 0 (2 ranks evenly over 2 nodes)",
        "numa: rank 1: cores 30 and memory of node 1 (2 ranks evenly over 2 nodes)",
    ]


# In a subprocess, since it changes the process; loaded by its file's name, as a rank does it. get_mempolicy is the
# system call after or before set_mempolicy; it returns the mode and the nodes.
BIND = """
import ctypes, importlib.util, json, os, subprocess, sys
spec = importlib.util.spec_from_file_location("numa", sys.argv[1])
numa = importlib.util.module_from_spec(spec)
spec.loader.exec_module(numa)
refused = numa.bind_self(numa.Binding(*json.loads(sys.argv[2])))
mode, mask = ctypes.c_int(), (ctypes.c_ulong * 64)()
number = {"x86_64": 239, "aarch64": 236}[os.uname().machine]
failed = ctypes.CDLL(None).syscall(*map(ctypes.c_long, [number]), ctypes.byref(mode), mask, ctypes.c_ulong(4096), None, 0)
child = subprocess.run([sys.executable, "-c", "import os; print(list(os.sched_getaffinity(0)))"], capture_output=True)
print(json.dumps([refused, sorted(os.sched_getaffinity(0)), json.loads(child.stdout), failed, mode.value, mask[0],
                  sorted(name for name in sys.modules if name.startswith("distrib"))]))
"""


def bound_in_a_process(binding: Binding) -> list[object]:
    command = [sys.executable, "-I", "-S", "-c", BIND, numa.__file__, json.dumps(binding)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    found: list[object] = json.loads(ended.stdout)
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: nothing can be bound elsewhere")


@linux
def test_a_process_and_its_children_are_bound_to_cores() -> None:
    core = max(os.sched_getaffinity(0))
    refused, own, child, *_, loaded = bound_in_a_process(Binding(0, None, (core,), ""))

    assert (refused, own, child, loaded) == ("", [core], [core], [])


@linux
def test_memory_is_preferred_from_the_node_or_the_refusal_is_told() -> None:
    node = read_nodes(os.sched_getaffinity(0))[0].number
    refused, _, _, failed, mode, mask, _ = bound_in_a_process(Binding(0, node, (), ""))
    if failed:  # the container forbids to ask as well as to set
        assert str(refused).startswith(f"memory of node {node}: ")
    else:
        assert (refused, mode, mask) == ("", 1, 1 << node)


@linux
def test_what_cannot_be_bound_is_told_and_raises_nothing() -> None:
    refused = str(bound_in_a_process(Binding(0, 1000, (100_000,), ""))[0])

    assert refused.startswith("cores 100000: Invalid argument; memory of node 1000: ")


def test_an_unbound_rank_is_left_as_it_is() -> None:
    before = os.sched_getaffinity(0)

    assert numa.bind_self(Binding(0, None, (), "one node")) == ""
    assert os.sched_getaffinity(0) == before


def test_where_the_system_has_no_such_call_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")

    assert numa.bind_self(Binding(0, None, (0,), "")).startswith("cores 0: ")
