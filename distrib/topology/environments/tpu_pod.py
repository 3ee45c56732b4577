"""A worker of a TPU slice: a Cloud TPU VM or a pod of GKE, alone, in a slice of several, or in one of several slices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from distrib.errors import TopologyError
from distrib.topology.environments.base import Environment, Variables, check_topology
from distrib.topology.topology import Rendezvous, Topology

Fetch = Callable[[str], "str | None"]
"""Returns an attribute that the instance's metadata server has; None if it has none of that name.

Raises OSError where no server answers.
"""

PORT: Final = 29500  # at which the ranks of several workers meet, unless one is named; torch's own default
_WORKER: Final = (
    "TPU_WORKER_ID",
    "CLOUD_TPU_TASK_ID",
    "JOB_COMPLETION_INDEX",
)  # the last is an indexed Job's
_HOST_BOUNDS: Final = ("TPU_HOST_BOUNDS", "TPU_PROCESS_BOUNDS")
_CHIP_BOUNDS: Final = ("TPU_CHIPS_PER_HOST_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS")
_SLICES: Final = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
# What the metadata attribute `tpu-env` calls the variables; of two for one variable, the later row counts.
_IN_TPU_ENV: Final = {
    "ACCELERATOR_TYPE": "TPU_ACCELERATOR_TYPE",
    "WORKER_ID": "TPU_WORKER_ID",
    "HOST_BOUNDS": "TPU_HOST_BOUNDS",
    "TPU_PROCESS_BOUNDS": "TPU_HOST_BOUNDS",
    "CHIPS_PER_HOST_BOUNDS": "TPU_CHIPS_PER_HOST_BOUNDS",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "TPU_CHIPS_PER_HOST_BOUNDS",
    **{name: name for name in _SLICES},
}
_TPU_ENV_LINE = re.compile(r"^(\w+): *'?([^'\n]*?)'? *$", re.MULTILINE)
_GENERATION = re.compile(r"(?:v|tpu)(\d+)")


@dataclass(frozen=True)
class TpuWorker:
    """One machine with TPU chips, and its place among the others.

    Attributes:
        index: Its number in its slice.
        hosts: Addresses of the slice's machines, in that order; one element where it is alone.
        accelerator: What the TPU is called: "v4-32"; empty if nobody says.
        host_bounds: How the slice's machines lie: (2, 2, 1); None if nobody says.
        chip_bounds: How the chips of one machine lie; None if nobody says.
        slice_index: Number of its slice.
        num_slices: How many slices there are, all alike.
        coordinator: Address of the first machine of the first slice; empty for one slice.
        source: Who says so: "TPU_WORKER_HOSTNAMES".
    """

    index: int = 0
    hosts: tuple[str, ...] = ("localhost",)
    accelerator: str = ""
    host_bounds: tuple[int, ...] | None = None
    chip_bounds: tuple[int, ...] | None = None
    slice_index: int = 0
    num_slices: int = 1
    coordinator: str = ""
    source: str = "alone"

    @property
    def node_rank(self) -> int:
        """Its number among the machines of all slices."""
        return self.slice_index * len(self.hosts) + self.index

    @property
    def num_nodes(self) -> int:
        """The machines of all slices."""
        return self.num_slices * len(self.hosts)

    @property
    def main_host(self) -> str:
        """The address of machine 0 of all."""
        return self.coordinator or self.hosts[0]

    @property
    def generation(self) -> int | None:
        """The 4 of "v4-32", the 5 of "v5litepod-16"; None if nobody says."""
        found = _GENERATION.match(self.accelerator)
        return int(found[1]) if found else None


class TpuPodEnvironment(Environment):
    """One process on each machine of a slice, with the variables of GKE: what `xla.spmd` wants, without a launcher.

    Cloud TPU VMs have no such variables; there `distrib launch` asks the metadata server and sets its own.
    """

    source: ClassVar[str] = "TPU pod"

    def detect(self, env: Mapping[str, str]) -> bool:
        return has_several_hosts(env)

    def read(self, env: Mapping[str, str]) -> Topology:
        worker, variables = read_tpu_worker(env), Variables(env, self.source)
        named = "MASTER_PORT" in variables
        port = variables.integer("MASTER_PORT", minimum=1, maximum=65535) if named else PORT
        return check_topology(
            Topology(
                rank=worker.node_rank,
                world_size=worker.num_nodes,
                node_rank=worker.node_rank,
                num_nodes=worker.num_nodes,
                rendezvous=Rendezvous(worker.main_host, port),
                source=self.source,
            )
        )


def has_several_hosts(env: Mapping[str, str]) -> bool:
    """Whether the variables name several machines, or several slices of one machine."""
    return "," in env.get("TPU_WORKER_HOSTNAMES", "") or env.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1")


def read_tpu_worker(env: Mapping[str, str], fetch: Fetch | None = None) -> TpuWorker:
    """Return this machine's place in its slice. Pure but for `fetch`.

    Args:
        env: What it says wins over metadata. With TPU_SKIP_MDS_QUERY in it, metadata are not asked for, as by libtpu.
        fetch: Asked only where `env` leaves something open.

    Raises:
        TopologyError: if a number is missing (D0201), is none (D0202), or does not fit to the others (D0203).
        OSError: of `fetch`.
    """
    known = {name: value for name, value in env.items() if value}
    if fetch is not None and not env.get("TPU_SKIP_MDS_QUERY") and not _is_complete(known):
        known = {**metadata_variables(fetch), **known}
    variables = Variables(known, TpuPodEnvironment.source)
    hosts = tuple(host.strip() for host in known.get("TPU_WORKER_HOSTNAMES", "").split(",") if host.strip())
    slices, slice_id, coordinator = _SLICES
    num_slices = variables.integer(slices, minimum=1) if slices in variables else 1
    index = variables.first(*_WORKER)
    worker = TpuWorker(
        index=variables.integer(index) if len(hosts) > 1 else 0,
        hosts=hosts if len(hosts) > 1 else ("localhost",),
        accelerator=known.get("TPU_ACCELERATOR_TYPE", ""),
        host_bounds=_bounds(variables, _HOST_BOUNDS),
        chip_bounds=_bounds(variables, _CHIP_BOUNDS),
        slice_index=variables.integer(slice_id) if num_slices > 1 else 0,
        num_slices=num_slices,
        coordinator=variables.text(coordinator).rpartition("//")[2].partition(":")[0]
        if num_slices > 1
        else "",
        source="TPU_WORKER_HOSTNAMES" if env.get("TPU_WORKER_HOSTNAMES") else "the metadata server",
    )
    _check(worker, index, slice_id)
    return worker


def metadata_variables(fetch: Fetch) -> dict[str, str]:
    """Return what a Cloud TPU VM's metadata server says, by the names of the variables that GKE sets."""
    told = dict(_TPU_ENV_LINE.findall(fetch("tpu-env") or ""))
    found = {ours: told[theirs] for theirs, ours in _IN_TPU_ENV.items() if told.get(theirs)}
    for name, attribute in (
        ("TPU_WORKER_ID", "agent-worker-number"),
        ("TPU_ACCELERATOR_TYPE", "accelerator-type"),
    ):
        if name not in found and (text := fetch(attribute)):
            found[name] = text.strip()
    # "HOSTNAME:UID:ADDRESS,...", one for each worker
    endpoints = [each.split(":") for each in (fetch("worker-network-endpoints") or "").split(",")]
    hosts = [parts[2].strip() for parts in endpoints if len(parts) > 2]
    return {**found, **({"TPU_WORKER_HOSTNAMES": ",".join(hosts)} if hosts else {})}


def _is_complete(known: Mapping[str, str]) -> bool:
    wanted = (("TPU_WORKER_HOSTNAMES",), ("TPU_ACCELERATOR_TYPE",), _WORKER, _HOST_BOUNDS, _CHIP_BOUNDS)
    return all(any(name in known for name in names) for names in wanted)


def _bounds(variables: Variables, names: tuple[str, ...]) -> tuple[int, ...] | None:
    name = variables.first(*names)
    if name not in variables:
        return None
    parts = variables.text(name).split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise TopologyError(
            "D0202",
            f"{name}={variables.env[name]!r} is not what {variables.source} sets; expected three numbers such as 2,2,1",
            where=name,
            fix=f"correct {name}, or unset it if another program left it behind",
        )
    return tuple(int(part) for part in parts)


def _check(worker: TpuWorker, index: str, slice_id: str) -> None:
    for name, number, count, what in (
        (index, worker.index, len(worker.hosts), "hosts in TPU_WORKER_HOSTNAMES"),
        (slice_id, worker.slice_index, worker.num_slices, "slices in MEGASCALE_NUM_SLICES"),
    ):
        if number >= count:
            raise TopologyError(
                "D0203",
                f"the variables disagree: {name} is {number}, but there are {count} {what}",
                where=name,
                fix="correct them, or unset what another program left behind",
            )
