"""Every kind of loader: each sample once in metrics, and the same samples meet at every world size and in a resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from distrib import Accelerator, RunConfig
from distrib.errors import DataError
from distrib.testing import ranks, run_ranks
from tests.multiproc.loading import (
    BATCHED_BY_USER,
    KINDS,
    Augmented,
    Flow,
    Numbers,
    PartOfRank,
    RarelyAugmented,
    Stateful,
    windows,
)  # fmt: skip

GLOBAL = {kind: {"accumulation": 6} if kind in BATCHED_BY_USER else {"global_batch": 6} for kind in KINDS}


def all_kinds(workers: int, dispatch: bool) -> dict[str, list]:
    """Return the windows of every kind, so that one group of processes shows them all."""
    found = {}
    for kind in KINDS:
        size = {"accumulation": 6 // torch_world_size()} if kind in BATCHED_BY_USER else {"global_batch": 6}
        found[kind] = windows(kind, 23, 2, workers=workers, dispatch=dispatch, **size)
    return found


def torch_world_size() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


@pytest.fixture(scope="module")
def alone() -> dict[str, list]:
    return run_ranks(all_kinds, 1, 0, False)[0]


def test_every_kind_of_loader_gives_each_sample_once(alone):
    for kind in KINDS:
        for epoch in (0, 1):
            seen = sorted(x for e, window in alone[kind] if e == epoch for x in window)
            if kind != "weighted":
                assert seen == list(range(23)), kind
            assert len(seen) == 23, kind


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("world_size", "workers", "dispatch"),
    [(2, 0, False), (3, 2, False), (1, 2, False), (2, 2, True), (3, 0, True)],
)
def test_the_same_samples_meet_at_every_world_size(alone, world_size, workers, dispatch):
    for found in run_ranks(all_kinds, world_size, workers, dispatch, timeout_s=200):
        for kind in KINDS:
            assert found[kind] == alone[kind], kind


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("before", "after", "workers"), [(1, 2, 0), (2, 1, 2), (2, 3, 0)])
def test_every_kind_resumes_in_mid_epoch_at_another_world_size(tmp_path, before, after, workers):
    whole = run_ranks(resumed_kinds, 1, tmp_path / "none", None, 0, timeout_s=200)[0]
    cut = run_ranks(resumed_kinds, before, tmp_path / "cut", 2, workers, timeout_s=200)[0]
    rest = run_ranks(resumed_kinds, after, tmp_path / "cut", None, 0, timeout_s=200)[0]
    for kind in whole:
        assert cut[kind] + rest[kind] == whole[kind], kind


def resumed_kinds(folder, stop_after, workers):
    found = {}
    for kind in ("shuffled", "own sampler", "batch sampler", "single", "shuffled stream", "stateful stream"):
        size = {"accumulation": 6 // torch_world_size()} if kind in BATCHED_BY_USER else {"global_batch": 6}
        place = folder / kind.replace(" ", "-")
        save = (stop_after,) if stop_after else ()
        found[kind] = windows(
            kind, 23, 2, folder=place, stop_after=stop_after, save_at=save, workers=workers, **size
        )
    return found


@pytest.mark.parametrize("tail", ["exact", "pad", "drop"])
def test_lengths_from_nothing_to_many_are_read_whole_on_every_number_of_ranks(tail):
    for world_size in (1, 2, 4):
        for found in run_ranks(lengths, world_size, tail, timeout_s=100):
            for (kind, n, batch), seen in found.items():
                stop = n - n % (batch * world_size) if tail == "drop" else n
                assert seen == list(range(stop)), (kind, n, batch, world_size)


def lengths(tail):
    return {
        (kind, n, batch): [x for _, window in windows(kind, n, batch, epochs=1, tail=tail) for x in window]
        for kind in ("in order", "stream")
        for n in (0, 1, 2, 7, 64)
        for batch in (1, 3, 5)
    }


def noise(kind: str, workers: int, skip: int) -> list[list[float]]:
    accelerator = Accelerator(cpu=True, seed=1, global_batch_size=6)
    data = {"always": Augmented(20), "rarely": RarelyAugmented(20), "stream": Flow(20, noise=True)}[kind]
    shuffle = None if kind == "stream" else True
    loader = accelerator.prepare(DataLoader(data, batch_size=2, shuffle=shuffle, num_workers=workers))
    accelerator.skip_first_batches(loader, skip)
    return [row for _ in range(2) for x in loader for row in accelerator.gather_for_metrics(x).tolist()]


@pytest.mark.parametrize("kind", ["always", "rarely", "stream"])
def test_augmentation_is_a_function_of_the_sample(kind):
    expected = run_ranks(noise, 1, kind, 0, 0)[0]
    assert len({tuple(row) for row in expected}) > (20 if kind == "rarely" else 39)
    for world_size, workers in ((1, 2), (2, 0), (3, 2)):
        assert run_ranks(noise, world_size, kind, workers, 0)[0] == expected
    resumed = run_ranks(noise, 1, kind, 0, 3)[0]
    assert resumed == expected[6:]


@ranks(1)
def test_data_code_does_not_disturb_the_loops_own_random_numbers():
    accelerator = Accelerator(cpu=True, seed=1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(1)
    loader = accelerator.prepare(DataLoader(Augmented(8), batch_size=4))
    torch.manual_seed(1)
    assert len(list(loader)) == 2
    assert torch.rand(3).tolist() == expected


def uneven_parts(lengths: list[int]):
    accelerator = Accelerator(cpu=True)
    data = PartOfRank(lengths, accelerator.process_index)
    loader = accelerator.prepare_data_loader(DataLoader(data, batch_size=3), is_distributed=True)
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    seen, gradients = [], []
    for x in loader:
        accelerator.backward((model(x.double().unsqueeze(1))).mean())
        seen += accelerator.gather_for_metrics(x).tolist()
        gradients.append(accelerator.unwrap_model(model).weight.grad.item())
        optimizer.step()
        optimizer.zero_grad()
    return sorted(seen), gradients, -(accelerator.unwrap_model(model).weight.item() - 1)


@pytest.mark.parametrize("lengths", [[5, 5], [7, 2], [0, 4], [4, 0], [1, 8, 3], [0, 0]])
def test_streams_of_the_ranks_own_may_end_anywhere(lengths):
    expected = [100 * rank + i for rank, length in enumerate(lengths) for i in range(length)]
    steps = [
        [100 * rank + i for rank, length in enumerate(lengths) for i in range(at, min(at + 3, length))]
        for at in range(0, max(lengths), 3)
    ]
    moved = sum(sum(step) / len(step) for step in steps)
    for seen, gradients, change in run_ranks(uneven_parts, len(lengths), lengths):
        assert seen == expected
        assert len(gradients) == len(steps)
        assert change == pytest.approx(moved)


@ranks(2)
def test_streams_that_differ_between_ranks_are_an_error_on_both():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(PartOfRank([6, 6], accelerator.process_index), batch_size=3))
    with pytest.raises(DataError, match="D0514"):
        list(loader)


@ranks(2)
def test_a_sampler_that_differs_between_ranks_is_an_error_on_both():
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    loader = accelerator.prepare(
        DataLoader(Numbers(8), batch_size=2, sampler=[*range(rank, 8), *range(rank)])
    )
    with pytest.raises(DataError, match="D0513"):
        list(loader)


@ranks(2)
def test_an_error_in_the_one_reader_is_raised_on_every_rank():
    accelerator = Accelerator(RunConfig(data={"dispatch": True}, device="cpu"))
    loader = accelerator.prepare(DataLoader(Broken(8), batch_size=2))
    with pytest.raises((DataError, RuntimeError), match="sample 5 is broken"):
        list(loader)


VIEWS = {
    "of a column": lambda x: x[:, -1],  # one row of it has the stride of the whole
    "of a conjugate": lambda x: torch.complex(x, 2 * x).conj(),
    "of a negation": lambda x: torch.complex(x, 2 * x).conj().imag,
}


def all_of(loader, **data):
    accelerator = Accelerator(RunConfig(data=data, device="cpu"))
    return torch.cat([accelerator.gather_for_metrics(x) for x in accelerator.prepare(loader)])


@pytest.mark.parametrize("view", VIEWS)
@ranks(2)
def test_any_view_of_a_tensor_can_be_a_batch_of_the_one_reader(view):
    rows = torch.arange(27.0).reshape(9, 3)
    loader = DataLoader(list(rows), batch_size=2, collate_fn=lambda found: VIEWS[view](torch.stack(found)))
    assert torch.equal(all_of(loader, dispatch=True), VIEWS[view](rows))


@pytest.mark.parametrize("view", VIEWS)
@ranks(2)
def test_any_view_of_a_tensor_can_be_a_sample_of_a_stream(view):
    x = VIEWS[view](torch.arange(27.0).reshape(9, 3))
    assert torch.equal(all_of(DataLoader(Parts(x), batch_size=2, collate_fn=torch.cat)), x)


class Parts(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x.split(1))


class Broken(Numbers):
    def __getitem__(self, i):
        if i == 5:
            raise RuntimeError("sample 5 is broken")
        return super().__getitem__(i)


@ranks(1, 2)
def test_one_reader_sends_any_object_in_one_collective_per_batch():
    accelerator = Accelerator(RunConfig(data={"dispatch": True}, device="cpu"))

    def collate(samples):
        return {"x": torch.stack(samples), "text": [f"sample {int(x)}" for x in samples], "kind": ("a", 1)}

    loader = accelerator.prepare(DataLoader(Numbers(13), batch_size=3, collate_fn=collate))
    seen = [(batch["text"], batch["x"].tolist(), batch["kind"]) for batch in loader]
    for text, numbers, kind in seen:
        assert text == [f"sample {i}" for i in numbers]
        assert kind == ("a", 1)


@ranks(1)
def test_attributes_of_the_users_loader_pass_through():
    accelerator = Accelerator(cpu=True)
    given = DataLoader(Numbers(9), batch_size=4, shuffle=True, drop_last=True, num_workers=0)
    prepared = accelerator.prepare(given)
    for name in (
        "batch_size",
        "sampler",
        "batch_sampler",
        "dataset",
        "drop_last",
        "collate_fn",
        "num_workers",
    ):
        assert getattr(prepared, name) is getattr(given, name), name
    assert len(prepared) == 2
    assert accelerator.prepare(given) is prepared
    assert accelerator.prepare(prepared) is prepared


@ranks(1)
def test_a_stream_with_a_state_is_not_read_again_from_its_beginning(tmp_path):
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, global_batch_size=4)
    loader = accelerator.prepare(DataLoader(Stateful(40), batch_size=4))
    for number, _ in enumerate(loader):
        if number == 5:
            accelerator.save_state()
            break
    other = Accelerator(cpu=True, project_dir=tmp_path, global_batch_size=4)
    data = Stateful(40)
    again = other.prepare(DataLoader(data, batch_size=4))
    other.load_state()
    assert [x.tolist() for x in again] == [list(range(i, i + 4)) for i in range(24, 40, 4)]
    assert data.read == 16
    assert [x.tolist() for x in again] == [list(range(i, i + 4)) for i in range(0, 40, 4)]


class Plain:
    """No tensor, and a text that holds an address."""


class Objects(Flow):
    def __iter__(self):
        yield from ({"object": Plain(), "x": x} for x in super().__iter__())


@ranks(2)
def test_objects_that_cannot_be_compared_are_no_difference_between_the_ranks():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Objects(8), batch_size=2, collate_fn=list))
    assert sum(len(batch) for batch in loader) == 4


@ranks(2)
def test_one_reader_for_all_of_a_divided_stream_is_refused():
    accelerator = Accelerator(RunConfig(device="cpu", data={"dispatch": True}))
    with pytest.raises(DataError, match="D0517"):
        accelerator.prepare_data_loader(DataLoader(Flow(8), batch_size=2), is_distributed=True)


class Slow(Numbers):
    def __getitem__(self, i):
        worker = torch.utils.data.get_worker_info()
        if worker.id == 0:
            torch.ones(500, 500) @ torch.ones(500, 500)
        return torch.tensor(i)


@ranks(1)
def test_a_loader_that_lets_workers_overtake_each_other_still_gives_the_runs_order():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Slow(20), batch_size=2, num_workers=2, in_order=False))
    assert [batch.tolist() for batch in loader] == [[i, i + 1] for i in range(0, 20, 2)]


class Buffered(Flow):
    """Says where it stands, but not what lies in its shuffle buffer, as Hugging Face's streams do."""

    _shuffling = "buffer"

    def state_dict(self):
        raise AssertionError("a state that is not whole must not be asked for")

    def load_state_dict(self, state):
        raise AssertionError("a state that is not whole must not be loaded")


@ranks(1)
def test_a_stream_whose_shuffle_buffer_is_not_in_its_state_is_read_again(tmp_path):
    def loader_of(accelerator):
        return accelerator.prepare(DataLoader(Buffered(12, shuffled=True), batch_size=2))

    whole = [batch.tolist() for batch in loader_of(Accelerator(cpu=True, seed=1))]
    accelerator = Accelerator(cpu=True, seed=1)
    loader = loader_of(accelerator)
    found = []
    for batch in loader:
        found.append(batch.tolist())
        if len(found) == 3:
            accelerator.save_state(tmp_path / "saved")
            break
    accelerator = Accelerator(cpu=True, seed=1)
    loader = loader_of(accelerator)
    accelerator.load_state(tmp_path / "saved")
    assert [batch.tolist() for batch in loader] == whole[len(found) :]
