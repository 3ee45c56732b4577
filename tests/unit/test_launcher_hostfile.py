"""DeepSpeed's hostfile: one line for this machine is its number of processes, anything else is told with its line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from distrib_launcher.hostfile import Host, parse, read_slots
from distrib_launcher.planning import count_processes

from distrib import RunConfig
from distrib.errors import LaunchError, NotBuiltError

WHERE = "--hostfile (launch.hostfile)"


def test_comments_and_empty_lines_mean_nothing():
    text = "# two machines\n\nworker-1 slots=4  # four GPUs\n  10.0.0.2\tslots = 8\n"
    assert parse(text, "hosts") == (Host("worker-1", 4, 3), Host("10.0.0.2", 8, 4))


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("worker-1", "hosts:1", "got 'worker-1'"),
        ("# a\nworker-1 slots=many", "hosts:2", "slots=many"),
        ("worker-1 slots=0", "hosts:1", "at least 1"),
        ("worker-1 slots=-2", "hosts:1", "at least 1"),
        ("worker-1 slots=4 max_slots=8", "hosts:1", "expected HOST slots=N"),
        ("a slots=1\nb slots=1\na slots=2", "hosts:3", "in line 1"),
        ("# nobody", "hosts:1", "no host"),
        ("", "hosts:1", "no host"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(text, place, words):
    with pytest.raises(LaunchError, match="D0946") as caught:
        parse(text, "hosts")
    assert caught.value.where == place
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", socket.gethostname()])
def test_a_file_of_this_machine_alone_says_how_many_processes_it_gets(tmp_path: Path, name):
    (tmp_path / "hosts").write_text(f"{name} slots=3\n")
    config = RunConfig(launch={"hostfile": str(tmp_path / "hosts")})
    assert count_processes(config, {}) == (3, f"the slots of {tmp_path / 'hosts'}")


@pytest.mark.parametrize(
    "text",
    ["localhost slots=2\nworker-2 slots=2\n", "worker-2 slots=2\n", "localhost slots=1\n127.0.0.1 slots=1\n"],
)
def test_other_machines_are_refused_by_name(tmp_path: Path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(NotBuiltError, match="D0947") as caught:
        read_slots(str(tmp_path / "hosts"), WHERE)
    assert caught.value.where == WHERE
    assert ("worker-2" if "worker" in text else "127.0.0.1") in str(caught.value)


def test_another_number_of_processes_than_the_file_s_is_a_contradiction(tmp_path: Path):
    (tmp_path / "hosts").write_text("localhost slots=3\n")
    config = RunConfig(launch={"hostfile": str(tmp_path / "hosts"), "nproc_per_node": 2})
    with pytest.raises(LaunchError, match=r"D0948.*3 slots.*nproc_per_node is 2"):
        count_processes(config, {})


def test_a_file_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(LaunchError, match="D0946"):
        read_slots(str(tmp_path / "hosts"), WHERE)
