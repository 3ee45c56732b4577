"""Where DeepSpeed keeps gradients, float32 masters and optimizer state, for each of its stages.

An engine flattens the parameters of a group one after the other and gives each rank a part of the whole (stages 1 and 2),
or flattens each parameter by itself and gives each rank a part of it (stage 3). So what a rank has of a parameter is an
interval of its elements in row-major order. The attributes that say where are DeepSpeed's own, of version 0.19.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.collectives.base import Collectives
from distrib.errors import StrategyError
from distrib.state import Interval, Slice, TensorSpec
from distrib.strategies.deepspeed_errors import Origin, telling, told

_GATHERED = "distrib"  # stands for a module that needs the whole parameter


@dataclass(frozen=True)
class Fragment:
    """The elements [start, stop) of a flattened parameter that this rank updates.

    Attributes:
        shape: Shape of the whole parameter.
        start: First element.
        stop: The one after the last; equal to `start` where the rank has none.
        master: (stop - start,), the live values that the optimizer updates.
        flat: The tensor of which `master` is a part, as the optimizer knows it; None for a frozen parameter.
        offset: Where in `flat` the part begins.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    master: Tensor
    flat: Tensor | None
    offset: int

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return this fragment's part of a tensor that is laid out like `flat`; a view."""
        return tensor.view(-1).narrow(0, self.offset, self.stop - self.start)

    def slice_of(self, name: str, part: Tensor) -> Slice:
        """Describe this fragment's part of a tensor of the parameter's shape."""
        return Slice(name, self.shape, part.dtype, Interval(self.start, self.stop), lambda: part)


class Held(ABC):
    """What one engine holds of gradients and state on this rank.

    Gradients of a window are first accumulated, then finished: averaged over the ranks, and ready for the optimizer.

    Args:
        engine: A `DeepSpeedEngine` with an optimizer.
        given: The user's optimizer, whose groups list the parameters of the module.
        origin: What it is made with.

    Attributes:
        stage: Of ZeRO.
        ids: Of all parameters in these groups.
        is_dirty: Whether there are gradients.
        is_finished: Whether they are averaged.
        is_gathered: Whether parameters are whole now, and may be changed in place.
    """

    def __init__(self, engine: Any, given: Optimizer, origin: Origin) -> None:
        self.engine, self.zero, self.given, self.origin = engine, engine.optimizer, given, origin
        self.stage = int(engine.zero_optimization_stage())
        self.module: nn.Module = engine.module
        self.ids = {id(x) for group in given.param_groups for x in group["params"]}
        # as they were when the engine was made: what is frozen later keeps its place
        self._stepped = {id(x) for x in self.module.parameters() if x.requires_grad and id(x) in self.ids}
        self._places = [
            place for place, group in enumerate(given.param_groups) if any(map(self.steps, group["params"]))
        ]
        self.is_dirty = self.is_finished = self.is_gathered = False

    def __deepcopy__(self, memo: Any) -> Held:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()  # what was pickled has no engine

    @property
    def base(self) -> Optimizer:
        """The optimizer that updates the masters."""
        found: Optimizer = self.engine.basic_optimizer
        return found

    def begin_with(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Fill the masters from whole parameters, which forwards compute with in a narrower format already."""
        for parameter in filter(self.steps, values):
            fragment = self.fragment(parameter)
            fragment.master.copy_(values[parameter].view(-1)[fragment.start : fragment.stop])

    def told(self, doing: str) -> AbstractContextManager[None]:
        """Return a context in which DeepSpeed's errors are told in our form."""
        return told(f"{doing} of {type(self.module).__name__}", self.origin)

    def before_backward(self) -> None:
        """Let the next backward add to the gradients and exchange nothing at its end that a step would need."""
        self._set_boundary(at_end=False)
        self.engine._running_engine_backward = True  # so that hooks leave the end of the backward to us
        with self.told("a backward"):
            self.engine._backward_prologue()

    def after_backward(self) -> None:
        """End a backward, which may have reached none of the parameters.

        Raises:
            StrategyError: D0888, if it adds to gradients that are averaged already.
        """
        self.engine._running_engine_backward = False
        if not self._was_reached():
            self._leave_backward()
            return
        self.is_dirty = True
        with self.told("a backward"):
            self.engine._backward_epilogue()
        if self.is_finished:
            self.forget()
            raise StrategyError(
                "D0888",
                f"backward reached {type(self.module).__name__} after its gradients had been averaged for a clip or a step; "
                "those of this loss would not be",
                fix="call backward for all losses of a step before the first clip, and zero_grad after a step that was skipped",
            )

    def abort_backward(self) -> None:
        """Leave a backward that an exception has ended; what it has left is dropped with the other gradients."""
        self.engine._running_engine_backward = False
        self.is_dirty = True
        self._drop_unfinished()
        self._leave_backward()

    def finish(self) -> None:
        """Average the gradients of the window over the ranks, if that is not done. Collective."""
        if self.is_dirty and not self.is_finished:
            with self.told("averaging gradients"):
                self._finish()
            self.is_finished = True

    def forget(self) -> None:
        """Drop all gradients."""
        if self.is_dirty:
            with self.told("clearing gradients"):
                self._forget()
            self.is_dirty = self.is_finished = False

    def step(self) -> bool:
        """Update the masters and what is computed with; say whether DeepSpeed did. Collective.

        Raises:
            StrategyError: D0951, inside of `gathered`.
        """
        self.refuse_gathered("an optimizer's step")
        self.finish()
        if not self.is_dirty:
            return True
        self._take_over_options()
        self._set_boundary(at_end=True)
        with self.told("a step"):
            self._hand_over()
            self.engine.step()
        self._set_boundary(at_end=False)
        self.given._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers look there
        stepped: bool = self.engine.was_step_applied()
        self.forget()
        return stepped

    def refuse_gathered(self, what: str) -> None:
        """Refuse to change masters while parameters are whole: these would go back to the masters afterwards (D0951)."""
        if self.is_gathered:
            raise StrategyError(
                "D0951",
                f"{what} inside of gathered, which takes over what {type(self.module).__name__} had there, would be undone",
                where="accelerator.gathered",
                fix="leave the context first",
            )

    def tensors(self, wanted: Collection[int]) -> list[Tensor]:
        """Return the tensors in which gradients lie now, those of parameters with these ids once they are finished."""
        if not self.is_dirty:
            return []
        return self._finished(wanted) if self.is_finished else self._accumulated()

    @abstractmethod
    def fragment(self, parameter: nn.Parameter) -> Fragment:
        """Return which part of a parameter of the module this rank updates."""

    @abstractmethod
    def refresh(self) -> None:
        """Let what is computed with follow the masters, which have been changed. Collective."""

    @abstractmethod
    def whole_masters(self, collectives: Collectives) -> Mapping[int, Tensor]:
        """Return all values of each parameter in the masters' format, by its id. Collective."""

    def computed_part(self, parameter: nn.Parameter, fragment: Fragment) -> Tensor:
        """Return the fragment's elements of the parameter as the forward computes with them; a view."""
        return parameter.data.view(-1)[fragment.start : fragment.stop]

    def take_back(self) -> None:
        """Let masters follow parameters that have been changed in place, equally on all ranks."""
        for parameter in self.trained():
            fragment = self.fragment(parameter)
            computed = self.computed_part(parameter, fragment)
            if not torch.equal(fragment.master.to(computed), computed):
                fragment.master.copy_(computed)

    def take_back_now(self) -> None:
        """Let masters follow what has been changed so far inside of `gathered`, if anything is gathered."""
        if self.is_gathered:
            self.take_back()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let all parameters be whole, and what is changed in them go back to the masters.

        Collective; inside of itself it does nothing.
        """
        if self.is_gathered:
            yield
            return
        with self._gathered():
            self.is_gathered = True
            try:
                yield
            finally:
                self.is_gathered = False
        self.take_back()

    def _gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def before_loading(self) -> None:
        """Drop copies that would outlive new values. Collective."""
        self.forget()

    def steps(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer updates a parameter: it was in its groups, and not frozen, when the engine was made."""
        return id(parameter) in self._stepped

    def trained(self) -> Iterator[nn.Parameter]:
        """Yield the module's parameters that the optimizer updates."""
        yield from filter(self.steps, self.module.parameters())

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the optimizer's state of a parameter: parts of tensors where they are its fragment's, else the values."""
        fragment = self.fragment(parameter)
        flat = fragment.flat
        if flat is None or flat not in self.base.state:
            return {}
        return {
            key: fragment.part_of(x) if _is_like(x, flat) else x for key, x in self.base.state[flat].items()
        }

    def allocate(self, wanted: Mapping[nn.Parameter, Mapping[str, TensorSpec]]) -> None:
        """Give each flat tensor exactly the state that a checkpoint has for its parameters, with any values.

        Args:
            wanted: Parameter -> key of the optimizer's state -> how the checkpoint has it.
        """
        keys: dict[Tensor, dict[str, Tensor]] = {}
        for parameter, specs in wanted.items():
            fragment = self.fragment(parameter)
            assert fragment.flat is not None, "it is stepped"
            of_flat = keys.setdefault(fragment.flat, {})
            here = self.base.state.get(fragment.flat, {})
            for key, spec in specs.items():
                if key not in of_flat:
                    is_like = tuple(spec.shape) == fragment.shape and key != "step"
                    of_flat[key] = _fitting(here.get(key), spec, fragment.flat, is_like=is_like)
        self.base.state.clear()
        self.base.state.update({flat: state for flat, state in keys.items() if state})

    def _was_reached(self) -> bool:
        """Whether the last backward has made gradients of parameters here."""
        return bool(self.zero._hooks_fired_this_backward)

    def _leave_backward(self) -> None:
        self.zero.exit_backward()

    @abstractmethod
    def _drop_unfinished(self) -> None:
        """Drop what a backward has left that did not reach its end: gradients that wait to be exchanged."""

    def _hand_over(self) -> None:
        """Bring finished gradients to where the optimizer looks for them; in memory they are there already."""
        return

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _forget(self) -> None: ...

    @abstractmethod
    def _accumulated(self) -> list[Tensor]: ...

    @abstractmethod
    def _finished(self, wanted: Collection[int]) -> list[Tensor]: ...

    def _set_boundary(self, *, at_end: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(at_end)

    def _take_over_options(self) -> None:
        """Let the groups have the learning rates and other options that the user's groups have now."""
        for own, place in zip(self.base.param_groups, self._places, strict=True):
            given = self.given.param_groups[place]
            own.update({key: value for key, value in given.items() if key != "params"})


class Whole(Held):
    """Stage 0: everything is whole on every rank, and only gradients are exchanged."""

    def __init__(self, engine: Any, given: Optimizer, origin: Origin) -> None:
        super().__init__(engine, given, origin)
        self._reached = False
        for x in self.trained():
            x.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]

    def before_backward(self) -> None:
        self._reached = False
        super().before_backward()

    def fragment(self, parameter: nn.Parameter) -> Fragment:
        values = parameter.data.view(-1)
        return Fragment(tuple(parameter.shape), 0, len(values), values, parameter, 0)

    def refresh(self) -> None:
        """There is one copy of the values."""

    def whole_masters(self, collectives: Collectives) -> Mapping[int, Tensor]:
        return {}

    def _note(self, _: Tensor) -> None:
        self._reached = True

    def _was_reached(self) -> bool:
        return self._reached

    def _leave_backward(self) -> None:
        """DeepSpeed counts nothing here."""

    def _drop_unfinished(self) -> None:
        """Gradients are exchanged at the end of a window, all at once."""

    def _finish(self) -> None:
        self._set_boundary(at_end=True)
        self.engine.allreduce_gradients()
        self._set_boundary(at_end=False)

    def _forget(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def _accumulated(self) -> list[Tensor]:
        return [x.grad for x in self.trained() if x.grad is not None]

    def _finished(self, wanted: Collection[int]) -> list[Tensor]:
        return [x.grad for x in self.trained() if x.grad is not None and id(x) in wanted]


class Flat(Held):
    """Stages 1 and 2: the parameters of a group lie one after the other, and each rank updates a part of the whole."""

    def __init__(self, engine: Any, given: Optimizer, origin: Origin) -> None:
        super().__init__(engine, given, origin)
        self._groups: dict[int, int] = {}
        self._offsets: dict[int, int] = {}
        for number, (parameters, flat) in enumerate(
            zip(self.zero.bit16_groups, self.zero.bit16_groups_flat, strict=True)
        ):
            for x in parameters:
                self._groups[id(x)] = number
                # right whatever order DeepSpeed has put them in, which its own mapping is not
                self._offsets[id(x)] = x.data.storage_offset() - flat.storage_offset()

    def fragment(self, parameter: nn.Parameter) -> Fragment:
        number, begin = self._groups[id(parameter)], self._offsets[id(parameter)]
        flat = self.zero.single_partition_of_fp32_groups[number]
        low = dist.get_rank(self.zero.real_dp_process_group[number]) * flat.numel()
        first, last = max(begin, low), min(begin + parameter.numel(), low + flat.numel())
        if first >= last:
            return Fragment(tuple(parameter.shape), 0, 0, flat.data.narrow(0, 0, 0), flat, 0)
        master = flat.data.narrow(0, first - low, last - first)
        return Fragment(tuple(parameter.shape), first - begin, last - begin, master, flat, first - low)

    def refresh(self) -> None:
        self.zero.update_lp_params()

    def whole_masters(self, collectives: Collectives) -> Mapping[int, Tensor]:
        parts = [x.detach().view(1, -1) for x in self.zero.single_partition_of_fp32_groups]
        flats = [x.view(-1) for x in collectives.gather(parts)]
        return {
            id(x): flats[self._groups[id(x)]].narrow(0, self._offsets[id(x)], x.numel()).view(x.shape)
            for x in self.trained()
        }

    @property
    def _offloads(self) -> bool:
        return bool(self.zero.cpu_offload)

    def before_backward(self) -> None:
        self.zero.clear_backward_seen_flag()
        super().before_backward()

    def _drop_unfinished(self) -> None:
        for bucket in self.zero.ipg_buckets.values():
            bucket.clear()
        self.zero._release_ipg_buffers()
        self.zero.extra_large_param_to_reduce.clear()
        self.zero.params_already_reduced = [False] * len(self.zero.params_already_reduced)

    def _finish(self) -> None:
        if self.zero.partition_gradients:
            self.zero.finalize_gradient_accumulation_boundary()
            self._set_boundary(at_end=False)
            return
        self.zero.setup_buckets()
        for x in self.trained():  # the ranks exchange the same parameters, whichever each of them has used
            if x.grad is None:
                x.grad = torch.zeros_like(x)
        self._set_boundary(at_end=True)
        self.engine.allreduce_gradients()
        self._set_boundary(at_end=False)
        if not self._offloads:  # a loss scale is taken out in float32, where small values are not lost
            for number, pieces in self.zero.averaged_gradients.items():
                self.zero.averaged_gradients[number] = [x.float() for x in pieces]

    def _forget(self) -> None:
        zero = self.zero
        for number in range(len(zero.bit16_groups)):
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        zero.zero_grad(set_to_none=True)
        zero.micro_step_id = -1  # as after a step: what comes next is written over what is there
        if self._offloads:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()
            for flat in zero.single_partition_of_fp32_groups:
                flat.grad.zero_()

    def _accumulated(self) -> list[Tensor]:
        zero = self.zero
        if self._offloads and zero.partition_gradients:
            return list(zero.accumulated_grads_in_cpu.values())
        if not zero.partition_gradients:
            return [x.grad for x in self.trained() if x.grad is not None]
        lists = [*zero.all_grad_tensors.values(), *zero.averaged_gradients.values()]
        return [x for pieces in lists if pieces is not None for x in pieces]

    def _finished(self, wanted: Collection[int]) -> list[Tensor]:
        zero = self.zero
        if self._offloads:
            fragments = [self.fragment(x) for x in self.trained() if id(x) in wanted]
            return [
                f.part_of(f.flat.grad) for f in fragments if f.flat is not None and f.flat.grad is not None
            ]
        found: list[Tensor] = []
        for number, parameters in enumerate(zero.params_in_partition):
            pieces = zero.averaged_gradients[number]  # one for each parameter, then padding
            found += [x for x, parameter in zip(pieces, parameters, strict=False) if id(parameter) in wanted]
        return found


class Partitioned(Held):
    """Stage 3: of each parameter a rank has a part, and the whole only while a module computes with it."""

    def __init__(self, engine: Any, given: Optimizer, origin: Origin) -> None:
        super().__init__(engine, given, origin)
        gather = "pre_sub_module_forward_function"  # which the hook of each module looks up when it is called
        hooks = self.zero.parameter_offload
        setattr(hooks, gather, telling(getattr(hooks, gather), "a forward", origin))

    def fragment(self, parameter: nn.Parameter) -> Fragment:
        x: Any = parameter
        start, stop = self._bounds(x)
        if not self.steps(x):
            return Fragment(tuple(x.ds_shape), start, stop, self._part(x, start, stop), None, 0)
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(x)]
        flat = self.zero.fp32_partitioned_groups_flat[group]
        master = self._values_of(group).narrow(0, offset, stop - start)
        return Fragment(tuple(x.ds_shape), start, stop, master, flat, offset)

    def computed_part(self, parameter: nn.Parameter, fragment: Fragment) -> Tensor:
        return self._part(parameter, fragment.start, fragment.stop)

    def refresh(self) -> None:
        for number in range(len(self.zero.fp16_groups)):
            self._refresh_group(number)
        self.zero.checkpoint_event_epilogue()

    def _bounds(self, parameter: Any) -> tuple[int, int]:
        """Return which elements of a flattened parameter are this rank's: the first, and the one after the last."""
        size, number = parameter.ds_numel, parameter.partition_numel()
        low = dist.get_rank(parameter.ds_process_group) * number
        return min(low, size), min(low + number, size)

    def _part(self, parameter: nn.Parameter, start: int, stop: int) -> Tensor:
        """Return elements of this rank as forwards compute with them now; a view."""
        if self.is_gathered:
            return parameter.data.view(-1)[start:stop]
        return self._computed(parameter)[: stop - start]

    def _values_of(self, group: int) -> Tensor:
        """Return the live masters of a group, flat."""
        values: Tensor = self.zero.fp32_partitioned_groups_flat[group].data
        return values

    def _computed(self, parameter: Any) -> Tensor:
        """Return the live part of a parameter that forwards compute with, flat and perhaps padded."""
        values: Tensor = parameter.ds_tensor.data.view(-1)
        return values

    def _refresh_group(self, group: int) -> None:
        self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def before_loading(self) -> None:
        super().before_loading()
        self.zero.checkpoint_event_prologue()  # parameters that stay whole would keep their old values

    def whole_masters(self, collectives: Collectives) -> Mapping[int, Tensor]:
        full = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param
        return {
            id(x): full(x).clone() if self.steps(x) and x.requires_grad else self._whole(x)
            for x in self.module.parameters()
        }

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if self.is_gathered:
            return parameter.detach().clone()
        with _zero().GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _whole_parameters(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        found: AbstractContextManager[None] = _zero().GatheredParameters(parameters, modifier_rank=0)
        return found

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        parameters: list[Any] = list(self.module.parameters())
        with self._whole_parameters(parameters):
            for x in parameters:
                # a module that computes would else divide them again, and lose what was changed
                x.ds_active_sub_modules.add(_GATHERED)
            try:
                yield
            finally:
                for x in parameters:
                    x.ds_active_sub_modules.clear()  # of modules too, whose forward has ended in an error

    def before_backward(self) -> None:
        self.zero.clear_backward_seen_flag()
        # Always add, to zeros at first. DeepSpeed writes in the first backward, and counts them by forwards: it would lose
        # a loss of two, and keep old gradients of what this window does not use.
        self.zero.micro_step_id = max(self.zero.micro_step_id, 1)
        super().before_backward()

    def _drop_unfinished(self) -> None:
        for bucket in self.zero.ipg_buckets.values():
            bucket.clear_params()
        for x in self.trained():
            x.grad = None

    def _finish(self) -> None:
        self.zero.finalize_gradient_accumulation_boundary()
        self._set_boundary(at_end=False)

    def _forget(self) -> None:
        self.zero.zero_grad(set_to_none=True)
        self.zero.averaged_gradients = {}
        self.zero.grad_partitions_flat_buffer.zero_()
        if self.zero.offload_optimizer:
            self.zero.reset_cpu_buffers()
            self.zero._offload_boundary_param_ids = set()
            for flat in self.zero.fp32_partitioned_groups_flat:
                if flat.grad is not None:
                    flat.grad.zero_()

    def _accumulated(self) -> list[Tensor]:
        return [self.zero.grad_partitions_flat_buffer]

    def _finished(self, wanted: Collection[int]) -> list[Tensor]:
        fragments = [(x, self.fragment(x)) for x in self.trained() if id(x) in wanted]
        if self.zero.offload_optimizer:
            return [
                f.part_of(f.flat.grad) for _, f in fragments if f.flat is not None and f.flat.grad is not None
            ]
        of: dict[int, Tensor] = {}
        for group, parameters in enumerate(self.zero.fp16_groups):
            of.update(zip(map(id, parameters), self.zero.averaged_gradients[group], strict=True))
        return [of[id(x)].view(-1)[: f.stop - f.start] for x, f in fragments]


LAYOUTS: Mapping[int, type[Held]] = {0: Whole, 1: Flat, 2: Flat, 3: Partitioned}


def _is_like(value: object, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape and value.dim() > 0


def _fitting(here: object, spec: TensorSpec, flat: Tensor, *, is_like: bool) -> Tensor:
    shape = flat.shape if is_like else torch.Size(spec.shape)
    if isinstance(here, Tensor) and (here.shape, here.dtype) == (shape, spec.dtype):
        return here
    device = flat.device if is_like else "cpu"
    return torch.zeros(shape, dtype=spec.dtype, device=device)


def _zero() -> Any:
    return importlib.import_module("deepspeed").zero
