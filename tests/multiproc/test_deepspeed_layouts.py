"""DeepSpeed's stages where more than data is divided: sequences over mesh.context, parameters twice (hpZ),
and state that is on a disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrib import Accelerator, RunConfig, StrategyError
from distrib.strategies.deepspeed_nvme import require_async_io, with_own_folders
from distrib.strategies.deepspeed_ops import extensions_folder
from distrib.testing import run_ranks
from tests.multiproc.test_context_parallel import agree, train
from tests.multiproc.test_deepspeed import assert_close

if find_spec("deepspeed") is None:
    pytest.skip("pip install deepspeed==0.19.8", allow_module_level=True)


def shared_sequences(stage: int) -> tuple[Any, Any]:
    """Train on sequences that two ranks share, once in float32 and once with a mask for each head."""
    settings = {"strategy": "deepspeed", "deepspeed": {"zero_stage": stage}, "mesh": {"context": 2}}
    return tuple(train(settings, options, torch.float32) for options in ({}, {"mask": "heads"}))


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        (3, 2),
        *(pytest.param(stage, 2, marks=pytest.mark.slow) for stage in (0, 1, 2)),
        *(pytest.param(stage, 4, marks=pytest.mark.slow) for stage in (2, 3)),
    ],
)
def test_ranks_that_share_sequences_train_as_one_process(stage, ranks):
    expected = [train({}, options, torch.float32) for options in ({}, {"mask": "heads"})]
    for found in run_ranks(shared_sequences, ranks, stage, timeout_s=110):
        for each, alone in zip(found, expected, strict=True):
            for name in [x for x in each[1] if x.endswith("k_proj.bias")]:
                # attention does not depend on it, so its gradient is rounding alone, which AdamW scales up
                each[1][name] = alone[1][name]
            agree(each, alone, 2e-4)


def wide() -> nn.Module:
    """Its first two weights have parts of more than a MiB on each of two ranks, so that DeepSpeed puts them on the disk."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(700, 900), nn.Tanh(), nn.Linear(900, 700), nn.Tanh(), nn.Linear(700, 3))


def wide_loss(model: nn.Module, rank: int) -> torch.Tensor:
    return model(torch.linspace(-1, 1 + rank, 1400).view(2, 700)).square().mean()


def wide_plainly(steps: int, ranks: int = 2) -> dict[str, torch.Tensor]:
    model = wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (sum(wide_loss(model, rank) for rank in range(ranks)) / ranks).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return {name: x.detach() for name, x in model.state_dict().items()}


def trained_wide(folder: str, strategy: dict[str, Any], do: str) -> dict[str, Any]:
    """Train, checkpoint and look at parameters, as `do` says: words of "step", "save", "load", "look" and "surgery"."""
    accelerator = Accelerator(RunConfig(device="cpu", seed=3, project_dir=folder, **strategy))
    model = wide()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3))
    seen: dict[str, Any] = {}
    for number, word in enumerate(do.split()):
        if word == "step":
            accelerator.backward(wide_loss(model, accelerator.process_index))
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        elif word == "save":
            accelerator.save_state(durable=False)
        elif word == "load":
            accelerator.load_state()
        elif word == "surgery":
            with accelerator.gathered(model) as plain, torch.no_grad():
                plain[0].weight.mul_(0.5)
        else:
            seen[f"{number}"] = {name: x.clone() for name, x in accelerator.get_state_dict(model).items()}
    zero = vars(model).get("_distrib_deepspeed")
    swapped = (
        zero
        and zero.zero.optimizer_swapper
        and [len(x.tensors) for x in zero.zero.optimizer_swapper.swap_params_info.values()]
    )
    parts = [getattr(x, "ds_tensor", None) for x in model.parameters()]
    absent = [x is not None and x.status.name == "NOT_AVAILABLE" for x in parts]
    return {**seen, "on disk": swapped, "parameters on disk": sum(absent)}


def in_a_file(folder: Path, zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}, **more}))
    return {"strategy": "deepspeed", "deepspeed": {"config": str(path)}}


ON_DISK = {"strategy": "deepspeed", "deepspeed": {"zero_stage": 3, "offload_optimizer": "nvme"}}
# Compiling takes minutes: `python -m distrib.strategies.deepspeed build-ops AsyncIOBuilder`
needs_async_io = pytest.mark.skipif(
    not any(extensions_folder(os.environ).glob("async_io/*.so")),
    reason="apt-get install libaio-dev; python -m distrib.strategies.deepspeed build-ops AsyncIOBuilder",
)


@needs_async_io
@pytest.mark.parametrize("params", ["none", "nvme", "nvme, optimizer in memory"])
def test_state_on_a_disk_trains_saves_and_resumes_as_in_one_process(tmp_path, params):
    disk = tmp_path / "disk"
    offload = {"device": "nvme", "nvme_path": str(disk)}
    zero: dict[str, Any] = {"offload_optimizer": offload, "sub_group_size": 300_000}
    if params != "none":
        zero["offload_param"] = {**offload, "max_in_cpu": 0}
    if params == "nvme, optimizer in memory":
        zero["offload_optimizer"] = {"device": "cpu"}
    strategy = in_a_file(tmp_path, zero)
    do = "step look step save step step look load step look surgery look step"
    for seen in run_ranks(trained_wide, 2, str(tmp_path), strategy, do, timeout_s=110):
        masters_and_moments = None if "memory" in params else [3, 3]  # of each wide weight
        assert seen["on disk"] == masters_and_moments
        assert seen["parameters on disk"] == (0 if params == "none" else 2)
        for when, steps in {"1": 1, "6": 4, "9": 3}.items():
            assert_close(seen[when], wide_plainly(steps))
        expected = wide_plainly(3)
        expected["0.weight"] *= 0.5
        assert_close(seen["11"], expected)


def in_folder(path: Path) -> dict[str, Any]:
    return {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": str(path)}}}


def test_each_engine_has_a_folder_of_its_own_and_those_of_dead_processes_are_removed(tmp_path):
    code = f"from tests.multiproc.test_deepspeed_layouts import *; with_own_folders(in_folder({str(tmp_path)!r})); os._exit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    dead = list(tmp_path.iterdir())
    made = [with_own_folders(in_folder(tmp_path)) for _ in range(2)]
    folders = {Path(x["zero_optimization"]["offload_optimizer"]["nvme_path"]) for x in made}
    assert len(dead) == 1
    assert len(folders) == 2
    assert set(tmp_path.iterdir()) == folders


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StrategyError, match=r"D0944.*deepspeed.nvme_path"):
        with_own_folders(in_folder(tmp_path / "file"))


def test_what_is_compiled_for_disks_already_needs_no_compiler(tmp_path):
    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io" / "async_io.so").touch()
    require_async_io(tmp_path, lambda: False)


def without_libaio(folder: str) -> str:
    """Return the error of a run on a machine on which async_io is not compiled, and cannot be."""
    os.environ.update(TORCH_EXTENSIONS_DIR=folder, DS_ACCELERATOR="cpu")  # as if nothing had been compiled
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder.has_function = lambda *_, **__: False  # what it asks for libaio with
    settings = {**ON_DISK["deepspeed"], "nvme_path": folder}
    try:
        trained_wide(folder, {"strategy": "deepspeed", "deepspeed": settings}, "")
    except StrategyError as error:
        return str(error)
    return "not refused"


def test_without_libaio_offload_to_nvme_is_refused_with_what_to_install(tmp_path):
    [told] = run_ranks(without_libaio, 1, str(tmp_path))
    assert "D0940" in told
    assert "libaio-dev" in told


@needs_async_io
@pytest.mark.parametrize("first_on_disk", [True, False], ids=["from a disk", "onto a disk"])
def test_checkpoints_go_between_disk_and_another_strategy(tmp_path, first_on_disk):
    on_disk = {**ON_DISK, "deepspeed": {**ON_DISK["deepspeed"], "nvme_path": str(tmp_path / "disk")}}
    order = [on_disk, {"strategy": "ddp"}]
    first, second = order if first_on_disk else reversed(order)
    run_ranks(trained_wide, 2, str(tmp_path), first, "step step save", timeout_s=110)
    for seen in run_ranks(trained_wide, 2, str(tmp_path), second, "load look step step look", timeout_s=110):
        assert_close(seen["1"], wide_plainly(2))
        assert_close(seen["4"], wide_plainly(4))


def test_parameters_divided_twice_train_save_and_resume_as_in_one_process(tmp_path):
    zero = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    do = "step step save step load look step look surgery look step look"
    found = run_ranks(trained_wide, 4, str(tmp_path), in_a_file(tmp_path, zero), do, timeout_s=110)
    for seen in found:
        assert_close(seen["5"], wide_plainly(2, ranks=4))
        assert_close(seen["7"], wide_plainly(3, ranks=4))
        expected = wide_plainly(3, ranks=4)
        expected["0.weight"] *= 0.5
        assert_close(seen["9"], expected)
        assert not torch.equal(seen["11"]["0.weight"], seen["9"]["0.weight"])


def two_engines_with_parameters_divided_twice(settings: dict[str, Any]) -> bool:
    accelerator = Accelerator(RunConfig(device="cpu", seed=3, **settings))
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    pairs = [accelerator.prepare(x, torch.optim.SGD(x.parameters(), lr=0.1)) for x in models]
    for model, optimizer in pairs:
        accelerator.backward(model(torch.ones(1, 3)).sum())
        secondary = model.weight.ds_secondary_tensor is not None
        optimizer.step()
    return secondary


def test_several_engines_share_the_groups_of_parameters_that_are_divided_twice(tmp_path):
    zero = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    assert all(run_ranks(two_engines_with_parameters_divided_twice, 2, in_a_file(tmp_path, zero)))
