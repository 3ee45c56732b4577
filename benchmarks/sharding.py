"""Fully sharded training (FSDP2) on 2 ranks: collectives, time and bytes held of a step; saving and loading."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from benchmarks.checkpoint import OneFile, Turn, clear, meet, shared_folder, timed
from benchmarks.measure import (
    MEGA,
    MILLI,
    OURS,
    PEER,
    RAW,
    Bar,
    Row,
    give_back_memory,
    interleaved,
    num_collectives,
    peak_mb,
    quiet,
)
from distrib.testing import run_ranks

WIDTH, LAYERS, BATCH = 256, 6, 8  # 4.7 M parameters: a step of about 20 ms
LARGE, LARGE_LAYERS = 1024, 6  # 50 M parameters, for checkpoints
ROUNDS, SAVES = 20, 5
LIGHT = "light"  # ours with durable=False or verify=False


class Block(nn.Module):
    """Two linear layers around a non-linearity, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Repeated blocks between two layers of their own."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList([Block(width) for _ in range(layers)])
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(self.norm(x))


@dataclass(frozen=True)
class Contestant:
    """A prepared model with the body of its loop."""

    model: nn.Module
    optimizer: Any
    step: Callable[[], None]


def run() -> list[Row]:
    return run_ranks(rows_of, 2, timeout_s=1200)[0]


def rows_of() -> list[Row]:
    dist.init_process_group("gloo")
    builders = {RAW: by_hand, PEER: with_accelerate, OURS: with_distrib}
    with quiet():
        found = {name: build(Net(WIDTH, LAYERS)) for name, build in builders.items()}
        for contestant in found.values():
            contestant.step()
    counts = Row("a step", "collectives", {name: [num_collectives(x.step)] for name, x in found.items()})
    counts.bars.append(Bar("over raw", counts.most_over(), 0))
    clock = Row(
        "a step", "ms wall", interleaved({n: x.step for n, x in found.items()}, step_ms, ROUNDS, warm_up=3)
    )
    clock.bars.append(Bar("/ raw", clock.ratio(RAW), 1.05))
    held = Row("held after a step", "MB", {name: [bytes_held(x) / MEGA] for name, x in found.items()})
    held.bars.append(Bar("/ raw", held.ratio(RAW), 1.02))
    with shared_folder() as folder, quiet():
        return [counts, clock, held, *checkpoints(folder)]


def step_ms(step: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(3):
        step()
    return (time.perf_counter() - start) / 3 / MILLI


def bytes_held(contestant: Contestant) -> int:
    """Return the bytes of parameters, gradients and optimizer state on this rank, counted tensor by tensor."""
    x = torch.ones(BATCH, WIDTH)
    contestant.model(x).square().mean().backward()
    state = contestant.optimizer.state.values()
    tensors = [
        *contestant.model.parameters(),
        *(p.grad for p in contestant.model.parameters() if p.grad is not None),
        *(x for values in state for x in values.values() if isinstance(x, Tensor)),
    ]
    return sum(x.to_local().nbytes if hasattr(x, "to_local") else x.nbytes for x in tensors)


def looped(
    model: nn.Module, optimizer: Any, backward: Callable[[Tensor], None], clip: Callable[[], Any]
) -> Contestant:
    x = torch.ones(BATCH, model.first.in_features)

    def step() -> None:
        backward(model(x).square().mean())
        clip()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(model, optimizer, step)


def by_hand(model: nn.Module) -> Contestant:
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def clip() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()

    return looped(model, optimizer, Tensor.backward, clip)


def with_distrib(model: nn.Module) -> Contestant:
    from distrib import Accelerator

    accelerator = Accelerator(cpu=True, strategy="fsdp")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    found = looped(
        model, optimizer, accelerator.backward, lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0)
    )
    model.accelerator = lambda: accelerator
    return found


def with_accelerate(model: nn.Module) -> Contestant:
    """It trains as DDP on a CPU, without a word: told afterwards that this is FSDP2, it is."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
        state_dict_type="sharded_state_dict",
    )  # fmt: skip
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    found = looped(
        model, optimizer, accelerator.backward, lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0)
    )
    model.accelerator = lambda: accelerator
    return found


def checkpoints(folder: Path) -> list[Row]:
    """Return rows of saving and loading 50 M parameters with AdamW's state."""
    ours, peer = (build(Net(LARGE, LARGE_LAYERS)) for build in (with_distrib, with_accelerate))
    for contestant in (ours, peer):
        contestant.step()
    own, other = ours.model.accelerator(), peer.model.accelerator()
    size = sum(p.numel() for p in ours.model.parameters()) * 3 * 4
    state = OneFile(size=size if dist.get_rank() == 0 else 1)
    save: dict[str, Turn] = {
        RAW: (state.write, folder / "raw"),
        PEER: (other.save_state, folder / "accelerate"),
        OURS: (functools.partial(own.save_state, durable=False), folder / "distrib"),
    }
    saved = interleaved(save, lambda turn: timed(turn, fresh=True)[0], SAVES)
    load: dict[str, Turn] = {
        RAW: (state.read, folder / "raw"),
        PEER: (other.load_state, folder / "accelerate"),
        OURS: (own.load_state, folder / "distrib"),
    }

    def resumed(turn: Turn) -> float:
        give_back_memory()
        return timed(turn, fresh=False)[0]

    loaded = interleaved(load, resumed, SAVES)
    rows = [
        Row(f"save, durable=False, {size / MEGA:.0f} MB", "s wall", saved),
        Row(f"load, {size / MEGA:.0f} MB", "s wall", loaded),
    ]
    rows[0].bars.extend(
        [Bar(f"/ {PEER}", rows[0].ratio(PEER), 0.8), Bar("/ one file", rows[0].ratio(RAW), 1.1)]
    )
    rows[1].bars.append(Bar(f"/ {PEER}", rows[1].ratio(PEER), 1.0))
    peaks = {}
    for name, (function, path) in load.items():
        if name != RAW:
            clear(path, fresh=False)
            peaks[name] = [peak_mb(lambda function=function, path=path: function(path))]
    meet()
    row = Row("extra memory of a load", "MB", peaks)
    row.bars.append(Bar("MB, largest tensor x 1.15", row.samples[OURS][0], 1.15 * 4 * LARGE**2 * 4 / MEGA))
    return [*rows, row]
