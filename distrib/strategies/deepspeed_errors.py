"""What DeepSpeed raises, told in this library's form."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from distrib.errors import DistribError, StrategyError
from distrib.strategies.deepspeed_config import UserFile, zero_options

# RuntimeErrors from within torch (a rank that is gone, memory) are none of DeepSpeed's; those that it raises itself are.
_ITS_OWN: Final = (
    AssertionError, AttributeError, ImportError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_MEANT: Final = {
    "pinned_buffers": "zero_optimization.offload_optimizer.buffer_count"
}  # name in its code -> key
_SHORT: Final = 400


@contextmanager
def told(doing: str, config: Mapping[str, Any], user: UserFile) -> Iterator[None]:
    """Turn errors that DeepSpeed raises in the body into ours, with the original as their cause.

    Args:
        doing: What goes on, for the message: "making an engine for Net".
        config: What the engine is made with.
        user: The user's own file.

    Raises:
        StrategyError: D0945; its place is the key of the configuration that the error speaks of, if it does.
    """
    try:
        yield
    except DistribError:
        raise
    except _ITS_OWN as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if type(error) not in _ITS_OWN or "deepspeed" not in Path(last.filename).parts:
            raise
        text = " ".join(str(error).split()) or f"{last.line}"
        key = key_in(text, config)
        in_file = key and user.get(key) is not None
        raise StrategyError(
            "D0945",
            f"DeepSpeed failed in {doing}: {type(error).__name__}: {text[:_SHORT]} ({Path(last.filename).name}:{last.lineno})",
            where=user.where(key) if in_file else f"DeepSpeed's {key}" if key else None,
            fix="correct that option in the file deepspeed.config names"
            if key
            else "see the error of DeepSpeed above",
        ) from error


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
