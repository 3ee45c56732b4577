"""Which line of the user's a message is about."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

_PACKAGE = f"{Path(__file__).parent}/"  # with the slash: a script may lie in distrib_demo/


def outside_frame(*also: str) -> tuple[FrameType, int]:
    """Return the innermost frame outside this package, and how far it is: the `stacklevel` for the caller to warn with.

    Args:
        also: Beginnings of further paths that are not the user's.
    """
    frame, level, ours = sys._getframe(1), 1, (_PACKAGE, *also)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return frame, level


def call_site(*also: str) -> str:
    """Return "file:line" of that frame."""
    frame, _ = outside_frame(*also)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
