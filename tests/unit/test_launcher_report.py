from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from typing import Any

import pytest
from distrib_launcher import report
from distrib_launcher.process import Ended
from distrib_launcher.redaction import Redactor
from distrib_launcher.report import (
    MAX_LINES,
    Circumstances,
    exit_code,
    facts,
    is_worth_a_restart,
    render,
)
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

    assert any("rank 1 ended without them" in line for line in shown(lost, fine(1, at=1.0)))


def test_a_peer_that_is_seen_to_finish_only_after_the_loss_is_pointed_out() -> None:
    lost = raised(0, 2.0, "DistBackendError", bases=["DistBackendError", "RuntimeError"])

    assert any("rank 1 ended without them" in line for line in shown(lost, fine(1, at=2.1)))


def test_an_error_s_own_fix_calls_for_no_further_advice() -> None:
    lines = [
        "DataError: error[D0519] a data worker was ended",
        "  fix: the machine had run out of memory: use fewer",
    ]

    assert not any("  try: " in line for line in shown(raised(0, 1.0, "DataError", lines=lines)))


def waited(rank: int, at: float, line: int) -> Outcome:
    late = "RuntimeError: Timed out waiting 6000ms for recv operation to complete"
    frames = [["/home/me/train.py", line, "main", "step()"]]
    return raised(rank, at, "RuntimeError", lines=[late], frames=frames)


def test_ranks_that_wait_for_each_other_at_different_places_are_told_what_to_look_for() -> None:
    assert any("under `if is_main_process`" in line for line in shown(waited(0, 1.0, 7), waited(1, 1.1, 9)))


def test_ranks_that_lose_each_other_at_one_place_get_no_such_hint() -> None:
    assert not any("hint" in line for line in shown(waited(0, 1.0, 7), waited(1, 1.1, 7)))


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


TEXT = st.text(max_size=400).filter(lambda x: not any(sign in x.lower() for sign in report._LOST_PEER))
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


def words(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


MESSAGES = st.lists(st.text(max_size=200), min_size=1, max_size=12)


@given(
    lines=MESSAGES,
    frames=st.lists(FRAME, max_size=12),
    failing=st.lists(MESSAGES, max_size=6),
    asked_to_end=st.integers(0, 9),
    columns=st.integers(20, 200),
    color=st.booleans(),
)
def test_at_every_width_the_report_is_short_fits_and_ends_with_the_code(
    lines: list[str],
    frames: list[list[Any]],
    failing: list[list[str]],
    asked_to_end: int,
    columns: int,
    color: bool,
) -> None:
    outcomes = [raised(0, 1.0, lines=lines, frames=frames)]
    outcomes += [raised(rank, 1.5, "KeyError", lines=told) for rank, told in enumerate(failing, 1)]
    outcomes += [stood(rank, f"/home/me/{rank}.py") for rank in range(10, 10 + asked_to_end)]
    text = render(Ended(tuple(outcomes)), Circumstances("host", columns=columns, color=color))
    found = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()

    assert len(found) <= MAX_LINES
    assert found[-1] == "exit code 1"
    assert max(map(len, found)) <= max(columns - 1, 20)
    assert ("\x1b" in text) == color


@given(columns=st.integers(30, 200))
def test_breaking_lines_changes_no_word(columns: int) -> None:
    outcomes = Ended((raised(0, 1.0, lines=["ValueError: the weights do not fit the model"]), asked(1, 2.0)))
    whole = render(outcomes, Circumstances("host"))

    assert words(render(outcomes, Circumstances("host", columns=columns))) == words(whole)


def test_a_part_of_a_broken_line_is_further_in_than_its_beginning() -> None:
    outcome = raised(0, 1.0, lines=["ValueError: " + "word " * 20], frames=[])
    lines = render(Ended((outcome,)), Circumstances("host", columns=41)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  ValueError"))

    assert [line[:7] for line in lines[start : start + 3]] == ["  Value", "      w", "      w"]


def test_only_the_headline_has_a_color() -> None:
    first, *rest = render(Ended((raised(0, 1.0),)), Circumstances("host", color=True)).splitlines()

    assert first == "\x1b[1;31mdistrib: rank 0 (process 100 on host) failed: ValueError\x1b[m"
    assert not any("\x1b" in line for line in rest)


def test_where_there_is_no_room_for_all_the_evidence_gives_way_and_nothing_else() -> None:
    frames = [[f"/home/me/{'deep/' * 12}{n}.py", n, "main", "step() " * 9] for n in range(9)]
    outcomes = [raised(0, 1.0, frames=frames, lines=["ValueError: " + "word " * 40] * 8)]
    outcomes += [stood(rank, f"/home/me/{rank}.py") for rank in range(1, 4)]
    around = Circumstances("host", columns=60, logs={0: "/logs/rank-0.log"})
    text = render(Ended(tuple(outcomes)), around)

    for rank in range(1, 4):
        assert f"rank {rank} followed: ended by the launcher, at /home/me/{rank}.py:7 in train" in words(text)
    assert "its whole output: /logs/rank-0.log" in text
    assert len(text.splitlines()) > MAX_LINES - 5  # and there is as much of it as there can be


SECRET = "Xq93hfUq81nQwz55-Lk20"


@given(before=st.integers(120, 320), after=st.integers(0, 320), columns=st.none() | st.integers(40, 200))
def test_no_part_of_a_secret_is_left_where_a_line_is_cut(
    before: int, after: int, columns: int | None
) -> None:
    outcome = raised(0, 1.0, lines=["x" * before + SECRET + "y" * after])
    around = Circumstances("host", columns=columns, redact=Redactor({"API_KEY": SECRET}).text)
    text = "".join(line.strip() for line in render(Ended((outcome,)), around).splitlines())

    assert not any(SECRET[i : i + 4] in text for i in range(len(SECRET) - 3))


def test_a_failure_on_its_way_to_a_restart_says_which_it_is() -> None:
    ended = Ended((raised(0, 1.0),))

    def last(**around: Any) -> str:
        return render(ended, Circumstances("host", max_restarts=2, **around)).splitlines()[-1]

    assert last(attempt=1, restarts=True) == "exit code 1; restarting all ranks (2 of 2)"
    assert last(attempt=1) == "exit code 1; gave up after 1 restart"
    assert last(attempt=2) == "exit code 1; gave up after 2 restarts"
    assert last() == "exit code 1"


def test_the_log_that_is_named_is_the_root_cause_s() -> None:
    around = Circumstances("host", logs={0: "/logs/rank-0.log", 1: "/logs/rank-1.log"})
    lines = render(Ended((asked(0, 2.0), raised(1, 1.0))), around).splitlines()

    assert lines[-2] == "  its whole output: /logs/rank-1.log"


@pytest.mark.parametrize(
    ("outcomes", "interrupted", "worth_it"),
    [
        ([raised(0, 1.0)], 0, True),
        ([died(0, 1.0, signal.SIGKILL)], 0, True),
        ([raised(0, 1.0, "CollectiveError", bases=["CollectiveError"])], 0, True),
        ([raised(0, 1.0, exit_code=3)], 0, True),
        ([raised(0, 1.0, exit_code=2)], 0, False),
        ([fine(0), fine(1)], 0, False),
        ([asked(0, 1.0)], 0, False),
        ([raised(0, 1.0), asked(1, 2.0)], signal.SIGTERM, False),
        ([], signal.SIGTERM, False),
    ],
)
def test_a_restart_is_for_failures_that_another_attempt_may_not_have(
    outcomes: list[Outcome], interrupted: int, worth_it: bool
) -> None:
    assert is_worth_a_restart(Ended(tuple(outcomes), interrupted)) is worth_it


def stood(rank: int, path: str, line: int = 7, called: str = "all_reduce") -> Outcome:
    inner = ("/v/site-packages/torch/distributed.py", 99, called)
    return replace(asked(rank, 2.0), stood=(inner, (path, line, "train"), (path, 1, "<module>")))


def test_followers_are_grouped_by_where_they_stood_in_the_user_s_code() -> None:
    same = [stood(rank, "/home/me/a.py") for rank in (0, 2, 3)]
    lines = shown(raised(1, 1.0), *same, stood(4, "/home/me/a.py", 8, "broadcast"))

    assert [line for line in lines if "followed" in line] == [
        "  ranks 0, 2-3 followed: ended by the launcher, at /home/me/a.py:7 in train (all_reduce)",
        "  rank 4 followed: ended by the launcher, at /home/me/a.py:8 in train (broadcast)",
    ]


def test_one_place_more_than_three_is_not_listed() -> None:
    places = [stood(rank, f"/home/me/{rank // 2}.py") for rank in range(2, 12)]
    lines = [line for line in shown(raised(0, 1.0), *places) if "followed" in line]

    assert [line.partition(" followed")[0] for line in lines] == [
        "  ranks 2-3",
        "  ranks 4-5",
        "  ranks 6-7",
        "  ranks 8-11",
    ]
    assert lines[-1].endswith("ended by the launcher, each elsewhere")


def test_the_largest_group_comes_first() -> None:
    lines = shown(
        raised(0, 1.0), stood(1, "/me/a.py"), *(stood(rank, "/me/b.py", called="wait") for rank in (2, 3))
    )

    assert [line[:11] for line in lines if "followed" in line] == ["  ranks 2-3", "  rank 1 fo"]


def test_a_rank_that_stood_in_no_code_of_the_user_s_has_no_place() -> None:
    outcome = replace(asked(1, 2.0), stood=(("/v/site-packages/torch/x.py", 1, "wait"),))

    assert "  rank 1 followed: ended by the launcher" in shown(raised(0, 1.0), outcome)


def test_a_rank_that_lost_its_peer_stood_where_its_exception_was_raised() -> None:
    frames = [["/home/me/train.py", 9, "step", "x"], ["/v/site-packages/torch/c.py", 3, "gather", "y"]]
    lost = raised(1, 1.5, "DistBackendError", bases=["DistBackendError"], frames=frames)

    assert "  rank 1 followed: lost its peer, at /home/me/train.py:9 in step (gather)" in shown(
        raised(0, 1.0), lost
    )


def told(*outcomes: Outcome, interrupted: int = 0, **around: Any) -> dict[str, Any]:
    """What a program reads in `failure.json`."""
    read: dict[str, Any] = json.loads(
        json.dumps(facts(Ended(outcomes, interrupted), Circumstances("host", **around)))
    )
    return read


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (
            raised(0, 1.0),
            {"exit_code": 1, "signal": None, "exception": "ValueError", "message": "ValueError: no"},
        ),
        (
            died(0, 1.0, signal.SIGSEGV),
            {"exit_code": 139, "signal": "SIGSEGV", "exception": None, "message": "", "frames": []},
        ),
        (asked(0, 1.0), {"exit_code": 143, "signal": "SIGTERM", "followed": True}),
        (
            Outcome(0, 100, 3, 1.0, event={"kind": "exit", "lines": ["bye"], "left_out": 0, "exit_code": 3}),
            {"exit_code": 3, "signal": None, "exception": None, "message": "bye", "followed": False},
        ),
        (Outcome(0, 100, 5, 1.0, event={"kind": "command"}), {"exit_code": 5, "exception": None}),
        (fine(0), {"exit_code": 0, "signal": None, "followed": False}),
        (replace(fine(0), stopped=True), {"exit_code": 0, "followed": False}),
        (
            replace(died(0, 1.0, signal.SIGABRT), crash="Fatal Python error: Aborted"),
            {"crash": "Fatal Python error: Aborted"},
        ),
        (stood(0, "/me/a.py"), {"stood_at": [list(frame) for frame in stood(0, "/me/a.py").stood]}),
        (
            raised(0, 1.0, "DistBackendError", bases=["DistBackendError"]),
            {"followed": True, "frames": [["/home/me/train.py", 7, "main"]]},
        ),
    ],
)
def test_of_every_kind_of_end_a_program_can_read_what_it_was(
    outcome: Outcome, expected: dict[str, Any]
) -> None:
    (rank,) = told(outcome)["ranks"]

    assert {key: rank[key] for key in expected} == expected
    assert (rank["rank"], rank["pid"]) == (0, 100)


def test_a_program_can_read_the_root_cause_the_code_and_the_attempt() -> None:
    found = told(asked(0, 2.0), raised(1, 1.0, exit_code=3), attempt=1, max_restarts=2, logs={1: "/l/1"})

    assert (found["root_cause"], found["exit_code"]) == (1, 3)
    assert (found["attempt"], found["max_restarts"], found["host"]) == (1, 2, "host")
    assert [rank["log"] for rank in found["ranks"]] == [None, "/l/1"]


def test_an_interrupt_before_any_rank_started_is_a_fact_too() -> None:
    found = told(interrupted=signal.SIGTERM)

    assert (found["interrupted"], found["exit_code"], found["root_cause"]) == ("SIGTERM", 143, None)
    assert found["ranks"] == []


def test_the_facts_hold_no_secret() -> None:
    outcome = raised(0, 1.0, lines=[f"ValueError: {SECRET} is refused"])
    found = told(outcome, redact=Redactor({"API_KEY": SECRET}).text)

    assert found["ranks"][0]["message"] == "ValueError: <redacted: API_KEY> is refused"
