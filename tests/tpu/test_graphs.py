"""How often something is compiled and run, from torch-xla's own counts."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig
from tests.contract.plain import loader_for, make_model, per_sample_loss
from tests.tpu.running import ONE, SHARDED, graphs, on_xla

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def loop(settings, make, *, steps, accumulation=1, n=48, micro=8, counted=False, seen=lambda k, a: None):
    """Train with clipping and a learning rate that changes in every step; call `seen` after each."""
    accelerator = Accelerator(RunConfig(seed=3, gradient_accumulation_steps=accumulation, **settings))
    model = make_model(torch.float32)
    optimizer = make(model.parameters())
    # from 0 up to 0.1 and down: 0.1 is 1 - beta of Adam too, and 0 is a number that XLA makes a constant
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(k, 20) / 2 if k < 30 else 60 / k)
    model, optimizer, schedule, loader = accelerator.prepare(
        model, optimizer, schedule, loader_for(n, micro, dtype=torch.float32)
    )
    done = 0
    while done < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                rows = per_sample_loss(model, batch)
                if counted:
                    accelerator.backward(rows.sum(), count=len(rows))
                else:
                    accelerator.backward(rows.mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                seen(done, accelerator)
                if done == steps:
                    break
    return accelerator, model, optimizer


def economy(settings, cases):
    """Return {case: (compiled by step 2, compiled by step 50, runs from step 2 to step 50)}."""
    import torch_xla.core.xla_model as xm

    from tests.tpu.running import _counts

    found = {}
    for name, (kind, options) in cases.items():
        marks = {}

        def note(step, _, marks=marks):
            if step in (2, 50):
                xm.wait_device_ops()
                marks[step] = _counts()

        loop(settings, OPTIMIZERS[kind], steps=50, seen=note, **options)
        found[name] = {
            "compiled": marks[50]["compiled"] - marks[2]["compiled"],
            "runs": marks[50]["runs"] - marks[2]["runs"],
        }
    return found


CASES = {
    "AdamW": ("AdamW", {}),
    "SGD": ("SGD", {}),
    "RMSprop": ("RMSprop", {}),
    "accumulation": ("AdamW", {"accumulation": 3}),
    "counted": ("AdamW", {"accumulation": 2, "counted": True}),
}


@functools.cache
def of_layout(layout):
    settings, devices, cases = {
        "one device": (ONE, 1, CASES),
        "4 shards": (SHARDED, 4, {name: CASES[name] for name in ("AdamW", "accumulation")}),
    }[layout]
    return on_xla(economy, settings, cases, devices=devices)[0]


IN_EACH = [("one device", name) for name in CASES] + [("4 shards", "AdamW"), ("4 shards", "accumulation")]


@pytest.mark.parametrize(("layout", "case"), IN_EACH)
def test_nothing_is_compiled_between_step_2_and_step_50(layout, case):
    assert of_layout(layout)[case]["compiled"] == 0


@pytest.mark.parametrize(("layout", "case"), IN_EACH)
def test_a_step_runs_one_graph(layout, case):
    assert of_layout(layout)[case]["runs"] == 48


def ragged_epochs(settings):
    """Return what each of 4 epochs over 29 samples compiled, and the rows and the mask of its last batch."""
    accelerator = Accelerator(RunConfig(seed=3, **settings))
    model = make_model(torch.float32)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters()), loader_for(29, 8, dtype=torch.float32)
    )
    compiled, ids = [], []
    for _ in range(4):
        with graphs() as seen:
            for batch in loader:
                accelerator.backward(per_sample_loss(model, batch).mean())
                optimizer.step()
                optimizer.zero_grad()
                last = batch["x"].shape[0], int(accelerator.sample_mask.sum().cpu())
                found = accelerator.gather_for_metrics(batch["id"])
                ids.append(found.tolist())
        compiled.append(seen["compiled"])
    return compiled, last, ids[:4]


def test_a_ragged_tail_is_filled_up_so_that_nothing_more_is_compiled():
    compiled, (rows, samples), ids = others()["ragged"]
    assert compiled[2:] == [0, 0]  # the second epoch begins with what the first one's last metric left behind
    assert (rows, samples) == (8, 5)
    assert [x for batch in ids for x in batch] == list(range(29))  # what fills up is in no metric


def evaluation():
    """Return the runs of a training step, of 6 evaluation batches that nobody reads, and with a barrier each micro-step."""
    accelerator, model, _ = loop(ONE, OPTIMIZERS["AdamW"], steps=3)
    loader = accelerator.prepare(loader_for(48, 8, dtype=torch.float32))
    total = torch.zeros((), device=accelerator.device)
    for _ in range(2):
        with graphs() as seen:
            for batch in loader:
                with torch.no_grad():
                    total += per_sample_loss(model, batch).sum()
    micro = {}

    def note(step, _):
        if step == 3:
            micro["graphs"] = graphs()
            micro["seen"] = micro["graphs"].__enter__()
        if step == 6:
            micro["graphs"].__exit__(None, None, None)

    loop({**ONE, "xla": {"barrier": "micro_step"}}, OPTIMIZERS["AdamW"], steps=6, accumulation=3, seen=note)
    return seen, micro["seen"], float(total.cpu())


def test_each_batch_of_an_evaluation_is_a_graph_of_its_own():
    seen, _, total = others()["evaluation"]
    assert seen == {"compiled": 0, "runs": 6}
    assert total > 0


def test_a_barrier_can_stand_behind_each_micro_step():
    _, seen, _ = others()["evaluation"]
    assert seen == {"compiled": 0, "runs": 3 * 4}  # of three steps: three micro-steps and the optimizer


class Ragged(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).sum()


def recompiling(lengths):
    """Take a step for each length; return what was told."""
    import io
    from contextlib import redirect_stderr

    accelerator = Accelerator(RunConfig(seed=3, **ONE))
    model = Ragged()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    said = io.StringIO()
    with redirect_stderr(said):
        for length in lengths:
            accelerator.backward(model(torch.ones(length, 4).to(accelerator.device)))
            optimizer.step()
            optimizer.zero_grad()
    return said.getvalue()


def several():
    return {
        "many": recompiling([4, 4, 5, 5, 6, 7, 5, 8, 9, 10, 11]),
        "few": recompiling([14, 14, 15, 16, 17, 18, 14, 15, 16, 17, 18]),
        "ragged": ragged_epochs(ONE),
        "evaluation": evaluation(),
    }


@functools.cache
def others():
    return on_xla(several)[0]


def test_steps_that_are_compiled_again_and_again_are_told_of_once_with_the_shapes():
    said = others()["many"]
    assert said.count("warning: xla: step 9 was compiled anew, the 5th time since step 2") == 1
    assert "(5, 4); (6, 4); (7, 4); (8, 4) and 1 more" in said
    assert "data.tail pad" in said


def test_steps_of_few_shapes_are_not_told_of():
    assert "compiled anew" not in others()["few"]
