"""On XLA a run has the parameters of a plain loop in torch on the same global batches, however it is laid out."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.contract.plain import train_plainly
from tests.contract.test_same_run import assert_same
from tests.contract.training import shuffled_order, train
from tests.tpu.running import LAYOUTS, ONE, on_xla

STEPS, N, MICRO = 8, 29, 8  # 29 leaves a ragged tail, which no number of devices divides
CASES = {
    "mean": {"accumulation": 1},
    "three micro-steps": {"accumulation": 3},
    "tokens": {"accumulation": 3, "counted": True},
    "clipped": {"accumulation": 1, "clip": 0.1},
    "tokens clipped": {"accumulation": 3, "counted": True, "clip": 0.1},
    "shuffled": {"accumulation": 2, "shuffle": True, "zero_grad": "start"},
    "dropped": {"accumulation": 1, "tail": "drop"},
}
TWO = ("mean", "tokens clipped", "shuffled")
FEW = ("tokens clipped", "shuffled")  # for layouts that differ from another in where things lie only
CASES_OF = {"one device": tuple(CASES), "4 shards": tuple(CASES), "4 devices": FEW, "2 x 2": FEW}
IN_EACH = [
    pytest.param(layout, case, id=f"{layout}-{case}") for layout in LAYOUTS for case in CASES_OF[layout]
]
_TAILS = {"exact": {"data": {"tail": "exact"}}, "drop": {}}


def every_case(settings, cases):
    found = {}
    for name in cases:
        options = CASES[name]
        tail = _TAILS[options.get("tail", "exact")]
        more = {key: value for key, value in options.items() if key != "accumulation"}
        run = train({**settings, **tail}, N, MICRO, options["accumulation"], STEPS, dtype=torch.float32, device="xla", **more)  # fmt: skip
        found[name] = ({key: value.cpu() for key, value in run[0].items()}, run[1], run[2])
    return found


@functools.cache
def runs(layout):
    settings, devices = LAYOUTS[layout]
    return on_xla(every_case, settings, CASES_OF[layout], devices=devices)[0]


@functools.cache
def runs_of_two():
    return on_xla(every_case, ONE, TWO, ranks=2)


def expected(options, ranks=1):
    order = shuffled_order(N, 11) if options.get("shuffle") else lambda _: list(range(N))
    return train_plainly(
        N, MICRO * ranks * options["accumulation"], STEPS, order, dtype=torch.float32,
        counted=options.get("counted", False), clip=options.get("clip"), drop=options.get("tail") == "drop",
    )  # fmt: skip


@pytest.mark.parametrize(("layout", "case"), IN_EACH)
def test_parameters_are_those_of_a_plain_loop(layout, case):
    assert_same(runs(layout)[case], expected(CASES[case]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", TWO)
def test_two_processes_have_the_parameters_of_a_plain_loop(case):
    for found in runs_of_two():
        assert_same(found[case], expected(CASES[case], ranks=2), rtol=0, atol=2e-5)
