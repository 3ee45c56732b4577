"""A training step over the hand-written one: Python calls, CPU time, collectives."""

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import (
    MICRO,
    OURS,
    PEER,
    RAW,
    Bar,
    Row,
    alone,
    interleaved,
    num_collectives,
    python_calls,
    quiet,
)
from distrib.testing import run_ranks

WIDTH, BATCH = 16, 4
FEW, MANY = 2, 200  # layers
ROUNDS, STEPS = 15, 100  # of the clock: rounds, and micro-steps per turn
MAX_EXTRA_CALLS, MAX_TIME_SHARE = 25, 1 / 3
NOTHING = threading.RLock()  # a context that makes no Python call, where a hand-written loop would have none

Loaded = tuple[Iterator[Any], Callable[[Any], None]]  # an iterator of batches, and the body of the loop


@dataclass(frozen=True)
class Loop:
    """What a loop asks for."""

    name: str
    clip: bool = False
    accumulation: int = 1
    bf16: bool = False
    count: bool = False


LOOPS = (
    Loop("plain"),
    Loop("clip", clip=True),
    Loop("accumulation 4", accumulation=4),
    Loop("bf16", bf16=True),
    Loop("count=", count=True),
    Loop("all of these", clip=True, accumulation=4, bf16=True, count=True),
)


def run() -> list[Row]:
    return [*alone(rows_of, 1), *run_ranks(rows_of, 2, 2, timeout_s=900)[0]]


def rows_of(ranks: int) -> list[Row]:
    if ranks > 1:
        dist.init_process_group("gloo")
    rows = []
    for loop in LOOPS:
        what = f"{loop.name}, {'one process' if ranks == 1 else f'DDP {ranks}'}"
        rows += [calls_row(what, loop), time_row(what, loop)]
        if ranks > 1:
            rows.append(collectives_row(what, loop))
    return rows


def calls_row(what: str, loop: Loop) -> Row:
    """Count the calls of each micro-step of one window; the worst is judged."""
    row, deep = (Row(what, "calls", calls(loop, layers)) for layers in (FEW, MANY))
    row.bars.append(Bar("over raw", row.most_over(), MAX_EXTRA_CALLS))
    row.bars.append(Bar(f"more with {MANY} layers", deep.most_over() - row.most_over(), 0))
    return row


def calls(loop: Loop, layers: int) -> dict[str, list[int]]:
    samples: dict[str, list[int]] = {}
    for name, (batches, body) in contestants(loop, layers).items():
        window = itertools.islice(batches, loop.accumulation)
        samples[name] = [python_calls(functools.partial(body, batch)) for batch in window]
    return samples


def time_row(what: str, loop: Loop) -> Row:
    row = Row(what, "us CPU", interleaved(contestants(loop, FEW), body_us, ROUNDS))
    row.bars.append(Bar(f"overhead / {PEER}'s", row.over() / row.over(of=PEER), MAX_TIME_SHARE))
    return row


def body_us(contestant: Loaded) -> float:
    """Return the CPU time of one micro-step without that of its batch."""
    batches, body = contestant
    spent = 0.0
    for batch in itertools.islice(batches, STEPS):
        start = (
            time.thread_time()
        )  # of this thread: gloo's, whose time varies more than all else, do the same for all
        body(batch)
        spent += time.thread_time() - start
    return spent / STEPS / MICRO


def collectives_row(what: str, loop: Loop) -> Row:
    """Count the operations of one window."""

    def window(contestant: Loaded) -> None:
        batches, body = contestant
        for batch in itertools.islice(batches, loop.accumulation):
            body(batch)

    samples = interleaved(contestants(loop, FEW), lambda found: num_collectives(lambda: window(found)), 1)
    row = Row(what, "collectives", samples)
    row.bars.append(Bar("over raw", row.most_over(), 0))
    return row


def contestants(loop: Loop, layers: int) -> dict[str, Loaded]:
    builders = {RAW: by_hand, PEER: with_accelerate, "fabric": with_fabric, OURS: with_distrib}
    if loop.count:
        del builders["fabric"]
    found = {}
    for name, build in builders.items():
        with quiet():
            batches, body = found[name] = build(loop, layers)
        for batch in itertools.islice(batches, 2 * loop.accumulation):  # fill caches, end at a window's end
            body(batch)
    return found


class OneSample(Dataset):
    """The same sample over and over, more often than any loop here asks for it."""

    sample = (torch.ones(WIDTH), torch.ones(WIDTH))

    def __len__(self) -> int:
        return 100_000  # torch's DistributedSampler, which Fabric puts in, lists all indices

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.sample


def parts(layers: int) -> tuple[nn.Module, torch.optim.Optimizer, Any, DataLoader]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.999**step)
    return model, optimizer, scheduler, DataLoader(OneSample(), BATCH)


def loss_of(output: torch.Tensor, target: torch.Tensor, loop: Loop) -> torch.Tensor:
    return nn.functional.mse_loss(output, target, reduction="sum" if loop.count else "mean")


def by_hand(loop: Loop, layers: int) -> Loaded:
    model, optimizer, scheduler, loader = parts(layers)
    parameters = list(model.parameters())
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        model = DistributedDataParallel(model)
    step = counted = 0

    def body(batch: Any) -> None:
        nonlocal step, counted
        x, y = batch
        step += 1
        closes = step % loop.accumulation == 0
        with NOTHING if closes or world == 1 else model.no_sync():
            with torch.autocast("cpu", torch.bfloat16) if loop.bf16 else NOTHING:
                output = model(x)
            loss = loss_of(output.float() if loop.bf16 else output, y, loop)
            if loop.accumulation > 1 and not loop.count:
                loss = loss / loop.accumulation
            loss.backward()
        counted += y.numel()
        if not closes:
            return
        if loop.count:
            total = torch.tensor(float(counted))
            if world > 1:
                dist.all_reduce(total)
            torch._foreach_mul_([p.grad for p in parameters], world / total.item())
        if loop.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        counted = 0

    return iter(loader), body


def with_distrib(loop: Loop, layers: int) -> Loaded:
    from distrib import Accelerator

    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if loop.bf16 else "no",
        gradient_accumulation_steps=loop.accumulation,
    )
    model, optimizer, scheduler, loader = accelerator.prepare(*parts(layers))

    def body(batch: Any) -> None:
        x, y = batch
        with accelerator.accumulate(model):
            loss = loss_of(model(x), y, loop)
            if loop.count:
                accelerator.backward(loss, count=y.numel())
            else:
                accelerator.backward(loss)
            if loop.clip:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    return iter(loader), body


def with_accelerate(loop: Loop, layers: int) -> Loaded:
    """It has no `count=`: the loop undoes its division by the accumulation, and divides by the count itself."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # else the precision of the process's first accelerator holds for all
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if loop.bf16 else "no",
        gradient_accumulation_steps=loop.accumulation,
    )
    model, optimizer, scheduler, loader = accelerator.prepare(*parts(layers))
    parameters, world, counted = list(model.parameters()), accelerator.num_processes, 0

    def body(batch: Any) -> None:
        nonlocal counted
        x, y = batch
        with accelerator.accumulate(model):
            loss = loss_of(model(x), y, loop)
            accelerator.backward(loss * loop.accumulation if loop.count else loss)
            counted += y.numel()
            if accelerator.sync_gradients:
                if loop.count:
                    total = accelerator.reduce(torch.tensor(float(counted)))
                    torch._foreach_mul_([p.grad for p in parameters], world / total.item())
                if loop.clip:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                counted = 0
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    return iter(loader), body


def with_fabric(loop: Loop, layers: int) -> Loaded:
    from lightning_fabric import Fabric

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    fabric = Fabric(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision="bf16-mixed" if loop.bf16 else "32-true",
    )
    fabric.launch()
    model, optimizer, scheduler, loader = parts(layers)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    step = 0

    def body(batch: Any) -> None:
        nonlocal step
        x, y = batch
        step += 1
        closes = step % loop.accumulation == 0
        with fabric.no_backward_sync(model, enabled=not closes):
            loss = loss_of(model(x), y, loop)
            fabric.backward(loss / loop.accumulation if loop.accumulation > 1 else loss)
        if not closes:
            return
        if loop.clip:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return iter(loader), body
