"""The TPU chips of this machine: how many there are, who holds them, and the variables with which ranks share them.

Nothing here opens a chip: libtpu belongs to one process at a time, and that is to be a rank.
"""

from __future__ import annotations

import importlib.machinery
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from distrib.errors import LaunchError, TopologyError
from distrib.topology.environments.tpu_pod import Fetch, TpuWorker, has_several_hosts, read_tpu_worker

_ROOT = Path("/")
_VENDOR = "0x1ae0"  # Google's, among PCI devices
# v2 and v3, v4, v5e, v6e, v7, v5p and one without a public name: what torch_xla counts
_CHIPS: Final = frozenset({"0x0027", "0x005e", "0x0063", "0x006f", "0x0076", "0x0056", "0x0062"})
_TWO_DIES = 7  # the generation whose chips consist of two, each a device of its own
_FIRST_PORT = 8476  # of the processes' TPU clients, one above the other; torch_xla's default
_LAYOUTS: Final = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1), 8: (2, 4, 1)}  # of the chips of one machine
_MASKS: Final = ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")
_PER_PROCESS: Final = (*_MASKS, "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_PORT")
_CUT: Final = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}  # what GKE says of the others goes
_LOCK = "tmp/libtpu_lockfile"
_METADATA_HOST = "169.254.169.254"  # by number: to look up a name can take longer than any limit
_METADATA_LIMIT_S = 2.0
_SHOWN = 60  # characters of another process's command


class Share(NamedTuple):
    """How the ranks of this machine use its chips.

    Attributes:
        variables: What each rank gets, by its local rank.
        files: The device files that only one program can use at a time.
    """

    variables: tuple[Mapping[str, str], ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chips:
    """The chips that this machine shows.

    Attributes:
        count: How many.
        files: Their device files, as far as there are any.
    """

    count: int
    files: tuple[str, ...]


def find_chips(root: Path = _ROOT) -> Chips:
    """Count the chips: device files, of which a container has only its own, else what is on the PCI bus."""
    on_bus = sum(_is_chip(each) for each in _entries(root / "sys/bus/pci/devices"))
    devices = [each for each in _entries(root / "dev") if re.fullmatch(r"accel\d+", each.name)]
    if on_bus and not devices:  # v5e and newer are files of vfio, which others' devices can be too
        devices = [each for each in _entries(root / "dev/vfio") if each.name.isdecimal()]
    files = tuple(sorted(map(str, devices)))
    return Chips(len(files) if files and not _are_vfio(files) else on_bus, files)


def uses_tpu(env: Mapping[str, str], chips: Chips) -> bool:
    """Whether ranks that compute with XLA do so on TPU chips."""
    chosen = env.get("PJRT_DEVICE", "")
    return chosen.startswith("TPU") or (not chosen and chips.count > 0)


def xla_is_installed() -> bool:
    """Whether the ranks could import torch_xla; nothing is imported for that."""
    return importlib.machinery.PathFinder.find_spec("torch_xla") is not None


def count_processes(env: Mapping[str, str], chips: Chips, *, spmd: bool) -> tuple[int, str]:
    """Return how many ranks this machine gets, at least 1, and the reason in a few words."""
    if not uses_tpu(env, chips):
        chosen = env.get("PJRT_DEVICE")
        return 1, f"PJRT_DEVICE={chosen}" if chosen else "no TPU was found"
    if spmd:
        return 1, "xla.spmd: one for all TPU chips of the machine"
    mask = next((name for name in _MASKS if env.get(name)), None)
    if mask and "," not in env[mask]:
        return 1, f"{mask}={env[mask]}"
    if not chips.count:
        return 1, f"PJRT_DEVICE={env.get('PJRT_DEVICE')}, but no TPU chip was found"
    return chips.count, f"one for each TPU chip: {chips.count}"


def find_worker(
    env: Mapping[str, str], fetch: Fetch | None, *, stays_alone: bool = False
) -> tuple[TpuWorker, bool]:
    """Return this machine's place among those that take part, and whether it does without others of its slice.

    Args:
        env: The launcher's environment.
        fetch: Asks the metadata server; None where ranks do not compute on a TPU: then only `env` counts.
        stays_alone: Whether the other machines are not to take part.

    Raises:
        TopologyError: if nobody says which TPU this is (D0914), or the variables are wrong.
    """
    if fetch is None:
        worker = read_tpu_worker(env) if has_several_hosts(env) else TpuWorker()
    else:
        try:
            worker = read_tpu_worker(env, fetch)
            why = "neither the variables of GKE nor the metadata server do"
        except OSError as error:
            worker, why = TpuWorker(), f"the metadata server does not answer: {error}"
        if not (worker.accelerator or stays_alone):
            raise _unknown(why)
    if not stays_alone:
        return worker, False
    own = TpuWorker(accelerator=worker.accelerator, chip_bounds=worker.chip_bounds, source="launch.nnodes")
    return own, worker.num_nodes > 1


def share_chips(
    worker: TpuWorker, chips: Chips, num_processes: int, env: Mapping[str, str], *, spmd: bool, is_cut: bool
) -> Share:
    """Decide which rank gets which chip. Pure.

    Args:
        worker: This machine, and the others that take part.
        chips: Of this machine.
        num_processes: The ranks of this machine.
        env: The launcher's environment; what it says of chips stands where one rank has them all.
        spmd: Whether one process has all chips of the machine.
        is_cut: Whether the machine is one of several that does without the others.

    Raises:
        LaunchError: if there are more or fewer ranks than chips (D0912), a variable says something else (D0913), or
            a chip has two cores (D0915).
        TopologyError: if nobody says how the chips lie (D0914).
    """
    if spmd and num_processes > 1:
        raise _wrong_number(
            num_processes, "1, since xla.spmd lets one process have them all", where="xla.spmd"
        )
    if spmd:
        own = {**_whole_machine(_chip_bounds(worker, chips)), **_CUT} if is_cut else {}
        return Share((_unless_set(env, {**_local(0, 1), **own}),), chips.files)
    if worker.generation in (2, 3):
        raise LaunchError(
            "D0915",
            f"each chip of {worker.accelerator} has two cores, so that one process for each core is not possible",
            where="device",
            fix="set xla.spmd: true, where one process has all cores of the machine",
        )
    if num_processes == 1 and worker.num_nodes == 1:
        cut = _CUT if is_cut else {}
        first = {"TPU_VISIBLE_CHIPS": "0"} if not any(env.get(name) for name in _MASKS) else {}
        return Share(
            (_unless_set(env, {**_local(0, 1), **_whole_machine((1, 1, 1)), **first, **cut}),), chips.files
        )
    if num_processes != chips.count:
        one = "" if worker.num_nodes > 1 else "1 or "
        raise _wrong_number(num_processes, f"{one}{chips.count}, one for each chip of this machine")
    _refuse_set(env)
    cut = _CUT if is_cut else {}
    return Share(tuple({**each, **cut} for each in _one_chip_each(worker, chips)), chips.files)


def _one_chip_each(worker: TpuWorker, chips: Chips) -> tuple[Mapping[str, str], ...]:
    hosts, own = worker.host_bounds or (1, 1, 1), _chip_bounds(worker, chips)
    bounds = [host * chip for host, chip in zip(hosts, own, strict=True)]
    if worker.generation == _TWO_DIES:
        bounds.append(2)  # as torch_xla does
    total = chips.count * len(worker.hosts)
    if math.prod(bounds) != total:
        raise _unknown(
            f"{len(worker.hosts)} machine{'s' if len(worker.hosts) > 1 else ''} of {chips.count} chips are {total}, but "
            f"the bounds {_text(hosts)} of machines and {_text(own)} of chips make {math.prod(bounds)}"
        )
    ports = [_FIRST_PORT + local_rank for local_rank in range(chips.count)]
    shared = {
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": _text(bounds),
        "TPU_PROCESS_ADDRESSES": ",".join(f"{host}:{port}" for host in worker.hosts for port in ports),
    }
    return tuple(
        {
            **_local(local_rank, chips.count),
            **shared,
            "CLOUD_TPU_TASK_ID": str(worker.index * chips.count + local_rank),
            "TPU_PROCESS_PORT": str(port),
            "TPU_VISIBLE_CHIPS": str(local_rank),
        }
        for local_rank, port in enumerate(ports)
    )


def _local(local_rank: int, count: int) -> dict[str, str]:
    return {
        "PJRT_DEVICE": "TPU",
        "PJRT_LOCAL_PROCESS_RANK": str(local_rank),
        "PJRT_LOCAL_PROCESS_COUNT": str(count),
    }


def _whole_machine(chips: Sequence[int]) -> dict[str, str]:
    """Make one process a TPU of its own, of some chips of this machine."""
    return {
        "TPU_CHIPS_PER_PROCESS_BOUNDS": _text(chips),
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "CLOUD_TPU_TASK_ID": "0",
    }


def _chip_bounds(worker: TpuWorker, chips: Chips) -> tuple[int, ...]:
    bounds, dies = worker.chip_bounds, 2 if worker.generation == _TWO_DIES else 1
    if bounds is not None and math.prod(bounds) * dies == chips.count:
        return bounds
    if bounds is None and chips.count // dies in _LAYOUTS:
        return _LAYOUTS[chips.count // dies]
    told = f"bounds of {_text(bounds)}" if bounds else "no bounds"
    raise _unknown(f"this machine shows {chips.count} chips, and has {told} for them")


def _unless_set(env: Mapping[str, str], variables: Mapping[str, str]) -> Mapping[str, str]:
    """Keep what the user says of the chips of the only process."""
    return {
        name: value
        for name, value in variables.items()
        if not env.get(name) or name in _CUT or name.startswith("PJRT_")
    }


def _refuse_set(env: Mapping[str, str]) -> None:
    for name in _PER_PROCESS:
        if env.get(name):
            raise LaunchError(
                "D0913",
                f"{name}={env[name]} holds for one process, but each rank is given a chip of its own",
                where=name,
                fix=f"unset {name}, or start one process: -n 1, or xla.spmd: true",
            )


def _text(bounds: Sequence[int]) -> str:
    return ",".join(map(str, bounds))


def _wrong_number(num_processes: int, expected: str, where: str = "launch.nproc_per_node") -> LaunchError:
    return LaunchError(
        "D0912",
        f"{num_processes} processes cannot share the TPU chips of this machine; expected {expected}",
        where=where,
        fix="leave the number of processes out",
    )


def _unknown(why: str) -> TopologyError:
    return TopologyError(
        "D0914",
        f"nobody says which TPU this machine belongs to, or how its chips lie: {why}",
        where="TPU_ACCELERATOR_TYPE",
        fix="set TPU_SKIP_MDS_QUERY=1 and TPU_ACCELERATOR_TYPE (v4-8), TPU_HOST_BOUNDS (1,1,1), "
        "TPU_CHIPS_PER_HOST_BOUNDS (2,2,1), on several machines TPU_WORKER_ID and TPU_WORKER_HOSTNAMES too; or "
        "compute elsewhere: --cpu, or PJRT_DEVICE=CPU",
    )


def refuse_if_held(files: Sequence[str], root: Path = _ROOT) -> None:
    """See that no process has the chips open, as one that was left behind by an earlier run.

    Raises:
        LaunchError: if one has (D0910), or another user's lock of libtpu would be in the way (D0911).
    """
    lock = root / _LOCK
    if files and lock.exists() and not os.access(lock, os.W_OK):
        raise LaunchError(
            "D0911",
            f"{lock} belongs to user {lock.stat().st_uid} and cannot be written, so that libtpu would not start",
            where=str(lock),
            fix=f"remove it when no program of that user has the TPU: sudo rm {lock}",
        )
    held = holders(files, root)
    if held:
        pid, file = held[0]
        raise LaunchError(
            "D0910",
            f"{file} is held by process {pid} ({_command(pid, root)}); a TPU has one program at a time",
            where=file,
            fix=f"end that process: kill {pid}"
            if pid != os.getpid()
            else "restart this process (the notebook's kernel), and compute on the TPU in the ranks only",
        )


def holders(files: Sequence[str], root: Path = _ROOT) -> list[tuple[int, str]]:
    """Return (process id, file) of those that have one of the files open, as far as we may look."""
    wanted, found = set(files), []
    for process in _entries(root / "proc") if wanted else []:
        if process.name.isdecimal():
            open_files = {_target(each) for each in _entries(process / "fd")} & wanted
            found += [(int(process.name), file) for file in sorted(open_files)]
    return sorted(found)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""


def _command(pid: int, root: Path) -> str:
    try:
        words = (root / f"proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended meanwhile"
    text = " ".join(words).strip()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def metadata_server(env: Mapping[str, str]) -> Fetch:
    """Return what asks the metadata server of a Google Cloud instance, with 2 s for each answer.

    Args:
        env: GCE_METADATA_HOST in it names another host and port, as for Google's own libraries.
    """

    def fetch(attribute: str) -> str | None:
        from http.client import HTTPConnection, HTTPException  # noqa: PLC0415 (slow, and for TPU VMs only)

        host = env.get("GCE_METADATA_HOST") or _METADATA_HOST
        connection = HTTPConnection(host, timeout=_METADATA_LIMIT_S)
        try:
            path = f"/computeMetadata/v1/instance/attributes/{attribute}"
            connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except HTTPException as error:
            raise OSError(f"{host} answers with no HTTP: {error}") from error
        finally:
            connection.close()
        return text if answer.status == 200 else None

    return fetch


def _is_chip(device: Path) -> bool:
    return _read(device / "vendor") == _VENDOR and _read(device / "device") in _CHIPS


def _are_vfio(files: Sequence[str]) -> bool:
    return any("/vfio/" in file for file in files)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
