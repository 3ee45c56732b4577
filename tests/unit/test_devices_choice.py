from __future__ import annotations

import pytest
import torch

from distrib.devices import DEVICES, choose_device
from distrib.errors import ConfigError, TopologyError


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every machine look like one without accelerators; a test adds what it needs."""
    for module in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(module, "device_count", lambda: 0)
    for module in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)


def add(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    monkeypatch.setattr(getattr(torch, name), "device_count", lambda: count)
    monkeypatch.setattr(
        torch.backends.mps if name == "mps" else getattr(torch, name), "is_available", lambda: True
    )
    if name == "cuda":
        monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize("requested", ["auto", "cpu"])
def test_without_accelerators_the_cpu_serves_any_number_of_ranks(requested: str) -> None:
    assert choose_device(requested, 64)[0].name == "cpu"


def test_the_reason_names_what_was_looked_for() -> None:
    reason = choose_device("auto", 1)[1]
    assert "\n" not in reason
    assert all(name in reason for name in DEVICES)


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_auto_takes_an_accelerator_that_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, name, 1)
    assert choose_device("auto", 1)[0].name == name


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_asking_for_an_accelerator_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(TopologyError) as caught:
        choose_device(name, 1, where="train.yaml:3 (device)")
    assert caught.value.code == "D0210"
    assert caught.value.where == "train.yaml:3 (device)"
    assert "device: auto" in str(caught.value.fix)


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_more_ranks_than_accelerators_are_refused(requested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "cuda", 2)
    with pytest.raises(TopologyError) as caught:
        choose_device(requested, 3)
    assert caught.value.code == "D0211"
    assert "3 ranks" in caught.value.problem
    assert "2 cuda" in caught.value.problem


def test_ranks_that_could_not_talk_on_the_accelerator_get_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "mps", 1)
    assert choose_device("auto", 2)[0].name == "cpu"


def test_an_unknown_device_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        choose_device("cuad", 1)
