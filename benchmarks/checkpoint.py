"""Saving and loading 50 M and 200 M parameters with AdamW's state, next to the same bytes in one file."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.measure import (
    MEGA,
    OURS,
    PEER,
    RAW,
    Bar,
    Row,
    alone,
    give_back_memory,
    interleaved,
    peak_mb,
    quiet,
)
from distrib.testing import run_ranks

WIDTH = 2048
SMALL, LARGE = 12, 48  # layers: 50 M and 200 M parameters
ROUNDS = {SMALL: 9, LARGE: 5}
MEMCPY, FSYNC, LIGHT = "memcpy", "fsync", "light"  # LIGHT: ours with durable=False or verify=False
BEHIND = "behind"  # ours with blocking=False

Turn = tuple[Callable[[Path], object], Path]  # what writes or reads a checkpoint, and where


def run() -> list[Row]:
    cores = len(os.sched_getaffinity(0))
    return [
        *alone(rows_of, 1, SMALL, threads=cores),
        *run_ranks(rows_of, 2, 2, SMALL, timeout_s=1200)[0],
        *alone(rows_of, 1, LARGE, threads=cores),
    ]


def rows_of(ranks: int, layers: int) -> list[Row]:
    if ranks > 1:
        dist.init_process_group("gloo")
    size = round(layers * WIDTH * (WIDTH + 1) / MEGA)
    where = f"{size} M, " + ("one process" if ranks == 1 else f"DDP {ranks}")
    with shared_folder() as folder, quiet():
        return list(measured(folder, where, ranks, layers))


def measured(folder: Path, where: str, ranks: int, layers: int) -> Iterator[Row]:
    """Yield a row per operation; the contestants of all saves, and of all loads, take turns in one run."""
    from accelerate import Accelerator as Peer

    from distrib import Accelerator

    ours, own_optimizer = prepared(Accelerator, layers)
    peer, peers_optimizer = prepared(Peer, layers)
    state, rounds = OneFile(layers), ROUNDS[layers]
    save: dict[str, Turn] = {
        MEMCPY: (state.copy, folder / "memcpy"),
        RAW: (state.write, folder / "raw"),
        FSYNC: (lambda path: state.write(path, durable=True), folder / "fsync"),
        PEER: (peer.save_state, folder / "accelerate"),
        OURS: (ours.save_state, folder / "distrib"),
        LIGHT: (lambda path: ours.save_state(path, durable=False), folder / "light"),
    }
    saved = interleaved(save, lambda turn: timed(turn, fresh=True), rounds)

    def resumed(turn: Turn) -> tuple[float, float]:
        """Load as a new process does, whose optimizer has no state yet."""
        for optimizer in (own_optimizer, peers_optimizer):
            optimizer.state.clear()
        give_back_memory()
        return timed(turn, fresh=False)

    load: dict[str, Turn] = {
        MEMCPY: (state.copy, folder / "memcpy"),
        RAW: (state.read, folder / "raw"),
        PEER: (peer.load_state, folder / "accelerate"),
        OURS: (ours.load_state, folder / "distrib"),
        LIGHT: (lambda path: ours.load_state(path, verify=False), folder / "distrib"),
    }
    loaded = interleaved(load, resumed, rounds)
    again = interleaved(load, lambda turn: timed(turn, fresh=False), rounds)
    wall, cpu = clocks(f"save, {where}", saved, raw=FSYNC, own=OURS)
    wall.bars.append(Bar("/ one file with fsync", wall.ratio(RAW), 1.15, target=True))
    yield from (wall, cpu)
    wall, cpu = clocks(f"save, durable=False, {where}", saved, raw=RAW, own=LIGHT)
    wall.bars.append(Bar("/ one file", wall.ratio(RAW), 1.1, target=True))
    if ranks > 1:
        wall.bars.append(Bar(f"/ {PEER}", wall.ratio(PEER), 0.8, target=True))
    yield from (wall, cpu)
    yield blocking(ours, peer, state, folder, where, rounds)
    for what, own, limit in (("load", OURS, 0.8), ("load, verify=False", LIGHT, 0.4)):
        wall, cpu = clocks(f"{what}, {where}", loaded, raw=RAW, own=own)
        wall.bars.append(Bar(f"/ {PEER}", wall.ratio(PEER), limit, target=True))
        yield from (wall, cpu)
    yield clocks(f"load again in one process, {where}", again, raw=RAW, own=OURS)[0]
    row = Row(f"extra memory of a save, {where}", "MB", memory(save, fresh=True))
    row.bars.append(Bar("MB", row.samples[OURS][0], 0.15 * state.bytes / ranks / MEGA, target=True))
    yield row
    row = Row(f"extra memory of a load, {where}", "MB", memory(load, fresh=False))
    row.bars.append(Bar(f"/ {PEER}", row.ratio(PEER), 0.2, target=True))
    yield row


def blocking(ours: Any, peer: Any, state: "OneFile", folder: Path, where: str, rounds: int) -> Row:
    """Return how long the training loop waits for a save that goes on behind it; Accelerate's has no such mode."""
    copy = OneFile(size=state.bytes // num_ranks())  # what one rank copies
    turns: dict[str, Turn] = {
        MEMCPY: (copy.copy_all, folder / "memcpy"),
        PEER: (peer.save_state, folder / "accelerate"),
        OURS: (lambda path: ours.save_state(path, blocking=False), folder / BEHIND),
    }
    samples = interleaved(turns, waited, rounds)
    row = Row(f"the loop waits for a save, {where}", "s wall", samples)
    row.bars.append(Bar("/ memcpy of the share", row.ratio(MEMCPY), 1.3, target=True))
    return row


def waited(turn: Turn) -> float:
    """Return wall seconds of rank 0 until the call returns; what goes on then is waited for."""
    function, path = turn
    clear(path, fresh=True)
    wall = time.perf_counter()
    handle = function(path)
    wall = time.perf_counter() - wall
    if hasattr(handle, "wait"):
        handle.wait()
    meet()
    return wall


def prepared(accelerator_class: Callable[..., Any], layers: int) -> tuple[Any, torch.optim.Optimizer]:
    """Return an accelerator with a model and an optimizer that has stepped, so that its state is there."""
    accelerator = accelerator_class(cpu=True)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.prepare(model, optimizer)
    return accelerator, optimizer


class OneFile:
    """As many bytes as the training state has, and rank 0's plainest ways to keep them; other ranks wait."""

    def __init__(self, layers: int = 0, *, size: int | None = None) -> None:
        model = layers * WIDTH * (WIDTH + 1) * torch.float32.itemsize
        self.bytes = size or 3 * model  # with two moments
        here = size is not None or is_main()
        self.state = torch.randint(256, (self.bytes,), dtype=torch.uint8) if here else torch.empty(0)
        self.other = torch.zeros_like(self.state)

    def copy_all(self, _path: Path) -> None:
        """Copy on every rank."""
        self.other.copy_(self.state)

    def copy(self, _path: Path) -> None:
        self.other.copy_(self.state)

    def write(self, path: Path, *, durable: bool = False) -> None:
        if is_main():
            with path.open("wb", buffering=0) as file:
                move_all(file.write, self.state)
                if durable:
                    os.fsync(file.fileno())

    def read(self, path: Path) -> None:
        if is_main():
            with path.open("rb", buffering=0) as file:
                move_all(file.readinto, self.other)


def move_all(move: Callable[[memoryview], int], tensor: Tensor) -> None:
    """Move a tensor's bytes by a system call that may do only a part of them at a time."""
    left = memoryview(tensor.numpy())
    while left:
        left = left[move(left) :]


def timed(turn: Turn, *, fresh: bool) -> tuple[float, float]:
    """Return wall seconds until the last rank is done, and CPU seconds of all ranks."""
    function, path = turn
    clear(path, fresh=fresh)
    wall, cpu = time.perf_counter(), time.process_time()
    function(path)
    cpu = time.process_time() - cpu
    meet()
    wall = time.perf_counter() - wall
    total = torch.tensor(cpu)
    if dist.is_initialized():
        dist.all_reduce(total)
    return wall, total.item()


def memory(turns: Mapping[str, Turn], *, fresh: bool) -> dict[str, list[float]]:
    """Return contestant -> rank 0's extra memory at its peak."""
    found = {}
    for name in (PEER, OURS):
        function, path = turns[name]
        clear(path, fresh=fresh)
        found[name] = [peak_mb(lambda function=function, path=path: function(path))]
    return found


def clear(path: Path, *, fresh: bool) -> None:
    """Let nobody start before the disk is idle and, if it must be `fresh`, the path is free."""
    if is_main():
        if fresh and path.is_dir():
            shutil.rmtree(path)
        elif fresh:
            path.unlink(missing_ok=True)
        os.sync()
    meet()


def clocks(what: str, samples: Mapping[str, list[Any]], *, raw: str, own: str) -> list[Row]:
    """Return a row of wall and one of CPU time, of the contestants that belong to this operation."""
    shown = {MEMCPY: MEMCPY, RAW: raw, PEER: PEER, OURS: own}
    return [
        Row(what, f"s {clock}", {name: [value[i] for value in samples[key]] for name, key in shown.items()})
        for i, clock in enumerate(("wall", "CPU"))
    ]


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def meet() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Yield the same new folder on all ranks."""
    names = [tempfile.mkdtemp(prefix="bench-") if is_main() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    try:
        yield Path(names[0])
        meet()
    finally:
        if is_main():
            shutil.rmtree(names[0])
