"""The learning-rate scheduler that a training loop sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distrib.errors import TrainingError
from distrib.training.optimizer import PreparedOptimizer


class PreparedScheduler:
    """Moves when its optimizer has stepped since its last call: once per optimizer step at any world size.

    Called per micro-batch, per step or per epoch, it does what the same loop in one process does.

    Attributes:
        scheduler: The user's own scheduler.
        steps_seen: Its optimizer's steps at the last call.
    """

    def __init__(self, scheduler: Any, optimizers: Sequence[PreparedOptimizer]) -> None:
        self.scheduler, self._optimizers = scheduler, optimizers
        self._owner: PreparedOptimizer | None = None
        self.steps_seen = 0

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advance the schedule if the optimizer has really stepped since the last call."""
        if self._owner is None:
            self._owner = self._find_owner()
        steps = self._owner.num_steps
        if steps != self.steps_seen:
            self.steps_seen = steps
            self.scheduler.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def _find_owner(self) -> PreparedOptimizer:
        wanted = getattr(self.scheduler, "optimizer", None)
        for optimizer in self._optimizers:
            if wanted is optimizer or wanted is optimizer.optimizer:
                return optimizer
        raise TrainingError(
            "D0604",
            f"the optimizer of {type(self.scheduler).__name__} has not been prepared",
            fix="give the optimizer to accelerator.prepare too",
        )
