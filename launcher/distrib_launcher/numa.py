"""Which NUMA node's cores and memory each rank uses, and binding a rank to them.

A core reaches its own node's memory, and the GPUs at its node, faster than another node's. The launcher decides
(`machine_bindings`), a rank binds itself (`bind_self`) before the user's program has started a thread: what it starts
later, data-loading workers too, inherits both. A control group's CPU quota counts cores and names none, so it changes
nothing here.

Standard library only, and loadable by file name: a rank runs this before the user's code.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")
_GPU_CLASS = "0x03"  # a display controller (PCI Code and ID Assignment, base class 03h)
_NVIDIA = "0x10de"
_MEMORY = re.compile(r"MemTotal:\s+(\d+) kB")
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # number of the system call; Linux, arch/*/syscall*.tbl
_MPOL_PREFERRED = 1  # take memory there while there is some, then elsewhere; Linux, uapi/linux/mempolicy.h
_WORD_BITS = 64


class Node(NamedTuple):
    """A NUMA node with cores that we may use.

    Attributes:
        number: The kernel's number.
        cores: Numbers of the usable ones, ascending.
        memory_bytes: All of its memory; 0 if it has none of its own.
    """

    number: int
    cores: tuple[int, ...]
    memory_bytes: int


class Gpus(NamedTuple):
    """Where the GPUs that a rank can see are.

    Attributes:
        nodes: Number of the node for each, in CUDA's order; None where that cannot be told.
        reason: Who says so, or why nobody does.
    """

    nodes: tuple[int, ...] | None
    reason: str


class Binding(NamedTuple):
    """What one rank is bound to. `Binding(*json.loads(json.dumps(binding)))` binds as well.

    Attributes:
        local_rank: The rank on this machine.
        node: Where its memory should come from; None to leave that as it is.
        cores: Where its threads may run; empty to leave that as it is.
        reason: Why.
    """

    local_rank: int
    node: int | None
    cores: tuple[int, ...]
    reason: str


def machine_bindings(
    num_ranks: int,
    env: Mapping[str, str],
    *,
    gpus: bool,
    usable: Collection[int] | None = None,
    root: Path = _ROOT,
) -> tuple[Binding, ...]:
    """Decide for this machine.

    Args:
        num_ranks: How many ranks run here.
        env: Of the ranks; CUDA's variables count.
        gpus: Whether rank i uses GPU i; else each rank uses cores alone.
        usable: Cores that may be used; those of this process by default.
        root: Below it are `sys`, `proc` and `dev`.
    """
    if usable is None:
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    nodes = read_nodes(usable, root)
    found = read_gpus(env, root) if gpus else Gpus(None, "")
    return bindings(nodes, num_ranks, found.nodes, gpu_reason=found.reason)


def read_nodes(usable: Collection[int], root: Path = _ROOT) -> tuple[Node, ...]:
    """Return the nodes that have a usable core, by number; empty where the system shows none.

    Args:
        usable: Cores that may be used, as `os.sched_getaffinity` gives them.
        root: Below it is `sys`.
    """
    found = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        cores = tuple(sorted(parse_numbers(_read(folder / "cpulist")) & set(usable)))
        memory = _MEMORY.search(_read(folder / "meminfo"))
        if cores:
            found.append(Node(int(folder.name[4:]), cores, int(memory[1]) * 1024 if memory else 0))
    return tuple(sorted(found))


def read_gpus(env: Mapping[str, str], root: Path = _ROOT) -> Gpus:
    """Return the nodes of the NVIDIA GPUs that a rank sees, or why they cannot be told.

    Args:
        env: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER in it count.
        root: Below it are `sys`, `proc` and `dev`.
    """
    gpus = _nvidia_gpus(root)
    if not gpus:
        return Gpus(None, "no NVIDIA GPU was found")
    files = sum(1 for _ in (root / "dev").glob("nvidia[0-9]*"))
    if files != len(gpus):  # a container that shows the host's list: CUDA numbers only its own
        return Gpus(None, f"{len(gpus)} GPUs are on the PCI bus, but {files} in /dev")
    models = {_read(folder / "device") for folder in gpus}
    if len(models) > 1 and env.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return Gpus(
            None, "GPUs of several models, whose order only CUDA knows; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    seen = _visible(env.get("CUDA_VISIBLE_DEVICES"), len(gpus))
    if seen is None:
        return Gpus(None, f"CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']} is no list of plain numbers")
    nodes = [_number(_read(gpus[index] / "numa_node")) for index in seen]
    if not nodes or min(nodes) < 0:  # -1 in many virtual machines
        return Gpus(
            None, "the system does not say at which node each GPU is" if nodes else "no GPU is visible"
        )
    return Gpus(tuple(nodes), "the node of its GPU")


def bindings(
    nodes: Sequence[Node], num_ranks: int, gpu_nodes: Sequence[int] | None = None, *, gpu_reason: str = ""
) -> tuple[Binding, ...]:
    """Lay the ranks of a machine over its nodes.

    A rank gets its GPU's node. Where that is not known, rank r of n gets node r * k // n of k, and with fewer ranks
    than nodes the nodes up to the next rank's, so that no core is left out; its memory then comes from where a thread
    runs. Ranks of one node share all of its cores: the scheduler lends a loading rank what the others leave idle, and
    their number of threads (`cores_per_rank`) keeps them off each other. Slices would also part the two threads of a
    core, which the kernel numbers far apart.

    Args:
        nodes: What `read_nodes` says.
        num_ranks: How many ranks run here.
        gpu_nodes: For each local rank the number of its GPU's node; None, or too few, if that is not known.
        gpu_reason: Why `gpu_nodes` is as it is.

    Returns:
        One for each local rank, in order.
    """
    unbound = _nothing_to_bind(nodes, num_ranks, gpu_nodes)
    if unbound:
        return tuple(Binding(rank, None, (), unbound) for rank in range(num_ranks))
    by_number = {node.number: node for node in nodes}
    if (
        gpu_nodes is not None
        and len(gpu_nodes) >= num_ranks
        and by_number.keys() >= set(gpu_nodes[:num_ranks])
    ):
        reason = gpu_reason or "the node of its GPU"
        return tuple(_on(rank, [by_number[gpu_nodes[rank]]], reason) for rank in range(num_ranks))
    if gpu_nodes is not None:
        few = len(gpu_nodes) < num_ranks
        gpu_reason = "fewer GPUs than ranks" if few else "no usable core at some GPU's node"
    reason = f"{num_ranks} ranks evenly over {len(nodes)} nodes{f': {gpu_reason}' if gpu_reason else ''}"
    return tuple(_on(rank, _share(nodes, rank, num_ranks), reason) for rank in range(num_ranks))


def cores_per_rank(bound: Sequence[Binding]) -> int | None:
    """Return how many threads each rank can have with a core for each, at least 1; None if nothing is bound."""
    ranks = Counter(binding.cores for binding in bound if binding.cores)
    return min((max(1, len(cores) // count) for cores, count in ranks.items()), default=None)


def _nothing_to_bind(nodes: Sequence[Node], num_ranks: int, gpu_nodes: Sequence[int] | None) -> str:
    if not nodes:
        return "the system shows no NUMA nodes"
    if len(nodes) == 1:
        return f"all usable cores are at one NUMA node, {nodes[0].number}"
    if num_ranks == 1 and gpu_nodes is None:
        return f"one rank uses all {len(nodes)} NUMA nodes"
    return ""


def _share(nodes: Sequence[Node], rank: int, num_ranks: int) -> Sequence[Node]:
    first = rank * len(nodes) // num_ranks
    return nodes[first : max(first + 1, (rank + 1) * len(nodes) // num_ranks)]


def _on(rank: int, nodes: Sequence[Node], reason: str) -> Binding:
    cores = tuple(sorted(core for node in nodes for core in node.cores))
    return Binding(
        rank, nodes[0].number if len(nodes) == 1 and nodes[0].memory_bytes else None, cores, reason
    )


def bind_self(binding: Binding) -> str:
    """Bind this thread, and what it starts from now on, to its cores and its node's memory.

    The memory is a preference: a full node does not end the rank.

    Returns:
        What could not be bound and why, such as in a container that forbids it; empty if all was.
    """
    refused = []
    if binding.cores:
        try:
            os.sched_setaffinity(0, binding.cores)
        except (AttributeError, OSError) as error:  # macOS has no such call
            refused.append(f"cores {format_numbers(binding.cores)}: {_words(error)}")
    if binding.node is not None:
        refusal = _prefer_memory_of(binding.node)
        if refusal:
            refused.append(f"memory of node {binding.node}: {refusal}")
    return "; ".join(refused)


def _prefer_memory_of(node: int) -> str:
    """Set this thread's memory policy; return why that failed, or an empty text."""
    try:
        import ctypes  # noqa: PLC0415 (needed only here)
    except ImportError as error:  # an interpreter that was built without libffi
        return str(error)
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _SET_MEMPOLICY or ctypes.sizeof(ctypes.c_long) != 8:
        return f"not known how on {sys.platform} {machine}"
    words = node // _WORD_BITS + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // _WORD_BITS] = 1 << (node % _WORD_BITS)
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(
        ctypes.c_long(_SET_MEMPOLICY[machine]),
        ctypes.c_long(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(words * _WORD_BITS + 1),  # the kernel takes one off (set_mempolicy(2), bugs)
    )
    return os.strerror(ctypes.get_errno()) if result else ""


def lines(bound: Sequence[Binding]) -> list[str]:
    """Say what is bound to what and why, one line for ranks that are bound alike."""
    alike: dict[Binding, list[int]] = {}
    for binding in bound:
        alike.setdefault(binding._replace(local_rank=0), []).append(binding.local_rank)
    return [_line(binding, ranks) for binding, ranks in alike.items()]


def _line(binding: Binding, ranks: Sequence[int]) -> str:
    if not binding.cores:
        return f"numa: nothing is bound: {binding.reason}"
    who = f"rank{'s' if len(ranks) > 1 else ''} {format_numbers(ranks)}"
    memory = "" if binding.node is None else f" and memory of node {binding.node}"
    return f"numa: {who}: cores {format_numbers(binding.cores)}{memory} ({binding.reason})"


def parse_numbers(text: str) -> set[int]:
    """Return the numbers of the kernel's list format, such as "0-3,8"; of a text in another format none."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            cores.update(range(int(first), int(last or first) + 1))
    return cores


def format_numbers(cores: Iterable[int]) -> str:
    """Return numbers in the kernel's list format."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _nvidia_gpus(root: Path) -> list[Path]:
    """Return the sysfs folders of the NVIDIA GPUs that the driver serves here, by bus id.

    Containers see the whole PCI bus; the NVIDIA container toolkit leaves only their own GPUs in the driver's list.
    """
    served = {folder.name.lower() for folder in (root / "proc/driver/nvidia/gpus").glob("*:*")}
    return sorted(
        folder
        for folder in (root / "sys/bus/pci/devices").glob("*:*")
        if _read(folder / "vendor").strip() == _NVIDIA
        and _read(folder / "class").startswith(_GPU_CLASS)
        and (not served or folder.name.lower() in served)
    )


def _visible(variable: str | None, count: int) -> list[int] | None:
    """Return the GPUs' indices; None if they are named in another way. As for CUDA, the first invalid one ends it."""
    if variable is None:
        return list(range(count))
    indices: list[int] = []
    for word in variable.split(","):
        index = _number(word)
        if word.strip().startswith(("GPU-", "MIG-")):
            return None
        if not 0 <= index < count:
            break
        indices.append(index)
    return indices


def _number(text: str) -> int:
    """Return a whole number of at least 0; -1 for any other text."""
    return int(text) if text.strip().isdecimal() else -1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
