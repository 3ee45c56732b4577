"""Hugging Face's data sets and torchdata's loader, and a loop over them, for tests; runs inside the ranks.

Nothing is downloaded: all data are made here.
"""

from __future__ import annotations

import os

import torch
from torch.utils.data import DataLoader

from distrib import Accelerator, RunConfig

N, BATCH, GLOBAL = 23, 2, 6
GLOBAL_OF_PARTS = 8  # a multiple of 2 ranks x BATCH, as streams that come divided need


def numbers(parts):
    for start, stop in parts:
        for i in range(start, stop):
            yield {"i": i}


def as_float(rows):
    return {"x": [i / 2 for i in rows["i"]]}


def plain():
    from datasets import Dataset

    return Dataset.from_dict({"i": list(range(N))})


def from_generator():
    from datasets import IterableDataset

    return IterableDataset.from_generator(numbers, gen_kwargs={"parts": [(0, 9), (9, 17), (17, N)]})


def halves():
    """Two streams, the first of which shuffles in a buffer."""
    from datasets import Dataset

    first, second = (
        Dataset.from_dict({"i": list(x)}).to_iterable_dataset(2) for x in (range(12), range(12, N))
    )
    return [first.shuffle(seed=7, buffer_size=4), second]


def make_data(kind: str):
    from datasets import concatenate_datasets, interleave_datasets

    match kind:
        case "map-style" | "map-style in StatefulDataLoader":
            return plain().with_format("torch")
        case "generator":
            return from_generator()
        case "shards" | "shards in StatefulDataLoader":
            return plain().to_iterable_dataset(num_shards=3)
        case "tensors":
            return plain().to_iterable_dataset(num_shards=3).with_format("torch")
        case "mapped":
            return plain().to_iterable_dataset(num_shards=3).map(as_float, batched=True, batch_size=4)
        case "mapped tables":
            return (
                plain()
                .to_iterable_dataset(num_shards=3)
                .with_format("arrow")
                .map(lambda x: x, batched=True, batch_size=4)
                .with_format("torch")
            )
        case "filtered":
            return plain().to_iterable_dataset(num_shards=3).filter(lambda row: row["i"] >= 0)
        case "shuffled":
            return plain().to_iterable_dataset(num_shards=4).shuffle(seed=7, buffer_size=5)
        case "shuffled and mapped":
            shuffled = plain().to_iterable_dataset(num_shards=4).shuffle(seed=7, buffer_size=5)
            return shuffled.map(as_float, batched=True, batch_size=4)
        case "interleaved":
            return interleave_datasets(halves(), stopping_strategy="all_exhausted_without_replacement")
        case "concatenated":
            return concatenate_datasets(halves())
    raise AssertionError(kind)


STREAMS = (
    "generator", "shards", "tensors", "mapped", "mapped tables", "filtered", "shuffled", "shuffled and mapped",
    "interleaved", "concatenated",
)  # fmt: skip
DATASETS = ("map-style", *STREAMS)
STATEFUL = ("map-style in StatefulDataLoader", "shards in StatefulDataLoader")


def make_loader(kind: str, workers: int) -> DataLoader:
    shuffle = True if kind.startswith("map-style") else None
    loader_type = DataLoader
    if kind in STATEFUL:
        from torchdata.stateful_dataloader import StatefulDataLoader as loader_type
    return loader_type(make_data(kind), batch_size=BATCH, shuffle=shuffle, num_workers=workers)


def new_accelerator(folder=None, global_batch=GLOBAL) -> Accelerator:
    return Accelerator(RunConfig(device="cpu", seed=5), global_batch_size=global_batch, project_dir=folder)


def windows(loader: DataLoader, *, folder=None, epochs=2, stop_after=None, global_batch=GLOBAL):
    """Return (epoch, sorted samples) of each window; go on from `folder`, and save there after `stop_after` of them."""
    accelerator = new_accelerator(folder, global_batch)
    loader = accelerator.prepare(loader)
    if folder is not None:
        accelerator.load_state()
    found, window = [], []
    for _ in range(loader.epoch, epochs):
        for batch in loader:
            window += accelerator.gather_for_metrics(batch["i"]).tolist()
            if not loader.micro_step.closes:
                continue
            found.append((loader.epoch, sorted(window)))
            window = []
            if len(found) == stop_after:
                accelerator.save_state()
                return found
    return found


def all_windows(kinds: tuple[str, ...], workers: int, folder=None, stop_after=None):
    """Go through every kind, so that one group of processes shows them all."""
    return {
        kind: windows(
            make_loader(kind, workers),
            folder=None if folder is None else folder / kind.replace(" ", "-"),
            stop_after=stop_after,
        )
        for kind in kinds
    }


def own_streams(num_shards: int, strategy: str, workers: int, folder=None, stop_after=None):
    """Go through a stream that Hugging Face has divided over the ranks."""
    from datasets.distributed import split_dataset_by_node

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    whole = plain().to_iterable_dataset(num_shards=num_shards)
    data = split_dataset_by_node(whole, rank, world_size, strategy=strategy)
    loader = DataLoader(data, batch_size=BATCH, num_workers=workers)
    return windows(loader, folder=folder, epochs=1, stop_after=stop_after, global_batch=GLOBAL_OF_PARTS)


def noise(workers: int) -> list[list[float]]:
    """Return the rows of a map-style data set whose transform draws."""

    def transform(rows):
        return {"i": rows["i"], "x": [torch.rand(()).item() for _ in rows["i"]]}

    accelerator = new_accelerator()
    loader = accelerator.prepare(
        DataLoader(plain().with_transform(transform), batch_size=BATCH, shuffle=True, num_workers=workers)
    )
    rows = [accelerator.gather_for_metrics([batch["i"], batch["x"]]) for _ in range(2) for batch in loader]
    return [row for i, x in rows for row in zip(i.tolist(), x.tolist(), strict=True)]
