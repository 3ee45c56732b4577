"""Sequence parallelism: between divided matrix products, each rank has a part of the positions (`mesh.tensor`).

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022). Within a stack of blocks the
hidden states, (batch, length, width), are divided along dim 1. A *region*, the module around the `colwise` modules of a
plan such as an attention or an MLP, gathers them at its entrance, and its `rowwise` modules leave them divided again.
So norms, residuals and dropouts work on length / mesh.tensor positions, and keep no more for the backward.

Inside a stack every rank computes its share of each gradient: that of its positions, or of its heads. What a block holds
whole therefore gets the sum over the ranks. Whether a block works on each position by itself outside of its regions, the
first training forward of its class finds out by computing it both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from distrib.collectives.exchange import all_gather_single
from distrib.errors import StrategyError
from distrib.strategies.blocks import outermost
from distrib.strategies.caches import without_empty_caches
from distrib.strategies.tensor import Colwise, Rowwise, TensorPlan

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
_WHERE = "tensor_parallel.sequence"
_reduce_scatter: Any = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)  # its old name
_MOST_APART = 5e-2  # relative difference of a block computed both ways; formats cause 1e-2 at most


@dataclass(frozen=True)
class Parts:
    """Where hidden states are divided and gathered.

    Attributes:
        stacks: Names of blocks that follow each other.
        regions: Names of the modules around the plan's `colwise` modules.
    """

    stacks: tuple[tuple[str, ...], ...]
    regions: tuple[str, ...]


def find_parts(model: nn.Module, plan: TensorPlan, wanted: Sequence[str] | None = None) -> Parts:
    """Find the stacks of blocks and the regions in them.

    Args:
        model: A plain module.
        plan: How its modules are divided.
        wanted: Names of the classes of its blocks; None to find them.

    Raises:
        StrategyError: D0851, if hidden states cannot be followed through the model; it says why.
    """
    names, _ = outermost(model, wanted)
    stacks: dict[str, list[str]] = {}
    for block in names:
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    divided = [tuple(x) for x in stacks.values() if any(_inside(block, plan) for block in x)]
    if not divided:
        raise cannot_divide(
            f"{type(model).__name__} has no repeated blocks in which the plan divides modules"
        )
    regions = [x for blocks in divided for block in blocks for x in _regions(model, block, plan)]
    return Parts(tuple(divided), tuple(dict.fromkeys(regions)))


def _inside(block: str, plan: TensorPlan) -> dict[str, str]:
    return {name: style for name, style in plan.styles.items() if name.startswith(f"{block}.")}


def _regions(model: nn.Module, block: str, plan: TensorPlan) -> Iterator[str]:
    styles = _inside(block, plan)
    if not {"colwise", "rowwise"} <= set(styles.values()):
        raise cannot_divide(f"in {block} the plan does not divide modules both colwise and rowwise")
    for name, style in styles.items():
        region = name.rpartition(".")[0]
        if style == "colwise_gather_output" or not isinstance(model.get_submodule(name), nn.Linear):
            raise cannot_divide(f"{name} is divided within a block, but its result is whole")
        if style != "colwise":
            continue
        around = model.get_submodule(region)
        if region == block or type(around).forward is nn.Module.forward:
            what = "the block itself" if region == block else f"a {type(around).__name__}"
            raise cannot_divide(f"{what} is right around {name}, and there hidden states cannot be gathered")
        yield region


def cannot_divide(why: str) -> StrategyError:
    """Return the error that hidden states cannot be divided."""
    return StrategyError(
        "D0851",
        f"hidden states cannot be divided along the sequence: {why}",
        where=_WHERE,
        fix="set tensor_parallel.sequence: false; it needs a list of repeated blocks (fsdp.wrap names them), with attention "
        "and MLP in modules of their own",
    )


class SequenceParallel:
    """Divides the hidden states of one model along the sequence.

    Args:
        model: Whose hooks do it; it is not changed yet.
        mesh: One-dimensional: the ranks that share matrix products.
        plan: How modules are divided.
        wanted: Names of the classes of its blocks; None to find them.

    Raises:
        StrategyError: D0851, as `find_parts`.
    """

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, plan: TensorPlan, wanted: Sequence[str] | None
    ) -> None:
        self.parts = find_parts(model, plan, wanted)
        self.is_off = False
        self.length = 0  # positions in all, in the region that was entered last
        self._size, self._rank, self._group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
        self._summed = WeakIdKeyDictionary()  # parameters whose gradients are summed
        self._tried: set[type[nn.Module]] = set()  # classes of blocks that were computed both ways
        self._inside: set[str] = set()  # last blocks of stacks that hidden states have entered and not left
        blocks = [block for blocks in self.parts.stacks for block in blocks]
        inside = [pair for block in blocks for pair in _inside(block, plan).items()]
        self.styles: Mapping[str, ParallelStyle] = {
            name: _Colwise() if style == "colwise" else _Rowwise(self, name) for name, style in inside
        }
        for stack in self.parts.stacks:
            self._hook_stack(model, stack)
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)
        for name in self.parts.regions:
            region = model.get_submodule(name)
            region.register_forward_pre_hook(partial(self._enter_region, name), with_kwargs=True)

    def __deepcopy__(self, _: object) -> SequenceParallel:
        return self  # hooks of a copied model talk in the same group

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave hidden states whole inside; matrix products stay divided where their parameters are."""
        before, self.is_off = self.is_off, True
        try:
            yield
        finally:
            self.is_off = before

    def _hook_stack(self, model: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            block = model.get_submodule(name)
            enter = partial(self._enter_block, name, names)
            block.register_forward_pre_hook(enter, with_kwargs=True)
            for module in block.modules():
                if module._parameters:
                    module.register_forward_pre_hook(self._sum_gradients)
        model.get_submodule(names[-1]).register_forward_hook(partial(self._leave, names[-1]))

    def _begin(self, _: nn.Module, __: Any) -> None:
        self._inside.clear()  # an exception may have ended the last forward

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._inside:
            raise _out_of_order(f"{sorted(self._inside)[0]}, the last of its list, was not called")

    def _enter_block(
        self, name: str, stack: Sequence[str], block: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        if self.is_off:
            return None
        place, hidden = _hidden_states(name, args, kwargs)
        _refuse_other_gradients(name, hidden, args, kwargs)
        if name != stack[0] and stack[-1] not in self._inside:
            raise _out_of_order(f"{name} comes before {stack[0]}, the first of its list")
        if name == stack[0]:
            self._inside.add(stack[-1])
            if hidden.shape[1] % self._size:
                raise StrategyError(
                    "D0852",
                    f"hidden states have {hidden.shape[1]} positions, which do not divide by mesh.tensor ({self._size})",
                    where=_WHERE,
                    fix="pad sequences to a multiple of it; generate inside of accelerator.gathered(model), where any "
                    "length is right",
                )
            hidden = _Split.apply(hidden, self)  # type: ignore[no-untyped-call]
            args, kwargs = _with(place, hidden, args, kwargs)
        if torch.is_grad_enabled() and block.training and type(block) not in self._tried:
            self._compute_both_ways(name, block, args, kwargs)
        return args, kwargs

    def _leave(self, name: str, _: nn.Module, __: Any, output: Any) -> Any:
        if self.is_off:
            return output
        self._inside.discard(name)
        if isinstance(output, tuple):
            return (_Join.apply(output[0], self), *output[1:])  # type: ignore[no-untyped-call]
        return _Join.apply(output, self)  # type: ignore[no-untyped-call]

    def _enter_region(
        self, name: str, _: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        if self.is_off:
            return None
        place, hidden = _hidden_states(name, args, kwargs)
        self.length = hidden.shape[1] * self._size
        return _with(place, _Gather.apply(hidden, self), args, kwargs)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _compute_both_ways(self, name: str, block: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Compare a block's result with that of whole hidden states. Collective.

        Raises:
            StrategyError: D0854, if they differ.
        """
        with torch.enable_grad():  # as the block will be called
            args, kwargs, fills_a_cache = without_empty_caches(block, args, kwargs)
        if fills_a_cache:
            return
        self._tried.add(type(block))
        place, hidden = _hidden_states(name, args, kwargs)
        with torch.random.fork_rng(), _without_dropout(block):
            divided = self.joined(_first(block.forward(*args, **kwargs)))
            args, kwargs = _with(place, self.joined(hidden), args, kwargs)
            with self.off():
                whole = _first(block.forward(*args, **kwargs))
        apart = float((divided - whole).double().norm() / whole.double().norm())
        if apart > _MOST_APART:
            raise StrategyError(
                "D0854",
                f"{name} ({type(block).__name__}) computes something else where its hidden states are divided along the "
                f"sequence: its results differ by {apart:.0%}; outside of {', '.join(self.parts.regions[:2])} and the like, "
                "positions have to be worked on one by one",
                where=_WHERE,
                fix="let the plan divide its attention too, or set tensor_parallel.sequence: false",
            )

    def _sum_gradients(self, module: nn.Module, _: Any) -> None:
        """Let what a module holds whole get the sum of the ranks' gradients from now on.

        While a sharded parameter is gathered, another tensor stands in its place, each time the same.
        """
        for parameter in module._parameters.values():
            if parameter is None or isinstance(parameter, DTensor) or not parameter.requires_grad:
                continue
            if not self.is_off and parameter not in self._summed:
                self._summed[parameter] = parameter.register_hook(self._sum)  # type: ignore[no-untyped-call]

    def _sum(self, gradient: Tensor) -> Tensor:
        total = gradient.float() if gradient.dtype.itemsize < 4 else gradient.clone()
        dist.all_reduce(total, group=self._group)
        return total.to(gradient.dtype)

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's positions."""
        length = whole.shape[1] // self._size
        return whole.narrow(1, self._rank * length, length).contiguous()

    def joined(self, part: Tensor) -> Tensor:
        """Put the positions of all ranks together. Collective."""
        part = part.transpose(0, 1).contiguous()
        whole = part.new_empty(self._size * part.shape[0], *part.shape[1:])
        all_gather_single(whole, part, self._group)
        return whole.transpose(0, 1).contiguous()

    def summed_part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's positions of the sum over the ranks. Collective."""
        whole = whole.transpose(0, 1).contiguous()
        part = whole.new_empty(whole.shape[0] // self._size, *whole.shape[1:])
        _reduce_scatter(part, whole, group=self._group)
        return part.transpose(0, 1).contiguous()


class _Split(Function):
    """Take this rank's positions of what all ranks have; the gradients of all are put together."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, sequence: SequenceParallel) -> Tensor:
        ctx.sequence = sequence
        return sequence.part_of(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.sequence.joined(gradient), None


class _Join(Function):
    """Put all positions together for what every rank computes alike, whose gradient every rank therefore has."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sequence: SequenceParallel) -> Tensor:
        ctx.sequence = sequence
        return sequence.joined(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.sequence.part_of(gradient), None


class _Gather(Function):
    """Put all positions together for a region, of whose gradient every rank has its heads' share."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sequence: SequenceParallel) -> Tensor:
        ctx.sequence = sequence
        return sequence.joined(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.sequence.summed_part_of(gradient), None


class _Unsummed(Function):
    """Show torch a tensor that all ranks have; its gradient stays each rank's share. `DTensor.from_local` would sum it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:  # noqa: ARG004 (torch's signature)
        return DTensor.from_local(x, mesh, (Replicate(),), run_check=False)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Tensor, None]:  # noqa: ARG004
        assert gradient.placements[0].is_partial()
        return gradient.to_local(), None


class _Colwise(Colwise):
    """Inside of a region: the gradient of its input is summed at the region's entrance, once for all."""

    def _prepare_input_fn(  # type: ignore[override]
        self, layouts: Any, desired: Any, module: nn.Module, inputs: Args, mesh: Any
    ) -> Any:  # fmt: skip
        if not isinstance(module.weight, DTensor):
            return inputs
        return _Unsummed.apply(inputs[0], mesh)  # type: ignore[no-untyped-call]


class _Rowwise(Rowwise):
    """Leaves its result divided along the sequence."""

    def __init__(self, sequence: SequenceParallel, name: str) -> None:
        super().__init__(output_layouts=Shard(1))
        self._sequence, self._name = sequence, name

    def _prepare_input_fn(  # type: ignore[override]
        self, layouts: Any, desired: Any, module: nn.Module, inputs: Args, mesh: Any
    ) -> Any:  # fmt: skip
        x, length = inputs[0], self._sequence.length
        if not self._sequence.is_off and (x.dim() != 3 or x.shape[1] != length):
            raise StrategyError(
                "D0853",
                f"{self._name} gets a tensor of shape {tuple(x.shape)}; expected three dimensions, the second of them the "
                f"{length} positions of the hidden states that were gathered",
                where=_WHERE,
                fix="take batch and length from what enters the module around the colwise ones, or set "
                "tensor_parallel.sequence: false",
            )
        return super()._prepare_input_fn(layouts, desired, module, inputs, mesh)

    def _prepare_output_fn(  # type: ignore[override]
        self, layouts: Any, to_local: Any, module: nn.Module, outputs: Any, mesh: Any
    ) -> Any:  # fmt: skip
        layouts = (Replicate(),) if self._sequence.is_off else layouts
        return super()._prepare_output_fn(layouts, to_local, module, outputs, mesh)


def _out_of_order(what: str) -> StrategyError:
    return StrategyError(
        "D0853",
        f"{what}; expected the blocks of a list from the first to the last, between which hidden states are divided",
        where=_WHERE,
        fix="remove blocks that are not called, or set tensor_parallel.sequence: false",
    )


def _hidden_states(name: str, args: Args, kwargs: Kwargs) -> tuple[int | str, Tensor]:
    """Return the hidden states among the arguments of a forward, and their place there.

    Raises:
        StrategyError: D0853, if there are none.
    """
    place: int | str = next((i for i, x in enumerate(args) if isinstance(x, Tensor)), "hidden_states")
    found = args[place] if isinstance(place, int) else kwargs.get(place)
    if isinstance(found, Tensor) and found.dim() == 3 and found.is_floating_point():
        return place, found
    shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "no tensor"
    raise StrategyError(
        "D0853",
        f"{name} gets {shape}; expected hidden states, (batch, length, width), as the first tensor or as hidden_states=",
        where=_WHERE,
        fix="call it so, or set tensor_parallel.sequence: false",
    )


def _with(place: int | str, hidden: Tensor, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    if isinstance(place, str):
        return args, {**kwargs, place: hidden}
    return (*args[:place], hidden, *args[place + 1 :]), kwargs


def _refuse_other_gradients(name: str, hidden: Tensor, args: Args, kwargs: Kwargs) -> None:
    """Refuse what each rank would have a share of the gradient of only.

    Raises:
        StrategyError: D0855.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    others = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad and x is not hidden]
    if others and torch.is_grad_enabled():
        raise StrategyError(
            "D0855",
            f"{name} gets a tensor of shape {tuple(others[0].shape)} beside the hidden states that needs a gradient, of "
            "which every rank would have its share only",
            where=_WHERE,
            fix="compute it inside of the block or detach it; models with two stacks of which one reads the other, need "
            "tensor_parallel.sequence: false",
        )


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _without_dropout(block: nn.Module) -> Iterator[None]:
    training = [module for module in block.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
