"""Whether training works on the device that is here: a short run, its graphs, a checkpoint and values between ranks.

For hardware that tests have not seen. The run is compared with a plain loop on the CPU.
"""

from __future__ import annotations

import copy
import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distrib.devices.xla_runtime import compilations, pjrt_device, xla_model
from distrib.errors import DistribError

_STEPS, _ROWS, _FEATURES = 12, 32, 64
_SETTLED: Final = 2  # steps after which nothing is new
# A TPU multiplies float32 in bfloat16 passes unless it is told otherwise, so that only few digits are the CPU's.
_TOLERANCE: Final = {"CPU": 1e-3}
_COARSE: Final = 0.3


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    found: str
    is_well: bool


def check(*, spmd: bool, client: str) -> tuple[list[Line], bool]:
    """Run the check on every rank. Collective.

    Args:
        spmd: One program for all devices, with parameters divided over them, instead of a process for each device.
        client: What PJRT runs on: "TPU", "CPU".

    Returns:
        This rank's lines, and whether it is the main one.
    """
    package: Any = importlib.import_module("distrib")  # a program may use the whole of it
    layout: dict[str, Any] = {"mesh": {"replicate": 1, "shard": -1}} if spmd else {}

    def accelerator(**more: Any) -> Any:
        settings = {"strategy": "xla", "seed": 0, "xla": {"spmd": spmd}, **layout, **more}
        return package.Accelerator(package.RunConfig(**settings))

    run = _Run(accelerator(global_batch_size=_ROWS), client)
    lines = [
        Line("devices", run.describe(), is_well=True),
        run.training(),
        run.graphs(),
        run.values(),
        run.checkpoint(),
    ]
    half = _Run(accelerator(global_batch_size=_ROWS, mixed_precision="bf16"), client)
    return [*lines, half.training("training in bf16", coarse=True)], run.accelerator.is_main_process


class _Run:
    """A model that learns, beside its like in a plain loop on the CPU."""

    def __init__(self, accelerator: Any, client: str) -> None:
        self.accelerator, self._client = accelerator, client
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(_FEATURES, 128), nn.GELU(), nn.Linear(128, 8))
        self._plain = copy.deepcopy(model)
        rows = TensorDataset(torch.randn(_ROWS * 4, _FEATURES), torch.randint(8, (_ROWS * 4,)))
        self._rows = rows
        readers = accelerator._runtime.readers.world_size
        optimizer = _optimizer(model)
        self.model, self.optimizer, self.schedule, self.loader = accelerator.prepare(
            model, optimizer, _schedule(optimizer), DataLoader(rows, batch_size=_ROWS // readers)
        )
        self._counts: list[tuple[int, int]] = []  # compiled and run, after each step

    def describe(self) -> str:
        """Say what the run is laid out over."""
        core: Any = importlib.import_module("torch_xla.runtime")
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.accelerator.mesh.axes if size > 1)
        return (
            f"PJRT {self._client}, {core.global_runtime_device_count()} devices, {self.accelerator.num_processes} "
            f"processes, mesh {sizes or '1'}"
        )

    def training(self, what: str = "training", *, coarse: bool = False) -> Line:
        """Train, and compare the parameters with those of the plain loop."""
        self._train(_STEPS)
        begin = _flat(self._plain)
        expected = _flat(_train_plainly(self._plain, self._rows))
        found = torch.cat([x.reshape(-1) for x in self.accelerator.get_state_dict(self.model).values()])
        apart = float((found - expected).norm() / (expected - begin).norm())
        limit = _COARSE if coarse else _TOLERANCE.get(self._client, _COARSE)
        said = (
            f"{_STEPS} steps; {apart:.1e} of the way apart from a plain loop on the CPU (at most {limit:g})"
        )
        return Line(what, said, apart <= limit)

    def graphs(self) -> Line:
        """Tell how many graphs the steps after the first ones have compiled and run."""
        (compiled, runs), (all_compiled, all_runs) = self._counts[_SETTLED - 1], self._counts[-1]
        later = _STEPS - _SETTLED
        per_step = (all_runs - runs) / later
        # host collectives read the gradients in the middle of a step
        most = 2 if self.accelerator._runtime.device_backend.on_host else 1
        return Line(
            "graphs",
            f"{all_compiled - compiled} compiled after step {_SETTLED}, {per_step:g} run in each step",
            all_compiled == compiled and per_step <= most,
        )

    def values(self) -> Line:
        """Exchange values that lie on the devices."""
        ranks, mine = self.accelerator.num_processes, self.accelerator.process_index
        value = torch.full((3,), float(mine + 1), device=self.accelerator.device)
        collectives = self.accelerator._runtime.collectives
        total = collectives.all_reduce_(value.clone()).cpu().tolist()
        everyone = collectives.gather(value).cpu().tolist()
        objects = self.accelerator.gather_object(mine)
        is_right = (
            total == [ranks * (ranks + 1) / 2] * 3
            and everyone == [float(rank + 1) for rank in range(ranks) for _ in range(3)]
            and objects == list(range(ranks))
        )
        return Line("values between ranks", f"sum {total[0]:g}, objects {objects}", is_right)

    def checkpoint(self) -> Line:
        """Save, step on, load, and compare."""
        with tempfile.TemporaryDirectory(prefix="xla-check-") as folder:
            place = self.accelerator.broadcast_object(str(Path(folder) / "saved"))
            self.accelerator.save_state(place)
            before = self.accelerator.get_state_dict(self.model)
            self._train(1)
            after = self.accelerator.get_state_dict(self.model)
            self.accelerator.load_state(place)
            loaded = self.accelerator.get_state_dict(self.model)
            self.accelerator.wait_for_everyone()
        came_back = all(torch.equal(before[name], loaded[name]) for name in before)
        had_moved = any(not torch.equal(before[name], after[name]) for name in before)
        return Line("checkpoint", "saved, and the same after a step and a load", came_back and had_moved)

    def _train(self, steps: int) -> None:
        done = 0
        while done < steps:
            for x, y in self.loader:
                self.accelerator.backward(nn.functional.cross_entropy(self.model(x), y))
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                xla_model().wait_device_ops()
                self._counts.append((compilations(), _runs()))
                done += 1
                if done == steps:
                    break


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([x.detach().reshape(-1).clone() for x in model.parameters()])


def _train_plainly(model: nn.Module, rows: TensorDataset) -> nn.Module:
    optimizer = _optimizer(model)
    schedule = _schedule(optimizer)
    batches = list(DataLoader(rows, batch_size=_ROWS))
    for step in range(_STEPS):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def _runs() -> int:
    metrics: Any = importlib.import_module("torch_xla.debug.metrics")
    found = [metrics.metric_data(name) for name in ("ExecuteTime", "ExecuteReplicatedTime")]
    return sum(data[0] for data in found if data)


def main(
    arguments: Sequence[str], env: Mapping[str, str], say: Callable[[str], object] = sys.stdout.write
) -> int:
    """Run the check and print its table: `check [--spmd]`; return 0 if all is well, else 1."""
    if not set(arguments) <= {"--spmd"}:
        sys.stderr.write("usage: python -m distrib.strategies.xla check [--spmd]\n")
        return 2
    try:
        lines, is_main = check(spmd="--spmd" in arguments, client=str(pjrt_device(env)))
    except DistribError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    width = max(len(line.what) for line in lines)
    for line in lines if is_main else [line for line in lines if not line.is_well]:
        say(f"{'ok  ' if line.is_well else 'FAIL'}  {line.what:<{width}}  {line.found}\n")
    return int(not all(line.is_well for line in lines))
