"""Functions of the script that take part in a save or a load: what they take over, and what they add."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

from distrib import Accelerator, CheckpointError
from distrib.checkpoint import inspect, latest, retain, verify
from distrib.checkpoint.hooks import Hooks, Weights, run_save_hooks
from distrib.checkpoint.storage import Storage
from distrib.state import ShardedState
from tests.unit.checkpointing import ALONE, rows, slice_of


class Pair:
    """Two models under one optimizer, which has stepped once."""

    def __init__(self, folder: Path | str, seed: int = 0) -> None:
        self.accelerator = Accelerator(cpu=True, project_dir=folder, seed=0)
        torch.manual_seed(seed)
        one, two = nn.Linear(3, 4), nn.Linear(4, 2)
        optimizer = torch.optim.AdamW([*one.parameters(), *two.parameters()])
        self.one, self.two, self.optimizer = self.accelerator.prepare(one, two, optimizer)
        self.two(self.one(torch.ones(1, 3))).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def values(self) -> list[torch.Tensor]:
        return [x.detach().clone() for x in (self.one.weight, self.two.weight)]

    def moments(self) -> list[torch.Tensor]:
        state = self.optimizer.optimizer.state
        return [state[x]["exp_avg"] for x in (self.one.weight, self.two.weight)]


def models_in(path: Path) -> set[str]:
    return {name.partition("/")[0] for name in inspect(path).tensors if name.startswith("model")}


def save_second_by_hand(models, weights, output_dir: str) -> None:
    torch.save(models[1].state_dict(), Path(output_dir) / "two.pt")
    weights.pop()


def load_second_by_hand(models, input_dir: str) -> None:
    models.pop().load_state_dict(torch.load(Path(input_dir) / "two.pt", weights_only=True))


@pytest.mark.parametrize("place", ["directory", "url"])
def test_a_model_that_hooks_save_and_load_comes_back_by_them_and_the_rest_by_us(
    tmp_path: Path, place: str
) -> None:
    target = "memory://hooks/best" if place == "url" else str(tmp_path / "best")
    saved = Pair(tmp_path)
    saved.accelerator.register_save_state_pre_hook(save_second_by_hand)
    path = saved.accelerator.save_state(target).wait()

    loaded = Pair(tmp_path, seed=1)
    loaded.accelerator.register_load_state_pre_hook(load_second_by_hand)
    loaded.accelerator.load_state(target)

    assert models_in(path) == {"model"}
    assert all(map(torch.equal, loaded.values, saved.values))
    assert all(map(torch.equal, loaded.moments(), saved.moments()))
    fsspec.filesystem("memory").store.clear()


def test_what_a_hook_writes_is_a_checksummed_part_of_the_checkpoint(tmp_path: Path) -> None:
    run, seen = Pair(tmp_path), []

    def hook(models, weights, output_dir: str) -> None:
        folder = Path(output_dir)
        seen.append((folder.name, list(folder.iterdir())))
        (folder / "unet" / "inner").mkdir(parents=True)
        (folder / "unet" / "inner" / "config.json").write_text("{}")
        (folder / "README.md").write_text("")

    run.accelerator.register_save_state_pre_hook(hook)
    path = run.accelerator.save_state().path
    assert isinstance(path, Path)

    assert seen == [(path.name, [])]
    assert (path / "unet" / "inner" / "config.json").read_text() == "{}"
    assert (path / "README.md").read_text() == ""
    verify(path)
    (path / "unet" / "inner" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"D0706.*unet/inner/config\.json"):
        verify(path)


def test_a_background_save_has_the_hooks_files_and_retention_removes_them(tmp_path: Path) -> None:
    run = Pair(tmp_path)
    run.accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: Path(folder, "a.txt").write_text("a")
    )
    path = run.accelerator.save_state(tmp_path / "runs" / "step-1", blocking=False).wait()
    assert isinstance(path, Path)
    assert (path / "a.txt").read_text() == "a"
    run.accelerator.save_state(tmp_path / "runs" / "step-2")
    assert retain(tmp_path / "runs", 1) == [path]
    assert not path.exists()


@pytest.mark.parametrize("which", ["models", "weights"])
def test_a_model_taken_out_of_either_list_is_not_saved_and_the_others_keep_their_names(
    tmp_path: Path, which: str
) -> None:
    run = Pair(tmp_path)
    run.accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: {"models": models, "weights": weights}[which].pop(0)
    )
    path = run.accelerator.save_state().path
    assert models_in(path) == {"model_1"}
    assert run.accelerator._run.models == [run.one, run.two]
    assert {name.rpartition(".")[0] for name in inspect(path).tensors if name.startswith("optimizer")} >= {
        "optimizer/exp_avg",
        "optimizer/exp_avg.model_1",
    }


def test_weights_are_the_live_tensors_by_plain_names_and_cannot_be_changed(tmp_path: Path) -> None:
    run, found = Pair(tmp_path), []
    run.accelerator.register_save_state_pre_hook(lambda models, weights, folder: found.extend(weights))
    run.accelerator.save_state()
    first, second = found
    assert [list(first), list(second)] == [["weight", "bias"]] * 2
    assert first["weight"].data_ptr() == run.one.weight.data_ptr()
    assert [x in found for x in (first, second)] == [True, True]
    with pytest.raises(TypeError):
        first["weight"] = torch.zeros(1)


def test_a_durable_save_syncs_every_folder_of_a_hook_s_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, synced = Pair(tmp_path), []

    def hook(models, weights, folder) -> None:
        Path(folder, "a", "b", "c").mkdir(parents=True)
        Path(folder, "a", "b", "c", "x").write_text("x")

    monkeypatch.setattr(Storage, "sync_dir", lambda self, path: synced.append(path))
    run.accelerator.register_save_state_pre_hook(hook)
    run.accelerator.save_state(tmp_path / "best")
    (hidden,) = {x for x in synced if x.name.startswith(".best.tmp-")}
    inside = {x.relative_to(hidden).as_posix() for x in synced if x.is_relative_to(hidden)}
    assert inside >= {".", "a", "a/b", "a/b/c"}


def test_a_large_file_of_a_hook_comes_back_from_a_url_whole(tmp_path: Path) -> None:
    run, found = Pair(tmp_path), []
    data = bytes(range(256)) * 2**13 + b"end"
    run.accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: Path(folder, "big.bin").write_bytes(data)
    )
    run.accelerator.register_load_state_pre_hook(
        lambda models, folder: found.append((Path(folder).name, Path(folder, "big.bin").read_bytes()))
    )
    run.accelerator.save_state("memory://hooks/big")
    run.accelerator.load_state("memory://hooks/big")
    assert found == [("big", data)]
    fsspec.filesystem("memory").store.clear()


def test_a_removed_hook_is_called_no_more(tmp_path: Path) -> None:
    run, calls = Pair(tmp_path), []
    handles = [
        run.accelerator.register_save_state_pre_hook(lambda *_: calls.append("save")),
        run.accelerator.register_load_state_pre_hook(lambda *_: calls.append("load")),
    ]
    run.accelerator.save_state()
    run.accelerator.load_state()
    for handle in handles:
        handle.remove()
        handle.remove()
    run.accelerator.save_state()
    run.accelerator.load_state()
    assert calls == ["save", "load"]


def test_a_hook_that_fails_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    run = Pair(tmp_path)

    def broken(models, weights, folder) -> None:
        Path(folder, "half").write_text("x")
        raise ValueError("no adapter")

    run.accelerator.register_save_state_pre_hook(broken)
    with pytest.raises(CheckpointError, match=r"D0763.*broken failed: ValueError: no adapter"):
        run.accelerator.save_state()
    assert latest(tmp_path / "checkpoints") is None
    assert not (tmp_path / "checkpoints").exists()


def test_a_load_hook_that_fails_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    Pair(tmp_path).accelerator.save_state()
    run = Pair(tmp_path, seed=1)
    before, moments = run.values, [x.clone() for x in run.moments()]

    def broken(models, folder) -> None:
        raise ValueError("no adapter")

    run.accelerator.register_load_state_pre_hook(broken)
    with pytest.raises(CheckpointError, match=r"D0763.*load_state hook .*broken failed"):
        run.accelerator.load_state()
    assert all(map(torch.equal, run.values, before))
    assert all(map(torch.equal, run.moments(), moments))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("objects.json", "save_state's own"),
        ("manifest.json", "save_state's own"),
        ("model/rank-00000.safetensors", "save_state's own"),
        ("a b.txt", "a name that a checkpoint cannot have"),
        (".hidden", "a name that a checkpoint cannot have"),
    ],
)
def test_a_file_that_a_checkpoint_cannot_have_is_refused_by_name(
    tmp_path: Path, name: str, words: str
) -> None:
    run = Pair(tmp_path)

    def hook(models, weights, folder) -> None:
        Path(folder, name).parent.mkdir(exist_ok=True)
        Path(folder, name).write_text("x")

    run.accelerator.register_save_state_pre_hook(hook)
    with pytest.raises(CheckpointError, match=f"D0765.*{words}") as refused:
        run.accelerator.save_state()
    assert repr(name) in refused.value.problem
    assert not (tmp_path / "checkpoints").exists()


def test_a_link_that_a_hook_has_made_is_refused(tmp_path: Path) -> None:
    run = Pair(tmp_path)
    run.accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: Path(folder, "passwd").symlink_to("/etc/passwd")
    )
    with pytest.raises(CheckpointError, match=r"D0765.*'passwd'.*no regular file"):
        run.accelerator.save_state()


@pytest.mark.parametrize("which", ["models", "weights"])
def test_what_a_hook_puts_into_a_list_is_refused_not_ignored(tmp_path: Path, which: str) -> None:
    run = Pair(tmp_path)
    run.accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: {"models": models, "weights": weights}[which].__setitem__(
            0, nn.Linear(1, 1)
        )
    )
    with pytest.raises(CheckpointError, match=f"D0764.*into the list of {which}"):
        run.accelerator.save_state()


def test_a_model_taken_only_while_loading_stays_as_it_is(tmp_path: Path) -> None:
    saved = Pair(tmp_path)
    saved.accelerator.save_state()
    run = Pair(tmp_path, seed=1)
    before = run.values
    run.accelerator.register_load_state_pre_hook(lambda models, folder: models.pop(0))
    run.accelerator.load_state()
    assert torch.equal(run.one.weight, before[0])
    assert torch.equal(run.two.weight, saved.two.weight)
    assert all(map(torch.equal, run.moments(), saved.moments()))


def test_a_model_taken_only_while_saving_is_missing_at_load(tmp_path: Path) -> None:
    saved = Pair(tmp_path)
    saved.accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.pop())
    saved.accelerator.save_state()
    with pytest.raises(CheckpointError, match=r"D0708(.|\n)*missing: 'model_1/weight'"):
        Pair(tmp_path).accelerator.load_state()


def test_a_tensor_of_which_a_rank_holds_a_part_is_refused_as_a_weight() -> None:
    full = torch.arange(12.0).reshape(4, 3)
    state = ShardedState({"model/w": (slice_of("model/w", full, rows((4, 3), 0, 2)),)})
    with pytest.raises(CheckpointError, match=r"D0764.*only a part of 'w'"):
        Weights(state, "model/")["w"]


def test_a_tied_name_is_among_the_weights() -> None:
    full = torch.arange(3.0)
    state = ShardedState(
        {"model/w": (slice_of("model/w", full, rows((3,), 0, 1)),)}, {}, {"model/v": "model/w"}
    )
    weights = Weights(state, "model/")
    assert list(weights) == ["w", "v"]
    assert torch.equal(weights["v"], full)


def test_no_folder_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hooks = Hooks()
    hooks.add(lambda models, weights, folder: Path(folder, "a").write_text("words"))
    taken = run_save_hooks(hooks, [], ShardedState({}), "best", ALONE)
    assert list(tmp_path.iterdir()) == []
    assert bytes(taken.files["a"]) == b"words"


def test_what_a_save_hook_changes_in_a_registered_object_is_saved(tmp_path):
    class Counter:
        calls = 0

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    accelerator, counter = Accelerator(cpu=True), Counter()
    accelerator.register_for_checkpointing(counter)

    def count(models, weights, folder):
        counter.calls += 1

    accelerator.register_save_state_pre_hook(count)
    accelerator.save_state(tmp_path / "checkpoint")
    counter.calls = 0
    accelerator.load_state(tmp_path / "checkpoint")
    assert counter.calls == 1
