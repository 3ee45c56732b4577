"""Writers x readers x world sizes: state comes back bit for bit, and ten more steps follow the run that was not cut.

A new strategy needs no line here: its row and its column come from the registry.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig
from distrib.checkpoint import open_checkpoint
from distrib.checkpoint.compare import differences
from distrib.collectives.single import SingleCollectives
from distrib.testing import run_ranks
from tests.contract.layouts import INSTALLED, settings_of, world_sizes
from tests.contract.plain import loader_for, per_sample_loss

SIZES = (1, 2, 3, 4)
SAVED_AT, MORE = 7, 10  # 53 samples are five global batches of at most 12: step 7 is inside the second epoch
TOLERANCE = 1e-6  # of a loss around 1 in float32 whose sums run in another order: 3e-8 is seen, a lost moment makes 1e-2


class World(NamedTuple):
    """A layout on a number of ranks."""

    strategy: str
    size: int

    def __str__(self) -> str:
        return f"{self.strategy}{self.size}"


class Step(NamedTuple):
    """One optimizer step: its samples, learning rates and mean loss."""

    ids: tuple[int, ...]
    rates: list[float]
    loss: float


ALONE = SingleCollectives()
LAYOUTS = [*INSTALLED, "fsdp, offloaded", "fsdp, 2 replicas of 2 shards"]
if "deepspeed" in INSTALLED:
    LAYOUTS += [f"deepspeed, stage {stage}" for stage in (0, 1, 3)]  # 2 is the default
WORLDS = [World(name, size) for name in LAYOUTS for size in world_sizes(name, SIZES)]
CELLS = list(itertools.product(WORLDS, WORLDS))


def pairs_of(cell: tuple[World, World]) -> set[tuple]:
    """Every pair of the cell's four values, with which of the four they are."""
    return set(itertools.combinations(enumerate((*cell[0], *cell[1])), 2))


def pairwise(cells: list[tuple[World, World]]) -> list[tuple[World, World]]:
    """Few cells in which every pair of values that occurs in `cells` occurs too: greedily the one with most new pairs."""
    missing = set().union(*map(pairs_of, cells))
    chosen = []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs_of(cell) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


# DeepSpeed starts slowly, so that only these of its cells are in every run
OF_DEEPSPEED = [
    (World("deepspeed, stage 3", 2), World("deepspeed, stage 1", 3)),
    (World("deepspeed, stage 1", 3), World("deepspeed", 2)),
    (World("deepspeed", 2), World("single", 1)),
    (World("fsdp", 2), World("deepspeed, stage 3", 3)),
]
OTHERS = [cell for cell in CELLS if not any(world.strategy.startswith("deepspeed") for world in cell)]
IN_EVERY_RUN = [*pairwise(OTHERS), *(cell for cell in OF_DEEPSPEED if cell in CELLS)]


class Net(nn.Module):
    """Tied weights, a buffer, a frozen parameter: what else than plain weights a checkpoint has to carry."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.inner.weight
        self.register_buffer("scale", torch.rand(6) + 0.5)
        self.shift = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, x):
        return self.out(torch.tanh(self.again(torch.tanh(self.inner(x * self.scale + self.shift)))))


class Run:
    """One training run inside a rank."""

    def __init__(self, strategy: str, folder: Path):
        torch.manual_seed(0)
        self.accelerator = Accelerator(
            RunConfig(
                device="cpu", seed=3, project_dir=str(folder), global_batch_size=12, **settings_of(strategy)
            )
        )
        model = Net()
        groups = [
            {"params": model.inner.parameters()},
            {"params": model.out.parameters(), "weight_decay": 0.1},
            {"params": [model.again.bias], "lr": 0.02},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01, amsgrad=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.7)
        loader = loader_for(53, 1, shuffle=True, dtype=torch.float32)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )

    def save(self, target: Path) -> dict[str, torch.Tensor]:
        """Save, and return the whole model as it is in memory."""
        self.accelerator.save_state(target, durable=False)
        return {
            name: value.detach().clone()
            for name, value in self.accelerator.get_state_dict(self.model).items()
        }

    def steps(self) -> Iterator[Step]:
        """Train for ever; yield after each optimizer step."""
        window = []
        while True:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    losses = per_sample_loss(self.model, batch)
                    self.accelerator.backward(losses.mean())
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                seen = self.accelerator.gather_for_metrics({"id": batch["id"], "loss": losses.detach()})
                window += zip(seen["id"].tolist(), seen["loss"].tolist(), strict=True)
                if self.accelerator.sync_gradients:
                    ids, values = zip(*sorted(window), strict=True)
                    window = []
                    rates = [group["lr"] for group in self.optimizer.param_groups]
                    yield Step(ids, rates, sum(values) / len(values))


def write(strategy: str, folder: Path) -> tuple[dict[str, torch.Tensor], list[Step]]:
    """Save at SAVED_AT and go on; return the model that was saved, and the steps after it."""
    run = Run(strategy, folder)
    steps = run.steps()
    list(itertools.islice(steps, SAVED_AT))
    model = run.save(folder / "saved")
    return model, list(itertools.islice(steps, MORE))


def read(strategy: str, saved: Path, folder: Path) -> tuple[dict[str, torch.Tensor], list[Step]]:
    """Load into a run that has nothing right yet, save again, and go on."""
    run = Run(strategy, folder)
    with torch.no_grad():
        for value in (*run.model.parameters(), *run.model.buffers()):
            value.add_(1)
    run.accelerator.load_state(saved)
    model = run.save(folder / "again")
    return model, list(itertools.islice(run.steps(), MORE))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder and outcome of a writer's uninterrupted run, trained when it is first asked for."""

    @functools.cache
    def outcome(writer: World) -> tuple[Path, tuple[dict[str, torch.Tensor], list[Step]]]:
        folder = tmp_path_factory.mktemp(str(writer))
        return folder / "saved", run_ranks(write, writer.size, writer.strategy, folder)[0]

    return outcome


def assert_same_state(found: Path, expected: Path) -> None:
    with open_checkpoint(found, ALONE) as a, open_checkpoint(expected, ALONE) as b:
        assert len(a.specs()) > 15  # parameters, buffer, three moments and a step for each that is trained
        assert a.specs() == b.specs()
        different = [name for name in a.specs() if not torch.equal(a.tensor(name), b.tensor(name))]
        assert different == []
        of_the_layout = ("setting: config.", "setting: counters.readers")  # folder, strategy, mesh
        assert [line for line in differences(a, b) if not line.startswith(of_the_layout)] == []


def assert_same_curve(found: list[Step], expected: list[Step], *, bitwise: bool) -> None:
    assert [step[:2] for step in found] == [step[:2] for step in expected]
    losses = [torch.tensor([step.loss for step in run], dtype=torch.float64) for run in (found, expected)]
    torch.testing.assert_close(*losses, rtol=0, atol=0 if bitwise else TOLERANCE)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pytest.param(
            *cell, id="-to-".join(map(str, cell)), marks=() if cell in IN_EVERY_RUN else pytest.mark.slow
        )
        for cell in CELLS
    ],
)
def test_any_world_s_state_comes_back_bitwise_in_any_other_and_its_loss_curve_goes_on(
    tmp_path, written, writer, reader
):
    """Pain 15 (a checkpoint bound to its world size)."""
    saved, (model, steps) = written(writer)
    for found, more in run_ranks(read, reader.size, reader.strategy, saved, tmp_path):
        assert found.keys() == model.keys()
        assert [name for name in model if not torch.equal(found[name], model[name])] == []
        assert_same_curve(more, steps, bitwise=writer == reader)
    assert_same_state(tmp_path / "again", saved)


def test_the_pairwise_cells_hold_every_pair_of_values_that_the_whole_matrix_holds():
    quick = [cell for cell in IN_EVERY_RUN if cell in OTHERS]
    assert set().union(*map(pairs_of, quick)) == set().union(*map(pairs_of, OTHERS))
    assert {world for cell in quick for world in cell} == {world for cell in OTHERS for world in cell}
