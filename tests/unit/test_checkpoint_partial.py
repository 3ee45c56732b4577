"""Loading a checkpoint that does not fit in all points: `strict=False` and `ignore=`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distrib import Accelerator, CheckpointError


def run(folder: Path, outputs: int = 2, *, extra: bool = False, scheduler: bool = False):
    accelerator = Accelerator(cpu=True, project_dir=folder, seed=0)
    torch.manual_seed(outputs)
    parts = {"body": nn.Linear(3, 4), "head": nn.Linear(4, outputs)}
    if extra:
        parts["scale"] = nn.Linear(outputs, outputs, bias=False)
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * outputs)
    objects = [model, optimizer]
    if scheduler:
        objects.append(torch.optim.lr_scheduler.StepLR(optimizer, 3))
    prepared = accelerator.prepare(*objects)
    model(torch.ones(1, 3)).sum().backward()
    prepared[1].step()
    prepared[1].zero_grad()
    return accelerator, model, optimizer


def test_a_head_of_another_size_is_left_alone_with_its_moments(tmp_path: Path) -> None:
    saved, old, old_optimizer = run(tmp_path)
    saved.save_state()
    accelerator, model, optimizer = run(tmp_path, outputs=5)
    head = model.head.weight.detach().clone()
    accelerator.load_state(ignore=["model/head.*"])

    assert torch.equal(model.body.weight, old.body.weight)
    assert torch.equal(model.head.weight, head)
    moments = optimizer.state[model.body.weight], old_optimizer.state[old.body.weight]
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])
    assert not optimizer.state.get(model.head.weight)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"strict": False}])
def test_a_wrong_shape_is_refused_and_nothing_is_changed(tmp_path: Path, options) -> None:
    run(tmp_path)[0].save_state()
    accelerator, model, optimizer = run(tmp_path, outputs=5)
    before = [x.detach().clone() for x in model.parameters()]
    moments = optimizer.state[model.body.weight]["exp_avg"].clone()
    with pytest.raises(CheckpointError, match=r"D0708(.|\n)*model/head\.weight"):
        accelerator.load_state(**options)

    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(optimizer.state[model.body.weight]["exp_avg"], moments)


def test_what_only_the_run_has_is_refused_unless_it_may_be_missing(tmp_path: Path) -> None:
    _, old, _ = saved = run(tmp_path)
    saved[0].save_state()
    accelerator, model, _ = run(tmp_path, extra=True)
    scale = model.scale.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"D0791.*scale\.weight.* only here|D0708"):
        accelerator.load_state()
    accelerator.load_state(strict=False)

    assert torch.equal(model.head.weight, old.head.weight)
    assert torch.equal(model.scale.weight, scale)


def test_what_only_the_checkpoint_has_is_refused_unless_it_may_be_left(tmp_path: Path) -> None:
    _, old, _ = saved = run(tmp_path, extra=True, scheduler=True)
    saved[0].save_state()
    accelerator, model, optimizer = run(tmp_path)
    with pytest.raises(CheckpointError, match="D0792"):
        accelerator.load_state()
    accelerator.load_state(strict=False)

    assert torch.equal(model.head.weight, old.head.weight)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_pattern_that_fits_nothing_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    accelerator, model, _ = run(tmp_path)
    accelerator.save_state()
    before = model.head.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"D0740.*'model/heat\.weight'.*model/head\.weight"):
        accelerator.load_state(ignore="model/heat.weight")

    assert torch.equal(model.head.weight, before)
