from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.launching import launch, script

# A thread that wants the interpreter's lock gets it only when another gives it up, as late as on a busy machine.
TRAINS = """
    import sys, warnings
    sys.setswitchinterval(5)
    warnings.simplefilter("ignore")
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from distrib import Accelerator

    accelerator = Accelerator(cpu=True, seed=0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for (x,) in loader:
        optimizer.zero_grad()
        accelerator.backward(model(x).mean())
        optimizer.step()
"""


STREAMS = TRAINS.replace(
    "DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=2)", "DataLoader(Numbers(), batch_size=2)"
)
STREAMS = STREAMS.replace(
    "    accelerator = Acc",
    """
    class Numbers(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ((torch.full((3,), float(i)),) for i in range(16))

    accelerator = Acc""",
)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("last", ["", "accelerator.end_training()"])
@pytest.mark.parametrize("text", [TRAINS, STREAMS], ids=["map-style", "iterable"])
def test_a_script_that_has_done_its_work_exits_with_0(tmp_path: Path, text: str, last: str) -> None:
    program = script(tmp_path, f"{text}    {last}\n")
    for _ in range(5):
        done = launch("-n", 2, program, cwd=tmp_path)
        assert done.code == 0, done.err
