"""Values between 2 ranks: torch.distributed operations and time per call."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import (
    MICRO,
    OURS,
    PEER,
    RAW,
    Bar,
    Row,
    interleaved,
    num_collectives,
    per,
    quiet,
    wall_s,
)
from distrib.testing import run_ranks

BATCH = 32
ROUNDS, CALLS = 15, 50  # of the clock: rounds, and calls per turn
MAX_OPERATIONS = {"gather of 12": 3, "reduce of 8": 2, "gather of 8 ragged": 2}


def run() -> list[Row]:
    return run_ranks(rows, 2, timeout_s=600)[0]


def rows() -> list[Row]:
    dist.init_process_group("gloo")
    found = []
    for what, calls in cases().items():
        operations = Row(what, "operations", interleaved(calls, num_collectives, 1))
        if what in MAX_OPERATIONS:
            operations.bars.append(Bar("operations", operations.samples[OURS][0], MAX_OPERATIONS[what]))
        found += [operations, Row(what, "us wall", interleaved(calls, per(CALLS, wall_s, MICRO), ROUNDS))]
    return found


def cases() -> dict[str, dict[str, Callable[[], Any]]]:
    """Return case -> contestant -> call. By hand: one operation per tensor, as a loop over `torch.distributed` has it."""
    import accelerate
    from accelerate.utils import gather_object

    from distrib import Accelerator

    with quiet():
        ours, peer = Accelerator(cpu=True), accelerate.Accelerator(cpu=True)
    nest = {
        "logits": [torch.randn(BATCH, 10) for _ in range(6)],
        "labels": [torch.arange(BATCH) for _ in range(4)],
        "scores": (torch.randn(BATCH), torch.randn(BATCH)),
    }
    losses = [torch.randn(4, 4) for _ in range(8)]
    ragged = [torch.randn(3 + 2 * dist.get_rank(), 8) for _ in range(8)]
    pair = (torch.randn(BATCH, 10), torch.arange(BATCH))
    texts = [f"answer {i}" for i in range(BATCH)]
    loops = [iter(accelerator.prepare(loader())) for accelerator in (ours, peer)]
    for loop in loops:  # metrics are gathered in the middle of a loop
        next(loop)
    return {
        "gather of 12": {
            RAW: lambda: [all_gather(x) for x in (*nest["logits"], *nest["labels"], *nest["scores"])],
            PEER: lambda: peer.gather(nest),
            OURS: lambda: ours.gather(nest),
        },
        "reduce of 8": {
            RAW: lambda: [dist.all_reduce(x.clone()) for x in losses],
            PEER: lambda: peer.reduce(losses),
            OURS: lambda: ours.reduce(losses),
        },
        "gather of 8 ragged": {
            RAW: lambda: [all_gather_ragged(x) for x in ragged],
            PEER: lambda: peer.gather(peer.pad_across_processes(ragged)),
            OURS: lambda: ours.gather(ragged),
        },
        "gather_for_metrics of 2": {
            RAW: lambda: [all_gather(x) for x in pair],
            PEER: lambda _open=loops: peer.gather_for_metrics(pair),
            OURS: lambda: ours.gather_for_metrics(pair),
        },
        "gather_object of 32 strings": {
            RAW: lambda: dist.all_gather_object([None] * dist.get_world_size(), texts),
            PEER: lambda: gather_object(texts),
            OURS: lambda: ours.gather_object(texts),
        },
    }


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(100 * BATCH)), BATCH)


def all_gather(x: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def all_gather_ragged(x: torch.Tensor) -> torch.Tensor:
    sizes = all_gather(torch.tensor([len(x)])).tolist()
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = all_gather(padded).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
