"""The examples and the README's commands, run as a user runs them."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distrib
from distrib import Accelerator
from distrib.errors import NotBuiltError
from tests.faults.launching import LIMIT_S, environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@dataclass(frozen=True)
class Run:
    """What a command that has ended well printed, without the ranks' names."""

    out: str
    err: str

    def numbers(self, pattern: str) -> list[tuple[float, ...]]:
        """Return the groups of every match, in order."""
        found = re.finditer(pattern, self.out)
        return [tuple(float(group) for group in match.groups()) for match in found]


def run(command: str, cwd: Path, **extra: str) -> Run:
    """Run a command as it would be typed; {examples} stands for their folder."""
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split(command.format(examples=EXAMPLES)),
        cwd=cwd,
        env=environment(PATH=bin_first, OMP_NUM_THREADS="1", **extra),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done.stdout.replace("[rank 0] ", ""), done.stderr)


# Digits

EPOCH = r"epoch (\d): test loss ([\d.]+), accuracy [\d.]+% \((\d+) of (\d+)\)"


@dataclass(frozen=True)
class Digits:
    """A run of four epochs on two processes, and one that stopped after two epochs on one and went on on two."""

    whole: Run
    begun: Run
    resumed: Run


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    one, other = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("stopped")
    return Digits(
        whole=run("distrib launch -n 2 --cpu {examples}/digits.py --epochs 4", one),
        begun=run("python {examples}/digits.py --epochs 2", other),
        resumed=run("distrib launch --config {examples}/digits.yaml {examples}/digits.py --epochs 4", other),
    )


def assert_same_epochs(found: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> None:
    """Losses in float32 differ by the order of additions; one image of 297 may fall on the other side."""
    for (epoch, loss, right, total), (true_epoch, true_loss, true_right, _) in zip(
        found, expected, strict=True
    ):
        assert (epoch, total) == (true_epoch, 297)
        assert loss == pytest.approx(true_loss, abs=2e-3)
        assert right == pytest.approx(true_right, abs=1)


def test_digits_learns_on_two_processes(digits: Digits):
    epochs = digits.whole.numbers(EPOCH)
    losses = [loss for _, loss, _, _ in epochs]
    assert [epoch for epoch, *_ in epochs] == [1, 2, 3, 4]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.25
    assert epochs[-1][2] > 0.93 * 297


def test_digits_learns_the_same_on_one_process_and_on_two(digits: Digits):
    assert_same_epochs(digits.begun.numbers(EPOCH), digits.whole.numbers(EPOCH)[:2])


def test_digits_goes_on_after_the_epoch_at_which_it_stopped(digits: Digits):
    assert "resumed after epoch 2, step 48\n" in digits.resumed.out
    assert "2 processes" in digits.resumed.err
    assert_same_epochs(digits.resumed.numbers(EPOCH), digits.whole.numbers(EPOCH)[2:])


# The same loop before and after


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("python {examples}/plain_loop.py", tmp_path_factory.mktemp("plain"))


def test_the_two_loops_differ_by_fewer_than_ten_lines():
    texts = [(EXAMPLES / name).read_text().splitlines() for name in ("plain_loop.py", "with_distrib.py")]
    changed = [line for line in difflib.ndiff(*texts) if line.startswith(("- ", "+ "))]
    assert 0 < len(changed) < 10


def test_the_plain_loop_learns(plain: Run):
    ((loss,),) = plain.numbers(r"final loss ([\d.]+)")
    assert 0 < loss < 0.1


def test_the_changed_loop_on_one_process_has_the_plain_loops_loss(plain: Run, tmp_path: Path):
    assert run("python {examples}/with_distrib.py", tmp_path).out == plain.out


def test_the_changed_loop_on_two_processes_has_the_plain_loops_loss(plain: Run, tmp_path: Path):
    found = run("distrib launch -n 2 --cpu {examples}/with_distrib.py", tmp_path)
    ((loss,),), ((expected,),) = (each.numbers(r"final loss ([\d.]+)") for each in (found, plain))
    assert "strategy ddp" in found.err
    assert loss == pytest.approx(expected, rel=1e-9)


# The small GPT

STEP = r"step +(\d+)/6  loss ([\d.]+)"
HELD_OUT = r"held-out loss ([\d.]+)"


@dataclass(frozen=True)
class Gpt:
    """Six steps on one process, with a checkpoint after the fourth, from which two processes go on."""

    folder: Path
    whole: Run
    resumed: Run


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Gpt:
    folder = tmp_path_factory.mktemp("gpt")
    corpus = folder / "corpus"
    corpus.mkdir()
    for name in ("argparse.py", "inspect.py"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, corpus)
    words = "{examples}/gpt.py --steps 6 --save-every 4 --log-every 1 --corpus corpus"
    config = str(EXAMPLES / "gpt.yaml")
    whole = run(f"python {words}", folder, DISTRIB_CONFIG_FILE=config)
    return Gpt(folder, whole, run(f"distrib launch --config {config} {words}", folder))


def test_gpt_learns(gpt: Gpt):
    steps = gpt.whole.numbers(STEP)
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1][1] < steps[0][1] - 1


def test_gpt_goes_on_in_mid_epoch_on_two_processes_with_the_losses_of_one(gpt: Gpt):
    assert re.search(r"resumed from .*/step-00000004 at step 4\n", gpt.resumed.out)
    for found, expected in zip(gpt.resumed.numbers(STEP), gpt.whole.numbers(STEP)[4:], strict=True):
        assert found == pytest.approx(expected, abs=2e-3)
    assert gpt.resumed.numbers(HELD_OUT)[0] == pytest.approx(gpt.whole.numbers(HELD_OUT)[0], abs=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        "strategy=fsdp mesh.tensor=2",
        "strategy=fsdp mesh.context=2",
        pytest.param("strategy=fsdp activation_checkpointing=full", marks=pytest.mark.slow),
        pytest.param("strategy=ddp mesh.context=2", marks=pytest.mark.slow),
        pytest.param("strategy=deepspeed deepspeed.zero_stage=3", marks=pytest.mark.slow),
    ],
)
def test_gpt_trains_the_same_in_every_layout_by_its_settings_alone(gpt: Gpt, settings: str, tmp_path: Path):
    flags = " ".join(f"--set {each}" for each in [*settings.split(), f"project_dir={tmp_path}"])
    words = "{examples}/gpt.py --steps 6 --save-every 4 --log-every 1 --corpus corpus"
    found = run(f"distrib launch --config {EXAMPLES / 'gpt.yaml'} {flags} {words}", gpt.folder)
    for (number, loss), (_, expected) in zip(found.numbers(STEP), gpt.whole.numbers(STEP), strict=True):
        assert loss == pytest.approx(expected, abs=2e-3), number
    assert found.numbers(HELD_OUT)[0] == pytest.approx(gpt.whole.numbers(HELD_OUT)[0], abs=2e-3)
    state = load_file(tmp_path / "model/model.safetensors")
    expected_state = load_file(gpt.folder / "runs/gpt/model/model.safetensors")
    assert {name: x.shape for name, x in state.items()} == {
        name: x.shape for name, x in expected_state.items()
    }


def test_gpts_export_fits_the_model(gpt: Gpt):
    spec = importlib.util.spec_from_file_location("gpt_example", EXAMPLES / "gpt.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.GPT()
    model.load_state_dict(load_file(gpt.folder / "runs/gpt/model/model.safetensors"), strict=True)
    text = torch.randint(256, (1, example.CONTEXT + 1))
    assert example.loss_of(model, text[:, :-1], text[:, 1:]).isfinite().all()


# The README

PREAMBLE = """
import argparse
import torch
from torch.utils.data import TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=3e-4)
lr = parser.parse_args().lr


class MyModel(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 4)


torch.manual_seed(0)
dataset = TensorDataset(torch.randn(200, 64), torch.randint(4, (200,)))
"""


def readme_block(language: str) -> str:
    """Return the code block of that language in the README's section "What it is"."""
    section = (ROOT / "README.md").read_text().split("\n## What it is\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return found


def readme_commands() -> list[str]:
    return [line.split(" #")[0].strip() for line in readme_block("bash").splitlines()]


def test_the_readme_shows_four_ways_to_start():
    starts = [command.split()[:2] for command in readme_commands()]
    assert starts == [
        ["python", "train.py"],
        ["distrib", "launch"],
        ["distrib", "launch"],
        ["torchrun", "--nproc-per-node"],
    ]


@pytest.mark.parametrize(
    ("index", "processes"), [(0, 1), (2, 2), (3, 2)], ids=["python", "config", "torchrun"]
)
def test_the_readmes_command_trains(tmp_path: Path, index: int, processes: int):
    (tmp_path / "train.py").write_text(PREAMBLE + readme_block("python").replace("3e-4", "lr"))
    (tmp_path / "run.yaml").write_text("device: cpu\nlaunch: {nproc_per_node: 2}\n")
    found = run(readme_commands()[index], tmp_path)
    assert f"{processes} process" in found.err
    steps = 3 * -(-200 // (32 * processes))
    assert (tmp_path / "checkpoints" / f"step-{steps:08d}" / "manifest.json").is_file()
    weights = load_file(tmp_path / "final" / "model.safetensors")
    assert {name: tuple(x.shape) for name, x in weights.items()} == {"weight": (4, 64), "bias": (4,)}


def test_the_page_of_examples_names_every_example():
    page = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.(?:py|yaml))\)", page)) == {
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")
    }


# The page for those who come from Accelerate


def migrating(section: str) -> str:
    return (ROOT / "docs" / "migrating.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]


def names_in(text: str) -> list[str]:
    return re.findall(r"`([a-z_A-Z]\w+)`", text)


def test_every_name_that_is_the_same_as_accelerates_exists():
    rows = migrating("The same names").split("\nOther names")[0].splitlines()
    for row in (row for row in rows if row.startswith("| ") and "for | names" not in row):
        _, about, names, _ = row.split("|")
        if "Accelerator" in about:
            known = set(inspect.signature(Accelerator.__init__).parameters)
        else:
            known = set(distrib.__all__ if about.strip() == "`distrib`" else dir(Accelerator))
        assert names_in(names)
        assert set(names_in(names)) <= known


def test_every_name_that_is_called_not_built_says_so():
    methods, functions, *_ = re.split(r"\n- ", migrating("Not built yet"))[1:]
    for name in names_in(methods):
        with pytest.raises(NotBuiltError):
            getattr(Accelerator(cpu=True), name)
    for name in set(names_in(functions)) - {"distrib", "init_empty_weights"}:
        with pytest.raises(NotBuiltError):
            getattr(distrib, name)
