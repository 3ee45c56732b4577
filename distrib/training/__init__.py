"""The loop's own objects: accumulation, optimizer, scheduler."""

from distrib.training.accumulation import Accumulation
from distrib.training.optimizer import PreparedOptimizer
from distrib.training.scheduler import PreparedScheduler

__all__ = ["Accumulation", "PreparedOptimizer", "PreparedScheduler"]
