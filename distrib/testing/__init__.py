"""Run a function on N real processes, in a test or at the prompt."""

from distrib.testing.decorator import ranks
from distrib.testing.run import RanksFailed, run_ranks

__all__ = ["RanksFailed", "ranks", "run_ranks"]
