"""When gradients synchronise and what they are divided by.

A *window* is the set of micro-steps whose gradients make one optimizer step. With a prepared loader it is a global
batch, known by arithmetic; without one, micro-steps are counted. A mean loss is weighted beforehand, so `.grad` is
right at once; a summed loss is divided by its total count at the first of clip and step. Every optimizer has its own
window, so that several models train side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distrib.errors import TrainingError
from distrib.training.window import Count

if TYPE_CHECKING:
    from distrib.data import LiveLoaders
    from distrib.data.sharding import MicroStep
    from distrib.precision.scaler import LossScaler
    from distrib.state import Runtime
    from distrib.strategies.base import Strategy
    from distrib.strategies.pipeline_run import Batch
    from distrib.training.optimizer import PreparedOptimizer

LATER = object()  # a loss that has not been computed yet
OVERFLOW, NOTHING_COUNTED = "the gradients are not finite", "nothing was counted"
_MOST_SKIPPED = 10  # steps in a row
_LEAST = 1e-30  # in place of a count of 0: a sum over nothing is 0, and so is its mean


class MicroStepScope:
    """The context of one micro-step of some models; entered again and again."""

    def __init__(self, accumulation: Accumulation, models: tuple[nn.Module, ...]) -> None:
        self.models, self._accumulation = models, accumulation
        self.owners = accumulation.owners_of(models)
        self.counted = 0  # micro-steps of the open window when no loader is read
        self.serial = 0
        quiet = accumulation.strategy.gradient_sync(models, enabled=False)
        self._quiet = None if isinstance(quiet, nullcontext) else quiet
        self._is_quiet = False

    def __enter__(self) -> None:
        accumulation = self._accumulation
        loader = accumulation.live.current
        is_bound = loader is not None and loader.micro_step is accumulation.micro_step is not None
        is_bound = is_bound or accumulation.bind_loader()
        accumulation.scope, accumulation.entered_for = self, accumulation.micro_step
        if not is_bound:
            accumulation.count(self)
        if self._quiet is not None and not accumulation.closes:
            self._is_quiet = True
            self._quiet.__enter__()

    def __exit__(self, *error: object) -> None:
        self._accumulation.scope = None
        if self._is_quiet and self._quiet is not None:
            self._is_quiet = False
            self._quiet.__exit__(None, None, None)


class Accumulation:
    """The windows of one accelerator.

    Args:
        strategy: Lays gradients out and synchronises them.
        runtime: Where and how counts are added over the ranks.
        live: The loader being read, if any, says where windows begin and end.
        steps: Micro-steps per window when no prepared loader is read.
        scaler: Scales losses in fp16.
        names: Returns the name of every parameter by its id, for messages.

    Attributes:
        closes: Whether the current micro-step is its window's last.
        micro_step: That of the loader being read; None if none is.
        scope: The `accumulate` that is open now.
    """

    def __init__(
        self,
        strategy: Strategy,
        runtime: Runtime,
        live: LiveLoaders,
        steps: int,
        *,
        scaler: LossScaler | None = None,
        names: Callable[[], Mapping[int, str]] = dict,
    ) -> None:
        self.strategy, self._readers, self.live = strategy, runtime.readers, live
        self._device, self._steps, self._scaler, self._names = runtime.device, steps, scaler, names
        wide, _ = runtime.device_backend.supports(torch.float64)
        self._count_dtype = torch.float64 if wide else torch.float32
        self.optimizers: list[PreparedOptimizer] = []
        self.closes = True
        self.micro_step: MicroStep | None = None
        self.scope: MicroStepScope | None = None
        self.entered_for: MicroStep | None = None  # the micro-step that `accumulate` was last entered for
        self._windows = 0  # counts them
        self._serial = 0  # number of the open one
        self._micro_steps = 0  # counts them
        self._number = 0  # of the current one
        self._is_alone = steps == 1  # whether the current micro-step is the only one of its window
        self._mean_weight, self._correction = 1 / steps, 1.0
        self._sum_weight = self._readers.world_size
        self.divides = scaler is not None  # whether `finish` has anything to do
        self.scopes: dict[tuple[nn.Module, ...], MicroStepScope] = {}
        self._outside = self.accumulate(())

    def accumulate(self, models: tuple[nn.Module, ...]) -> MicroStepScope:
        """Return the context of one micro-step; gradients of `models` stay on the rank unless it closes a window."""
        scope = self.scopes.get(models)
        if scope is None:
            scope = self.scopes[models] = MicroStepScope(self, models)
        return scope

    def step_through(self, model: nn.Module, batch: Batch, count: Count | None) -> Tensor:
        """Run a batch through a model that may be cut into stages, with its backward where gradients are on.

        Returns:
            The mean loss, 0-d and detached, equal on the ranks that hold parts of one model.
        """
        runner, trains = self.strategy.runner_of(model), torch.is_grad_enabled()
        assert batch.loss_function is not None, "there is no step without a loss"
        if runner is not None:
            compute = batch.loss_function

            def checked(output: Any, targets: Any) -> Tensor:
                loss = compute(output, targets)
                _check_loss(loss, trains=trains)
                return loss

            factor = self.enter(LATER, count) if trains else None
            found = runner.run(batch._replace(loss_function=checked, is_sum=count is not None), factor)
        else:
            loss = batch.loss_function(model(batch.inputs), batch.targets)
            _check_loss(loss, trains=trains)
            if trains:
                factor = self.enter(loss, count)
                self.strategy.backward(loss * factor)
            found = loss.detach().reshape(())
        return found if count is None else (found / self._scalar(count).clamp_min(_LEAST)).to(found.dtype)

    def enter(self, loss: object, count: Count | None) -> float | Tensor:
        """Enter a mean loss, or a summed loss and what it counts, into the windows of its optimizers.

        Args:
            loss: The loss, or LATER if it is not there yet.
            count: What a sum counts; None for a mean.

        Returns:
            What its gradients are to be multiplied by.

        Raises:
            TrainingError: if it is no loss, or mean and sum, or unequal counts, meet in one window.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            _check_loss(loss)  # which tells what is wrong
        scope = self.scope
        if scope is None:
            scope = self._outside
            self.bind_loader()
        weight, scale = self._mean_weight, 1.0
        if count is not None:
            if type(count) is not int or count < 0:
                _check_count(count)
            weight, self.divides = self._sum_weight, True
        if self._scaler is not None:
            scale = self._scaler.scale
            if count is not None:
                weight *= self._sum_factor(count)
        for optimizer in scope.owners:
            self._note(optimizer, count, scale)
        return weight * scale

    def finish_for(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide the gradients of the optimizers of `parameters`, before they are clipped."""
        wanted = set(map(id, parameters))
        for optimizer in self.optimizers:
            if not wanted.isdisjoint(optimizer.parameter_ids):
                self.finish(optimizer)

    def finish(self, optimizer: PreparedOptimizer) -> None:
        """Take the loss scale and the total count out of an optimizer's gradients, once.

        Collective in a window of summed losses.
        """
        window = optimizer.window
        if window.divided or window.kind is None:
            return
        window.divided = True
        factor = self._correction / window.loss_scale if window.kind == "mean" else 1 / window.loss_scale
        if window.kind == "sum":
            total = window.total
            if isinstance(total, Tensor):
                total = float(self._readers.all_reduce_(self._scalar(total)))
            elif self._readers.world_size > 1:
                counted = torch.tensor(total, dtype=self._count_dtype, device=self._device)
                total = float(self._readers.all_reduce_(counted))
            if not total:
                window.unusable = NOTHING_COUNTED
                return
            factor /= total * (self._scaler.sum_factor or 1.0) if self._scaler is not None else total
        if factor != 1 or self._scaler is not None:
            check = self._scaler is not None
            finite = self.strategy.scale_gradients_(optimizer.parameters(), factor, check_finite=check)
            window.unusable = "" if finite else OVERFLOW

    def add(self, optimizer: PreparedOptimizer) -> None:
        """Take part in the windows with one more optimizer."""
        self.optimizers.append(optimizer)
        for models, scope in self.scopes.items():
            scope.owners = self.owners_of(models)

    def owners_of(self, models: tuple[nn.Module, ...]) -> list[PreparedOptimizer]:
        """Return the optimizers of `models`; all of them for none."""
        if not models:
            return list(self.optimizers)
        return [x for x in self.optimizers if any(x.trains(model) for model in models)]

    def reset(self) -> None:
        """Forget open windows: a checkpoint has been loaded, and they will be replayed."""
        self.micro_step, self.closes = None, True
        for scope in self.scopes.values():
            scope.counted = 0
        for optimizer in self.optimizers:
            optimizer.abandon()

    def was_left(self) -> bool:
        """Whether the loop over a loader has ended in the middle of a window."""
        return self.micro_step is not None and self.live.current is None

    def check_may_step(self) -> None:
        """Refuse a step in the middle of a window that `accumulate` was not told about.

        Raises:
            TrainingError: if the batch yielded last is not its window's last and `accumulate` is not in use.
        """
        self.bind_loader()
        if not self.closes and self.micro_step is not None and self.entered_for is not self.micro_step:
            raise TrainingError(
                "D0601",
                "optimizer.step() in the middle of a global batch: this run takes several micro-steps per step",
                fix="put the loop's body into `with accelerator.accumulate(model):`",
            )

    def stepped(self, optimizer: PreparedOptimizer) -> None:
        """Note that a window's gradients are used up; what was yielded for it counts as consumed."""
        window = optimizer.window
        outcome, window.serial, window.kind, window.unusable = window.unusable, None, None, ""
        for loader in self.live.stack:
            loader.stepped()
        if self._scaler is not None and outcome != NOTHING_COUNTED:
            self._scaler.update(finite=not outcome)
            if self._scaler.skipped_in_a_row >= _MOST_SKIPPED:
                raise self._never_finite(optimizer, self._scaler)

    def count(self, scope: MicroStepScope) -> None:
        """Count a micro-step of the models of `scope`, where no loader is read."""
        if scope.counted == 0:
            self._windows += 1
            scope.serial = self._windows
        scope.counted += 1
        self._number = self._micro_steps = self._micro_steps + 1
        self.closes = scope.counted >= self._steps
        if self.closes:
            scope.counted = 0

    def bind_loader(self) -> bool:
        """Take up the micro-step of the loader being read; say whether there is one."""
        loader = self.live.current
        step = loader.micro_step if loader is not None else None
        if step is self.micro_step:
            return step is not None
        self.micro_step = step
        if step is None or loader is None:  # the loop over a loader has ended
            self.closes, self._mean_weight, self._correction = True, 1 / self._steps, 1.0
            self._sum_weight = self._readers.world_size
            self._serial = self._windows = self._windows + 1
            self._is_alone = self._steps == 1
            return False
        self.closes, self._is_alone = step.closes, step.closes and step.opens
        if loader.taken_up is not step:  # else an evaluation loop has ended, and this micro-step goes on
            loader.taken_up = step
            self._micro_steps += 1
            self._windows += step.opens
            loader.numbers = self._micro_steps, self._windows if step.opens else loader.numbers[1]
        self._number, self._serial = loader.numbers
        self._mean_weight, self._correction = loader.weight_of_mean, loader.correction
        self.divides = self.divides or self._correction != 1
        self._sum_weight = self._readers.world_size if loader.has_samples else 0
        return True

    def _note(self, optimizer: PreparedOptimizer, count: Count | None, scale: float) -> None:
        """Enter one loss into an optimizer's window."""
        window = optimizer.window
        serial = self._serial if self.micro_step is not None or self.scope is None else self.scope.serial
        if window.serial != serial:
            if optimizer.is_unfinished:
                optimizer.abandon()
            elif optimizer.content == "open":
                optimizer.content = "used"
            window.open(serial)
            window.loss_scale = scale
        kind: Literal["mean", "sum"] = "mean" if count is None else "sum"
        if window.kind is None and not window.divided:
            window.kind = kind
        elif window.kind != kind or window.divided:
            window.check_kind(kind)
        if window.loss_scale != scale:
            optimizer.rescale(scale / window.loss_scale)
            window.loss_scale = scale
        if count is not None:
            if window.micro_step != self._number:
                window.micro_step, window.micro_count = self._number, count
                window.total = window.total + count if self._sum_weight else window.total
            else:
                window.check_count(count)
        optimizer.is_unfinished = not self.closes
        if optimizer.content == "nothing" and not self._is_alone:
            optimizer.content = "open"

    def _sum_factor(self, count: Count) -> float:
        """Return what summed losses are multiplied by in fp16: a power of two near 1 / count, the same all run long."""
        assert self._scaler is not None, "only a loss scale needs it"
        if self._scaler.sum_factor is None:  # the first sum of the run: collective
            most = self._readers.all_reduce_(self._scalar(count), "max")
            self._scaler.sum_factor = float(2.0 ** -int(torch.log2(most.clamp_min(1)).ceil()))
        return self._scaler.sum_factor

    def _scalar(self, value: Count) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self._device, self._count_dtype, copy=True).reshape(())
        return torch.tensor(value, dtype=self._count_dtype, device=self._device)

    def _never_finite(self, optimizer: PreparedOptimizer, scaler: LossScaler) -> TrainingError:
        return TrainingError(
            "D0606",
            f"the gradients of the last {_MOST_SKIPPED} steps were not finite, although the loss scale has fallen to "
            f"{scaler.scale:g}; step {optimizer.num_steps + 1} was not taken; the first of them is "
            f"{self._first_bad(optimizer)}",
            fix="look for a division by zero or a logarithm of zero there, or use mixed_precision: bf16",
        )

    def _first_bad(self, optimizer: PreparedOptimizer) -> str:
        names = self._names()
        for parameter in optimizer.parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"that of {names.get(id(parameter), 'a parameter of no prepared model')}"
        return "that of a parameter on another rank"


def _check_loss(loss: object, *, trains: bool = True) -> None:
    if loss is LATER or (
        isinstance(loss, Tensor) and loss.numel() == 1 and (loss.requires_grad or not trains)
    ):
        return
    raise TrainingError(
        "D0607",
        f"backward was given {_describe(loss)}; expected one number that requires grad",
        fix="reduce the loss to one number with mean() or sum(), and do not detach it or compute it under no_grad",
    )


def _describe(loss: object) -> str:
    if not isinstance(loss, Tensor):
        return f"a {type(loss).__name__}"
    return f"a tensor of shape {tuple(loss.shape)}" + ("" if loss.requires_grad else " without grad")


def _check_count(count: object) -> None:
    fits = count.numel() == 1 if isinstance(count, Tensor) else isinstance(count, Real) and float(count) >= 0
    if not fits:
        raise TrainingError(
            "D0608",
            f"backward was given count={count!r:.80}; expected a number of at least 0, or a tensor that holds one",
            fix="pass how many tokens or samples the summed loss of this rank counts",
        )
