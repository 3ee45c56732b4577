from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.launching import command, environment, launch, launching, pids, script

MEET = """
    import os, torch
    from datetime import timedelta
    import torch.distributed as dist
    {join}
    x = torch.ones(2)
    dist.all_reduce(x)
    assert x.tolist() == [2.0, 2.0]
    dist.destroy_process_group()
    print("met", flush=True)
"""
PLAIN = 'dist.init_process_group("gloo", timeout=timedelta(seconds=30))'
OURS = """
    from distrib.collectives.process_group import connect
    from distrib.topology.detect import detect_topology
    connect(detect_topology(os.environ), "gloo", torch.device("cpu"), 30.0, 30.0)
"""


@pytest.mark.parametrize("join", [PLAIN, OURS], ids=["torch's own store", "distrib's store"])
def test_rank_0_takes_over_the_reserved_port(tmp_path: Path, join: str) -> None:
    done = launch("-n", 2, script(tmp_path, MEET.format(join=join.strip())), cwd=tmp_path)

    assert (done.code, done.out.count("met")) == (0, 2), done.err


def test_launches_at_the_same_time_do_not_collide(tmp_path: Path) -> None:
    text = """
        import os, socket
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        server.listen()
        print(os.environ["MASTER_PORT"])
    """
    words = command(script(tmp_path, text))
    started = [
        subprocess.Popen(
            words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(6)
    ]
    ports = [process.communicate(timeout=60)[0] for process in started]

    assert len(set(ports)) == 6
    assert not any(process.returncode for process in started)


def test_a_port_that_is_taken_is_refused_with_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        done = launch("--master-port", port, script(tmp_path, "print('started')"), cwd=tmp_path)

    assert (done.code, done.out) == (2, "")
    assert f"error[D0301] --master-port: port {port} is in use by process {os.getpid()}" in done.err


def test_a_port_that_another_launch_holds_is_refused(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = "import os, pathlib, time; pathlib.Path(f'{os.getpid()}.pid').touch(); time.sleep(60)"
    with launching("--master-port", port, script(tmp_path, text), cwd=tmp_path):
        pids(tmp_path, 1)
        done = launch("--main_process_port", port, script(tmp_path, "print('started')"), cwd=tmp_path)

    assert (done.code, done.out) == (2, "")
    assert "D0301" in done.err


def test_a_port_can_be_used_again_at_once(tmp_path: Path) -> None:
    text = """
        import os, socket
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
        client = socket.create_connection(address)
        server.accept()[0].close()  # leaves a connection that waits, on the server's side
        client.close()
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = script(tmp_path, text)

    assert [launch("--master-port", port, program, cwd=tmp_path).code for _ in range(2)] == [0, 0]


def test_help_imports_neither_torch_nor_the_schema() -> None:
    text = (
        "import sys\n"
        "from distrib_launcher.cli import run\n"
        "run(['--help'], {})\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'rich', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_launch_imports_no_torch(tmp_path: Path) -> None:
    text = (
        "import sys\n"
        "from distrib_launcher.cli import run\n"
        f"run(['launch', {str(script(tmp_path, 'pass'))!r}], {{}})\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[]"
