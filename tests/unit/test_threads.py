from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from distrib.errors import TopologyError
from distrib.topology.threads import cgroup_cores, threads_per_rank, usable_cores

V2 = "0::/jobs/one\n"
V1 = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n"


def cores_of(files: dict[str, str]) -> float | None:
    return cgroup_cores(files.get)


def test_this_process_may_use_a_core() -> None:
    assert usable_cores() >= 1


def test_no_control_group_sets_no_limit() -> None:
    assert cores_of({}) is None


def test_a_version_2_quota_is_counted_in_cores() -> None:
    assert cores_of({"/proc/self/cgroup": V2, "/sys/fs/cgroup/jobs/one/cpu.max": "150000 100000\n"}) == 1.5


def test_a_version_2_group_without_quota_sets_no_limit() -> None:
    assert cores_of({"/proc/self/cgroup": V2, "/sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n"}) is None


def test_the_tightest_ancestor_wins() -> None:
    files = {
        "/sys/fs/cgroup/jobs/one/cpu.max": "400000 100000\n",
        "/sys/fs/cgroup/jobs/cpu.max": "200000 100000\n",
    }
    assert cores_of({"/proc/self/cgroup": V2, **files}) == 2


def test_a_container_that_shows_the_hosts_path_is_found_at_the_mount() -> None:
    mount = "/sys/fs/cgroup/cpu,cpuacct"
    files = {f"{mount}/cpu.cfs_quota_us": "300000\n", f"{mount}/cpu.cfs_period_us": "100000\n"}
    assert cores_of({"/proc/self/cgroup": V1, **files}) == 3


def test_a_version_1_quota_of_minus_one_sets_no_limit() -> None:
    folder = "/sys/fs/cgroup/cpu/docker/abc"
    files = {f"{folder}/cpu.cfs_quota_us": "-1\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    assert cores_of({"/proc/self/cgroup": V1, **files}) is None


def test_cores_are_divided_among_the_local_ranks() -> None:
    assert threads_per_rank({}, 8, 2) == (4, "usable cores: 8, ranks on this node: 2")


@given(st.integers(1, 512), st.integers(1, 512))
def test_every_rank_has_a_thread_and_no_core_is_promised_twice(cores: int, ranks: int) -> None:
    threads, _ = threads_per_rank({}, cores, ranks)
    assert threads >= 1
    assert threads * ranks <= max(cores, ranks)


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_the_users_own_number_wins(value: str, threads: int) -> None:
    chosen, reason = threads_per_rank({"OMP_NUM_THREADS": value}, 64, 1)
    assert chosen == threads
    assert "OMP_NUM_THREADS" in reason


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_of_threads_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(TopologyError, match="D0202"):
        threads_per_rank({"OMP_NUM_THREADS": value}, 8, 1)
