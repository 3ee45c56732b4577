"""When gradients synchronise and what they are divided by.

A *window* is the set of micro-steps whose gradients make one optimizer step. With a prepared loader it is a global
batch, known by arithmetic; without one, micro-steps are counted. A mean loss is weighted beforehand, so `.grad` is
right at once; a summed loss is divided by its total count at the first of clip and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from distrib.errors import TrainingError

if TYPE_CHECKING:
    from distrib.data import LiveLoaders
    from distrib.data.sharding import MicroStep, Share
    from distrib.state import Runtime
    from distrib.strategies.base import Strategy
    from distrib.training.optimizer import PreparedOptimizer

Count: TypeAlias = "int | Tensor"


class Accumulation:
    """The open window of one accelerator.

    Args:
        strategy: Lays gradients out and synchronises them.
        runtime: Where and how counts are added over the ranks.
        live: The loader being read, if any, says where windows begin and end.
        steps: Micro-steps per window when no prepared loader is read.
    """

    def __init__(self, strategy: Strategy, runtime: Runtime, live: LiveLoaders, steps: int) -> None:
        self._strategy, self._collectives, self._live = strategy, runtime.collectives, live
        self._device, self._steps = runtime.device, steps
        wide, _ = runtime.device_backend.supports(torch.float64)
        self._count_dtype = torch.float64 if wide else torch.float32
        self.optimizers: list[PreparedOptimizer] = []
        self.closes = True
        self._inside = False
        self._bound: MicroStep | None = None
        self._accumulated: MicroStep | None = None  # the micro-step that `accumulate` was last entered for
        self._counted = 0  # micro-steps of the open window when no loader is read
        self._owners: Sequence[PreparedOptimizer] = ()
        self._owners_found: dict[tuple[int, ...], Sequence[PreparedOptimizer]] = {}
        self._kind: str | None = None  # "mean" or "sum", of this window's losses
        self._micro_count: Count | None = None  # of this micro-step's summed losses
        self._total: Count | None = None  # this rank's count over the window so far
        self._divisor: float | None = None  # the count over all ranks, once it has been asked for

    @contextmanager
    def accumulate(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Bind the batch that was yielded last; gradients of `models` stay on the rank unless it closes the window."""
        if not self.bind():
            self._count_micro_step()
        self._owners = self._owners_of(models)
        self._inside, self._accumulated = True, self._bound
        try:
            with self._strategy.gradient_sync(models, enabled=self.closes):
                yield
        finally:
            self._inside = False

    def backward(self, loss: Tensor, count: Count | None) -> None:
        """Add the gradients of a mean loss, or of a summed loss and what it counts."""
        if not self._inside:
            self.bind()
            self._owners = self.optimizers
        self._check_kind("mean" if count is None else "sum")
        weight = self._mean_weight() if count is None else self._sum_weight(count)
        self._strategy.backward(loss if weight == 1 else loss * weight)
        for optimizer in self._owners:
            optimizer.note_backward(closing=self.closes)

    def finish(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Divide gradients of summed losses by the window's total count; whether anything was counted at all.

        Collective in a window of summed losses. Each optimizer's gradients are divided once.
        """
        if self._kind != "sum":
            return True
        total = self._total_count()
        for optimizer in self._owners_of_parameters(parameters):
            if not optimizer.divided and total:
                optimizer.divided = True
                factor = torch.tensor(1 / total, dtype=self._count_dtype, device=self._device)
                self._strategy.scale_gradients_(optimizer.parameters(), factor)
        return bool(total)

    def add(self, optimizer: PreparedOptimizer) -> None:
        """Take part in the windows with one more optimizer."""
        self.optimizers.append(optimizer)
        self._owners_found.clear()

    def reset(self) -> None:
        """Forget the open window: a checkpoint has been loaded, and it will be replayed."""
        self._bound, self._counted, self.closes = None, 0, True
        self._open_window()

    def check_may_step(self) -> None:
        """Refuse a step in the middle of a window that `accumulate` was not told about.

        Raises:
            TrainingError: if the batch yielded last is not its window's last and `accumulate` is not in use.
        """
        if self._inside:
            return
        self.bind()
        if not self.closes and self._bound is not None and self._accumulated is not self._bound:
            raise TrainingError(
                "D0601",
                "optimizer.step() in the middle of a global batch: this run takes several micro-steps per step",
                fix="put the loop's body into `with accelerator.accumulate(model):`",
            )

    def bind(self) -> bool:
        """Take up the micro-step of the loader being read; False if there is none."""
        loader = self._live.current
        if loader is None or loader.micro_step is None:
            if self._bound is not None:  # the loop over a loader has ended
                self._bound, self._counted = None, 0
                self.closes = True
            return False
        step = loader.micro_step
        if step is not self._bound:
            self._bound, self.closes = step, step.closes
            self._micro_count = None
            if step.opens:
                self._open_window()
        return True

    def _count_micro_step(self) -> None:
        if self._counted == 0:
            self._open_window()
        self._counted += 1
        self._micro_count = None
        self.closes = self._counted >= self._steps
        if self.closes:
            self._counted = 0

    def _open_window(self) -> None:
        self._kind = self._total = self._divisor = None
        for optimizer in self.optimizers:
            optimizer.open_window()

    def _check_kind(self, kind: str) -> None:
        if self._kind not in (None, kind):
            raise TrainingError(
                "D0602",
                "backward(loss) and backward(loss_sum, count=n) are mixed in one global batch",
                fix="use one of the two for all losses of a step",
            )
        self._kind = kind

    def _share(self) -> Share | None:
        loader = self._live.current
        return loader.share if loader is not None and self._bound is not None else None

    def _mean_weight(self) -> float:
        """Weight of this rank's mean, so that the average over ranks, added up, is the window's mean."""
        step, share = self._bound, self._share()
        if step is None or share is None:
            return 1 / self._steps
        rows = share.rows if step.padded_size != step.size else share.size
        return rows * self._collectives.world_size / step.padded_window

    def _sum_weight(self, count: Count) -> float:
        """Weight of this rank's sum against the average over ranks; notes what it counts."""
        share = self._share()
        weight = 0 if share is not None and share.is_stand_in else self._collectives.world_size
        if self._micro_count is None:
            counted = count if weight else count * 0
            self._micro_count, self._total = count, counted if self._total is None else self._total + counted
        elif bool(self._micro_count != count):
            raise TrainingError(
                "D0603",
                f"two backward calls of one micro-step count {int(self._micro_count)} and {int(count)}; "
                "they share one division, so the counts must be equal",
                fix="add the losses up before one backward call, or normalise one of them yourself",
            )
        return weight

    def _total_count(self) -> float:
        if self._divisor is None:
            mine = torch.as_tensor(0 if self._total is None else self._total)
            mine = mine.detach().to(self._device, self._count_dtype, copy=True).reshape(())
            self._divisor = float(self._collectives.all_reduce_(mine))
        return self._divisor

    def _owners_of(self, models: Sequence[nn.Module]) -> Sequence[PreparedOptimizer]:
        """Return the optimizers of `models`, remembered: the search would grow with the models."""
        if not models:
            return self.optimizers
        key = tuple(map(id, models))
        if key not in self._owners_found:
            self._owners_found[key] = [x for x in self.optimizers if any(x.trains(model) for model in models)]
        return self._owners_found[key]

    def _owners_of_parameters(self, parameters: Iterable[nn.Parameter]) -> list[PreparedOptimizer]:
        wanted = {id(parameter) for parameter in parameters}
        return [optimizer for optimizer in self.optimizers if wanted & optimizer.parameter_ids]
