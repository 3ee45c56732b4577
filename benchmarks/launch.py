"""From the command to the first DDP step of the processes that it starts, and the CPU time of the whole command."""

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from socket import socket

from benchmarks.measure import OURS, PEER, RAW, Bar, Row, cpu_s, interleaved

LIMIT_S = 120
BIN = Path(sys.executable).parent
TORCHRUN = "torchrun"
WORLDS = {2: (5, 0.75), 8: (3, 0.3)}  # number of processes: rounds, and at most this part of torchrun's time
PROGRAM = """
    import os, sys, time
    import torch
    import torch.distributed as dist
    from torch import nn

    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            file.write(str(time.clock_gettime(time.CLOCK_MONOTONIC)))
    dist.barrier()
    os._exit(0)  # torch 2.13 sometimes aborts when it ends a process that has a DDP model
"""


def commands(processes: int) -> dict[str, tuple[object, ...]]:
    return {
        RAW: (),
        TORCHRUN: (BIN / "torchrun", "--nproc-per-node", processes),
        PEER: (
            *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", processes, "--num_machines", 1),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
        ),  # --multi_gpu: its way to start several processes; the program stays on the CPU
        OURS: (BIN / "distrib", "launch", "--cpu", "-n", processes),
    }


def run() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "train.py"
        program.write_text(textwrap.dedent(PROGRAM))
        for processes, (rounds, most) in WORLDS.items():
            samples = interleaved(
                commands(processes),
                lambda command, processes=processes: timed(command, program, processes),
                rounds,
            )
            first, cpu = (
                Row(what, unit, {name: [value[i] for value in values] for name, values in samples.items()})
                for i, (what, unit) in enumerate(
                    (
                        (f"{processes} processes to the first step", "s wall"),
                        (f"the same, whole command of {processes}", "s CPU"),
                    )
                )
            )
            first.bars.append(Bar(f"/ {TORCHRUN}", first.ratio(TORCHRUN), most))
            rows += [first, cpu]
    return rows


def timed(command: tuple[object, ...], program: Path, processes: int) -> tuple[float, float]:
    """Return wall seconds until rank 0 has stepped, and CPU seconds of all processes."""
    stepped = program.with_name("stepped")
    stepped.unlink(missing_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = (program, stepped)
    start = time.clock_gettime(time.CLOCK_MONOTONIC)
    cpu = cpu_s(lambda: finish(command, words, env) if command else by_hand(words, env, processes))
    return float(stepped.read_text()) - start, cpu


def finish(command: tuple[object, ...], words: tuple[Path, ...], env: dict[str, str]) -> None:
    subprocess.run([*map(str, command), *words], env=env, check=True, capture_output=True, timeout=LIMIT_S)


def by_hand(words: tuple[Path, ...], env: dict[str, str], processes: int) -> None:
    """Start the ranks without a launcher: what no launcher of fresh interpreters can undercut."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(processes),
        }
    ranks = [
        subprocess.Popen((sys.executable, *words), env={**env, **meeting, "RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        codes = [rank.wait(LIMIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        raise RuntimeError(f"the ranks ended with exit codes {codes}")
