from __future__ import annotations

from collections.abc import Mapping

import pytest
from distrib_launcher.oom import OomKills, count_oom_kills

VMSTAT = "nr_free_pages 7\noom_kill 4\n"


def count(files: Mapping[str, str]) -> OomKills:
    return count_oom_kills(files.get)


def test_the_machine_and_the_group_are_counted_with_control_groups_2() -> None:
    files = {
        "/proc/vmstat": VMSTAT,
        "/proc/self/cgroup": "0::/job/step\n",
        "/sys/fs/cgroup/job/step/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n",
    }
    assert count(files) == OomKills(group=2, machine=4)


def test_the_group_is_counted_with_control_groups_1() -> None:
    files = {
        "/proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n",
        "/sys/fs/cgroup/memory/docker/abc/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    }
    assert count(files) == OomKills(group=1, machine=None)


def test_a_path_of_the_host_falls_back_to_the_container_s_own_root() -> None:
    files = {
        "/proc/self/cgroup": "0::/../of/the/host\n",
        "/sys/fs/cgroup/memory.events": "oom_kill 5\n",
    }
    assert count(files).group == 5


def test_nothing_is_known_where_the_kernel_does_not_tell() -> None:
    assert count({}) == OomKills(group=None, machine=None)


def test_only_what_was_added_counts() -> None:
    assert OomKills(group=3, machine=9).since(OomKills(group=3, machine=8)) == OomKills(group=0, machine=1)
    assert OomKills(group=3).since(OomKills()) == OomKills()


@pytest.mark.parametrize(
    ("kills", "said"),
    [
        (OomKills(group=1, machine=1), "1 of this job's processes"),
        (OomKills(group=0, machine=2), "2 processes of this machine"),
        (OomKills(group=None, machine=0), "was not at work"),
        (OomKills(), "often"),
    ],
)
def test_a_sigkill_is_explained_by_what_the_kernel_counted(kills: OomKills, said: str) -> None:
    assert said in kills.explain_sigkill()
