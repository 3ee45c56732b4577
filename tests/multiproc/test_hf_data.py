"""Hugging Face's data sets and torchdata's loader: each sample once, at every size, and in a resume."""

from __future__ import annotations

from itertools import chain

import pytest
from torch.utils.data import DataLoader

from distrib import Accelerator, RunConfig
from distrib.errors import DataError
from distrib.testing import RanksFailed, ranks, run_ranks
from tests.multiproc.hf_loading import (
    DATASETS,
    GLOBAL,
    STATEFUL,
    N,
    all_windows,
    new_accelerator,
    noise,
    own_streams,
    plain,
    windows,
)  # fmt: skip

HOW = "pip install -e '.[dev-hf]'"
pytest.importorskip("datasets", reason=f"needs Hugging Face's datasets: {HOW}")
pytest.importorskip("torchdata.stateful_dataloader", reason=f"needs torchdata: {HOW}")

KINDS = (*DATASETS, *STATEFUL)
pytestmark = pytest.mark.timeout(300)


def samples(found, epoch: int) -> list[int]:
    return sorted(chain.from_iterable(window for e, window in found if e == epoch))


@pytest.fixture(scope="module")
def alone():
    return run_ranks(all_windows, 1, KINDS, 0, timeout_s=250)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_comes_once_in_each_epoch(alone, kind: str):
    for epoch in (0, 1):
        assert samples(alone[kind], epoch) == list(range(N))
    assert [len(window) for _, window in alone[kind]] == [GLOBAL, GLOBAL, GLOBAL, N % GLOBAL] * 2


@pytest.mark.parametrize("kind", ["map-style", "shuffled", "shuffled and mapped", "interleaved"])
def test_a_shuffled_data_set_has_another_order_in_the_next_epoch(alone, kind: str):
    first, second = ([window for e, window in alone[kind] if e == epoch] for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 2)])
def test_the_same_samples_meet_on_every_number_of_ranks_and_workers(alone, world_size: int, workers: int):
    for found in run_ranks(all_windows, world_size, KINDS, workers, timeout_s=250):
        assert found == alone


@pytest.mark.parametrize("stops", [(2, 1), (5, 1)])  # in the first epoch, in the second
@pytest.mark.parametrize(
    "sizes", [((1, 0), (1, 0), (1, 0)), ((1, 2), (2, 0), (2, 2)), ((2, 0), (1, 2), (2, 2))]
)
def test_every_kind_resumes_twice_in_one_epoch_at_any_size(tmp_path, alone, stops, sizes):
    parts = [
        run_ranks(all_windows, world_size, KINDS, workers, tmp_path, stop, timeout_s=250)[0]
        for (world_size, workers), stop in zip(sizes, (*stops, None), strict=True)
    ]
    found = {kind: [window for part in parts for window in part[kind]] for kind in KINDS}
    wrong = {kind: seen for kind, seen in found.items() if seen != alone[kind]}
    assert wrong == {}


@pytest.mark.parametrize(
    ("num_shards", "strategy"), [(2, "shards"), (3, "examples"), (3, "shards"), (4, "auto"), (1, "auto")]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_is_divided_already_is_recognized(num_shards: int, strategy: str, workers: int):
    for found in run_ranks(own_streams, 2, num_shards, strategy, workers):
        assert samples(found, 0) == list(range(N))


@pytest.mark.parametrize(("num_shards", "strategy"), [(2, "shards"), (3, "examples"), (3, "shards")])
def test_a_stream_that_is_divided_already_resumes(tmp_path, num_shards: int, strategy: str):
    whole = run_ranks(own_streams, 2, num_shards, strategy, 0)[0]
    parts = [
        run_ranks(own_streams, 2, num_shards, strategy, workers, tmp_path, stop)[0]
        for workers, stop in ((0, 1), (2, 1), (0, None))
    ]
    assert [window for part in parts for window in part] == whole


def test_a_stream_that_is_divided_already_resumes_on_as_many_ranks_only(tmp_path):
    run_ranks(own_streams, 2, 2, "shards", 0, tmp_path, 1)
    with pytest.raises(RanksFailed, match="D0502"):
        run_ranks(own_streams, 1, 2, "shards", 0, tmp_path)


@ranks(2)
def test_one_reader_for_all_of_a_divided_stream_is_refused():
    from datasets.distributed import split_dataset_by_node

    accelerator = Accelerator(RunConfig(device="cpu", data={"dispatch": True}))
    data = split_dataset_by_node(plain().to_iterable_dataset(2), accelerator.process_index, 2)
    with pytest.raises(DataError, match="D0517"):
        accelerator.prepare(DataLoader(data, batch_size=2))


def test_a_transform_that_draws_is_a_function_of_the_sample():
    expected = run_ranks(noise, 1, 0)[0]
    assert len({x for _, x in expected}) == 2 * N
    for world_size, workers in ((1, 2), (2, 0), (2, 2)):
        assert run_ranks(noise, world_size, workers)[0] == expected


@ranks(1)
def test_a_stream_that_was_looked_at_before_loses_nothing_after_a_resume(tmp_path):
    def loader():
        data = plain().to_iterable_dataset(3)
        next(iter(data))
        return DataLoader(data, batch_size=2)

    assert len(windows(loader(), folder=tmp_path, stop_after=2)) == 2
    accelerator = new_accelerator(tmp_path)
    prepared = accelerator.prepare(loader())
    accelerator.load_state()
    assert next(iter(prepared))["i"].tolist() == [12, 13]
    assert [i for batch in prepared for i in batch["i"].tolist()] == list(range(N))  # left, so begun anew


@ranks(1)
def test_a_subclass_of_the_stateful_loader_is_taken_and_one_that_iterates_otherwise_refused():
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Renamed(StatefulDataLoader):
        pass

    class Doubling(StatefulDataLoader):
        def __iter__(self):
            return (2 * batch for batch in super().__iter__())

    accelerator = new_accelerator()
    assert sum(len(batch["i"]) for batch in accelerator.prepare(Renamed(plain(), batch_size=2))) == N
    with pytest.raises(DataError, match="D0516"):
        accelerator.prepare(Doubling(plain(), batch_size=2))
