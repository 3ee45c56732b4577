"""Registered objects whose state only pickle can store: refused, or stored and opened when the caller says so twice."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from distrib_launcher.cli import run as cli
from torch import nn

from distrib import Accelerator, CheckpointError
from distrib.checkpoint import inspect, open_checkpoint, verify
from distrib.checkpoint.codec import decode
from distrib.checkpoint.commands import open_alone
from distrib.checkpoint.compare import differences
from tests.unit.checkpointing import ALONE


class Plan:
    """A value that is no part of JSON."""

    def __init__(self, name: str) -> None:
        self.name = name


class Keeper:
    """An object with any state."""

    def __init__(self, state) -> None:
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state) -> None:
        self.state = state


class Trap:
    """Whoever opens its pickle makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def started(folder: Path, *states) -> tuple[Accelerator, list[Keeper]]:
    accelerator = Accelerator(cpu=True, project_dir=folder, seed=0)
    model = nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    keepers = [Keeper(x) for x in states]
    accelerator.register_for_checkpointing(*keepers)
    return accelerator, keepers


def trapped(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with a trap in it, and the directory that opening it would make."""
    sprung = tmp_path / "sprung"
    path = started(tmp_path, {"x": Trap(str(sprung))})[0].save_state("trap", allow_pickle=True).path
    assert isinstance(path, Path)
    return path, sprung


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_by_default_such_a_state_is_refused_with_object_path_and_option(tmp_path: Path) -> None:
    accelerator, _ = started(tmp_path, {"n": 1}, {"plan": Plan("a")})
    with pytest.raises(CheckpointError) as refused:
        accelerator.save_state()
    error = refused.value
    assert error.code == "D0709"
    assert "registered object 1 (tests.unit.test_checkpoint_pickle.Keeper)" in error.problem
    assert "custom[1]['plan'] is a tests.unit.test_checkpoint_pickle.Plan" in error.problem
    assert "save_state(allow_pickle=True)" in str(error.fix)
    assert not (tmp_path / "checkpoints").exists()


def test_with_the_option_twice_it_comes_back(tmp_path: Path) -> None:
    started(tmp_path, {"n": 1}, {"plan": Plan("a"), "t": torch.ones(3)})[0].save_state(allow_pickle=True)
    accelerator, (plain, keeper) = started(tmp_path, None, None)
    accelerator.load_state(allow_pickle=True)
    assert plain.state == {"n": 1}
    assert (keeper.state["plan"].name, keeper.state["t"].tolist()) == ("a", [1, 1, 1])


def test_a_state_that_needs_no_pickle_is_none_also_with_the_option(tmp_path: Path) -> None:
    path = started(tmp_path, {"n": 1, "t": torch.ones(5000)})[0].save_state(allow_pickle=True).path
    assert inspect(path).pickles() == []
    accelerator, (keeper,) = started(tmp_path, None)
    accelerator.load_state(path)
    assert keeper.state["t"].shape == (5000,)


def test_it_lies_in_a_file_of_its_own_that_the_manifest_lists(tmp_path: Path) -> None:
    path = started(tmp_path, {"plan": Plan("a" * 100)})[0].save_state(allow_pickle=True).path
    manifest = inspect(path)
    (name,) = manifest.pickles()
    (part,) = manifest.tensors[name].slices
    assert name == "pickled/0.tests.unit.test_checkpoint_pickle.Keeper"
    assert [x for x in manifest.files if x.startswith("pickled/")] == [part.file]
    holders = [x for x in manifest.files if b"a" * 100 in (path / x).read_bytes()]
    assert holders == [part.file]

    data = bytearray((path / part.file).read_bytes())
    data[part.offset + 20] ^= 1
    (path / part.file).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"D0706.*{name}"):
        verify(path)


def test_a_load_without_the_option_names_object_and_option_and_opens_nothing(tmp_path: Path) -> None:
    path, sprung = trapped(tmp_path)
    accelerator, (keeper,) = started(tmp_path, "before")
    weight = accelerator._run.models[0].weight.detach().clone()
    with pytest.raises(CheckpointError) as refused:
        accelerator.load_state(path)
    assert refused.value.code == "D0761"
    assert "registered object 0 (tests.unit.test_checkpoint_pickle.Keeper)" in refused.value.problem
    assert "load_state(allow_pickle=True)" in str(refused.value.fix)
    assert (keeper.state, sprung.exists()) == ("before", False)
    assert torch.equal(accelerator._run.models[0].weight, weight)

    accelerator.load_state(path, allow_pickle=True)
    assert sprung.exists()


def test_a_pickle_that_no_object_takes_is_not_opened_even_with_the_option(tmp_path: Path) -> None:
    path, sprung = trapped(tmp_path)
    started(tmp_path)[0].load_state(path, strict=False, allow_pickle=True)
    assert not sprung.exists()


def test_an_object_whose_class_is_made_in_a_function_is_stored_too(tmp_path: Path) -> None:
    class Inner(Keeper):
        pass

    keepers = [Inner({"plan": Plan("a")}), Inner(None)]
    accelerators = [Accelerator(cpu=True, project_dir=tmp_path) for _ in keepers]
    for accelerator, keeper in zip(accelerators, keepers, strict=True):
        accelerator.register_for_checkpointing(keeper)
    accelerators[0].save_state("c", allow_pickle=True)
    accelerators[1].load_state("c", allow_pickle=True)
    assert keepers[1].state["plan"].name == "a"


def test_a_damaged_pickle_is_not_opened_even_if_checks_are_left_out(tmp_path: Path) -> None:
    path, sprung = trapped(tmp_path)
    manifest = inspect(path)
    (part,) = manifest.tensors[manifest.pickles()[0]].slices
    data = (path / part.file).read_bytes()
    (path / part.file).write_bytes(data.replace(b"sprung", b"spring"))
    accelerator, _ = started(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"D0706.*the pickle of registered object 0"):
        accelerator.load_state(path, allow_pickle=True, verify=False)
    assert [sprung.exists(), (tmp_path / "spring").exists()] == [False, False]


def test_no_command_and_no_reader_opens_a_pickle_and_show_marks_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, sprung = trapped(tmp_path)
    for words in (["ls", "."], ["verify", "trap"], ["diff", "trap", "trap"], ["export", "trap", "out"]):
        assert cli(["checkpoint", *words], {}) == 0
    capfd.readouterr()
    assert cli(["checkpoint", "show", "trap"], {}) == 0
    text = capfd.readouterr().out
    assert cli(["checkpoint", "show", "trap", "--json"], {}) == 0
    found = json.loads(capfd.readouterr().out)
    with open_checkpoint(path, ALONE) as reader:
        assert repr(reader.custom[0]).startswith("<pickle pickled/0.")
    assert not sprung.exists()

    name = "0.tests.unit.test_checkpoint_pickle.Keeper"
    row = next(line for line in text.splitlines() if line.startswith(f"pickled/{name}"))
    assert row.split()[2] == "pickle"
    assert "pickles of registered objects" in text
    assert text.splitlines()[-1].split()[0] == name
    assert found["pickles"] == [f"pickled/{name}"]


def test_diff_tells_that_pickles_differ_without_opening_them(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        paths.append(started(tmp_path, {"plan": Plan(name)})[0].save_state(name, allow_pickle=True).path)
    with open_alone(paths[0]) as a, open_alone(paths[1]) as b:
        found = [x for x in differences(a, b) if "random" not in x]
    assert len(found) == 1
    assert found[0].startswith("setting: custom[0] <pickle pickled/0.")


def test_a_state_that_cannot_be_pickled_either_is_refused(tmp_path: Path) -> None:
    accelerator, _ = started(tmp_path, {"lock": threading.Lock()})
    with pytest.raises(CheckpointError, match=r"D0760.*registered object 0.*cannot be pickled either"):
        accelerator.save_state(allow_pickle=True)


def test_a_pickle_whose_class_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(tmp_path, {"plan": Plan("a")})[0].save_state(allow_pickle=True)
    accelerator, (keeper,) = started(tmp_path, "before")
    monkeypatch.delattr("tests.unit.test_checkpoint_pickle.Plan")
    with pytest.raises(CheckpointError, match=r"D0762.*registered object 0.*Plan"):
        accelerator.load_state(allow_pickle=True)
    assert keeper.state == "before"


def test_a_pickle_that_is_said_to_lie_among_the_weights_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"D0702.*outside pickled/"):
        decode({"$": "pickle", "v": "model/weight"}, "x", lambda name: torch.zeros(1))


def test_a_scheduler_is_never_pickled(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    scheduler.plan = Plan("a")
    accelerator.prepare(model, optimizer, scheduler)
    with pytest.raises(CheckpointError, match=r"D0709.*scheduler 0"):
        accelerator.save_state(allow_pickle=True)
