from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from distrib_launcher.commands.checkpoint import _progress
from safetensors.torch import load_file

from distrib.checkpoint import inspect, save
from tests.arch.interpreter import HEAVY, asked
from tests.unit.checkpointing import ALONE, called, contents

WITHOUT_TORCH = """
import json, sys
from distrib_launcher.cli import run
code = run(%r, {})
print(json.dumps([code, [heavy for heavy in %r if heavy in sys.modules]]))
"""
TENSORS = {
    "model/a.weight": torch.arange(12.0).reshape(3, 4),
    "model/a.lora_A.default.weight": torch.ones(2, 4),
    "model_1/b": torch.ones(2),
    "optimizer/exp_avg.a.weight": torch.zeros(3, 4),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(path: str, step: int = 1, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    info = {"strategy": "Single", "config": {"seed": step}}
    return save(Path(path), contents(tensors or TENSORS, counters={"step": step}, info=info), ALONE)


def shown(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    code, out, err = called(capfd, *words)
    assert code == 0, err
    return out


def damage(path: Path, name: str) -> None:
    part = inspect(path).tensors[name].slices[0]
    data = bytearray((path / part.file).read_bytes())
    data[part.offset] ^= 1
    (path / part.file).write_bytes(data)


@pytest.mark.parametrize(
    "words", [["checkpoint", "--help"], ["checkpoint", "export", "--help"], ["checkpoint", "lss"]]
)
def test_help_and_wrong_usage_load_neither_torch_nor_numpy(tmp_path: Path, words: list[str]) -> None:
    code, heavy = asked(WITHOUT_TORCH % (words, HEAVY), tmp_path)
    assert (code, heavy) == (0 if "--help" in words else 2, [])


def test_the_commands_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(capfd)
    assert code == 2
    assert [line.split()[0] for line in err.split("Commands:\n")[1].splitlines()] == [
        "ls",
        "show",
        "verify",
        "diff",
        "export",
        "convert",
        "prune",
    ]


def test_an_unknown_command_is_named_with_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(capfd, "exprot")
    assert (code, "error[D0305]" in err, "did you mean 'export'" in err) == (2, True, True)


def test_the_checkpoints_of_a_run_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        saved(f"checkpoints/step-{step:08d}", step)
    (Path("checkpoints") / "step-00000001" / "loaders.json").unlink()

    lines = shown(capfd, "ls").splitlines()

    assert [line.split()[0] for line in lines] == ["checkpoint", "step-00000001", "step-00000002"]
    assert lines[1].endswith("loaders.json is missing")
    assert lines[2].endswith("complete")
    assert shown(capfd, "ls", "checkpoints").splitlines() == lines


def test_an_empty_folder_has_no_checkpoints_and_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    Path("checkpoints").mkdir()
    assert called(capfd, "ls") == (0, "", "no checkpoints in checkpoints\n")


def test_a_checkpoint_is_shown_for_people_and_for_programs(capfd: pytest.CaptureFixture[str]) -> None:
    saved("c", 5)
    text = shown(capfd, "show", "c")
    assert ("model/a.weight" in text, "  step " in text, "  seed  5" in text) == (True, True, True)
    assert json.loads(shown(capfd, "show", "c", "--json"))["tensors"]["model/a.weight"]["shape"] == [3, 4]


def test_what_is_no_checkpoint_is_an_error_in_the_usual_form(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["show", "nowhere"], ["ls", "nowhere"], ["prune", "nowhere", "--keep-last", "1"]):
        code, out, err = called(capfd, *words)
        assert (code, out) == (1, "")
        assert err.startswith("error[D0701]")
        assert "fix:" in err


def test_verify_names_every_damaged_tensor_and_goes_on_with_the_next_checkpoint(
    capfd: pytest.CaptureFixture[str],
) -> None:
    paths = [saved("a"), saved("b"), saved("c")]
    damage(paths[0], "model/a.weight")
    damage(paths[0], "optimizer/exp_avg.a.weight")
    (paths[1] / "manifest.json").write_text("{}")

    code, out, err = called(capfd, "verify", "a", "b", "c")

    assert (code, out) == (1, "a: 2 damaged\nb: 1 damaged\nc: ok\n")
    assert [line[:12] for line in err.splitlines() if line.startswith("error")] == [
        "error[D0706]",
        "error[D0706]",
        "error[D0701]",
    ]
    assert "'model/a.weight'" in err
    assert "'optimizer/exp_avg.a.weight'" in err


def test_verify_of_a_whole_checkpoint_succeeds(capfd: pytest.CaptureFixture[str]) -> None:
    saved("a")
    assert called(capfd, "verify", "a") == (0, "a: ok\n", "")


def test_diff_tells_by_its_exit_code_and_names_what_differs(capfd: pytest.CaptureFixture[str]) -> None:
    saved("a", 1)
    saved("b", 1)
    saved("c", 2, TENSORS | {"model_1/b": torch.zeros(2)})

    assert called(capfd, "diff", "a", "b") == (0, "a and b hold the same\n", "")
    assert called(capfd, "diff", "a", "c") == (
        1,
        "values: model_1/b 2 of 2 differ, by at most 1\n"
        "setting: counters.step 1 -> 2\nsetting: config.seed 1 -> 2\n",
        "",
    )


@pytest.mark.parametrize("words", [["diff", "a", "a"], ["export", "a", "out"]])
def test_a_damaged_checkpoint_is_neither_compared_nor_exported_unless_checks_are_left_out(
    capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    damage(saved("a"), "model/a.weight")
    code, _, err = called(capfd, *words)
    assert (code, "D0706" in err, Path("out").exists()) == (1, True, False)
    assert called(capfd, *words, "--no-verify")[0] == 0


@pytest.mark.parametrize("command", ["export", "merge"])
def test_the_first_model_is_exported_in_the_hugging_face_layout(
    capfd: pytest.CaptureFixture[str], folder: Path, command: str
) -> None:
    saved("a")
    Path("my.json").write_text('{"model_type": "x"}')

    out = shown(capfd, command, "a", "out", "--dtype", "bfloat16", "--config", "my.json")

    assert out == f"{folder / 'out'}\n"
    assert sorted(x.name for x in Path("out").iterdir()) == ["config.json", "model.safetensors"]
    assert Path("out/config.json").read_text() == '{"model_type": "x"}'
    found = load_file("out/model.safetensors")
    assert {name: x.dtype for name, x in found.items()} == dict.fromkeys(
        ["a.weight", "a.lora_A.default.weight"], torch.bfloat16
    )
    assert torch.equal(found["a.weight"].float(), TENSORS["model/a.weight"])


def test_shards_patterns_and_other_models_are_the_export_s(capfd: pytest.CaptureFixture[str]) -> None:
    saved("a")
    shown(capfd, "export", "a", "sharded", "--max-shard-size", "50B")
    shown(capfd, "export", "a", "some", "--include", "*.weight", "--include", "nothing")
    shown(capfd, "export", "a", "second", "--model", "1")

    assert len(list(Path("sharded").glob("model-*-of-00002.safetensors"))) == 2
    assert len(load_file("some/model.safetensors")) == 2
    assert list(load_file("second/model.safetensors")) == ["b"]


def test_an_adapter_is_exported_with_its_settings(capfd: pytest.CaptureFixture[str]) -> None:
    saved("a")
    Path("adapter_config.json").write_text("{}")
    shown(capfd, "export", "a", "out", "--format", "adapter", "--config", "adapter_config.json")

    assert sorted(x.name for x in Path("out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert list(load_file("out/adapter_model.safetensors")) == ["a.lora_A.weight"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--format", "adapter", "--max-shard-size", "1GB"], "D0308"),
        (["--adapter", "x"], "D0308"),
        (["--format", "adapter", "--adapter", "x"], "D0719"),
        (["--config", "nowhere.json"], "D0725"),
        (["--max-shard-size", "many"], "D0719"),
        (["--dtype", "int3"], "D0307"),
    ],
)
def test_an_export_that_makes_no_sense_is_refused_before_anything_is_written(
    capfd: pytest.CaptureFixture[str], words: list[str], code: str
) -> None:
    saved("a")
    status, out, err = called(capfd, "export", "a", "out", *words)
    assert (status != 0, out, code in err) == (True, "", True)
    assert not Path("out").exists()


def test_a_file_of_torch_save_is_converted_and_what_is_left_out_is_said(
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3}, "a.pt")

    code, out, err = called(capfd, "convert", "a.pt", "out", "--step", "9")

    assert (code, out, err) == (0, "out: from torch.save, step 9\n", "left out: 'epoch': not known\n")
    assert inspect("out").counters["step"] == 9
    assert called(capfd, "convert", "a.pt", "out")[2].startswith("error[D0726]")


def test_prune_keeps_the_newest_and_milestones(capfd: pytest.CaptureFixture[str], folder: Path) -> None:
    for step in (1, 2, 3, 4):
        saved(f"runs/step-{step:08d}", step)
    words = ["prune", "runs", "--keep-last", "1", "--keep-every", "2"]
    gone = [folder / "runs" / f"step-{step:08d}" for step in (1, 3)]

    dry = shown(capfd, *words, "--dry-run")
    assert dry.splitlines() == [*(f"would remove {x}" for x in gone), "would remove 2 checkpoints"]
    assert all(x.exists() for x in gone)

    assert shown(capfd, *words).splitlines() == [*(f"removed {x}" for x in gone), "removed 2 checkpoints"]
    assert sorted(x.name for x in Path("runs").iterdir()) == ["step-00000002", "step-00000004"]


LOSSES = (3.0, 1.0, 2.0, 4.0, 5.0)  # of steps 1 to 5


@pytest.fixture
def run_with_best(folder: Path) -> Path:
    """The checkpoints of a run that is set to keep the two with the smallest loss."""
    for step, loss in enumerate(LOSSES, 1):
        counters = {"step": step, "metrics": {"loss": loss}}
        info = {"config": {"checkpoint.keep_best": 2, "checkpoint.best_metric": "loss"}}
        save(folder / f"runs/step-{step:08d}", contents(TENSORS, counters=counters, info=info), ALONE)
    return folder / "runs"


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], [2, 3, 5]),
        (["--keep-best", "0"], [5]),
        (["--keep-best", "1"], [2, 5]),
        (["--best-mode", "max"], [4, 5]),
        (["--keep-best", "3", "--best-metric", "loss", "--best-mode", "min"], [1, 2, 3, 5]),
    ],
)
def test_prune_keeps_the_best_as_the_run_or_the_options_say(
    capfd: pytest.CaptureFixture[str], run_with_best: Path, words: list[str], steps: list[int]
) -> None:
    shown(capfd, "prune", "runs", "--keep-last", "1", *words)
    assert [int(x.name.removeprefix("step-")) for x in sorted(run_with_best.iterdir())] == steps


def test_prune_says_which_are_the_best(capfd: pytest.CaptureFixture[str], run_with_best: Path) -> None:
    lines = shown(capfd, "prune", "runs", "--keep-last", "1", "--dry-run").splitlines()
    best = [run_with_best / f"step-{step:08d}" for step in (2, 3)]
    assert lines[:2] == [f"keeping {path}, of the 2 best by loss (min)" for path in best]
    assert lines[-1] == "would remove 2 checkpoints"


@pytest.mark.parametrize(
    "words", [["--keep-best", "0", "--best-mode", "max"], ["--best-metric", "los"]], ids=["none", "misspelt"]
)
def test_prune_removes_nothing_while_the_best_are_not_clear(
    capfd: pytest.CaptureFixture[str], run_with_best: Path, words: list[str]
) -> None:
    code, _, err = called(capfd, "prune", "runs", "--keep-last", "1", *words)
    assert (code, "error[D0325]" in err, len(list(run_with_best.iterdir()))) == (2, True, len(LOSSES))


def test_prune_does_not_guess_by_which_metric(capfd: pytest.CaptureFixture[str]) -> None:
    saved("runs/step-00000001")
    code, _, err = called(capfd, "prune", "runs", "--keep-last", "1", "--keep-best", "1")
    assert (code, "error[D0325]" in err) == (2, True)


def test_prune_without_a_number_removes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    saved("runs/step-00000001")
    code, _, err = called(capfd, "prune", "runs")
    assert (code, "D0307" in err, Path("runs/step-00000001").exists()) == (2, True, True)


def test_progress_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    kept = os.dup(2)
    try:
        os.dup2(slave, 2)
        monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(slave), "w"))
        with _progress("verify a") as progress:
            progress(1, 2)
        sys.stderr.close()
    finally:
        os.dup2(kept, 2)
        for file in (kept, slave):
            os.close(file)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: all has been read, and nobody writes any more
        while part := os.read(master, 2**16):
            drawn += part
    os.close(master)
    assert b"verify a" in drawn
    assert b"50%" in drawn
