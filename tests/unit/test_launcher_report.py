from __future__ import annotations

import signal
from typing import Any

import pytest
from distrib_launcher.process import Ended
from distrib_launcher.report import MAX_LINES, Circumstances, exit_code, render
from distrib_launcher.workers import Outcome
from hypothesis import given, strategies as st


def raised(rank: int, at: float, name: str = "ValueError", *, stopped: bool = False, **event: Any) -> Outcome:
    told = {
        "kind": "exception",
        "type": name,
        "bases": [name, "Exception"],
        "lines": [f"{name}: no"],
        "left_out": 0,
        "frames": [["/home/me/train.py", 7, "main", "step()"]],
        "parts": [],
        "causes": [],
        "exit_code": 1,
        **event,
    }
    return Outcome(rank, 100 + rank, 1, at, stopped, told)


def asked(rank: int, at: float) -> Outcome:
    return Outcome(
        rank, 100 + rank, 143, at, stopped=True, event={"kind": "signal", "signal": 15, "exit_code": 143}
    )


def died(rank: int, at: float, number: int, *, stopped: bool = False) -> Outcome:
    return Outcome(rank, 100 + rank, -number, at, stopped)


def fine(rank: int, at: float = 1.0) -> Outcome:
    return Outcome(rank, 100 + rank, 0, at)


def shown(*outcomes: Outcome, interrupted: int = 0) -> list[str]:
    return render(Ended(outcomes, interrupted), Circumstances("host")).splitlines()


def test_success_says_nothing() -> None:
    assert shown(fine(0), fine(1)) == []


def test_the_report_names_rank_place_error_followers_and_code() -> None:
    assert shown(asked(0, 2.0), raised(1, 1.0), asked(2, 2.0)) == [
        "distrib: rank 1 (process 101 on host) failed: ValueError",
        "  /home/me/train.py:7 in main",
        "      step()",
        "  ValueError: no",
        "  ranks 0, 2 followed: ended by the launcher",
        "exit code 1",
    ]


def test_the_first_of_two_failures_is_the_root_cause() -> None:
    lines = shown(raised(0, 2.0, "KeyError"), raised(1, 1.0))

    assert lines[0].startswith("distrib: rank 1 ")
    assert "  rank 0 failed too: KeyError: no" in lines


def test_a_rank_that_lost_its_peer_first_is_not_the_root_cause() -> None:
    lost = raised(
        0, 1.0, "RuntimeError", lines=["RuntimeError: [..] Connection closed by peer [127.0.0.1]:1"]
    )
    lines = shown(lost, died(1, 1.1, signal.SIGKILL))

    assert lines[0] == "distrib: rank 1 (process 101 on host) failed: ended by SIGKILL"
    assert "  rank 0 followed: lost its peer, at /home/me/train.py:7 in main" in lines
    assert any("out-of-memory" in line for line in lines)


def test_a_peer_that_had_finished_is_pointed_out() -> None:
    lost = raised(0, 2.0, "DistBackendError", bases=["DistBackendError", "RuntimeError"])

    assert any("rank 1 had ended before" in line for line in shown(lost, fine(1, at=1.0)))


def test_the_same_error_on_all_ranks_is_shown_once() -> None:
    lines = shown(raised(0, 1.0), raised(1, 1.1), raised(2, 1.2))

    assert (
        lines[0]
        == "distrib: rank 0 (process 100 on host) failed: ValueError; ranks 1-2 failed in the same way"
    )
    assert sum("ValueError: no" in line for line in lines) == 1


def test_library_frames_are_left_out_but_for_the_last() -> None:
    frames = [
        ["/home/me/train.py", 1, "main", "f()"],
        ["/v/site-packages/torch/nn.py", 2, "call", "g()"],
        ["/v/site-packages/torch/mm.py", 3, "mm", "h()"],
    ]
    lines = shown(raised(0, 1.0, frames=frames))

    assert [line for line in lines if ".py" in line] == [
        "  /home/me/train.py:1 in main",
        "  /v/site-packages/torch/mm.py:3 in mm",
    ]


@pytest.mark.parametrize(
    ("outcomes", "interrupted", "code"),
    [
        ([fine(0)], 0, 0),
        ([raised(0, 1.0)], 0, 1),
        ([raised(0, 1.0, exit_code=3)], 0, 3),
        ([died(0, 1.0, signal.SIGSEGV)], 0, 139),
        ([asked(0, 1.0)], signal.SIGTERM, 143),
        ([fine(0)], signal.SIGTERM, 143),
        ([died(0, 1.0, signal.SIGKILL, stopped=True)], signal.SIGINT, 130),
        ([raised(0, 1.0), asked(1, 2.0)], signal.SIGINT, 1),
    ],
)
def test_the_exit_code_is_the_root_cause_s(outcomes: list[Outcome], interrupted: int, code: int) -> None:
    assert exit_code(Ended(tuple(outcomes), interrupted)) == code


TEXT = st.text(max_size=400)
FRAME = st.tuples(st.sampled_from(["/me/a.py", "/v/site-packages/b.py"]), st.integers(1, 99), TEXT, TEXT).map(
    list
)


@given(
    lines=st.lists(TEXT, min_size=1, max_size=60),
    frames=st.lists(FRAME, max_size=60),
    left_out=st.integers(0, 9),
    parts=st.lists(st.tuples(st.integers(1, 3), TEXT, st.lists(FRAME, max_size=3)), max_size=20),
    causes=st.lists(st.tuples(TEXT, st.lists(FRAME, max_size=3)), max_size=3),
    others=st.lists(st.sampled_from([raised, asked, fine]), max_size=80),
)
def test_the_report_is_short_and_ends_with_the_code(
    lines: list[str], frames: list[list[Any]], others: list[Any], **rest: Any
) -> None:
    root = raised(0, 1.0, lines=lines, frames=frames, **rest)
    found = shown(root, *(make(rank, 2.0) for rank, make in enumerate(others, 1)))

    assert len(found) <= MAX_LINES
    assert found[-1] == "exit code 1"
    assert all(len(line) <= 300 for line in found)


def test_a_cause_whose_text_the_message_repeats_is_left_out() -> None:
    frames = [["/home/me/train.py", 3, "load", ""], ["/v/site-packages/x.py", 9, "read", ""]]
    causes = [["OSError: disk gone", frames], ["KeyError: 'a'", frames]]
    lines = shown(raised(0, 1.0, lines=["DataError: cannot read: disk gone"], causes=causes))

    assert [line for line in lines if "because" in line] == [
        "  because of KeyError: 'a' (/home/me/train.py:3)"
    ]


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("CollectiveError", "error[D0402] gather failed: anything", 124),
        ("CollectiveError", "error[D0401] the ranks do not agree", 1),
        ("RuntimeError", "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1", 124),
        ("RuntimeError", "Timed out waiting 1000ms for recv operation to complete", 124),
        ("DistBackendError", "NCCL error: remote process exited or there was a network error", 124),
        ("DistBackendError", "NCCL error: CUDA out of memory", 1),
        ("ConnectionError", "https://data.example: Connection reset by peer", 1),
        ("ValueError", "no", 1),
    ],
)
def test_only_a_lost_or_late_peer_without_another_cause_is_a_124(name: str, text: str, code: int) -> None:
    lost = raised(0, 1.0, name, bases=[name, "Exception"], lines=[f"{name}: {text}"])

    assert exit_code(Ended((lost, asked(1, 2.0)))) == code
    assert shown(lost, asked(1, 2.0))[-1] == f"exit code {code}"


def test_an_interrupt_is_one_line() -> None:
    lines = shown(asked(0, 1.0), died(1, 2.0, signal.SIGKILL, stopped=True), interrupted=signal.SIGINT)

    assert lines == [
        "distrib: interrupted by SIGINT; ranks 0-1 ended within 0.0 s; rank 1 had to be killed; exit code 130"
    ]


def test_lost_output_is_a_failure_only_if_there_is_no_other() -> None:
    lost = "stdout: No space left on device"

    assert exit_code(Ended((fine(0), fine(1)), lost=lost)) == 1
    assert exit_code(Ended((fine(0), raised(1, 1.0, exit_code=3)), lost=lost)) == 3
    assert exit_code(Ended((asked(0, 1.0),), signal.SIGTERM, lost=lost)) == 143


def test_ranks_that_followed_in_several_ways_are_counted() -> None:
    lost = raised(2, 1.5, "DistBackendError", bases=["DistBackendError"], frames=[])
    lines = shown(asked(0, 2.0), raised(1, 1.0), lost, asked(3, 2.0))

    assert "  ranks 0, 2-3 followed: 2 ended by the launcher, 1 lost its peer" in lines


def test_an_error_of_ours_shows_where_the_script_called_and_not_where_we_raised() -> None:
    frames = [
        ["/home/me/train.py", 1, "main", ""],
        ["/v/site-packages/distrib/startup.py", 61, "read_config", "raise ConfigError("],
    ]
    ours = raised(0, 1.0, "ConfigError", bases=["ConfigError", "DistribError"], frames=frames, exit_code=2)

    assert [line for line in shown(ours) if ".py" in line] == ["  /home/me/train.py:1 in main"]


def test_of_a_command_only_its_exit_code_is_told() -> None:
    command = Outcome(0, 100, 3, 1.0, event={"kind": "command"})

    assert shown(command) == ["distrib: rank 0 (process 100 on host) failed: exit code 3", "exit code 3"]


@pytest.mark.parametrize(("count", "told"), [(1, "1 process"), (2, "2 processes")])
def test_what_ranks_left_behind_is_counted(count: int, told: str) -> None:
    text = render(Ended((fine(0),), leftovers=count), Circumstances("host"))

    assert text == f"distrib: ended {told} that the ranks had left behind"
