"""`python -m distrib.strategies.xla check`: what shows on hardware that training works there."""

from __future__ import annotations

import os

import pytest

from distrib.strategies import xla_check, xla_step
from tests.tpu.running import on_xla


def checked(arguments, breaks=None):
    """Run the check and return its exit status and table; with something broken, if asked for."""
    if breaks == "step":
        xla_step.DeviceStep.__call__ = lambda self, optimizer: None
    said: list[str] = []
    status = xla_check.main(arguments, os.environ, said.append)
    return status, "".join(said)


@pytest.mark.parametrize(
    ("arguments", "ranks", "devices"),
    [([], 1, 1), ([], 2, 1), (["--spmd"], 1, 4)],
    ids=["one", "two", "spmd"],
)
def test_the_check_passes_and_its_main_rank_prints_the_table(arguments, ranks, devices):
    found = on_xla(checked, arguments, ranks=ranks, devices=devices)
    assert [status for status, _ in found] == [0] * ranks
    assert found[0][1].count("ok  ") == 6
    assert all(text == "" for _, text in found[1:])


def test_the_check_fails_if_steps_do_nothing():
    ((status, text),) = on_xla(checked, [], "step")
    assert status == 1
    failed = [line.split("  ")[1].strip() for line in text.splitlines() if line.startswith("FAIL")]
    assert failed == ["training", "checkpoint", "training in bf16"]
