"""What DeepSpeed raises, told in this library's form."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import nn

from distrib.errors import StrategyError
from distrib.strategies.deepspeed_config import UserFile, zero_options

# What its code raises on purpose, beside classes of its own. What torch raises for memory or a lost rank is of other classes.
_ITS_OWN: Final = (
    AssertionError, AttributeError, ImportError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_LOST_PEER: Final = "gloo/"  # a RuntimeError like any other, but for the place in gloo's source that it names
_MEANT: Final = {  # name in its code -> key
    "pinned_buffers": "zero_optimization.offload_optimizer.buffer_count",
    "range() arg 3 must not be zero": "zero_optimization.offload_optimizer.buffer_count",
    "Not enough buffers": "zero_optimization.offload_param.buffer_count",
}
_SHORT: Final = 400


class Origin(NamedTuple):
    """What an engine is made with.

    Attributes:
        config: The whole of it.
        user: What the user says of it.
    """

    config: Mapping[str, Any]
    user: UserFile


@contextmanager
def told(doing: str, *origins: Origin) -> Iterator[None]:
    """Turn errors that DeepSpeed raises in the body into ours, with the original as their cause; others pass unchanged.

    Args:
        doing: What goes on, for the message: "making an engine for Net".
        origins: Of the engines that may have raised it.

    Raises:
        StrategyError: D0945; its place is the key of the configuration that the error speaks of, if it does.
    """
    try:
        yield
    except Exception as error:
        if (ours := _ours(error, doing, origins)) is None:
            raise
        raise ours from error


def telling(function: Callable[[nn.Module], None], doing: str, origin: Origin) -> Callable[[nn.Module], None]:
    """Return a function of DeepSpeed's whose errors are ours, as `told` makes them, for where it is called often."""

    def run(module: nn.Module) -> None:
        try:
            function(module)
        except Exception as error:
            if (ours := _ours(error, f"{doing} of {type(module).__name__}", (origin,))) is None:
                raise
            raise ours from error

    return run


def _ours(error: Exception, doing: str, origins: tuple[Origin, ...]) -> StrategyError | None:
    """Return an error of DeepSpeed's own in our form; None for one that is not."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not _is_deepspeed_s(error, Path(last.filename)):
        return None
    text = " ".join(str(error).split()) or f"{last.line}"
    key, user = _spoken_of(text, origins)
    return StrategyError(
        "D0945",
        f"DeepSpeed failed in {doing}: {type(error).__name__}: {text[:_SHORT]} ({Path(last.filename).name}:{last.lineno})",
        where=user.where(key) if user else f"DeepSpeed's {key}" if key else None,
        fix="give that option another value, in what deepspeed.config names"
        if key
        else "see the error of DeepSpeed above",
    )


def _is_deepspeed_s(error: Exception, raised_in: Path) -> bool:
    if type(error).__module__.partition(".")[0] == "deepspeed":
        return True
    package = find_spec("deepspeed")
    folders = (package and package.submodule_search_locations) or ()
    is_inside = any(raised_in.is_relative_to(folder) for folder in folders)
    return is_inside and type(error) in _ITS_OWN and _LOST_PEER not in str(error)


def _spoken_of(text: str, origins: tuple[Origin, ...]) -> tuple[str, UserFile | None]:
    """Return the key that a message speaks of, or an empty text, and the user's own file if that has it."""
    keys = [key_in(text, origin.config) for origin in origins]
    for key, origin in zip(keys, origins, strict=True):
        if key and origin.user.get(key) is not None:
            return key, origin.user
    return next(filter(None, keys), ""), None


def key_in(text: str, config: Mapping[str, Any]) -> str:
    """Return the dotted key of DeepSpeed's configuration that a message speaks of; empty if it speaks of none.

    Only names of several words count, as "buffer_count" or "buffer count": "device" or "stage" may mean anything.
    """
    for name, key in _MEANT.items():
        if name in text:
            return key
    words = " ".join(["", *re.findall(r"[^\W_]+", text), ""])
    known = [*_dotted(config), *zero_options()]
    found = [
        x for x in known if "_" in (name := x.rpartition(".")[2]) and f" {name.replace('_', ' ')} " in words
    ]
    return max(found, key=lambda x: len(x.rpartition(".")[2]), default="")


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
