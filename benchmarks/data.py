"""The prepared loader over torch's own: calls and CPU time per batch, skipping, the start of a huge epoch."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.measure import (
    MICRO,
    MILLI,
    OURS,
    PEER,
    RAW,
    Bar,
    Row,
    alone,
    cpu_s,
    interleaved,
    peak_mb,
    python_calls,
    quiet,
)
from distrib.testing import run_ranks

BATCH, SAMPLES = 32, 20_000
ROUNDS = 11
MAX_EXTRA_CALLS, MAX_TIME_RATIO = 10, 1.05
SKIPPED_FROM = 10**6  # samples
SKIPS = (10, 100, 1000, 10_000)  # batches
MAX_SKIP_MS = 2
LARGE, HUGE = 10**7, 10**9  # samples; torch's shuffle lists them all, and HUGE would take tens of GB
MAX_START_MS, MAX_START_MB = 10, 10


class Bare(Dataset):
    """The cheapest samples there are: nothing hides the loader's own cost."""

    def __init__(self, samples: int) -> None:
        self.samples, self.fetched = samples, 0
        self.row = torch.ones(64)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.fetched += 1
        return self.row, index


class Images(Bare):
    """32 x 32 pictures of bytes, made into floats as a data set of pictures does."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.bytes = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.bytes[index % 512].float().div_(255).sub_(0.5), index


def run() -> list[Row]:
    rows = [*alone(batches, 1), *run_ranks(batches, 2, 2, timeout_s=900)[0]]
    return [*rows, *alone(skipping), *starting()]


def batches(ranks: int) -> list[Row]:
    if ranks > 1:
        dist.init_process_group("gloo")
    rows = []
    for shuffle in (False, True):
        case = f"{'shuffled' if shuffle else 'in order'}, {'one process' if ranks == 1 else f'{ranks} ranks'}"
        bare, images = (loaders(kind(SAMPLES), shuffle=shuffle) for kind in (Bare, Images))
        rows.append(Row(f"a batch, {case}", "calls", interleaved(bare, calls_per_batch, 1)))
        rows[-1].bars.append(Bar("over raw", rows[-1].over(), MAX_EXTRA_CALLS))
        for data, found, is_target in (("pictures", images, False), ("bare samples", bare, True)):
            row = Row(f"a batch of {data}, {case}", "us CPU", interleaved(found, us_per_batch, ROUNDS))
            row.bars.append(Bar(f"/ {RAW}", row.ratio(RAW), MAX_TIME_RATIO, is_target))
            rows.append(row)
    return rows


def loaders(data: Bare, *, shuffle: bool) -> dict[str, Any]:
    """Return a loader of each contestant; by hand, ranks divide the data with torch's DistributedSampler."""
    from accelerate import Accelerator as Peer

    from distrib import Accelerator

    loader = DataLoader(data, BATCH, shuffle=shuffle)
    if dist.is_initialized():
        raw = DataLoader(data, BATCH, sampler=DistributedSampler(data, shuffle=shuffle))
    else:
        raw = loader
    with quiet():
        return {RAW: raw, PEER: Peer(cpu=True).prepare(loader), OURS: Accelerator(cpu=True).prepare(loader)}


def exhaust(loader: Any) -> None:
    for _ in loader:
        pass


def calls_per_batch(loader: Any) -> float:
    """Count over a whole epoch: what happens once per epoch or per block of batches has its share in it."""
    return python_calls(lambda: exhaust(loader)) / len(loader)


def us_per_batch(loader: Any) -> float:
    return cpu_s(lambda: exhaust(loader)) / len(loader) / MICRO


def skipping() -> list[Row]:
    """Start at batch k of a shuffled epoch: the time to its first batch, and how many samples are read."""
    import accelerate

    from distrib import Accelerator

    data = Bare(SKIPPED_FROM)
    loader = DataLoader(data, BATCH, shuffle=True)
    with quiet():
        ours, peer = Accelerator(cpu=True), accelerate.Accelerator(cpu=True)
    our_loader, peer_loader = ours.prepare(loader), peer.prepare(loader)
    rows = []
    for k in SKIPS:
        starts = {
            RAW: lambda k=k: next(itertools.islice(loader, k, None)),
            PEER: lambda k=k: next(iter(accelerate.skip_first_batches(peer_loader, k))),
            OURS: lambda k=k: next(iter(ours.skip_first_batches(our_loader, k))),
        }
        rows.append(Row(f"skip to batch {k}", "ms CPU", interleaved(starts, lambda f: cpu_s(f) / MILLI, 3)))
        rows[-1].bars.append(Bar("least ms", min(rows[-1].samples[OURS]), MAX_SKIP_MS, target=True))
        rows.append(Row(f"skip to batch {k}", "samples", interleaved(starts, lambda f: fetched(data, f), 1)))
        rows[-1].bars.append(Bar("read", rows[-1].samples[OURS][0], BATCH, target=True))
    return rows


def fetched(data: Bare, function: Callable[[], object]) -> int:
    before = data.fetched
    function()
    return data.fetched - before


def starting() -> list[Row]:
    """Start shuffled epochs, each contestant in a process of its own, so that its peak of memory is its own."""
    rows = []
    for samples, names in ((LARGE, (RAW, PEER, OURS)), (HUGE, (OURS,))):
        found = {name: alone(start, name, samples) for name in names}
        for unit, place, limit in (("ms CPU", 0, MAX_START_MS), ("MB", 1, MAX_START_MB)):
            row = Row(
                f"start of 10**{len(str(samples)) - 1} samples", unit, {n: f[place] for n, f in found.items()}
            )
            if samples == HUGE:
                row.bars.append(Bar(f"least {unit}", min(row.samples[OURS]), limit))
            rows.append(row)
    return rows


def start(name: str, samples: int) -> tuple[list[float], list[float]]:
    """Return CPU ms and peak MB of reaching the first batch."""
    next(iter(loaders(Bare(1000), shuffle=True)[name]))  # imports
    loader = loaders(Bare(samples), shuffle=True)[name]
    peak = peak_mb(lambda: next(iter(loader)))
    return [cpu_s(lambda: next(iter(loader))) / MILLI for _ in range(3)], [peak]
