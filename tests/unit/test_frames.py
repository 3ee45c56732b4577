"""Which line of the user's a message is about."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import FunctionType

import pytest

import distrib
from distrib import frames
from distrib.collectives import signature
from distrib.strategies.batchnorm import warn_of_each_rank

PACKAGE = Path(distrib.__file__).parent
SCRIPT = f"{PACKAGE}_demo/train.py"


def calling(fn, path=SCRIPT):
    """Return a function of another file that calls `fn` in its third line."""
    code = compile("def call(fn):\n\n    return fn()\n", str(path), "exec").co_consts[0]
    return partial(FunctionType(code, {}), fn)  # which has no frame of its own


@pytest.mark.parametrize("call_site", [frames.call_site, signature.call_site])
def test_the_innermost_line_outside_the_package_is_named(call_site):
    inner = calling(calling(call_site, PACKAGE / "data/loader.py"), PACKAGE / "accelerator.py")
    assert calling(inner, "/home/a/train.py")() == "/home/a/train.py:3"


@pytest.mark.parametrize("call_site", [frames.call_site, signature.call_site])
def test_a_script_in_a_folder_whose_name_begins_like_ours_is_the_users(call_site):
    assert calling(call_site)() == f"{SCRIPT}:3"


def test_a_warning_about_batch_normalization_stands_at_the_users_call():
    with pytest.warns(UserWarning, match="BatchNorm") as caught:
        calling(calling(partial(warn_of_each_rank, ["bn"]), PACKAGE / "strategies/ddp.py"))()
    assert (caught[0].filename, caught[0].lineno) == (SCRIPT, 3)


def test_a_collective_in_a_context_manager_is_called_where_that_is_entered():
    assert calling(calling(signature.call_site, contextlib.__file__))() == f"{SCRIPT}:3"
