"""Checkpoints of other programs: what comes out is what went in, and no code of theirs is run."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import shutil
import sys
import types
from itertools import accumulate
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator
from distrib.checkpoint import inspect, open_checkpoint, save
from distrib.checkpoint.adopt import adopt, is_conversion
from distrib.checkpoint.convert import convert
from distrib.errors import CheckpointError
from distrib.state import TrainState
from distrib.strategies import slices
from distrib.strategies.single import Single
from distrib.testing import run_ranks
from distrib.topology import resolve_mesh
from tests.unit.checkpointing import ALONE, contents


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 5), nn.Linear(5, 5), nn.Linear(5, 2)
    )


def adamw(model):
    """Two groups whose order is not that of the model's parameters."""
    decayed = [x for x in model.parameters() if x.ndim > 1]
    plain = [x for x in model.parameters() if x.ndim < 2]
    return torch.optim.AdamW([{"params": plain, "weight_decay": 0.0}, {"params": decayed}], lr=1e-2)


def steps(model, optimizer, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(6, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def trained(count=3):
    model = network()
    optimizer = adamw(model)
    steps(model, optimizer, count)
    return model, optimizer


def resume(path, model, optimizer, scheduler=None, *, has_optimizer=True):
    """Load a conversion as `load_state` does, without data and generators."""
    names, strategy = slices.parameter_names([model]), Single(SimpleNamespace(mesh=resolve_mesh({}, 1)), {})
    with adopt(open_checkpoint(path, ALONE), [optimizer], names, [scheduler] if scheduler else []) as reader:
        state = TrainState((model,), (optimizer,) if has_optimizer else ())
        with strategy.loading(state, reader.specs(), reader.objects) as wanted:
            reader.check(wanted)
            reader.fill(wanted)
        if scheduler:
            assert reader.schedulers[0]["kind"] == type(scheduler).__name__
            scheduler.load_state_dict(reader.schedulers[0]["state"])


def resumed(path):
    model = network(seed=1)
    optimizer = adamw(model)
    resume(path, model, optimizer)
    return model, optimizer


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(found[name], x)] == []


def assert_same_state(found, expected):
    (model, optimizer), (other, reference) = found, expected
    assert_same_tensors(model.state_dict(), other.state_dict())
    mine, theirs = optimizer.state_dict(), reference.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, values in theirs["state"].items():
        assert_same_tensors(mine["state"][key], values)


def assert_goes_on_alike(found, expected):
    """Both hold the same, and three further steps are the same too."""
    assert_same_state(found, expected)
    for each in (found, expected):
        steps(*each, 3, seed=5)
    assert_same_state(found, expected)


def refused(source, out, **kwargs):
    with pytest.raises(CheckpointError) as raised:
        convert(source, out, **kwargs)
    assert not Path(out).exists()
    return raised.value


def weights_of(path):
    with open_checkpoint(path, ALONE) as reader:
        names = [*reader.specs(), *reader.manifest.aliases]
        found = {x: reader.manifest.aliases.get(x, x) for x in names if x.startswith("model/")}
        return {name.removeprefix("model/"): reader.tensor(x) for name, x in found.items()}


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# torch.save


def test_weights_and_optimizer_of_torch_save_go_on_as_if_nothing_had_happened(tmp_path):
    model, optimizer = trained()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")

    made = convert(tmp_path / "a.pt", tmp_path / "out")

    assert (made.kind, made.step, made.left_out) == ("torch.save", 3, ())
    assert inspect(tmp_path / "out").counters == {"step": 3, "optimizer_steps": [3]}
    assert_goes_on_alike(resumed(tmp_path / "out"), (model, optimizer))


def test_a_conversion_says_that_it_is_one(tmp_path):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")
    save(tmp_path / "own", contents({"model/w": torch.ones(1)}), ALONE)

    assert is_conversion(inspect(tmp_path / "out"))
    assert inspect(tmp_path / "out").info["converted"]["source"] == str(tmp_path / "a.pt")
    assert not is_conversion(inspect(tmp_path / "own"))


def test_a_checkpoint_of_ours_is_adopted_as_it_is(tmp_path):
    save(tmp_path / "own", contents({"model/w": torch.ones(1)}), ALONE)
    with open_checkpoint(tmp_path / "own", ALONE) as reader:
        assert adopt(reader, [], {}, []) is reader


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "module.module.",
        "_orig_mod.module.",
        "_fsdp_wrapped_module.",
    ],
)
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
def test_a_model_gets_its_plain_names_however_it_was_wrapped_and_kept(tmp_path, prefix, key):
    model = network()
    state = {prefix + name: x for name, x in model.state_dict().items()}
    torch.save({key: state} if key else state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")

    assert_same_tensors(weights_of(tmp_path / "out"), model.state_dict())


def test_a_module_of_that_name_below_others_keeps_it(tmp_path):
    state = {"module.a": torch.ones(1), "head": torch.ones(2)}
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")

    assert_same_tensors(weights_of(tmp_path / "out"), state)


def test_tied_tensors_are_stored_once(tmp_path):
    shared = torch.randn(3, 3)
    torch.save({"a": shared, "b": shared, "view": shared[:2]}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")

    assert inspect(tmp_path / "out").aliases == {"model/b": "model/a"}
    assert_same_tensors(weights_of(tmp_path / "out"), {"a": shared, "b": shared, "view": shared[:2]})


def test_a_file_of_the_old_format_is_read_too(tmp_path):
    model, optimizer = trained()
    saved = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "global_step": 11,
    }
    torch.save(saved, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)

    made = convert(tmp_path / "a.ckpt", tmp_path / "out")

    assert made.step == 11
    assert_same_state(resumed(tmp_path / "out"), (model, optimizer))


def test_an_optimizer_that_knows_names_is_stored_by_them(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer, 1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out", step=1)

    assert "optimizer/momentum_buffer.2.weight" in inspect(tmp_path / "out").tensors


def test_schedulers_scaler_and_what_is_left_out_are_told(tmp_path):
    model, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "scaler": {"scale": 8.0},
        "epoch": 3,
        "step": torch.tensor(3),
    }
    torch.save(saved, tmp_path / "a.pt")

    made = convert(tmp_path / "a.pt", tmp_path / "out")

    assert made.left_out == ("'epoch': not known",)
    with open_checkpoint(tmp_path / "out", ALONE) as reader:
        assert reader.scaler == {"scale": 8.0}
        assert [x["state"] for x in reader.schedulers] == [scheduler.state_dict()]


def test_another_optimizer_than_the_converted_one_is_refused_by_its_groups(tmp_path):
    model, optimizer = trained()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")
    other = network(seed=1)

    with pytest.raises(CheckpointError) as raised:
        resume(tmp_path / "out", other, torch.optim.AdamW(other.parameters()))
    assert raised.value.code == "D0790"


def test_a_pickle_is_refused_by_what_it_names_and_not_run(tmp_path):
    torch.save({"model": network().state_dict(), "x": Bomb(tmp_path / "run")}, tmp_path / "a.pt")
    error = refused(tmp_path / "a.pt", tmp_path / "out", allow_pickle=True)

    assert (error.code, "posix.mkdir" in error.problem) == ("D0722", True)
    assert not (tmp_path / "run").exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "run")))
    assert refused(tmp_path / "a.pt", tmp_path / "out").code == "D0722"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: b"PK\x03\x04" + x[4:90]]
)
def test_a_damaged_file_is_an_error_of_ours(tmp_path, damage):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(damage((tmp_path / "a.pt").read_bytes()))
    assert refused(tmp_path / "a.pt", tmp_path / "out").code in ("D0722", "D0723")


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([1, 2], "D0724"),
        ({"a": 1}, "D0724"),
        ({"encoder": {"w": torch.ones(1)}}, "D0724"),
        ({"model": {"w": torch.ones(1), "below": {"x": torch.ones(1)}}}, "D0724"),
        ({"w": torch.ones(2).to_sparse()}, "D0724"),
        ({"_orig_mod.w": torch.ones(1), "w": torch.ones(1)}, "D0723"),
        ({"model": {"w": torch.ones(1)}, "optimizer": {"state": {0: {}}, "param_groups": []}}, "D0723"),
        ({"model": {"w": torch.ones(1)}, "optimizer": {"state": {}, "param_groups": [{"lr": 1}]}}, "D0723"),
    ],
)
def test_what_is_no_model_is_refused_and_says_what_is_expected(tmp_path, value, code):
    torch.save(value, tmp_path / "a.pt")
    error = refused(tmp_path / "a.pt", tmp_path / "out")
    assert error.code == code
    assert error.fix


def test_a_source_that_is_not_there_or_known_or_ours_already_is_refused(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    own = save(tmp_path / "own", contents({"model/w": torch.ones(1)}), ALONE)

    for source, problem in (("nowhere", "does not exist"), ("notes", "holds a.txt"), (own, "already")):
        error = refused(tmp_path / source, tmp_path / "out")
        assert (error.code, problem in error.problem) == ("D0721", True)


# Accelerate


class Counter:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def accelerate_run(folder, **kwargs):
    """Train and save with Accelerate itself; returns its model, optimizer and scheduler."""
    accelerate = pytest.importorskip(
        "accelerate", reason="needs Hugging Face's accelerate: pip install accelerate"
    )
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        model = network()
        optimizer = adamw(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        model, wrapped, stepper = accelerator.prepare(model, optimizer, scheduler)
        accelerator.register_for_checkpointing(Counter(kwargs.pop("counter", 5)))
        for _ in range(3):
            steps(model, wrapped, 1)
            stepper.step()
        accelerator.save_state(str(folder), **kwargs)
        return model, optimizer, scheduler
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("safe", [True, False])
def test_a_checkpoint_of_accelerate_converts_and_resumes(tmp_path, safe):
    model, optimizer, scheduler = accelerate_run(tmp_path / "a", safe_serialization=safe)

    made = convert(tmp_path / "a", tmp_path / "out")
    other = network(seed=1)
    mine = adamw(other)
    schedule = torch.optim.lr_scheduler.StepLR(mine, 2)
    resume(tmp_path / "out", other, mine, schedule)

    assert (made.kind, made.step) == ("accelerate", 3)
    assert "random_states_0.pkl" in made.left_out[0]
    assert schedule.state_dict() == scheduler.state_dict()
    assert_goes_on_alike((other, mine), (model, optimizer))


def load_state_rank(path):
    """Load a conversion as a user does; returns all that came back."""
    accelerator = Accelerator(cpu=True)
    model = network(seed=1)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    counter = Counter(0)
    accelerator.register_for_checkpointing(counter)
    accelerator.load_state(path)
    plain = accelerator.unwrap_model(model)
    state = optimizer.optimizer.state_dict()["state"]
    accelerator.end_training()
    return plain.state_dict(), state, scheduler.scheduler.state_dict(), counter.value, optimizer.num_steps


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("world_size", [1, 2])
def test_load_state_takes_a_checkpoint_of_accelerate_that_was_converted(tmp_path, world_size):
    model, optimizer, scheduler = accelerate_run(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "out")

    for weights, state, schedule, value, num_steps in run_ranks(
        load_state_rank, world_size, str(tmp_path / "out")
    ):
        assert_same_tensors(weights, model.state_dict())
        for key, values in optimizer.state_dict()["state"].items():
            assert_same_tensors(state[key], values)
        assert (schedule, value, num_steps) == (scheduler.state_dict(), 5, 3)


@pytest.mark.filterwarnings("default")
def test_objects_registered_in_accelerate_are_taken_over_and_pickles_of_them_only_on_demand(tmp_path):
    accelerate_run(tmp_path / "plain")
    accelerate_run(tmp_path / "odd", counter=types.SimpleNamespace(x=1))
    convert(tmp_path / "plain", tmp_path / "out")
    with open_checkpoint(tmp_path / "out", ALONE) as reader:
        assert reader.custom == [{"value": 5}]

    error = refused(tmp_path / "odd", tmp_path / "other")
    assert (error.code, "types.SimpleNamespace" in error.problem) == ("D0722", True)
    assert "--allow-pickle" in error.fix
    assert (
        refused(tmp_path / "odd", tmp_path / "other", allow_pickle=True).code == "D0709"
    )  # it is no plain value


@pytest.mark.filterwarnings("default")
def test_a_pickled_object_is_unpickled_when_the_user_says_so(tmp_path):
    accelerate_run(tmp_path / "a")
    torch.save({"when": Bomb(tmp_path / "run")}, tmp_path / "a" / "custom_checkpoint_0.pkl")

    refused(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "run").exists()
    convert(tmp_path / "a", tmp_path / "out", allow_pickle=True)
    assert (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")
def test_weights_that_are_tied_come_back_whichever_of_their_names_accelerate_kept(tmp_path):
    accelerate = pytest.importorskip(
        "accelerate", reason="needs Hugging Face's accelerate: pip install accelerate"
    )
    torch.manual_seed(3)
    model = Frozen()
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        accelerator.prepare(model)
        accelerator.save_state(str(tmp_path / "a"))
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    other = Frozen()

    convert(tmp_path / "a", tmp_path / "out")
    resume(tmp_path / "out", other, torch.optim.SGD(other.parameters()), has_optimizer=False)

    assert len(weights_of(tmp_path / "out")) == len(model.state_dict()) - 1
    assert_same_tensors(other.state_dict(), model.state_dict())


def test_sharded_weights_are_found_by_their_index(tmp_path):
    state = network().state_dict()
    names, files = list(state), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: files[at % 2] for at, name in enumerate(names)}
    for file in files:
        save_file({name: state[name] for name in names if where[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    write_index(index, where)

    convert(tmp_path, tmp_path / "out")
    assert_same_tensors(weights_of(tmp_path / "out"), state)
    shutil.rmtree(tmp_path / "out")

    for odd in ("../a.safetensors", "missing.safetensors", "", 3):
        write_index(index, where | {names[0]: odd})
        assert refused(tmp_path, tmp_path / "out").code == "D0723"
    write_index(index, where | {"more": files[0]})
    assert "'more'" in refused(tmp_path, tmp_path / "out").problem


def test_pickled_weights_are_found_by_their_index_too(tmp_path):
    state = network().state_dict()
    where = {name: f"pytorch_model-0000{1 + at % 2}-of-00002.bin" for at, name in enumerate(state)}
    for file in set(where.values()):
        torch.save({name: x for name, x in state.items() if where[name] == file}, tmp_path / file)
    write_index(tmp_path / "pytorch_model.bin.index.json", where)

    convert(tmp_path, tmp_path / "out")
    assert_same_tensors(weights_of(tmp_path / "out"), state)


@pytest.mark.parametrize("named", [True, False])
def test_the_second_optimizer_s_names_are_those_of_the_second_model_or_places(tmp_path, named):
    models = [network(), network(seed=1)]
    for at, model in enumerate(models):
        parameters = model.named_parameters() if named else model.parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        steps(model, optimizer, 1)
        end = f"_{at}" if at else ""
        save_file(model.state_dict(), tmp_path / f"model{end}.safetensors")
        torch.save(optimizer.state_dict(), tmp_path / f"optimizer{end}.bin")
    convert(tmp_path, tmp_path / "out")
    names = slices.parameter_names(models) if named else {}

    stored = {name for name in inspect(tmp_path / "out").tensors if name.startswith("optimizer")}
    assert stored == {
        f"optimizer{f'_{at}' if at else ''}/momentum_buffer.{names.get(id(x), f'param_groups.0.{place}')}"
        for at, model in enumerate(models)
        for place, x in enumerate(model.parameters())
    }


def write_index(path, where):
    import json

    path.write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("damage", [lambda x: x[:-5], lambda x: b"\xff" * 8 + x[8:], lambda x: b""])
def test_damaged_safetensors_are_an_error_of_ours(tmp_path, damage):
    save_file(network().state_dict(), tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert refused(tmp_path, tmp_path / "out").code == "D0723"


def test_one_rank_s_part_of_a_model_is_refused(tmp_path):
    torch.save({}, tmp_path / "pytorch_model_fsdp_0_rank1.bin")
    assert refused(tmp_path, tmp_path / "out").code == "D0724"


def fsdp2_rank(folder, kind):
    """Train under FSDP2 and save with Accelerate's own functions; returns what it would be as a whole."""
    import warnings

    warnings.simplefilter("ignore")
    import torch.distributed as dist
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind, auto_wrap_policy="NO_WRAP")
    PartialState(cpu=True)
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = adamw(model)
    steps(model, optimizer, 3)
    accelerator = types.SimpleNamespace(process_index=dist.get_rank(), num_processes=dist.get_world_size())
    save_fsdp_model(plugin, accelerator, model, folder)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    dist.destroy_process_group()
    return whole


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2_checkpoints_of_accelerate_on_two_ranks_convert_and_resume(tmp_path, kind):
    pytest.importorskip("accelerate", reason="needs Hugging Face's accelerate: pip install accelerate")
    weights, state = run_ranks(fsdp2_rank, 2, str(tmp_path / "a"), kind)[0]

    made = convert(tmp_path / "a", tmp_path / "out")
    model, optimizer = resumed(tmp_path / "out")

    assert (made.kind, made.step) == ("accelerate", 3)
    assert_same_tensors(model.state_dict(), weights)
    for name, parameter in model.named_parameters():
        assert_same_tensors(optimizer.state[parameter], state["state"][name])


# torch.distributed.checkpoint


def write_dcp(path, value):
    dcp.save(value, checkpoint_id=path, no_dist=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_directory_of_dcp_converts_and_resumes(tmp_path):
    model, optimizer = trained()
    write_dcp(tmp_path / "a", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 4})

    made = convert(tmp_path / "a", tmp_path / "out")

    assert (made.kind, made.step) == ("torch.distributed.checkpoint", 4)
    assert_goes_on_alike(resumed(tmp_path / "out"), (model, optimizer))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metadata_that_name_anything_else_are_refused_by_name_and_not_run(tmp_path):
    write_dcp(tmp_path / "a", {"model": network().state_dict()})
    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "run")))
    error = refused(tmp_path / "a", tmp_path / "out", allow_pickle=True)

    assert (error.code, "posix.mkdir" in error.problem) == ("D0722", True)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_pieces_of_dcp_are_not_unpickled_either(tmp_path):
    write_dcp(tmp_path / "a", {"model": network().state_dict(), "x": Bomb(tmp_path / "run")})
    assert refused(tmp_path / "a", tmp_path / "out").code == "D0722"
    assert not (tmp_path / "run").exists()


def change_metadata(path, change):
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def lead_outside(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../__0_0.distcp"


def lose_a_piece(metadata):
    metadata.storage_data.popitem()


def overlap(metadata):
    chunks = metadata.state_dict_metadata["model.0.weight"].chunks
    chunks.append(chunks[0])


def swap_two(metadata):
    data = list(metadata.storage_data)
    a, b = (next(x for x in data if x.fqn == name) for name in ("model.0.weight", "model.2.weight"))
    metadata.storage_data[a], metadata.storage_data[b] = metadata.storage_data[b], metadata.storage_data[a]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", [lead_outside, lose_a_piece, overlap, swap_two])
def test_metadata_that_contradict_themselves_or_the_files_are_refused(tmp_path, change):
    write_dcp(tmp_path / "a", {"model": network().state_dict()})
    shutil.copy(tmp_path / "a" / "__0_0.distcp", tmp_path)
    change_metadata(tmp_path / "a", change)
    assert refused(tmp_path / "a", tmp_path / "out").code == "D0723"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_truncated_file_of_dcp_is_an_error_of_ours(tmp_path, name):
    write_dcp(tmp_path / "a", {"model": network().state_dict()})
    data = (tmp_path / "a" / name).read_bytes()
    (tmp_path / "a" / name).write_bytes(data[: len(data) // 2])
    assert refused(tmp_path / "a", tmp_path / "out").code == "D0723"


# DeepSpeed


def fake_deepspeed(monkeypatch):
    """Make modules of DeepSpeed's names, so that a pickle of ours names what its pickles name."""
    for module, name in (
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ):
        fake = types.ModuleType(module)
        kind = type(
            name, (), {"__module__": module, "__init__": lambda self, value: setattr(self, "value", value)}
        )
        kind.__reduce__ = lambda self: (type(self), (self.value,))
        setattr(fake, name, kind)
        for parent in accumulate(module.split(".")[:-1], "{}.{}".format):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module, fake)
    return lambda stage: sys.modules["deepspeed.runtime.zero.config"].ZeroStageEnum(stage)


def write_zero(folder, model, optimizer, stage, world_size, enum, *, aligned=1):
    """Write what ZeRO writes of a model and an AdamW, as zero_to_fp32.py describes it."""
    names = {id(x): name for name, x in model.named_parameters()}
    groups = [group["params"] for group in optimizer.param_groups]
    shapes = [{names[id(x)]: x.shape for x in group} for group in groups]
    folder.mkdir(parents=True)
    for rank in range(world_size):
        flats = {
            key: [flat(group, key, optimizer, stage, rank, world_size, aligned) for group in groups]
            for key in (None, "exp_avg", "exp_avg_sq")
        }
        base = {
            "state": {
                at: {
                    "step": torch.tensor(3.0),
                    "exp_avg": flats["exp_avg"][at],
                    "exp_avg_sq": flats["exp_avg_sq"][at],
                }
                for at in range(len(groups))
            },
            "param_groups": [
                {**{k: v for k, v in group.items() if k != "params"}, "params": [at]}
                for at, group in enumerate(optimizer.param_groups)
            ],
        }
        keys = (
            ("fp32_flat_groups", "optimizer_state_dict")
            if stage == 3
            else ("single_partition_of_fp32_groups", "base_optimizer_state")
        )
        gaps = [[-x.numel() % aligned for x in group] for group in groups]
        state = {
            "zero_stage": enum(stage),
            **({"param_alignment_paddings": gaps} if stage < 3 else {}),
            "partition_count": world_size,
            keys[0]: flats[None],
            keys[1]: base,
        }
        torch.save(
            {"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    buffers = [name for name, _ in model.named_buffers()]
    for rank in range(world_size if stage == 3 else 1):
        module = {
            n: torch.empty(0) if stage == 3 and n not in buffers else x for n, x in model.state_dict().items()
        }
        head = {
            "module": module,
            "buffer_names": buffers,
            "param_shapes": shapes,
            "global_steps": 4,
            "skipped_steps": 1,
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        torch.save(head, folder / f"{name}_model_states.pt")
    (folder.parent / "latest").write_text(folder.name)


def flat(group, key, optimizer, stage, rank, world_size, aligned):
    each = [(x.detach() if key is None else optimizer.state[x][key]).reshape(-1) for x in group]
    if stage == 3:
        return torch.cat([padded(x, world_size).chunk(world_size)[rank] for x in each])
    each = [padded(x, aligned) for x in each]
    return padded(torch.cat(each), 2 * world_size).chunk(world_size)[rank].clone()


def padded(x, multiple):
    return torch.cat([x, x.new_full((-len(x) % multiple,), torch.nan)])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_gaps_between_aligned_parameters_of_zero_are_left_out(tmp_path, monkeypatch, world_size):
    model, optimizer = trained()
    enum = fake_deepspeed(monkeypatch)
    write_zero(tmp_path / "a" / "global_step3", model, optimizer, 2, world_size, enum, aligned=8)

    convert(tmp_path / "a", tmp_path / "out")
    assert_same_state(resumed(tmp_path / "out"), (model, optimizer))


def test_an_order_that_deepspeed_has_dealt_parameters_out_in_does_not_matter(tmp_path, monkeypatch):
    model, optimizer = trained()
    groups = [{**group, "params": group["params"][::-1]} for group in optimizer.param_groups]
    dealt = types.SimpleNamespace(param_groups=groups, state=optimizer.state)
    write_zero(tmp_path / "a" / "global_step3", model, dealt, 2, 2, fake_deepspeed(monkeypatch))

    convert(tmp_path / "a", tmp_path / "out")
    assert_same_state(resumed(tmp_path / "out"), (model, optimizer))


def test_what_deepspeed_writes_without_zero_converts_and_resumes(tmp_path):
    model, optimizer = trained()
    (tmp_path / "a").mkdir()
    head = {"module": model.state_dict(), "optimizer": optimizer.state_dict(), "global_steps": 3}
    torch.save(head, tmp_path / "a" / "mp_rank_00_model_states.pt")

    assert convert(tmp_path / "a", tmp_path / "out").left_out == ()
    assert_same_state(resumed(tmp_path / "out"), (model, optimizer))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_zero_checkpoints_convert_and_resume(tmp_path, monkeypatch, stage, world_size):
    model, optimizer = trained()
    write_zero(
        tmp_path / "a" / "global_step3", model, optimizer, stage, world_size, fake_deepspeed(monkeypatch)
    )

    made = convert(tmp_path / "a", tmp_path / "out")

    assert (made.kind, made.step) == ("deepspeed", 3)
    assert_goes_on_alike(resumed(tmp_path / "out"), (model, optimizer))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "D0723"),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "D0723"),
        ("mp_rank_00_model_states.pt", "D0723"),
    ],
)
def test_a_missing_file_of_zero_is_noticed(tmp_path, monkeypatch, name, code):
    write_zero(tmp_path / "a" / "global_step3", *trained(), 2, 2, fake_deepspeed(monkeypatch))
    (tmp_path / "a" / "global_step3" / name).unlink()
    assert refused(tmp_path / "a", tmp_path / "out").code == code


def test_a_model_divided_by_other_means_than_zero_is_refused(tmp_path, monkeypatch):
    write_zero(tmp_path / "a" / "global_step3", *trained(), 2, 1, fake_deepspeed(monkeypatch))
    file = tmp_path / "a" / "global_step3" / "mp_rank_00_model_states.pt"
    shutil.copy(file, file.with_name("mp_rank_01_model_states.pt"))
    assert refused(tmp_path / "a", tmp_path / "out").code == "D0724"


def test_other_objects_in_a_checkpoint_of_zero_are_refused_and_not_run(tmp_path, monkeypatch):
    write_zero(tmp_path / "a" / "global_step3", *trained(), 2, 1, fake_deepspeed(monkeypatch))
    file = tmp_path / "a" / "global_step3" / "mp_rank_00_model_states.pt"
    torch.save({"module": {}, "x": Bomb(tmp_path / "run")}, file)
    assert refused(tmp_path / "a", tmp_path / "out").code == "D0722"
    assert not (tmp_path / "run").exists()


def test_latest_cannot_lead_outside(tmp_path, monkeypatch):
    write_zero(tmp_path / "b" / "global_step3", *trained(), 2, 1, fake_deepspeed(monkeypatch))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latest").write_text("../b/global_step3")
    assert refused(tmp_path / "a", tmp_path / "out").code == "D0723"


def test_accelerate_s_directory_with_deepspeed_s_in_it_is_read_as_one(tmp_path, monkeypatch):
    model, optimizer = trained()
    write_zero(tmp_path / "a" / "pytorch_model", model, optimizer, 2, 2, fake_deepspeed(monkeypatch))
    torch.save({"value": 1}, tmp_path / "a" / "custom_checkpoint_0.pkl")

    made = convert(tmp_path / "a", tmp_path / "out")

    assert made.kind == "accelerate"
    assert_same_state(resumed(tmp_path / "out"), (model, optimizer))
    with open_checkpoint(tmp_path / "out", ALONE) as reader:
        assert reader.custom == [{"value": 1}]


class Frozen(nn.Module):
    """Tied weights, a frozen parameter, a buffer, and nothing that two ranks could halve."""

    def __init__(self):
        super().__init__()
        self.a, self.tied = nn.Linear(7, 13), nn.Linear(7, 13, bias=False)
        self.tied.weight = self.a.weight
        self.norm, self.b, self.c = nn.LayerNorm(13), nn.Linear(13, 11), nn.Linear(11, 1)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        return self.c(self.b(self.norm(self.a(x) + self.tied(x))))


def deepspeed_rank(folder, stage, options):
    """Train with DeepSpeed itself, and beside it one process with all data; returns the latter's state."""
    import warnings

    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    torch.manual_seed(0)
    model, alone = Frozen(), Frozen()
    alone.load_state_dict(model.state_dict())
    reference = adamw_of_trained(alone)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **options},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw_of_trained(model), config=config)
    for step in range(3):
        data = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(data[torch.distributed.get_rank() * 4 :][:4]).square().mean())
        engine.step()
        reference.zero_grad()
        alone(data).square().mean().backward()
        reference.step()
    engine.save_checkpoint(folder)
    torch.distributed.destroy_process_group()
    state = {name: dict(reference.state[x]) for name, x in alone.named_parameters() if x in reference.state}
    return alone.state_dict(), state


def adamw_of_trained(model):
    trained = [x for x in model.parameters() if x.requires_grad]
    groups = [[x for x in trained if (x.ndim > 1) is wide] for wide in (True, False)]
    return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2)


@pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="needs deepspeed: pip install deepspeed"
)
@pytest.mark.parametrize(
    ("stage", "options"),
    [(0, {}), (1, {}), (2, {}), (3, {}), (2, {"round_robin_gradients": True}), (3, {"sub_group_size": 60})],
)
def test_what_deepspeed_itself_wrote_equals_one_process_and_loads(tmp_path, stage, options):
    weights, state = run_ranks(deepspeed_rank, 2, str(tmp_path / "a"), stage, options, timeout_s=110)[0]

    made = convert(tmp_path / "a", tmp_path / "out")
    model = Frozen()
    optimizer = adamw_of_trained(model)
    resume(tmp_path / "out", model, optimizer)

    assert made.step == 3
    for name, value in weights.items():  # sums of two ranks' gradients round otherwise than one process's
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        for key, value in state.get(name, {}).items():
            torch.testing.assert_close(optimizer.state[parameter][key], value, rtol=0, atol=1e-6)


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_changed_bit_of_a_weight_is_noticed_where_the_source_has_checksums(tmp_path):
    weight = torch.randn(50, 50)
    torch.save({"w": weight}, tmp_path / "a.pt")
    write_dcp(tmp_path / "dcp", {"w": weight})
    for source, file in (("a.pt", "a.pt"), ("dcp", "dcp/__0_0.distcp")):
        at = (tmp_path / file).read_bytes().index(weight.numpy().tobytes())
        flip(tmp_path / file, at + 77)

        assert refused(tmp_path / source, tmp_path / "out").code == "D0723"
        convert(tmp_path / source, tmp_path / f"{source}-out", verify=False)
        assert int((weights_of(tmp_path / f"{source}-out")["w"] != weight).sum()) == 1


def damaged(data, random):
    """A copy of some bytes that is cut, changed in a few places, or has some more in the middle."""
    data, kind, at = bytearray(data), random.random(), random.randrange(len(data))
    if kind < 0.3:
        return data[:at]
    if kind < 0.4:
        return data[:at] + random.randbytes(3) + data[at:]
    for _ in range(random.choice((1, 1, 8))):
        data[random.randrange(min(len(data), random.choice((500, 4000, len(data)))))] = random.randrange(256)
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "new.pt",
        "old.pt",
        "dcp/.metadata",
        "dcp/__0_0.distcp",
        "accelerate/model.safetensors",
        "accelerate/optimizer.bin",
        "zero/global_step3/mp_rank_00_model_states.pt",
        "zero/global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ],
)
def test_whatever_happened_to_a_file_the_error_is_ours_and_nothing_is_left(tmp_path, monkeypatch, name):
    model, optimizer = trained(1)
    both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(both, tmp_path / "new.pt")
    torch.save(both, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    write_dcp(tmp_path / "dcp", both)
    (tmp_path / "accelerate").mkdir()
    save_file(both["model"], tmp_path / "accelerate" / "model.safetensors")
    torch.save(both["optimizer"], tmp_path / "accelerate" / "optimizer.bin")
    write_zero(tmp_path / "zero" / "global_step3", model, optimizer, 2, 2, fake_deepspeed(monkeypatch))
    source, out, random = tmp_path / name.partition("/")[0], tmp_path / "out", Random(0)
    good = (tmp_path / name).read_bytes()
    codes = set()
    for _ in range(40):
        (tmp_path / name).write_bytes(damaged(good, random))
        try:
            convert(source, out, durable=False)
            shutil.rmtree(out)  # the damage was where nothing is read from
        except CheckpointError as error:
            codes.add(error.code)
        assert not out.exists()
    assert "D0723" in codes
    assert codes <= {"D0715", "D0721", "D0722", "D0723", "D0724"}


def test_a_bomb_is_one(tmp_path):
    torch.load(io.BytesIO(saved_bomb(tmp_path / "run")), weights_only=False)
    assert (tmp_path / "run").exists()


def saved_bomb(path):
    buffer = io.BytesIO()
    torch.save(Bomb(path), buffer)
    return buffer.getvalue()
