"""What the first of 10,000 ranks does for one checkpoint of the world: the plan of who writes what, and the manifest."""

import torch

from benchmarks.measure import MILLI, OURS, Bar, Row, alone, cpu_s, peak_mb
from distrib.checkpoint import format as manifest
from distrib.checkpoint.plan import Held, Share, WritePlan, plan_writes
from distrib.state import Box, TensorSpec

RANKS, TENSORS, WIDTH = 10_000, 30, 64
ITEM_BYTES, HEAD_BYTES, CHECKSUM = 4, 100, "0123456789abcdef"
MOST_S, MOST_MB = 5.0, 200.0


def run() -> list[Row]:
    seconds, megabytes = alone(measured)
    time_row = Row(
        f"{RANKS * TENSORS:,} slices of {TENSORS} tensors, CPU time", "ms", {OURS: [seconds / MILLI]}
    )
    time_row.bars.append(Bar("s", seconds, MOST_S))
    memory_row = Row("the same, extra memory at its peak", "MB", {OURS: [megabytes]})
    memory_row.bars.append(Bar("MB", megabytes, MOST_MB))
    return [time_row, memory_row]


def measured() -> tuple[float, float]:
    """Return CPU seconds and megabytes above those of what the ranks have told."""
    told = [
        Share(
            (rank,),
            tuple(
                Held(f"model/{i}", (RANKS, WIDTH), "F32", Box((rank, 0), (1, WIDTH))) for i in range(TENSORS)
            ),
        )
        for rank in range(RANKS)
    ]
    spent: list[float] = []
    megabytes = peak_mb(
        lambda: spent.append(cpu_s(lambda: document_of(plan_writes(told, manifest.ITEMSIZE))))
    )
    return spent[0], megabytes


def document_of(plan: WritePlan) -> bytes:
    """Return the manifest of a checkpoint that was written by a plan."""
    files, slices = {}, {}
    for rank, owned in enumerate(plan.owned):
        file, at = f"model/rank-{rank:05d}.safetensors", HEAD_BYTES
        for held in owned:
            stored = manifest.StoredSlice(held.where, file, at, CHECKSUM)
            slices.setdefault(held.name, []).append(stored)
            at += ITEM_BYTES * WIDTH
        files[file] = manifest.FileRecord(at, HEAD_BYTES, CHECKSUM)
    spec = TensorSpec((RANKS, WIDTH), torch.float32)
    return manifest.dump(
        manifest.Manifest(
            world_size=RANKS,
            files=files,
            tensors={name: manifest.StoredTensor(spec, tuple(found)) for name, found in slices.items()},
            aliases={},
            counters={},
            config={},
            info={},
            folder="",
        )
    )
