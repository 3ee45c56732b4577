"""A pytest test that runs inside the ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from distrib.testing.run import run_ranks


def ranks(*world_sizes: int, timeout_s: float = 60) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the decorated test on every rank of a job, once for each world size.

    Fixtures and parameters are evaluated in the test's own process and handed to the ranks by pickling.

    Args:
        world_sizes: Number of ranks of each run; the test's id shows it as "W2".
        timeout_s: Time limit of one run in seconds.
    """
    import pytest  # noqa: PLC0415 (only tests need it)

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def test(*, world_size_: int, **arguments: Any) -> None:
            run_ranks(test, world_size_, timeout_s=timeout_s, **arguments)

        parameters = list(inspect.signature(fn).parameters.values())
        extra = inspect.Parameter("world_size_", inspect.Parameter.KEYWORD_ONLY)
        test.__signature__ = inspect.Signature([*parameters, extra])  # type: ignore[attr-defined]
        test.in_rank = fn  # type: ignore[attr-defined]
        marked: Callable[..., Any] = pytest.mark.parametrize(
            "world_size_", world_sizes, ids=[f"W{size}" for size in world_sizes]
        )(test)
        return marked

    return decorate
