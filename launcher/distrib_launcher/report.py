"""From how each rank ended to one report and one exit code. Pure functions, but for the limits of this process."""

from __future__ import annotations

import re
import signal
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import distrib
from distrib_launcher.advice import advice_on
from distrib_launcher.limits import limits_behind
from distrib_launcher.oom import OomKills
from distrib_launcher.process import Ended
from distrib_launcher.worker import narrowed
from distrib_launcher.workers import Outcome

MAX_LINES = 25
_MAX_FRAMES = 5  # of two lines each
_MAX_MESSAGE = 8  # lines of an exception's own text
_MAX_MESSAGE_WIDTH = 150  # characters of a text that goes into the headline
_MAX_PARTS = 6  # of an exception group
_MAX_WIDTH = 300
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_FOLLOWING = {  # what a rank gets when another one has gone
    "CollectiveError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "ConnectionError",
}
_LOST_PEER = (  # what distrib, gloo, NCCL and torch's store say when a peer ended or did not join in time
    "error[d0402]",
    "gloo/transport/",
    "for recv operation to complete",
    "for send operation to complete",
    "remote process exited or there was a network error",
    "ncclremoteerror",
    "collective operation timeout",
    "did the remote server shutdown or crash",
)
_LOST_CONNECTION = (  # what else is said then, but of other connections too
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "socket closed",
    "broken pipe",
)
_USAGE = 2
_TIMEOUT = 124  # as of the command `timeout`
_NARROWEST = 20  # columns
_MAX_TAIL = 14  # lines of a report that are not the cause's own
_MAX_PLACES = 3  # where ranks stood, one line each
_CAUSES = {
    signal.SIGSEGV: "a crash in native code: a library built for another torch or driver, or a bad pointer in an "
    "extension",
    signal.SIGBUS: "often shared memory is full: enlarge /dev/shm or use fewer data-loader workers",
    signal.SIGABRT: "native code gave up; its message is in the rank's output above",
    signal.SIGILL: "the processor lacks an instruction that a library was built for",
    signal.SIGFPE: "an integer division by zero in native code",
    signal.SIGTERM: "somebody asked this process to end: a scheduler, a container runtime or a user",
    signal.SIGINT: "somebody interrupted this process",
    signal.SIGPIPE: "it wrote to a pipe that nobody reads any more",
    signal.SIGXCPU: "it used up its limit of CPU time (`ulimit -t`)",
}


def exit_code(ended: Ended) -> int:
    """Return what the launcher exits with: the root cause's code, 128 + signal for signals, 0 if all went well.

    A rank that lost a peer, or waited for it in vain, while nobody has a failure of their own, is a 124. Output that
    is lost for another reason than that nobody reads it is a failure too, if there is no other.
    """
    root = root_cause(ended.outcomes)
    if root is not None and not root.stopped:
        return _TIMEOUT if _says(root.event, _LOST_PEER) else _status(root)
    if ended.interrupted:
        return 128 + ended.interrupted
    return _status(root) if root is not None else int(bool(ended.lost))


def root_cause(outcomes: Iterable[Outcome]) -> Outcome | None:
    """Return the failure that the others followed from: the first, but losing a peer is nobody's own failure."""
    failed = [outcome for outcome in outcomes if _status(outcome)]
    return min(failed, key=lambda each: (each.stopped, _follows(each), each.at, each.rank), default=None)


@dataclass(frozen=True)
class Circumstances:
    """What else a report needs to know.

    Attributes:
        hostname: This machine's name.
        oom_kills: What the kernel counted during the run.
        attempt: How often the ranks had been restarted before.
        max_restarts: How often they may be.
        restarts: Whether they will be now.
        logs: Rank -> file that has its whole output; empty if there is none.
        columns: Width to break lines at; None: do not break them.
        color: Whether the headline is to stand out.
        redact: Takes secrets out of a text.
    """

    hostname: str
    oom_kills: OomKills = field(default_factory=OomKills)
    attempt: int = 0
    max_restarts: int = 0
    restarts: bool = False
    logs: Mapping[int, str] = field(default_factory=dict)
    columns: int | None = None
    color: bool = False
    redact: Callable[[str], str] = str


def render(ended: Ended, around: Circumstances) -> str:
    """Return the report: at most `MAX_LINES` lines, the root cause once; empty if all went well.

    Args:
        ended: How the ranks ended.
        around: What else is known.
    """
    root = root_cause(ended.outcomes)
    if ended.interrupted and (root is None or root.stopped):
        return _interrupted(ended)
    if root is None:
        return "\n".join([*_leftovers(ended), *_lost(ended)])
    alike = [each for each in ended.outcomes if each is not root and _same(each, root)]
    others = [each for each in ended.outcomes if each is not root and each not in alike]
    head = [_headline(root, alike, around.hostname)]
    tail = [
        *_others(others),
        *_not_there(root, others),
        *_hints(root, around.oom_kills),
        *([f"  output was lost: {ended.lost}"] if ended.lost else []),
        *_log_lines(root, around.logs),
        _last_line(ended, around),
    ]
    return _fitted(head, lambda room: _evidence(root, room, around.redact), tail, around)


def is_worth_a_restart(ended: Ended) -> bool:
    """Whether a rank failed in a way that another attempt may not: not by a wrong configuration, nor at our command."""
    root = root_cause(ended.outcomes)
    return root is not None and not root.stopped and not ended.interrupted and _status(root) != _USAGE


def facts(ended: Ended, around: Circumstances) -> dict[str, Any]:
    """Return what `failure.json` says of a failed attempt: exit code, root cause, and every rank."""
    root = root_cause(ended.outcomes)
    return {
        "format": 1,
        "host": around.hostname,
        "attempt": around.attempt,
        "max_restarts": around.max_restarts,
        "exit_code": exit_code(ended),
        "interrupted": signal.Signals(ended.interrupted).name if ended.interrupted else None,
        "root_cause": root.rank if root else None,
        "ranks": [_facts_of(each, around) for each in ended.outcomes],
    }


def _facts_of(outcome: Outcome, around: Circumstances) -> dict[str, Any]:
    event, number = outcome.event, _signal_of(outcome)
    return {
        "rank": outcome.rank,
        "pid": outcome.pid,
        "exit_code": _status(outcome),
        "signal": number.name if number is not None else None,
        "followed": bool(_status(outcome)) and (outcome.stopped or _follows(outcome)),
        "exception": event.get("type"),
        "message": around.redact("\n".join(event.get("lines", ()))),
        "frames": [[path, line, function] for path, line, function, _ in event.get("frames", ())],
        "stood_at": [list(frame) for frame in outcome.stood],
        "crash": outcome.crash,
        "log": around.logs.get(outcome.rank),
    }


def _last_line(ended: Ended, around: Circumstances) -> str:
    code = f"exit code {exit_code(ended)}"
    if around.restarts:
        return f"{code}; restarting all ranks ({around.attempt + 1} of {around.max_restarts})"
    if around.attempt:
        return f"{code}; gave up after {around.attempt} restart{'s' if around.attempt > 1 else ''}"
    return code


def _log_lines(root: Outcome, logs: Mapping[int, str]) -> list[str]:
    return [f"  its whole output: {logs[root.rank]}"] if root.rank in logs else []


def _fitted(
    head: Sequence[str], evidence: Callable[[int], list[str]], tail: Sequence[str], around: Circumstances
) -> str:
    """Join the parts, with as much evidence as leaves at most `MAX_LINES` lines on the screen."""

    def whole(lines: Sequence[str]) -> list[str]:
        return [_cut(around.redact(line)) for line in lines]

    end = _broken(whole(tail), around.columns)
    if len(end) > _MAX_TAIL:  # the cause comes before what others said of it
        width = around.columns or _MAX_WIDTH
        short = [narrowed(line, max(width - 1, _NARROWEST)) for line in whole(tail)]
        end = [*short[: _MAX_TAIL - 1], short[-1]] if len(short) > _MAX_TAIL else short
    begin = _broken(whole(head), around.columns)
    middle: list[str] = []
    for room in range(max(0, MAX_LINES - len(begin) - len(end)), -1, -1):
        middle = _broken(whole(evidence(room)), around.columns)
        if len(begin) + len(middle) + len(end) <= MAX_LINES:
            break
    rows = MAX_LINES - len(begin) - len(end)
    if not middle and rows > 0 and around.columns:  # a message that is too long for so narrow a terminal
        line = "".join(whole(evidence(1))[:1])
        middle = _broken([narrowed(line, max(_NARROWEST, rows * (around.columns - 8)))], around.columns)[
            :rows
        ]
    shown = [*begin, *middle, *end]
    if len(shown) > MAX_LINES:  # a headline of many lines
        shown = [*shown[: MAX_LINES - len(end)], *end]
    if around.color:
        shown = [f"\x1b[1;31m{shown[0]}\x1b[m", *shown[1:]]
    return "\n".join(shown)


def _broken(lines: Sequence[str], columns: int | None) -> list[str]:
    """Break lines at a width, between words where that can be, each part below the first one further in."""
    if columns is None:
        return list(lines)
    broken = []
    for line in lines:
        text = line.lstrip()
        indent = " " * (len(line) - len(text))
        broken += textwrap.wrap(
            text,
            max(columns - 1, _NARROWEST),
            initial_indent=indent,
            subsequent_indent=f"{indent}    ",
            break_on_hyphens=False,
        )
    return broken


def _status(outcome: Outcome) -> int:
    if outcome.event.get("exit_code"):
        return int(outcome.event["exit_code"])
    return 128 - outcome.returncode if outcome.returncode < 0 else outcome.returncode


def _signal_of(outcome: Outcome) -> signal.Signals | None:
    told = outcome.event.get("exit_code")
    number = outcome.event.get("signal") or (0 if told else -outcome.returncode)
    return signal.Signals(number) if number in set(signal.Signals) else None


def follows(event: Mapping[str, Any]) -> bool:
    """Whether a program ended, by what it told of its end, only because it lost another rank."""
    lost = _LOST_PEER + _LOST_CONNECTION
    return bool(_FOLLOWING & set(event.get("bases", ()))) or _says(event, lost)


def _says(event: Mapping[str, Any], phrases: Iterable[str]) -> bool:
    """Whether one of the phrases is in the message of the exception that ended a program."""
    text = "\n".join(event["lines"]).lower() if event.get("kind") == "exception" else ""
    return any(phrase in text for phrase in phrases)


def _follows(outcome: Outcome) -> bool:
    return follows(outcome.event)


def _same(one: Outcome, other: Outcome) -> bool:
    """Whether two ranks failed in the same way at the same place, so that showing one shows both."""
    keys = ("kind", "type", "lines", "signal", "exit_code")
    if one.returncode != other.returncode or any(one.event.get(key) != other.event.get(key) for key in keys):
        return False
    last = [each.event["frames"][-1:] if each.event.get("frames") else [] for each in (one, other)]
    return last[0] == last[1] and not (one.stopped and not one.event.get("lines"))


def _headline(root: Outcome, alike: Sequence[Outcome], hostname: str) -> str:
    who = f"rank {root.rank} (process {root.pid} on {hostname})"
    also = f"; {_ranks(alike)} failed in the same way" if alike else ""
    return f"distrib: {who} failed: {_what(root)}{also}"


def _what(outcome: Outcome) -> str:
    number = _signal_of(outcome)
    if number is not None or outcome.returncode < 0:
        return f"ended by {number.name if number else f'signal {-outcome.returncode}'}"
    if outcome.event.get("kind") == "exception":
        return str(outcome.event["type"])
    if outcome.event.get("kind") == "exit":
        lines = outcome.event.get("lines", ())
        return "sys.exit with a message" if _needs_room(lines) else f"sys.exit({_argument(outcome.event)!r})"
    without = (
        "" if outcome.event.get("kind") == "command" else ", without an exception (os._exit, or native code)"
    )
    return f"exit code {_status(outcome)}{without}"


def _argument(event: Mapping[str, Any]) -> object:
    return event["lines"][0] if event.get("lines") else event["exit_code"]


def _needs_room(lines: Sequence[str]) -> bool:
    """Whether what `sys.exit` was told is more than goes into the headline."""
    return len(lines) > 1 or any(len(line) > _MAX_MESSAGE_WIDTH for line in lines)


def _evidence(root: Outcome, room: int, redact: Callable[[str], str] = str) -> list[str]:
    """The Python stack at a crash, the exception with its frames, or what `sys.exit` was told."""
    event = root.event
    lines = redact("\n".join(event.get("lines", ()))).split("\n") if event.get("lines") else []
    if _signal_of(root) is not None:
        return [f"  {line}" for line in root.crash.splitlines() if line.strip()][:room]
    if event.get("kind") != "exception" and not _needs_room(lines):
        return []
    message = _shorten(lines, _MAX_MESSAGE, event["left_out"])
    details = [*_parts(event.get("parts", ())), *_causes(event.get("causes", ()), " ".join(lines))]
    room_for_frames = min(_MAX_FRAMES, (room - len(message) - len(details) - 1) // 2)
    frames = _frames(_told_frames(event), room_for_frames) if room_for_frames > 0 else []
    return [*frames, *(f"  {line}" for line in [*message, *details])][:room]


def _parts(parts: Iterable[Sequence[Any]]) -> list[str]:
    """One line for each exception of a group."""
    lines = [f"{'  ' * depth}{text}{_place(frames)}" for depth, text, frames in parts]
    return _shorten(lines, _MAX_PARTS)


def _causes(causes: Iterable[Sequence[Any]], message: str) -> list[str]:
    """One line for each cause, unless the message holds its text already."""
    told = [(text, frames) for text, frames in causes if (text.partition(": ")[2] or text) not in message]
    return [f"because of {text}{_place(frames)}" for text, frames in told]


def _place(frames: Sequence[Sequence[object]]) -> str:
    """Where it was raised: the user's innermost frame, or else the innermost."""
    chosen = [frame for frame in frames if _is_users(str(frame[0]))] or frames
    return f" ({chosen[-1][0]}:{chosen[-1][1]})" if chosen else ""


def _told_frames(event: Mapping[str, Any]) -> Sequence[Sequence[object]]:
    """The frames that help: not ours below the script's, for an error of ours says itself what to mend."""
    frames: Sequence[Sequence[object]] = event.get("frames", ())
    users = [frame for frame in frames if _is_users(str(frame[0]))]
    return users if users and "DistribError" in event.get("bases", ()) else frames


def _frames(frames: Sequence[Sequence[object]], room: int) -> list[str]:
    """The user's own frames, and the last one whosever it is; the innermost ones where there is not room for all."""
    chosen = [frame for frame in frames[:-1] if _is_users(str(frame[0]))] + list(frames[-1:])
    shown = chosen[-room:] if room > 0 else []
    lines = [f"  ({len(chosen) - len(shown)} outer frames left out)"] if len(shown) < len(chosen) else []
    for path, number, name, text in shown:
        lines.append(f"  {path}:{number} in {name}")
        lines += [f"      {text}"] if text else []
    return lines


def _is_users(path: str) -> bool:
    library = sysconfig.get_path("stdlib")
    own = (f"{Path(distrib.__file__).parent}/", f"{Path(__file__).parent}/")
    return not (
        path.startswith(("<frozen", library + "/", *own))
        or "/site-packages/" in path
        or "/dist-packages/" in path
    )


def _others(others: Sequence[Outcome]) -> list[str]:
    """One line for each place at which ranks that followed stood, and for each failure of its own (a few)."""
    followed = [each for each in others if _status(each) and (each.stopped or _follows(each))]
    failed = [each for each in others if _status(each) and each not in followed]
    finished = [each for each in others if not _status(each)]
    lines = [f"  {_ranks([each])} failed too: {_brief(each)}" for each in failed[:3]]
    lines += [f"  {_ranks(failed[3:])} failed too"] if len(failed) > 3 else []
    lines += _followers(followed)
    return lines + ([f"  {_ranks(finished)} finished normally"] if finished else [])


def _followers(followed: Sequence[Outcome]) -> list[str]:
    places: dict[str, list[Outcome]] = {}
    for each in followed:
        places.setdefault(_stood(each), []).append(each)
    groups = sorted(places.items(), key=lambda item: (-len(item[1]), item[1][0].rank))
    shown, rest = groups[:_MAX_PLACES], [each for _, group in groups[_MAX_PLACES:] for each in group]
    lines = [f"  {_ranks(group)} followed: {_how(group)}{place}" for place, group in shown]
    return lines + ([f"  {_ranks(rest)} followed: {_how(rest)}, each elsewhere"] if rest else [])


def _stood(outcome: Outcome) -> str:
    """Say where a rank stood when it was stopped, or lost its peer: in the user's code, and in which call of it."""
    told = [(path, line, function) for path, line, function, _ in outcome.event.get("frames", ())]
    frames = list(outcome.stood) or told[::-1]  # innermost first
    users = next((frame for frame in frames if _is_users(frame[0])), None)
    if users is None:
        return ""
    called = frames[frames.index(users) - 1][2] if frames.index(users) else ""
    return f", at {users[0]}:{users[1]} in {users[2]}" + (f" ({called})" if called else "")


def _brief(outcome: Outcome) -> str:
    return str(outcome.event["lines"][-1]) if outcome.event.get("kind") == "exception" else _what(outcome)


def _how(followed: Sequence[Outcome]) -> str:
    killed = sum(1 for each in followed if _was_killed(each))
    lost = sum(1 for each in followed if not _was_killed(each) and (not each.stopped or _follows(each)))
    asked = len(followed) - lost - killed
    parts = [
        (asked, "ended by the launcher"),
        (killed, "killed by the launcher after the grace time"),
        (lost, "lost its peer" if lost == 1 else "lost their peer"),
    ]
    told = [(count, what) for count, what in parts if count]
    return told[0][1] if len(told) == 1 else ", ".join(f"{count} {what}" for count, what in told)


def _was_killed(outcome: Outcome) -> bool:
    return outcome.stopped and outcome.returncode == -signal.SIGKILL


def _not_there(root: Outcome, others: Sequence[Outcome]) -> list[str]:
    """Name the ranks that the root cause waited for in vain, or say that all waited for each other."""
    if not _follows(root):
        return []
    gone = [
        each for each in others if not _status(each)
    ]  # seen to end only after those that it left have failed
    if gone:
        return [f"  hint: {_ranks(gone)} ended without them: do all ranks make the same number of steps?"]
    if not _says(root.event, _LOST_PEER):
        return []
    busy = [each for each in others if each.stopped and not _follows(each)]
    if busy:
        return [f"  hint: {_ranks(busy)} had not failed: do all ranks make the same calls, and in time?"]
    if len({_stood(each) for each in (root, *others)}) > 1:
        return [
            "  hint: they waited at different places: is a call that all have to make under `if is_main_process`?"
        ]
    return []


def _hints(root: Outcome, oom_kills: OomKills) -> list[str]:
    """The likely cause of a signal; the limits that may be behind an exception, or what to try about it."""
    number = _signal_of(root)
    if number == signal.SIGKILL:
        return [f"  likely cause: {oom_kills.explain_sigkill()}"]
    if number in _CAUSES:
        return [f"  likely cause: {_CAUSES[number]}"]
    said = (
        line for line in root.event.get("lines", ()) if not line.startswith("  fix: ")
    )  # has its own advice
    text = "\n".join([str(root.event.get("type", "")), *said])
    limits = [f"  likely cause: {limit}" for limit in limits_behind(text)]
    advice = advice_on(text) if root.event.get("kind") == "exception" and not limits else ""
    return limits or ([f"  try: {advice}"] if advice else [])


def _interrupted(ended: Ended) -> str:
    name = signal.Signals(ended.interrupted).name
    if not ended.outcomes:
        code = 128 + ended.interrupted
        return f"distrib: interrupted by {name} before any rank had started; exit code {code}"
    killed = [each for each in ended.outcomes if each.returncode == -signal.SIGKILL]
    by_force = f"; {_ranks(killed)} had to be killed" if killed else ""
    return (
        f"distrib: interrupted by {name}; {_ranks(ended.outcomes)} ended within {ended.stop_s:.1f} s{by_force}; "
        f"exit code {128 + ended.interrupted}"
    )


def _leftovers(ended: Ended) -> list[str]:
    if not ended.leftovers:
        return []
    processes = "1 process" if ended.leftovers == 1 else f"{ended.leftovers} processes"
    return [f"distrib: ended {processes} that the ranks had left behind"]


def _lost(ended: Ended) -> list[str]:
    if not ended.lost:
        return []
    return [f"distrib: every rank ended with 0, but output was lost: {ended.lost}", "exit code 1"]


def _ranks(outcomes: Sequence[Outcome]) -> str:
    """Name ranks with runs folded: "ranks 0-2, 5"."""
    numbers = sorted(outcome.rank for outcome in outcomes)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    named = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(named)}"


def _shorten(lines: Sequence[str], most: int, left_out: int = 0) -> list[str]:
    """Keep the first and the last lines of a long text, of which `left_out` lines are gone already."""
    if len(lines) <= most:
        return list(lines)
    kept = most - 1
    head = (kept + 1) // 2
    return [*lines[:head], f"... ({len(lines) - kept + left_out} lines left out)", *lines[head - kept :]]


def _cut(line: str) -> str:
    """Make a line fit, and harmless for a terminal: no colors, no control characters."""
    text = _COLOR.sub("", line)
    return narrowed("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), _MAX_WIDTH)
