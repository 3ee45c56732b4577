"""Streams and loaders of other libraries, by stand-ins: what of theirs is relied on, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator
from distrib.data.indexed import check_kind
from distrib.errors import DataError
from tests.multiproc.loading import Stateful


class BufferShuffledExamplesIterable:
    """Hugging Face's part of a stream that keeps samples which its state leaves out."""

    def __init__(self, ex_iterable):
        self.ex_iterable = ex_iterable


class Step:
    def __init__(self, ex_iterable):
        self.ex_iterable = ex_iterable


class Several:
    def __init__(self, *ex_iterables):
        self.ex_iterables = list(ex_iterables)


class Examples:
    pass


class Whole(Stateful):
    """A stream of Hugging Face's kind."""

    def __init__(self, n: int, parts):
        super().__init__(n)
        self._ex_iterable = parts


SHUFFLED = BufferShuffledExamplesIterable(Examples())
IN_BUFFERS = {
    "itself": SHUFFLED,
    "below another part": Step(Step(SHUFFLED)),
    "the second of several": Several(Examples(), Step(SHUFFLED)),
    "several of several": Step(Several(Examples(), Several(Examples(), SHUFFLED))),
}


def read_after_a_resume(parts, folder) -> int:
    """Return how many samples of 40 are read, where 24 have been used."""
    accelerator = Accelerator(cpu=True, project_dir=folder, global_batch_size=4)
    for number, _ in enumerate(accelerator.prepare(DataLoader(Whole(40, parts), batch_size=4))):
        if number == 5:
            accelerator.save_state()
            break
    other = Accelerator(cpu=True, project_dir=folder, global_batch_size=4)
    data = Whole(40, parts)
    again = other.prepare(DataLoader(data, batch_size=4))
    other.load_state()
    assert [i for batch in again for i in batch.tolist()] == list(range(24, 40))
    return data.read


@pytest.mark.parametrize("where", IN_BUFFERS)
def test_a_stream_with_a_shuffle_buffer_anywhere_is_read_again(tmp_path, where: str):
    assert read_after_a_resume(IN_BUFFERS[where], tmp_path) == 40


@pytest.mark.parametrize("parts", [Examples(), Step(Examples()), Several(Examples(), Step(Examples()))])
def test_a_stream_without_one_goes_on_by_its_state(tmp_path, parts):
    assert read_after_a_resume(parts, tmp_path) == 16


class LookedAt(Stateful):
    """Tells where its last loop stood, and begins where `load_state_dict` said: as Hugging Face's streams do."""

    _starting_state_dict = None

    def __iter__(self):
        start = (self._starting_state_dict or {"at": 0})["at"]
        for i in range(start, self.n):
            self.at = i + 1
            yield torch.tensor(i)

    def load_state_dict(self, state):
        self._starting_state_dict = state


def test_a_stream_that_was_looked_at_begins_anew_at_its_first_sample(tmp_path):
    def loader_of(accelerator: Accelerator):
        data = LookedAt(12)
        next(iter(data))
        return accelerator.prepare(DataLoader(data, batch_size=2))

    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    for _ in zip(range(3), loader_of(accelerator), strict=False):
        pass
    accelerator.save_state()
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    loader = loader_of(accelerator)
    accelerator.load_state()
    assert next(iter(loader)).tolist() == [6, 7]
    assert [i for batch in loader for i in batch.tolist()] == list(range(12))


def test_a_loader_is_refused_for_an_iter_of_its_own_only():
    data = TensorDataset(torch.arange(4))
    theirs = type("Theirs", (DataLoader,), {"__iter__": DataLoader.__iter__, "__module__": "torchdata.x"})
    renamed, own = type("Renamed", (theirs,), {}), type("Own", (theirs,), {"__iter__": lambda self: iter(())})
    for kind in (DataLoader, type("Plain", (DataLoader,), {}), theirs, renamed):
        check_kind(kind(data))
    with pytest.raises(DataError, match=r"D0516.*Own has an __iter__"):
        check_kind(own(data))


@pytest.mark.parametrize("name", ["state_dict", "load_state_dict"])
def test_a_stateful_loaders_own_state_is_refused_since_it_does_not_follow_the_loop(name: str):
    class Keeping(DataLoader):
        def state_dict(self):
            return {"samples_yielded": 0}

        def load_state_dict(self, state):
            raise AssertionError("nobody would go on from it")

    loader = Accelerator(cpu=True).prepare(Keeping(TensorDataset(torch.arange(4))))
    with pytest.raises(AttributeError, match=f"no {name}: .*save_state"):
        getattr(loader, name)
