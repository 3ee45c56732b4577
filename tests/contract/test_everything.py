"""A script that mixes it all: two networks, fp16, accumulation, a ragged tail, evaluation inside, a kill and a resume."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from distrib import Accelerator, RunConfig
from distrib.testing import RanksFailed, run_ranks

GLOBAL, EPOCHS = 12, 2


class Samples(Dataset):
    """n samples with augmentation, which draws from torch's generator."""

    def __init__(self, n: int, dtype: torch.dtype, *, augmented: bool = False):
        self.x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n)).to(dtype)
        self.augmented = augmented

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = 0.1 * torch.rand(6).to(self.x.dtype) if self.augmented else 0
        return {"x": self.x[i] + noise, "id": torch.tensor(i)}


def network(outputs: int, dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype)


def train(folder: str, precision: str, workers: int, dies_at: int | None) -> tuple[list, list]:
    """Return what was seen, and the parameters; with `dies_at` the last rank is killed in that step."""
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "no" else torch.float32
    ranks = int(os.environ["WORLD_SIZE"])
    accelerator = Accelerator(
        RunConfig(
            device="cpu", mixed_precision=precision, seed=4, project_dir=folder, gradient_accumulation_steps=3,
            checkpoint={"keep_last": 2},
        )
    )  # fmt: skip
    maker, judge = network(6, dtype), network(1, dtype)
    m_opt = torch.optim.AdamW(maker.parameters(), lr=0.01)
    j_opt = torch.optim.SGD(judge.parameters(), lr=0.05, momentum=0.9)
    batch = GLOBAL // 3 // ranks
    loader = DataLoader(Samples(31, dtype, augmented=True), batch, shuffle=True, num_workers=workers)
    held_out = DataLoader(Samples(7, dtype), 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(m_opt, 0.02, total_steps=EPOCHS * 3)
    maker, judge, m_opt, j_opt, loader, held_out, schedule = accelerator.prepare(
        maker, judge, m_opt, j_opt, loader, held_out, schedule
    )
    if accelerator.scaler is not None:
        accelerator.scaler.scale = 1024.0
    accelerator.load_state()
    seen: list = []
    for epoch in range(loader.epoch, EPOCHS):
        for batch in loader:
            x = batch["x"]
            with accelerator.accumulate(judge):
                j_opt.zero_grad()
                real, made = judge(x), judge(maker(x).detach())
                accelerator.backward(((1 - real).square() + made.square()).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(judge.parameters(), 1.0)
                j_opt.step()
            with accelerator.accumulate(maker):
                m_opt.zero_grad()
                errors = (maker(x) - x.flip(1)).square().sum(1)
                counts = accelerator.sample_mask.sum()
                accelerator.backward((errors * accelerator.sample_mask).sum(), count=int(counts))
                accelerator.clip_grad_norm_(maker.parameters(), 5.0)
                m_opt.step()
                schedule.step()
            ids = accelerator.gather_for_metrics(batch["id"]).tolist()
            if not accelerator.sync_gradients:
                continue
            with torch.no_grad():
                held = [
                    accelerator.gather_for_metrics((maker(b["x"]) - b["x"]).square().mean(1))
                    for b in held_out
                ]
            assert sum(map(len, held)) == 7
            seen.append(
                (epoch, m_opt.num_steps, sorted(ids), m_opt.param_groups[0]["lr"], torch.cat(held).tolist())
            )
            accelerator.save_state()
            if m_opt.num_steps == dies_at and accelerator.is_last_process:
                threading.Event().wait(0.05)
                os.kill(os.getpid(), signal.SIGKILL)
    models = [accelerator.unwrap_model(model) for model in (maker, judge)]
    return seen, [x.detach().flatten().tolist() for model in models for x in model.parameters()]


def flat(values) -> list[float]:
    return [
        x for value in values for x in (flat(value) if isinstance(value, (list, tuple)) else [float(value)])
    ]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run_ranks(train, 1, str(tmp_path_factory.mktemp("single")), "no", 0, None)[0]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("before", "after", "workers", "dies_at"), [(2, 2, 0, 2), (2, 1, 2, 4), (1, 4, 0, 3), (4, 2, 1, 5)]
)
def test_everything_at_once_equals_its_run_on_one_process(tmp_path, single, before, after, workers, dies_at):
    arguments = (str(tmp_path), "no", workers)
    with pytest.raises(RanksFailed):
        run_ranks(train, before, *arguments, dies_at)
    seen, parameters = run_ranks(train, after, *arguments, None)[0]
    expected_seen, expected = single
    assert [x[:3] for x in seen] == [x[:3] for x in expected_seen[-len(seen) :]]
    assert flat(seen) == pytest.approx(flat(expected_seen[-len(seen) :]), rel=1e-9, abs=1e-12)
    assert flat(parameters) == pytest.approx(flat(expected), rel=1e-9, abs=1e-12)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", [1, 2])
def test_everything_at_once_in_fp16_resumes_bitwise(tmp_path: Path, world_size):
    whole = run_ranks(train, world_size, str(tmp_path / "whole"), "fp16", 0, None)[0]
    with pytest.raises(RanksFailed):
        run_ranks(train, world_size, str(tmp_path / "parts"), "fp16", 0, 3)
    seen, parameters = run_ranks(train, world_size, str(tmp_path / "parts"), "fp16", 0, None)[0]
    assert seen == whole[0][-len(seen) :]
    assert parameters == whole[1]
