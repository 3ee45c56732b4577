"""When data workers are forked."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

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
