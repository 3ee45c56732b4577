from __future__ import annotations

import itertools
import os
import pty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distrib_launcher.output import Assembler, Display, Pump, Source, Surface, fitting, wants_color
from hypothesis import given, strategies as st

LINE = st.binary(max_size=20).map(lambda raw: raw.translate(None, b"\n\r\x1b"))


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(lines=st.lists(LINE, max_size=8), cuts=st.lists(st.integers(0, 200), max_size=8), end=st.booleans())
def test_lines_come_out_whole_however_the_stream_is_cut(
    lines: list[bytes], cuts: list[int], end: bool
) -> None:
    data = b"\n".join(lines) + (b"\n" if end else b"")
    assembler = Assembler()

    seen = [line for chunk in chunks(data, cuts) for line in assembler.feed(chunk)] + assembler.finish()

    assert b"\n".join(seen).rstrip(b"\n") == data.rstrip(b"\n")


@given(data=st.binary(max_size=80), cuts=st.lists(st.integers(0, 80), max_size=8))
def test_the_cuts_never_change_what_is_shown(data: bytes, cuts: list[int]) -> None:
    whole, cut = Assembler(), Assembler()

    expected = whole.feed(data) + whole.finish()

    assert [line for chunk in chunks(data, cuts) for line in cut.feed(chunk)] + cut.finish() == expected


def test_of_an_overwritten_line_the_last_state_is_kept() -> None:
    assembler = Assembler()
    assembler.feed(b"\r 10%")
    assembler.feed(b"\r 20%")

    assert assembler.progress == b" 20%"
    assert assembler.feed(b"\rdone\n") == [b"done"]
    assert assembler.progress == b""


def test_bars_below_one_another_are_lines_and_one_progress_line() -> None:
    assembler = Assembler()
    up = b"\x1b[A"
    started = assembler.feed(b"\router 0%") + assembler.feed(b"\n\rinner 0%" + up)
    inner = assembler.feed(b"\n\rinner 50%" + up)
    shown = assembler.progress
    ended = assembler.feed(b"\router 50%") + assembler.feed(b"\n\rinner 0%" + up)

    assert (started, inner, shown, ended) == ([b"outer 0%"], [], b"inner 50%", [b"outer 50%"])
    assert assembler.feed(b"\n\n\rinmost 0%" + up + up) == []
    assert assembler.progress == b"inmost 0%"


def test_colors_pass_and_what_moves_the_cursor_does_not() -> None:
    line = b"\x1b[2J\x1b[1;31mred\x1b[0m\x1b[K\x1b[3D\n"

    assert Assembler().feed(line) == [b"\x1b[1;31mred\x1b[0m"]


def test_a_windows_line_end_is_one_line_end() -> None:
    assembler = Assembler()

    assert assembler.feed(b"one\r") + assembler.feed(b"\ntwo\r\n") == [b"one", b"two"]


def test_memory_does_not_grow_with_progress() -> None:
    assembler = Assembler()
    for step in range(1000):
        assembler.feed(b"\r%5d" % step)

    assert len(assembler.tail) < 20


def test_a_line_without_an_end_comes_in_pieces_and_never_fills_the_memory() -> None:
    assembler, chunk = Assembler(), b"x" * (1 << 16)
    pieces = []
    for _ in range(100):
        pieces += assembler.feed(chunk)
        assert len(assembler.tail) <= 1 << 20

    assert len(pieces) == 5
    assert b"".join(pieces + assembler.finish()) == chunk * 100


@pytest.mark.parametrize(
    ("line", "columns", "shown"),
    [
        ("50%|█████|", 6, "50%|██"),
        ("50%|█████|", 10, "50%|█████|"),
        ("日本語", 5, "日本"),
        ("e\u0301te\u0301", 2, "e\u0301t"),
        ("\x1b[32mgreen\x1b[0m", 3, "\x1b[32mgre\x1b[0m"),
        ("\x1b[1;32mgreen\x1b[0m", 5, "\x1b[1;32mgreen\x1b[0m"),
    ],
)
def test_a_line_is_cut_between_characters_to_what_a_terminal_shows(
    line: str, columns: int, shown: str
) -> None:
    assert fitting(line.encode(), columns).decode() == shown


def test_bytes_that_are_no_text_pass_as_they_are_where_they_fit() -> None:
    assert fitting(b"\xff\x80", 5) == b"\xff\x80"


def test_a_message_of_the_launcher_replaces_what_the_keyboard_left_on_a_terminal() -> None:
    assert Surface(terminal=True).message(b"Ctrl-C") == b"\r\x1b[KCtrl-C\n"
    assert Surface(terminal=False).message(b"Ctrl-C") == b"Ctrl-C\n"


def test_a_message_of_the_launcher_stands_above_the_progress_line() -> None:
    surface = Surface(terminal=True)
    surface.progress("a", b"10%")

    assert surface.message(b"Ctrl-C") == b"\r\x1b[KCtrl-C\n10%"


def test_a_terminal_shows_another_ranks_line_above_the_progress_line() -> None:
    surface = Surface(terminal=True)
    shown = surface.progress("a", b"10%") + surface.line("b", b"hello") + surface.progress("a", b"20%")

    assert shown == b"10%\r\x1b[Khello\n10%\r\x1b[K20%"


def test_a_file_never_joins_two_ranks_in_one_line() -> None:
    surface = Surface(terminal=False)
    shown = surface.progress("a", b"10%") + surface.line("b", b"hello") + surface.progress("a", b"20%")

    assert shown == b"10%\nhello\n20%"


def test_a_finished_progress_line_replaces_itself() -> None:
    surface = Surface(terminal=False)

    assert surface.progress("a", b"10%") + surface.line("a", b"done") == b"10%\rdone\n"


def test_unchanged_progress_is_not_shown_again() -> None:
    surface = Surface(terminal=True)
    surface.progress("a", b"10%")

    assert surface.progress("a", b"10%") == b""


def pumped(*streams: tuple[bytes, bytes]) -> bytes:
    """Send (prefix, data) of each stream through a pump; return what it wrote."""
    target_read, target_write = os.pipe()
    sources = []
    for index, (prefix, data) in enumerate(streams):
        read, write = os.pipe()
        os.write(write, data)
        os.close(write)
        sources.append(Source(read, target_write, prefix, shows_progress=index == 0))
    pump = Pump(sources)
    pump.run()
    pump.close()
    os.close(target_write)
    with os.fdopen(target_read, "rb") as file:
        return file.read()


def test_every_line_carries_its_rank_and_none_is_lost() -> None:
    shown = pumped((b"[rank 0] ", b"a\nb"), (b"[rank 1] ", b"c\n\nd\n"))

    assert sorted(shown.splitlines()) == [
        b"[rank 0] a",
        b"[rank 0] b",
        b"[rank 1] ",
        b"[rank 1] c",
        b"[rank 1] d",
    ]


def test_a_progress_line_that_is_never_ended_still_ends_the_output_with_a_line_end() -> None:
    assert pumped((b"[rank 0] ", b"\r10%\r20%")).endswith(b"[rank 0] 20%\n")


def test_progress_of_other_ranks_is_folded_to_its_last_state() -> None:
    assert pumped((b"[rank 0] ", b""), (b"[rank 1] ", b"\r10%\r20%\n")) == b"[rank 1] 20%\n"


def test_a_line_that_is_finished_as_it_stands_is_not_written_again() -> None:
    surface = Surface(terminal=True)

    assert surface.progress("a", b"hello") + surface.line("a", b"hello") == b"hello\n"


def pumped_to(target: int) -> str:
    """Send a line through a pump; return what it says was lost."""
    read, write = os.pipe()
    os.write(write, b"a\n")
    os.close(write)
    pump = Pump([Source(read, target, b"", shows_progress=False)])
    pump.run()
    pump.close()
    os.close(target)
    return pump.lost


def test_lines_that_a_full_disk_refuses_are_lost(capfd: pytest.CaptureFixture[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)

    assert pumped_to(full) == f"{full}: No space left on device"
    assert capfd.readouterr().err.count("the ranks' output is lost") == 1


def test_lines_that_nobody_reads_any_more_are_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)

    assert pumped_to(write) == ""
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("display", "num_workers", "captures"),
    [
        (Display(), 1, False),
        (Display(), 2, True),
        (Display(shown=frozenset({0})), 1, True),
        (Display(shown=frozenset()), 1, True),
        (Display(log=lambda rank: Path(f"/{rank}")), 1, True),
        (Display(color=True), 1, False),
    ],
)
def test_one_worker_writes_to_our_own_streams_unless_its_output_is_kept_or_filtered(
    display: Display, num_workers: int, captures: bool
) -> None:
    assert display.captures(num_workers) is captures


@contextmanager
def stderr_at_a_terminal() -> Iterator[None]:
    ours, theirs = pty.openpty()
    before = os.dup(2)
    os.dup2(theirs, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        for fd in (before, ours, theirs):
            os.close(fd)


def prefixes(color: bool) -> list[bytes]:
    """Of stdout and stderr of rank 0, then of rank 1; stdout goes to a file, stderr to a terminal."""
    with stderr_at_a_terminal():
        sources = Display(color=color).sources([(0, (10, 11)), (1, (12, 13))])
    return [source.prefix for source in sources]


def test_a_rank_s_color_goes_to_a_terminal_only(capfd: pytest.CaptureFixture[str]) -> None:
    assert prefixes(color=True) == [
        b"[rank 0] ",
        b"\x1b[36m[rank 0]\x1b[m ",
        b"[rank 1] ",
        b"\x1b[33m[rank 1]\x1b[m ",
    ]
    assert prefixes(color=False) == [b"[rank 0] ", b"[rank 0] ", b"[rank 1] ", b"[rank 1] "]


@pytest.mark.parametrize(
    ("env", "color"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),  # the convention: an empty value is none
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_colors_are_for_terminals_that_have_them_and_users_that_want_them(
    env: dict[str, str], color: bool
) -> None:
    assert wants_color(env) is color


def displayed(display: Display, *data: bytes) -> Pump:
    """Show what ranks 0, 1, ... write to stdout; return the pump, at its end."""
    ranks, writers = [], []
    for rank in range(len(data)):
        pipes = [os.pipe() for _ in range(2)]
        ranks.append((rank, [read for read, _ in pipes]))
        writers.append([write for _, write in pipes])
    pump = Pump(display.sources(ranks))
    pump.start()
    for text, (out, err) in zip(data, writers, strict=True):
        for byte in text:
            os.write(out, bytes([byte]))  # in the smallest pieces
        os.close(out)
        os.close(err)
    pump.join()
    pump.close()
    return pump


def test_ranks_that_are_not_shown_are_kept_all_the_same(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    display = Display(shown=frozenset({1}), log=lambda rank: tmp_path / f"{rank}.log")

    displayed(display, b"a\n", b"b\n", b"c\n")

    assert capfd.readouterr() == ("[rank 1] b\n", "")
    assert [(tmp_path / f"{rank}.log").read_bytes() for rank in range(3)] == [b"a\n", b"b\n", b"c\n"]


def test_a_log_holds_whole_lines_without_rank_progress_or_color_of_the_rank(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    display = Display(log=lambda rank: tmp_path / f"{rank}.log", color=True)

    displayed(display, b"\r10%\r20%\rdone\nthe last one has no end", b"one\n")

    assert (tmp_path / "0.log").read_bytes() == b"done\nthe last one has no end\n"
    assert (tmp_path / "1.log").read_bytes() == b"one\n"


def test_a_log_is_added_to_and_not_begun_again(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "0.log").write_bytes(b"before\n")

    displayed(Display(log=lambda rank: tmp_path / f"{rank}.log"), b"after\n")

    assert (tmp_path / "0.log").read_bytes() == b"before\nafter\n"


def test_logs_that_a_full_disk_refuses_are_warned_of_once_and_the_lines_are_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    pump = displayed(Display(log=lambda rank: Path("/dev/full")), b"a\nb\nc\n", b"d\n")

    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[rank 0] a", "[rank 0] b", "[rank 0] c", "[rank 1] d"]
    assert err == "distrib: warning: the logs are not complete: No space left on device\n"
    assert (pump.log_lost, pump.lost) == ("No space left on device", "")


def test_logs_that_cannot_be_opened_are_missed_and_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    displayed(Display(log=lambda rank: tmp_path / "none" / f"{rank}.log"), b"a\n", b"b\n")

    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[rank 0] a", "[rank 1] b"]
    assert err == "distrib: warning: the logs are not complete: No such file or directory\n"
