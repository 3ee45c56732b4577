"""From settings to a plan: how many processes, how they are started, and why."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from distrib.config import RunConfig, to_wire
from distrib.errors import ConfigError, LaunchError, NotBuiltError
from distrib.topology import DATA_AXES, resolve_mesh
from distrib.topology.environments.tpu_pod import PORT
from distrib.topology.threads import threads_per_rank, usable_cores
from distrib_launcher import tpu
from distrib_launcher.accelerators import may_use_gpus, may_use_xla, processes_for
from distrib_launcher.hostfile import read_slots
from distrib_launcher.numa import cores_per_rank, machine_bindings
from distrib_launcher.plan import LaunchPlan, Machine, Program

_MOST_PROCESSES = 4096
_OWN_FILES = 40  # of the launcher itself, generously


class Reasons(NamedTuple):
    """Why the plan is as it is: its number of processes, of threads, and how they are started."""

    processes: str
    threads: str
    start_method: str


def make_plan(
    program: Program, config: RunConfig, env: Mapping[str, str], *, stays_alone: bool = False
) -> tuple[LaunchPlan, Reasons]:
    """Settle what will run; return it with the reasons for what was chosen.

    Args:
        program: What every rank runs.
        config: The settings of this launch.
        env: The launcher's environment.
        stays_alone: Whether other machines of a TPU slice do not take part; they do not with `launch.nnodes: 1` either.

    Raises:
        LaunchError: if a rank is to be shown that there is not, the strategy runs on one process only, or the
            processes cannot share the TPU chips.
        NotBuiltError: if restarts are asked for on several machines.
        ConfigError: if this machine cannot hold so many processes, or the mesh needs another number of them.
        TopologyError: if OMP_NUM_THREADS is no number, or nobody says which TPU this is.
    """
    chips = tpu.find_chips() if may_use_xla(config.device, env) else None
    count, count_reason = count_processes(config, env, chips)
    _check_count(count, config)
    stays_alone = stays_alone or config.is_set("launch.nnodes")
    machine, share = _place(config, env, chips, count, stays_alone=stays_alone)
    world_size = count * machine.count
    if config.strategy == "single" and world_size > 1:
        raise LaunchError(
            "D0310",
            f"strategy single runs on one process, but {world_size} were asked for",
            where=config.source("strategy").where,
            fix="leave the strategy out, or start one process",
        )
    if machine.count > 1 and config.launch.max_restarts:
        raise NotBuiltError(
            "launch.max_restarts on several machines",
            where=config.source("launch.max_restarts").where,
            fix="leave it out: the machines' launchers do not agree on restarts yet",
        )
    sizes = {axis: size for axis, size in config.mesh.model_dump().items() if config.is_set(f"mesh.{axis}")}
    key = f"mesh.{next(iter(sizes), 'replicate')}"
    where = config.source(key).where
    if chips is None or not config.xla.spmd:  # there the mesh is one of devices, of which a rank has several
        resolve_mesh(sizes, world_size, free=DATA_AXES, where=f"{where} ({key})" if where else None)
    bound = machine_bindings(count, env, gpus=may_use_gpus(config.device)) if config.launch.numa else ()
    threads, threads_reason = _threads(env, count, cores_per_rank(bound))
    start_method, start_reason = choose_start_method(config, program.kind, count)
    own = config.launch
    plan = LaunchPlan(
        program=program,
        num_processes=count,
        threads=threads,
        master_addr=machine.main_host,
        master_port=own.master_port or (PORT if machine.count > 1 else 0),
        config=to_wire(config),
        grace_s=own.grace_s,
        start_method=start_method,
        preload=own.preload,
        max_restarts=own.max_restarts,
        port_from=config.source("launch.master_port").where or None,
        log_dir=Path(own.log_dir) if own.log_dir else None,
        shown_ranks=_shown_ranks(config, world_size),
        bindings=bound,
        machine=machine,
        device_variables=share.variables,
        exclusive=share.files,
    )
    return plan, Reasons(count_reason, threads_reason, start_reason)


def _place(
    config: RunConfig, env: Mapping[str, str], chips: tpu.Chips | None, count: int, *, stays_alone: bool
) -> tuple[Machine, tpu.Share]:
    """Find this machine's place among those of its TPU slice, and deal out its chips."""
    on_tpu = chips is not None and tpu.uses_tpu(env, chips)
    worker, is_cut = tpu.find_worker(
        env, tpu.metadata_server(env) if on_tpu else None, stays_alone=stays_alone
    )
    machine = (
        Machine(worker.node_rank, worker.num_nodes, worker.source, worker.main_host)
        if worker.num_nodes > 1
        else Machine()
    )
    if chips is None or not on_tpu:
        return machine, tpu.Share()
    return machine, tpu.share_chips(worker, chips, count, env, spmd=config.xla.spmd, is_cut=is_cut)


def _threads(env: Mapping[str, str], count: int, bound_cores: int | None) -> tuple[int, str]:
    threads, reason = threads_per_rank(env, usable_cores(), count)
    if bound_cores is None or bound_cores >= threads or env.get("OMP_NUM_THREADS"):
        return threads, reason
    return bound_cores, f"{bound_cores} of its NUMA node's cores for each rank there"


def choose_start_method(
    config: RunConfig, kind: str, count: int, platform: str = sys.platform
) -> tuple[str, str]:
    """Return "fork" or "spawn", and why."""
    where = config.source("launch.start_method").where
    if kind == "command":
        return "spawn", "a command"
    if platform != "linux":
        return "spawn", f"forking is safe on Linux only, not on {platform}"
    if where:
        return config.launch.start_method, where
    if config.launch.preload:
        return "fork", "launch.preload"
    return ("spawn", "one process") if count == 1 else ("fork", "torch is loaded once for all")


def _shown_ranks(config: RunConfig, count: int) -> frozenset[int] | None:
    shown = config.launch.show_ranks
    if shown == "all":
        return None
    if max(shown) >= count:
        raise LaunchError(
            "D0314",
            f"there is no rank {max(shown)} among {count}; expected ranks from 0 to {count - 1}",
            where=f"{config.source('launch.show_ranks').where} (launch.show_ranks)",
            fix="correct it, or leave it out to see every rank",
        )
    return frozenset(shown)


def count_processes(
    config: RunConfig, env: Mapping[str, str], chips: tpu.Chips | None = None
) -> tuple[int, str]:
    """Return how many processes this machine gets, and why.

    Args:
        config: The settings of this launch.
        env: The launcher's environment.
        chips: The machine's TPU chips, if the ranks compute with XLA; else None.
    """
    count = config.launch.nproc_per_node
    if config.launch.hostfile is not None:
        return _count_of_hostfile(config, config.launch.hostfile)
    if count != "auto":
        return count, str(config.source("launch.nproc_per_node").where)
    if config.strategy == "single":
        return 1, "strategy single"
    if chips is not None:
        return tpu.count_processes(env, chips, spmd=config.xla.spmd)
    return processes_for(config.device, env)


def _count_of_hostfile(config: RunConfig, path: str) -> tuple[int, str]:
    where = f"{config.source('launch.hostfile').where} (launch.hostfile)"
    slots, count = read_slots(path, where), config.launch.nproc_per_node
    if count not in ("auto", slots):
        raise LaunchError(
            "D0948",
            f"{path} gives this machine {slots} slots, but launch.nproc_per_node is {count}",
            where=where,
            fix="correct one of them, or leave launch.nproc_per_node out",
        )
    return slots, f"the slots of {path}"


def most_processes(open_files: int) -> int:
    """Return how many processes a launcher with this limit of open files can watch: each takes it 5 of them."""
    return min(_MOST_PROCESSES, max(1, (open_files - _OWN_FILES) // 5))


def _check_count(count: int, config: RunConfig) -> None:
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = most_processes(open_files if open_files != resource.RLIM_INFINITY else sys.maxsize)
    if count > most:
        option = config.source("launch.nproc_per_node").where
        limit = "on one machine" if most == _MOST_PROCESSES else f"with a limit of {open_files} open files"
        raise ConfigError(
            "D0106",
            f"got {count}; expected at most {most} processes {limit}",
            where=f"{option} (launch.nproc_per_node)" if option else "launch.nproc_per_node",
            fix="start fewer" + ("" if most == _MOST_PROCESSES else ", or raise the limit: `ulimit -n`"),
        )
