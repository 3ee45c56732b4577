"""Loggers that know their rank, and one-line notices."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from distrib import ConfigError, get_logger
from distrib.logging import RankLogger, notice, rank_of

NAME = "distrib.tests.logging"


@pytest.fixture(autouse=True)
def quiet_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    logger = logging.getLogger(NAME)
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> RankLogger:
    caplog.set_level("DEBUG", logger=NAME)
    return get_logger(NAME)


def on_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("RANK", str(rank))


def test_rank_0_logs(log: RankLogger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    on_rank(monkeypatch, 0)
    log.info("loss %.1f of %s", 0.25, "epoch 3")
    assert caplog.record_tuples == [(NAME, logging.INFO, "loss 0.2 of epoch 3")]


def test_other_ranks_are_silent(
    log: RankLogger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    on_rank(monkeypatch, 1)
    log.error("once is enough")
    assert caplog.records == []


def test_every_rank_logs_what_is_not_for_the_main_process_only(
    log: RankLogger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for rank in range(3):
        on_rank(monkeypatch, rank)
        log.warning("rank %d is here", rank, main_process_only=False)
    assert caplog.messages == ["rank 0 is here", "rank 1 is here", "rank 2 is here"]


def test_a_process_without_a_launcher_logs(log: RankLogger, caplog: pytest.LogCaptureFixture):
    log.info("alone")
    assert caplog.messages == ["alone"]


@pytest.mark.parametrize("method", ["debug", "info", "warning", "error", "critical", "exception"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_method_asks_for_the_rank(
    log: RankLogger,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    rank: int,
):
    on_rank(monkeypatch, rank)
    getattr(log, method)("text")
    assert len(caplog.records) == (rank == 0)


def test_a_level_below_the_loggers_is_not_logged(log: RankLogger, caplog: pytest.LogCaptureFixture):
    caplog.set_level("WARNING", logger=NAME)
    log.info("too low")
    assert caplog.records == []


@pytest.mark.parametrize("call", ["info", "log"])
def test_a_record_names_the_place_of_the_call(log: RankLogger, caplog: pytest.LogCaptureFixture, call: str):
    if call == "info":
        log.info("here")
    else:
        log.log(logging.INFO, "here")
    (record,) = caplog.records
    assert record.pathname == __file__
    assert record.funcName == "test_a_record_names_the_place_of_the_call"


def helper(log: RankLogger) -> None:
    log.info("here", stacklevel=2)


def test_a_stacklevel_counts_from_the_call_as_in_the_standard_logger(
    log: RankLogger, caplog: pytest.LogCaptureFixture
):
    helper(log)
    assert caplog.records[0].funcName == "test_a_stacklevel_counts_from_the_call_as_in_the_standard_logger"


def test_an_exception_is_logged_with_its_traceback(log: RankLogger, caplog: pytest.LogCaptureFixture):
    try:
        raise ValueError("seven")
    except ValueError:
        log.exception("it failed")
    assert "ValueError: seven" in caplog.text


def test_extra_fields_reach_the_record(log: RankLogger, caplog: pytest.LogCaptureFixture):
    log.info("text", extra={"step": 12})
    assert caplog.records[0].step == 12  # type: ignore[attr-defined]


def test_for_the_main_process_and_in_order_is_refused(log: RankLogger):
    with pytest.raises(ConfigError, match="in_order=True"):
        log.info("text", in_order=True, main_process_only=True)


def test_a_single_process_logs_in_order_at_once(log: RankLogger, caplog: pytest.LogCaptureFixture):
    log.info("text", in_order=True)
    assert caplog.messages == ["text"]


def test_logging_out_of_order_may_be_said(log: RankLogger, caplog: pytest.LogCaptureFixture):
    log.info("text", in_order=False)
    assert caplog.messages == ["text"]


@pytest.mark.parametrize("level", ["WARNING", "warning"])
def test_get_logger_sets_the_level_of_the_standard_logger(level: str):
    logger = get_logger(NAME, level)
    assert logger.logger is logging.getLogger(NAME)
    assert logging.getLogger(NAME).level == logging.WARNING


def test_get_logger_leaves_the_level_as_it_is():
    logging.getLogger(NAME).setLevel(logging.ERROR)
    get_logger(NAME)
    assert logging.getLogger(NAME).level == logging.ERROR


@pytest.mark.parametrize(
    ("env", "rank"),
    [
        ({}, 0),
        ({"RANK": "3"}, 3),
        ({"SLURM_PROCID": "4"}, 4),
        ({"RANK": "3", "SLURM_PROCID": "4"}, 3),
        ({"RANK": "", "SLURM_PROCID": "4"}, 4),
        ({"OMPI_COMM_WORLD_RANK": "5"}, 5),
        ({"MV2_COMM_WORLD_RANK": "5"}, 5),
        ({"PMI_RANK": "5"}, 5),
        ({"RANK": "3", "PMI_RANK": "5"}, 3),
        ({"RANK": "first"}, 0),
        ({"RANK": "-1"}, 0),
    ],
)
def test_the_rank_comes_from_the_usual_variables(env: dict[str, str], rank: int):
    assert rank_of(env) == rank


@given(rank=st.integers(0, 10**6))
def test_any_rank_is_read(rank: int):
    assert rank_of({"RANK": str(rank)}) == rank


def test_a_notice_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]):
    notice("precision bf16: the CPU supports it")
    assert tuple(capsys.readouterr()) == ("", "distrib: precision bf16: the CPU supports it\n")
