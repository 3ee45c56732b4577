"""At least two thousand faults, none of which may succeed in silence: `make test-all`; a sample runs in `make test`."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distrib.checkpoint import Contents, open_checkpoint, save, verify
from distrib.checkpoint.storage import Storage
from distrib.errors import CheckpointError
from distrib.state import ShardedState, whole
from tests.faults.test_checkpoint_faults import NthFails, contents, stored_value
from tests.unit.checkpointing import ALONE, on_ranks

SAMPLE, WHOLE = 150, 1800


def many(folder: Path) -> Path:
    """A checkpoint with tensors of several kinds, documents and random states."""
    draw = torch.Generator().manual_seed(0)
    tensors = {f"model/layer{k}.w": torch.randn(13, 7, generator=draw) for k in range(4)}
    tensors |= {
        f"optimizer/exp_avg.layer{k}.w": torch.randn(13, 7, generator=draw).bfloat16() for k in range(4)
    }
    state = ShardedState({name: (whole(name, x),) for name, x in tensors.items()}, {"optimizer": {"lr": 0.1}})
    custom = [{"ema": torch.randn(6000, generator=draw)}]
    return save(
        folder / "c", Contents(state=state, counters={"step": 3}, custom=custom), ALONE, durable=False
    )


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def damages(path: Path, count: int) -> Iterator[tuple[Path, str]]:
    """Damage one file at a time, and mend it when the caller comes back."""
    draw = random.Random(7)
    files = files_of(path)
    for number in range(count):
        file = draw.choice(files)
        good = file.read_bytes()
        kind = ("flip", "flip", "flip", "cut", "grow", "zero", "gone")[number % 7]
        at = draw.randrange(len(good) - 1)
        if kind == "flip":
            bad = bytearray(good)
            bad[at] ^= 1 << draw.randrange(8)
            file.write_bytes(bad)
        elif kind == "cut":
            file.write_bytes(good[:at])
        elif kind == "grow":
            file.write_bytes(good + b"\0" * (1 + at))
        elif kind == "zero":
            zeroed = good[:at] + b"\0" * (len(good) - at)
            file.write_bytes(zeroed if zeroed != good else good[:at])
        else:
            file.unlink()
        yield file, f"{kind} at {at} of {len(good)}"
        file.write_bytes(good)


def check_damages(folder: Path, count: int) -> None:
    path = many(folder)
    for file, what in damages(path, count):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path, ALONE).close()
        assert file.name in str(caught.value), f"{what}: {caught.value}"
    verify(path)


def test_a_sample_of_damages_is_found_and_named(tmp_path: Path) -> None:
    check_damages(tmp_path, SAMPLE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_damage_is_found_and_named(tmp_path: Path) -> None:
    check_damages(tmp_path, WHOLE)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("stuck", [False, True], ids=["one-failure", "all-fail-after"])
@pytest.mark.parametrize("who", [0, 1])
def test_whichever_operation_fails_on_one_of_two_ranks_all_are_told(
    tmp_path: Path, who: int, stuck: bool, exchange: bool
) -> None:
    target, faults = tmp_path / "c", 0
    save(target, contents(0), ALONE, durable=False)
    before = 0
    for nth in range(1, 500):
        broken = NthFails(nth, stuck=stuck, exchange=exchange)

        def attempt(ranks, broken=broken, nth=nth):
            return save(target, contents(nth), ranks, storage=broken if ranks.rank == who else Storage())

        outcomes = on_ranks(2, attempt)
        failed = [isinstance(each, CheckpointError) for each in outcomes]
        assert len(set(failed)) == 1, outcomes
        found = stored_value(target)
        assert found in ({before, nth} if failed[0] and stuck else {before} if failed[0] else {nth}), nth
        before = found
        if broken.left > 0:
            break
        faults += 1
    assert faults > (15 if who == 0 else 5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whichever_read_fails_the_load_fails_and_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, told = many(tmp_path), os.preadv, list[str]()
    for nth in range(1, 500):
        left = [nth]

        def failing(file, buffers, offset, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(file, buffers, offset)

        monkeypatch.setattr(os, "preadv", failing)
        try:
            with open_checkpoint(path, ALONE) as reader:
                for name in reader.specs():
                    reader.tensor(name)
        except CheckpointError as error:
            told.append(str(error))
            continue
        assert left[0] > 0
        break
    assert len(told) > 10
    assert all(str(path) in each and "Input/output error" in each for each in told)
