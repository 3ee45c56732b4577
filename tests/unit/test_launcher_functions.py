"""`distrib.launch` and `distrib.notebook_launcher`: what is refused, and small real launches."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distrib_launcher.functions import launch, notebook_launcher

from distrib.config import RunConfig, with_code
from distrib.errors import ConfigError, DistribError, LaunchError, NotBuiltError

FRESH = with_code(
    RunConfig(), {"launch.start_method": "spawn", "device": "cpu"}, "test.py:1"
)  # without torch


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda name: name.startswith("DISTRIB_"), os.environ), "RANK"]:
        monkeypatch.delenv(name, raising=False)


def refused(call: Callable[[], Any], kind: type[DistribError] = LaunchError) -> DistribError:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def test_the_results_come_in_rank_order_with_the_arguments_of_every_rank(
    capfd: pytest.CaptureFixture[str],
) -> None:
    offset = 10  # travels with the function

    def sum_up(base: int, *, factor: int) -> tuple[int, str]:
        return offset + base * factor + int(os.environ["RANK"]), os.environ["WORLD_SIZE"]

    assert launch(sum_up, (2,), nproc=2, config=FRESH, kwargs={"factor": 3}) == [(16, "2"), (17, "2")]
    assert "distrib: test_the_results" in capfd.readouterr().err


def test_a_rank_that_fails_fails_the_call_with_the_report_s_headline(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise ValueError("no such thing")

    error = refused(lambda: launch(fail, nproc=1, config=FRESH))

    assert error.code == "D0315"
    assert "rank 0" in str(error)
    assert "failed: ValueError" in str(error)
    assert __file__ in str(error)  # where it was called
    assert "ValueError: no such thing" in capfd.readouterr().err


def test_a_function_in_a_rank_cannot_launch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRIB_CONFIG", '{"settings": []}')
    monkeypatch.setenv("RANK", "3")

    error = refused(lambda: launch(print, config=FRESH))

    assert (error.code, "rank 3" in str(error)) == ("D0316", True)


def test_only_the_main_thread_can_launch() -> None:
    with ThreadPoolExecutor(1) as pool:
        error = refused(lambda: pool.submit(launch, print, nproc=1, config=FRESH).result())

    assert (error.code, "main thread" in str(error)) == ("D0316", True)


@pytest.mark.parametrize("cannot_travel", [threading.Lock(), (each for each in ())])
def test_what_cannot_travel_is_refused_before_anything_starts(
    cannot_travel: object, capfd: pytest.CaptureFixture[str]
) -> None:
    def use() -> object:
        return cannot_travel

    errors = [
        refused(lambda: launch(use, nproc=1, config=FRESH)),
        refused(lambda: launch(print, (cannot_travel,), nproc=1, config=FRESH)),
        refused(lambda: launch(print, nproc=1, config=FRESH, kwargs={"file": cannot_travel})),
    ]

    assert {error.code for error in errors} == {"D0317"}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("args", [3, "lr"])
def test_a_single_argument_that_is_in_no_tuple_is_refused_and_shown(args: Any) -> None:
    error = refused(lambda: notebook_launcher(print, args))

    assert (error.code, repr(args) in error.problem, "(x,)" in error.fix) == ("D0324", True, True)


def test_a_number_of_ranks_that_contradicts_the_configuration_is_refused_with_both_places() -> None:
    config = with_code(RunConfig(), {"launch.nproc_per_node": 3}, "config.py:8")

    error = refused(lambda: launch(print, nproc=2, config=config), ConfigError)

    assert "config.py:8" in str(error)
    assert Path(__file__).name in str(error)


def test_a_notebook_on_several_machines_is_refused() -> None:
    assert "num_nodes=2" in str(refused(lambda: notebook_launcher(print, num_nodes=2), NotBuiltError))
