"""ZeRO-2 on 2 ranks against a loop that a person writes with DeepSpeed: collectives and time of a step."""

import os
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import OURS, RAW, Bar, Row, interleaved, num_collectives, quiet
from benchmarks.sharding import BATCH, LAYERS, WIDTH, Contestant, Net, looped, step_ms
from distrib.strategies.deepspeed_ops import adopt_process_group, load_deepspeed
from distrib.testing import run_ranks

ROUNDS = 30
STAGE = 2
CLIP = 1.0


def run() -> list[Row]:
    return run_ranks(rows_of, 2, timeout_s=900)[0]


def rows_of() -> list[Row]:
    dist.init_process_group("gloo")
    rows = []
    for accumulation in (1, 4):
        builders = {RAW: by_hand, OURS: with_distrib}
        with quiet():
            found = {name: build(Net(WIDTH, LAYERS), accumulation) for name, build in builders.items()}
            for contestant in found.values():
                contestant.step()
        what = f"a step of {accumulation} micro-step{'s' if accumulation > 1 else ''}"
        counts = Row(what, "collectives", {name: [num_collectives(x.step)] for name, x in found.items()})
        counts.bars.append(Bar("over raw", counts.most_over(), 0))
        steps = {name: x.step for name, x in found.items()}
        clock = Row(what, "ms wall", interleaved(steps, step_ms, ROUNDS, warm_up=3))
        clock.bars.append(Bar("/ raw", clock.ratio(RAW), 1.05))
        rows += [counts, clock]
    return rows


def by_hand(model: torch.nn.Module, accumulation: int) -> Contestant:
    deepspeed = load_deepspeed(os.environ, "cpu")
    adopt_process_group(deepspeed)  # else it compiles a collective that training does not use
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": CLIP,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": STAGE,
                "reduce_bucket_size": sum(x.numel() for x in model.parameters()),
            },
        },
    )
    x = torch.ones(BATCH, WIDTH)

    def step() -> None:
        for _ in range(accumulation):
            engine.backward(engine(x).square().mean())
            engine.step()

    return Contestant(model, optimizer, step)


def with_distrib(model: torch.nn.Module, accumulation: int) -> Contestant:
    from distrib import Accelerator

    accelerator = Accelerator(cpu=True, strategy="deepspeed", gradient_accumulation_steps=accumulation)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    micro_step = looped(
        model,
        optimizer,
        accelerator.backward,
        lambda: accelerator.clip_grad_norm_(model.parameters(), CLIP),
    ).step

    def step() -> None:
        for _ in range(accumulation):
            with accelerator.accumulate(model):
                micro_step()

    contestant: Any = Contestant(model, optimizer, step)
    model.accelerator = lambda: accelerator  # lives as long as the model
    return contestant
