"""How many CPU cores this process may use, and how many threads each rank should have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from distrib.errors import TopologyError

_CGROUP_ROOT = PurePosixPath("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return how many cores this process may use: its CPU affinity, cut by a CPU limit of its container."""
    # macOS has neither affinity nor cgroups.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cgroup_cores(_read)
    return max(1, cores if limit is None else min(cores, int(limit)))


def threads_per_rank(env: Mapping[str, str], cores: int, local_world_size: int) -> tuple[int, str]:
    """Divide the cores among this node's ranks.

    Args:
        env: OMP_NUM_THREADS in it wins.
        cores: What `usable_cores` says.
        local_world_size: Number of ranks on this node.

    Returns:
        Threads for each rank, at least 1, and the reason in a few words.

    Raises:
        TopologyError: if OMP_NUM_THREADS is no positive number.
    """
    chosen = env.get("OMP_NUM_THREADS", "").strip()
    if chosen:
        return _outer_level(chosen), f"OMP_NUM_THREADS={chosen}"
    return max(1, cores // local_world_size), f"usable cores: {cores}, ranks on this node: {local_world_size}"


def cgroup_cores(read: Callable[[str], str | None]) -> float | None:
    """Return the tightest CPU quota of this process's control groups, in cores; None when there is none.

    Every ancestor counts, and so does the mount's root: in a container the path may be one of the host.

    Args:
        read: Path -> contents of the file, None where there is no such file.

    Formats: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and
    https://docs.kernel.org/scheduler/sched-bwc.html (cpu.cfs_quota_us).
    """
    quotas = []
    for controllers, group in _memberships(read("/proc/self/cgroup") or ""):
        if controllers == "":
            quotas += [_v2_quota(read, folder) for folder in _with_ancestors(_CGROUP_ROOT, group)]
        elif "cpu" in controllers.split(","):
            for mount in (_CGROUP_ROOT / controllers, _CGROUP_ROOT / "cpu"):
                quotas += [_v1_quota(read, folder) for folder in _with_ancestors(mount, group)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _outer_level(value: str) -> int:
    outer = value.split(",", maxsplit=1)[
        0
    ].strip()  # OpenMP allows a list, one number for each level of nesting
    if not (outer.isascii() and outer.isdigit() and int(outer) > 0):
        raise TopologyError(
            "D0202", f"OMP_NUM_THREADS={value!r} is no number of threads; expected an integer of at least 1",
            where="OMP_NUM_THREADS", fix="correct it, or unset it to have the cores divided among the ranks",
        )  # fmt: skip
    return int(outer)


def _memberships(proc_self_cgroup: str) -> Iterator[tuple[str, str]]:
    """Yield (controllers, path) of each line `id:controllers:path`; version 2 has no controllers there."""
    for line in proc_self_cgroup.splitlines():
        _, controllers, group = line.split(":", 2)
        yield controllers, group


def _with_ancestors(mount: PurePosixPath, group: str) -> Iterator[str]:
    folder = mount / group.lstrip("/")
    yield str(folder)
    yield from (str(parent) for parent in folder.parents if parent.is_relative_to(mount))


def _v2_quota(read: Callable[[str], str | None], folder: str) -> float | None:
    words = (read(f"{folder}/cpu.max") or "max").split()  # "max 100000" or "150000 100000", microseconds
    return None if words[0] == "max" else int(words[0]) / int(words[1])


def _v1_quota(read: Callable[[str], str | None], folder: str) -> float | None:
    quota, period = read(f"{folder}/cpu.cfs_quota_us"), read(f"{folder}/cpu.cfs_period_us")
    if quota is None or period is None or int(quota) <= 0:  # -1: no limit
        return None
    return int(quota) / int(period)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")  # a group may have any name
    except OSError:
        return None
