"""One batch through the stages of a cut model: microbatches, what travels between stages, and the backward.

Written on point-to-point operations rather than on `torch.distributed.pipelining` (2.13), whose stages run forward and
backward of uninitialised tensors to learn shapes, for each new size and at each change between training and evaluation:
running statistics change then, and gradients that a window has accumulated are dropped from FSDP parameters. They also
ask for microbatches of one size. Here the first batch of each shape tells the next stage what comes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from distrib.errors import CollectiveError, StrategyError
from distrib.seeding import derive
from distrib.strategies.pipeline import Cut, Stage
from distrib.strategies.pipeline_plan import Action, actions, parts_of
from distrib.strategies.slices import WITHOUT_VALUES

_HEADER = 256  # integers that say what travels from one stage to the next
_MANY = -1  # in place of the number of tensors: one, not in a tuple
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class Batch(NamedTuple):
    """What a cut model is given.

    Attributes:
        inputs: Passed to the model as one argument: a tensor (rows, *s), or tensors in any nesting.
        targets: Passed to the loss function; of as many rows.
        loss_function: Returns the loss of some rows from the model's output for them and their targets.
        is_sum: Whether that is a sum over rows rather than a mean.
        microbatches: How many parts; None for the setting.
    """

    inputs: Any
    targets: Any = None
    loss_function: Callable[[Any, Any], Tensor] | None = None
    is_sum: bool = False
    microbatches: int | None = None


class Spec(NamedTuple):
    """What is known of a tensor before it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool  # whether a gradient is going to be sent back


class Handed(NamedTuple):
    """What one stage hands to the next for one microbatch."""

    specs: tuple[Spec, ...]
    is_tuple: bool


class Outcome(NamedTuple):
    """What one pass returns: the loss of the batch, and the model's outputs where they were asked for."""

    loss: Tensor
    outputs: list[Any]


Known = dict[tuple[int, int], Handed]  # (sending stage, part) -> what it hands on
QuietOf = Callable[[Stage], AbstractContextManager[None]]


class Runner:
    """Runs batches through a cut model. All ranks of the pipeline call it with the same batch.

    Args:
        cut: The model.
        quiet: Returns the context of a backward whose gradients are not exchanged with other replicas yet.
    """

    def __init__(self, cut: Cut, quiet: QuietOf) -> None:
        self.cut, self.quiet = cut, quiet
        self._known: dict[str, Known] = {}

    def run(self, batch: Batch, factor: float | Tensor | None) -> Tensor:
        """Return the loss of a batch on every rank of the pipeline, detached. Collective.

        Args:
            batch: The same on all of them.
            factor: What gradients are multiplied by; None runs no backward.
        """
        found = self._pass(batch, factor).loss
        return self.cut.pipelining.peers.all_reduce_(found)  # zeros but on the last stage's rank

    def forward(self, batch: Batch) -> Any:
        """Return the model's output for a batch on every rank of the pipeline. Collective."""
        peers = self.cut.pipelining.peers
        with torch.no_grad():
            parts = self._pass(batch, None).outputs
        source = peers.world_size - 1
        mine = _joined(parts) if peers.rank == source else None
        specs = peers.broadcast_object(pytree.tree_map_only(Tensor, _spec_of, mine), source)
        device = self.cut.pipelining.runtime.device

        def empty(x: Spec) -> Tensor:
            return torch.empty(x.shape, dtype=x.dtype, device=device)

        if peers.rank != source:
            mine = pytree.tree_map(lambda x: empty(x) if _is_spec(x) else x, specs, is_leaf=_is_spec)
        return peers.broadcast(mine, source)

    def _pass(self, batch: Batch, factor: float | Tensor | None) -> Outcome:
        cut, pipelining = self.cut, self.cut.pipelining
        if WITHOUT_VALUES in vars(cut.model):
            cut.model()  # which says what has no values
        trains = factor is not None
        rows = _rows_of(batch)
        shapes = pytree.tree_map_only(Tensor, lambda x: f"{tuple(x.shape)} {x.dtype}", batch.inputs)
        frozen = zlib.crc32(bytes(x.requires_grad for x in cut.model.parameters()))
        mode = f"model.training {cut.model.training}, gradients {trains}, requires_grad {frozen:08x}"
        key = f"{rows} rows, inputs {shapes}, {mode}"
        cuts = parts_of(rows, self._agree(key, min(rows, batch.microbatches or pipelining.microbatches)))
        key = f"{len(cuts)} microbatches of {key}"
        walk = _Pass(self, batch, cuts, factor, self._known.get(key))
        schedule = pipelining.options.schedule if trains else "forward"
        plan = actions(schedule, pipelining.ranks, pipelining.options.stages_per_rank, len(cuts))
        with torch.set_grad_enabled(trains), self._noise():
            for action in plan[pipelining.peers.rank]:
                walk.do(action)
            walk.end()
        self._known[key] = walk.handed
        return walk.outcome

    def _agree(self, key: str, parts: int) -> int:
        """Find out before anything travels whether the pipeline's ranks have one batch, and into how many parts it is cut.

        Replicas gather and reduce the same units as often, so all cut their batches into as many parts: an epoch's last
        batch may have fewer rows on some.
        """
        pipelining = self.cut.pipelining
        everyone = pipelining.runtime.collectives.exchange([parts, zlib.crc32(key.encode())])
        if len({everyone[rank][1] for rank in pipelining.members}) > 1:
            keys = pipelining.peers.gather_object(key)
            raise StrategyError(
                "D0845",
                "the ranks of one pipeline were given different batches: "
                + "; ".join(
                    f"rank {rank} {text}" for rank, text in zip(pipelining.members, keys, strict=True)
                ),
                fix="call pipeline_step with the batch of a prepared loader, which gives them the same one",
            )
        return min(count for count, _ in everyone)

    @contextmanager
    def _noise(self) -> Iterator[None]:
        """Let each rank draw noise of its own inside, such as dropout; outside, its peers go on drawing the same."""
        pipelining = self.cut.pipelining
        backend = pipelining.runtime.device_backend
        drawn = int(torch.randint(2**62, (), device="cpu"))
        before, on_device = torch.get_rng_state(), backend.rng_state()
        torch.manual_seed(derive(drawn, "stage", pipelining.peers.rank))
        try:
            yield
        finally:
            torch.set_rng_state(before)
            if on_device is not None:
                backend.set_rng_state(on_device)


class _Slot:
    """A tensor that has come from the stage before, and the gradient that goes back for it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.gradient: Tensor | None = None


class _Arrive(torch.autograd.Function):
    """Gives a tensor that has come to autograd; not as a leaf, since the stage's first operation may be in place."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, slot: _Slot) -> Tensor:
        ctx.slot = slot
        return slot.value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.slot.gradient = gradient
        return None, None


class _Pass:
    """One batch on its way; holds what is between a forward and its backward."""

    def __init__(
        self, runner: Runner, batch: Batch, cuts: Sequence[range], factor: Any, known: Known | None
    ) -> None:
        self._runner, self._batch, self._cuts, self._factor = runner, batch, cuts, factor
        cut = runner.cut
        self._stages = {stage.index: stage for stage in cut.stages}
        self._members, self._device = cut.pipelining.members, cut.pipelining.runtime.device
        self._known, self.handed = known, dict(known or {})
        self._rows = cuts[-1].stop
        self._coming: dict[tuple[int, int], list[tuple[dist.Work | None, Tensor]]] = {}
        self._slots: dict[tuple[int, int], list[_Slot]] = {}
        self._outputs: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._losses: dict[tuple[int, int], Tensor] = {}
        self._sent: dict[tuple[int, int], list[tuple[dist.Work, Tensor]]] = {}  # from stage, to stage
        self._left = dict.fromkeys(self._stages, len(cuts))  # backwards of each stage
        self._anchor = torch.zeros((), requires_grad=True)
        self.outcome = Outcome(torch.zeros((), dtype=cut.dtype, device=self._device), [])
        self._do = {
            "forward": self._forward,
            "backward": self._backward,
            "send": self._send,
            "receive": self._receive,
            "send_back": self._send_back,
            "receive_back": self._receive_back,
        }

    def do(self, action: Action) -> None:
        self._do[action.operation](action.stage, action.part)

    def end(self) -> None:
        for route in list(self._sent):
            self._finish_sending(*route)

    def _forward(self, index: int, part: int) -> None:
        stage = self._stages[index]
        given = self._arrived(index, part) if index else _rows(self._batch.inputs, self._cuts[part])
        output = stage(given)
        if not stage.is_last:
            self._keep(index, part, output)
        elif self._batch.loss_function is None:
            self.outcome.outputs.append(output)
        else:
            loss = self._batch.loss_function(output, _rows(self._batch.targets, self._cuts[part]))
            weight = 1.0 if self._batch.is_sum else len(self._cuts[part]) / self._rows
            self.outcome.loss.add_(loss.detach().to(self.outcome.loss.dtype).reshape(()), alpha=weight)
            if self._factor is not None:
                self._losses[index, part] = loss * (self._factor * weight)

    def _keep(self, index: int, part: int, output: Any) -> None:
        tensors = output if type(output) is tuple else (output,)
        if not all(isinstance(x, Tensor) for x in tensors):
            raise _unsendable(index, f"{_shown(output)}; expected a tensor, or a tuple of tensors")
        now = Handed(tuple(map(_spec_of, tensors)), type(output) is tuple)
        before = self.handed.setdefault((index, part), now)
        if before != now:
            raise _unsendable(
                index,
                f"{_texts(now)} after {_texts(before)} for a batch of the same shape; expected the same",
            )
        self._outputs[index, part] = tensors

    def _arrived(self, index: int, part: int) -> Any:
        handed = self.handed[index - 1, part]
        slots = []
        for work, x in self._coming.pop((index, part)):
            _wait(work)
            slots.append(_Slot(x))
        self._slots[index, part] = [
            slot for slot, spec in zip(slots, handed.specs, strict=True) if spec.trains
        ]
        given = tuple(
            _Arrive.apply(self._anchor, slot) if spec.trains else slot.value  # type: ignore[no-untyped-call]
            for slot, spec in zip(slots, handed.specs, strict=True)
        )
        return given if handed.is_tuple else given[0]

    def _backward(self, index: int, part: int) -> None:
        stage = self._stages[index]
        self._left[index] -= 1
        is_last = not self._left[index]
        gradients: list[Tensor | None] = [None]
        if stage.is_last:
            outputs = [self._losses.pop((index, part))]
        else:
            outputs = [x for x in self._outputs.pop((index, part)) if x.requires_grad]
            gradients = []
            for work, x in self._coming.pop((index, part), ()):
                _wait(work)
                gradients.append(x)
        if not outputs:
            return
        if isinstance(stage, FSDPModule):
            stage.set_is_last_backward(is_last)
        with nullcontext() if is_last else self._runner.quiet(stage):
            torch.autograd.backward(outputs, gradients)

    def _send(self, index: int, part: int) -> None:
        tensors = [x.detach() for x in self._outputs[index, part]]
        if self._known is None:
            tensors.insert(0, _header(index, self.handed[index, part]).to(self._device))
        self._isend(tensors, index, index + 1)
        if self._factor is None:
            del self._outputs[index, part]

    def _receive(self, index: int, part: int) -> None:
        if self._known is None:
            header = torch.empty(_HEADER, dtype=torch.int64, device=self._device)
            _wait(self._irecv(header, index - 1))
            self.handed[index - 1, part] = _read(header.tolist())
        specs = self.handed[index - 1, part].specs
        empty = [torch.empty(x.shape, dtype=x.dtype, device=self._device) for x in specs]
        self._coming[index, part] = [(self._irecv(x, index - 1), x) for x in empty]

    def _send_back(self, index: int, part: int) -> None:
        slots = self._slots.pop((index, part))
        gradients = [torch.zeros_like(x.value) if x.gradient is None else x.gradient for x in slots]
        self._isend(gradients, index, index - 1)

    def _receive_back(self, index: int, part: int) -> None:
        empty = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in self._outputs[index, part]
            if x.requires_grad
        ]
        self._coming[index, part] = [(self._irecv(x, index + 1), x) for x in empty]

    def _isend(self, tensors: Sequence[Tensor], index: int, to: int) -> None:
        self._finish_sending(
            index, to
        )  # so that what was sent does not stay in memory; see `actions` on deadlocks
        flat = [x.contiguous() for x in tensors if x.numel()]
        self._sent[index, to] = [(_started(dist.isend(x, self._rank_of(to))), x) for x in flat]

    def _finish_sending(self, index: int, to: int) -> None:
        for work, _ in self._sent.pop((index, to), ()):
            _wait(work)

    def _irecv(self, x: Tensor, stage: int) -> dist.Work | None:
        return _started(dist.irecv(x, self._rank_of(stage))) if x.numel() else None

    def _rank_of(self, stage: int) -> int:
        return self._members[stage % len(self._members)]


def _rows_of(batch: Batch) -> int:
    """Return how many rows a batch has.

    Raises:
        StrategyError: D0845, if its tensors do not have equally many.
    """
    leaves = [x for x in pytree.tree_leaves((batch.inputs, batch.targets)) if isinstance(x, Tensor)]
    sizes = {x.shape[0] if x.dim() else 0 for x in leaves}
    if len(sizes) != 1 or 0 in sizes:
        raise StrategyError(
            "D0845",
            f"inputs and targets of a pipeline are cut along dim 0, but have shapes {[tuple(x.shape) for x in leaves]}; "
            "expected equally many rows, at least one",
            fix="leave out what is not one row per sample, or expand it to one",
        )
    return sizes.pop()


def _rows(tree: Any, part: range) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x[part.start : part.stop], tree)


def _joined(parts: Sequence[Any]) -> Any:
    """Put outputs of microbatches together along dim 0; what is no tensor is taken from the first."""
    leaves = [pytree.tree_flatten(part)[0] for part in parts]
    _, structure = pytree.tree_flatten(parts[0])
    joined = [
        torch.cat(same) if isinstance(same[0], Tensor) else same[0] for same in zip(*leaves, strict=True)
    ]
    return pytree.tree_unflatten(joined, structure)


def _spec_of(x: Tensor) -> Spec:
    return Spec(tuple(x.shape), x.dtype, x.requires_grad)


def _is_spec(x: object) -> bool:
    return isinstance(x, Spec)


def _header(index: int, handed: Handed) -> Tensor:
    numbers = [len(handed.specs) if handed.is_tuple else _MANY]
    for spec in handed.specs:
        if spec.dtype not in _DTYPES:
            raise _unsendable(index, f"a tensor of {spec.dtype}, which does not travel")
        numbers += [_DTYPES.index(spec.dtype), int(spec.trains), len(spec.shape), *spec.shape]
    if len(numbers) > _HEADER:
        raise _unsendable(index, f"{len(handed.specs)} tensors; expected fewer")
    return torch.tensor(numbers + [0] * (_HEADER - len(numbers)), dtype=torch.int64, device="cpu")


def _read(numbers: list[int]) -> Handed:
    count, *rest = numbers
    left = iter(rest)
    specs = []
    for _ in range(1 if count == _MANY else count):
        dtype, trains, dims = next(left), next(left), next(left)
        specs.append(Spec(tuple(next(left) for _ in range(dims)), _DTYPES[dtype], bool(trains)))
    return Handed(tuple(specs), count != _MANY)


def _unsendable(index: int, what: str) -> StrategyError:
    return StrategyError(
        "D0844",
        f"stage {index} of the pipeline returns {what}",
        fix="let every unit return a tensor or a tuple of tensors whose shapes follow from the shapes of its inputs",
    )


def _shown(output: Any) -> str:
    inner = f" with {[type(x).__name__ for x in output]}" if isinstance(output, tuple) else ""
    return f"a {type(output).__name__}{inner}"


def _texts(handed: Handed) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {x.shape}" for x in handed.specs)


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "only ranks that are not in the group get none"
    return work


def _wait(work: dist.Work | None) -> None:
    try:
        if work is not None:
            work.wait()
    except RuntimeError as error:
        raise CollectiveError(
            "D0402",
            f"pipeline_step failed: {error}",
            fix="look for the rank that ended or stopped first; this rank only followed it",
        ) from error
