"""When data workers are forked."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from distrib import Accelerator
from distrib.data import workers


@pytest.mark.parametrize(("num_workers", "has_group", "waits"), [(1, True, 1), (0, True, 0), (1, False, 0)])
def test_workers_are_forked_when_the_threads_of_gloo_sleep(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, has_group: bool, waits: int
) -> None:
    waited: list[int] = []
    loader = DataLoader(list(torch.arange(4)), batch_size=2, num_workers=num_workers)
    monkeypatch.setattr(dist, "is_initialized", lambda: has_group)
    monkeypatch.setattr(workers, "let_threads_finish", lambda: waited.append(loader._iterator is None))
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: iter([len(waited)]))
    assert list(workers.iterator_of(loader)) == [waits]


class Told:
    """A data set whose workers report errors of threads, as those that hand tensors over do."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, i):
        try:
            raise self.error
        except type(self.error):
            sys.excepthook(*sys.exc_info())
        return torch.tensor(i)


@pytest.mark.parametrize(("error", "told"), [(ConnectionResetError(), False), (ValueError("mine"), True)])
def test_a_worker_tells_of_errors_in_its_threads_but_not_that_its_rank_has_gone(capfd, error, told):
    loader = Accelerator(cpu=True).prepare(DataLoader(Told(error), num_workers=1))
    assert len(list(loader)) == 2
    assert (type(error).__name__ in capfd.readouterr().err) == told
