"""Context parallelism: between a model's first and last block, each rank works on its part of the sequences.

Attention alone needs the whole sequence. There, ranks trade parts of the sequence for attention heads and back, with one
all-to-all each (Jacobs et al., "DeepSpeed Ulysses", 2023). What is before and after the blocks, the loss too, works on
whole sequences on every rank, so scripts, masks, positions and counts stay as they are.

Gradients are averaged over these ranks by the strategy. Inside the blocks each rank has only the part of a gradient that
comes from its tokens, so there the gradient is scaled up by the number of ranks, where the blocks end.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (as everybody calls it)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from distrib.collectives.base import Collectives
from distrib.collectives.single import SingleCollectives
from distrib.errors import StrategyError
from distrib.state import Runtime
from distrib.strategies.caches import is_cache

_Attention = Callable[..., Tensor]
_MARK = "_distrib_context"  # attribute of a block: the stack that it is in
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_MOST_APART = 1e-3  # relative difference of what a block makes of a part and of the whole, in float32
_MOST_APART_NARROW = 0.1  # in 16 bits; attention that sees a part only is off by more than that in the end

_plain_attention: _Attention = F.scaled_dot_product_attention
_here = threading.local()  # .now: whose parts, and their length, while a block of a divided stack computes


class ContextParallel:
    """Lets the blocks of models work on parts of the sequences.

    Args:
        peers: The ranks that share each sequence.
        ring: The attention of torch that takes parts (see `ring_attention`); None for all-to-all.
    """

    def __init__(self, peers: Collectives, ring: _Attention | None = None) -> None:
        self.peers, self.ring = peers, ring
        self.size, self.index = peers.world_size, peers.rank

    def __deepcopy__(self, memo: Any) -> ContextParallel:
        return self

    def __reduce__(self) -> Any:
        return ContextParallel, (SingleCollectives(),)  # a model that was pickled computes alone

    def divide(self, root: nn.Module, blocks: Sequence[str]) -> list[str]:
        """Let blocks of a model work on parts, in place, and return the names of those that do.

        Args:
            root: A plain module.
            blocks: Names of modules in it, none inside of another. Those in one `ModuleList` or the like make a stack,
                which is divided before its first and put together after its last one.

        Raises:
            StrategyError: D0846, if the model's configuration has a number of heads that does not divide.
        """
        if self.size == 1:
            return []
        stacks: dict[str, list[str]] = {}
        for name in blocks:
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
        found = [
            names for parent, names in stacks.items() if isinstance(root.get_submodule(parent), _CONTAINERS)
        ]
        if found:
            heads = getattr(getattr(root, "config", None), "num_attention_heads", self.size)
            if self.ring is None and isinstance(heads, int):
                self._check_heads(heads, type(root).__name__)
            _intercept_attention()
        for names in found:
            members = [root.get_submodule(name) for name in names]
            if not hasattr(members[0], _MARK):
                Stack(self, root, members, names[0])
        return [name for names in found for name in names]

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's part along `dim`, in memory of its own."""
        length = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.index * length, length).contiguous()

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 (torch's signature)
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Return torch's `scaled_dot_product_attention` over whole sequences, of this rank's part of the queries.

        Args:
            query: (B, heads, length, width), this rank's part of each sequence.
            key: As `query`, perhaps with fewer heads.
            value: As `key`.
            attn_mask: As torch takes it for whole sequences.
            dropout_p: As of torch, like the others.
            is_causal: See there.
            scale: See there.
            enable_gqa: See there.

        Raises:
            StrategyError: D0846, if the heads do not divide; D0848, for a mask over a part of the sequences.
        """
        if self.ring is not None:
            return self._ring(query, key, value, attn_mask, dropout_p, is_causal=is_causal, scale=scale)
        heads, length = query.shape[1], query.shape[2]
        self._check_heads(heads, "attention")
        times = self.size // math.gcd(key.shape[1], self.size)
        if times > 1:  # fewer key heads than ranks: several ranks need the same one
            key, value = (x.repeat_interleave(times, 1) for x in (key, value))
        if attn_mask is not None:
            attn_mask = self._own_heads(self._whole_mask(attn_mask, length), heads)
        query, key, value = self._trade_sequence_for_heads(query, key, value)
        mixed = _plain_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
            enable_gqa=enable_gqa and key.shape[1] != query.shape[1],
        )  # fmt: skip
        return self._trade_heads_for_sequence(mixed)

    def _trade_sequence_for_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Turn (B, heads, part, width) into (B, part of heads, whole, width), each, in one exchange if that is possible."""
        if len({x.shape[3] for x in tensors}) > 1 or len({x.dtype for x in tensors}) > 1:
            return [y for x in tensors for y in self._trade_sequence_for_heads(x)]
        # (B, ranks, heads, part, width) each
        by_rank = [x.unflatten(1, (self.size, -1)) for x in tensors]  # type: ignore[no-untyped-call]
        heads = [x.shape[2] for x in by_rank]
        sent = torch.cat(by_rank, 2).movedim(1, 0).contiguous()
        came = _AllToAll.apply(sent, self.peers)  # type: ignore[no-untyped-call]
        whole = came.movedim(0, 2).flatten(2, 3)  # (B, heads of all tensors, ranks x part, width)
        return list(whole.split(heads, 1))

    def _trade_heads_for_sequence(self, mixed: Tensor) -> Tensor:
        """Turn (B, part of heads, whole, width) into (B, heads, part, width)."""
        sent = mixed.unflatten(2, (self.size, -1)).movedim(2, 0).contiguous()  # type: ignore[no-untyped-call]
        came: Tensor = _AllToAll.apply(sent, self.peers)  # type: ignore[no-untyped-call]
        return came.movedim(0, 1).flatten(1, 2)

    def _whole_mask(self, mask: Tensor, length: int) -> Tensor:
        """Return a mask over whole sequences; one of keys alone that is over the part is put together."""
        if mask.shape[-1] == length and (mask.dim() < 2 or mask.shape[-2] == 1):
            parts = self.peers.all_gather(mask.contiguous())
            return parts.movedim(0, -2).flatten(-2)
        if mask.shape[-1] == length or (mask.dim() > 1 and mask.shape[-2] == length):
            raise StrategyError(
                "D0848",
                f"attention was given a mask of shape {tuple(mask.shape)}, made for {length} tokens, which are this rank's "
                f"part of {length * self.size} (mesh.context {self.size})",
                fix="make the mask before the first block, for whole sequences, or use is_causal=True",
            )
        return mask

    def _own_heads(self, mask: Tensor, heads: int) -> Tensor:
        return self.part(mask, mask.dim() - 3) if mask.dim() > 2 and mask.shape[-3] == heads else mask

    def _ring(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        *,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        assert self.ring is not None
        if mask is not None:
            raise StrategyError(
                "D0848",
                "ring attention takes no mask",
                where="context_parallel.attention",
                fix="set context_parallel.attention: ulysses, or use is_causal=True",
            )
        times = query.shape[1] // key.shape[1]
        if times > 1:
            key, value = (x.repeat_interleave(times, 1) for x in (key, value))
        return self.ring(query, key, value, None, dropout_p, is_causal, scale=scale)

    def _check_heads(self, heads: int, what: str) -> None:
        if heads % self.size:
            raise StrategyError(
                "D0846",
                f"{what} has {heads} heads, which do not divide by mesh.context ({self.size})",
                where="mesh.context",
                fix="choose a size of mesh.context that divides the number of heads"
                + (" on each of the ranks of mesh.tensor" if what == "attention" else ""),
            )


class Stack:
    """Consecutive blocks of one model, the first of which takes this rank's part of hidden states (B, length, width).

    Which side inputs belong to tokens, and so are divided too, is told by their shapes: position ids, rotary tables.
    Masks stay whole. Without gradients, a length that does not divide and whatever fills a key/value cache are computed
    whole, by every rank.
    """

    def __init__(self, parts: ContextParallel, root: nn.Module, blocks: list[nn.Module], name: str) -> None:
        self._parts, self._first, self._last, self._name = parts, blocks[0], blocks[-1], name
        self._is_divided = self._is_checked = False
        for block in blocks:
            vars(block)[_MARK] = self
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._last.register_forward_hook(self._leave)
        root.register_forward_pre_hook(self._begin)
        root.register_forward_hook(self._end)

    def compute(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a block's forward on what `_enter` has made of its arguments, perhaps in the backward."""
        hidden = _hidden(args, kwargs)
        if hidden is None or not (torch.is_grad_enabled() or self._is_divided):
            return forward(block, *args, **kwargs)
        with _attending_over(self._parts, hidden.shape[1]):
            return forward(block, *args, **kwargs)

    def _begin(self, root: nn.Module, args: Any) -> None:
        self._is_divided = False

    def _end(self, root: nn.Module, args: Any, output: Any) -> None:
        if self._is_divided:
            self._is_divided = False
            raise StrategyError(
                "D0846",
                f"{type(root).__name__} ends with the sequences still divided: {self._name} has run, but the last block "
                "beside it has not run after it",
                where="mesh.context",
                fix="let the model run all blocks of a list in order, or set mesh.context: 1",
            )

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        hidden = _hidden(args, kwargs)
        if hidden is None:
            return None
        size, is_first = self._parts.size, block is self._first
        if is_first:
            self._is_divided = self._may_divide(hidden, args, kwargs)
        if not (torch.is_grad_enabled() or self._is_divided):
            return None
        whole = hidden.shape[1] * (1 if is_first else size)

        def own(name: str, value: Any) -> Any:
            return pytree.tree_map_only(Tensor, lambda x: self._own(name, x, hidden, whole), value)

        divided = tuple(own("", x) for x in args), {name: own(name, x) for name, x in kwargs.items()}
        if is_first and torch.is_grad_enabled() and not self._is_checked:
            self._is_checked = True
            self._check(block, (args, kwargs), divided)
        return divided

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        if not (torch.is_grad_enabled() or self._is_divided):
            return output
        self._is_divided = False
        first = output if isinstance(output, Tensor) else output[0]
        if first.dim() != 3:
            return output
        whole = _Join.apply(first, self._parts)  # type: ignore[no-untyped-call]
        return whole if isinstance(output, Tensor) else type(output)((whole, *output[1:]))

    def _may_divide(self, hidden: Tensor, args: Any, kwargs: Mapping[str, Any]) -> bool:
        divides = hidden.shape[1] % self._parts.size == 0
        if not torch.is_grad_enabled():
            return divides and not any(map(is_cache, (*args, *kwargs.values())))
        if not divides:
            raise StrategyError(
                "D0846",
                f"{self._name} was given sequences of {hidden.shape[1]} tokens, which do not divide by mesh.context "
                f"({self._parts.size})",
                where="mesh.context",
                fix="pad sequences to a multiple of it, and leave the padding out of the loss",
            )
        return True

    def _own(self, name: str, tensor: Tensor, hidden: Tensor, whole: int) -> Tensor:
        if tensor is hidden:
            return tensor if tensor.shape[1] < whole else self._parts.part(tensor, 1)
        dim = _dim_of_tokens(name, tensor, len(hidden), whole)
        return tensor if dim is None else self._parts.part(tensor, dim)

    @torch.no_grad()
    def _check(self, block: nn.Module, whole: Any, part: Any) -> None:
        """Compare what a block makes of a part with what it makes of the whole, once. Collective.

        Raises:
            StrategyError: D0847, on all ranks, if they differ: tokens meet in another way than through torch's attention,
                or the block counts positions from the start of its input.
        """
        training = {x: x.training for x in block.modules()}
        if any(isinstance(x, FSDPModule) for x in training if x is not block):
            return  # its own gathering would run once too often
        for module in training:
            module.training = False
        whole, part = (pytree.tree_map(lambda x: None if is_cache(x) else x, each) for each in (whole, part))
        try:
            self._is_divided = False
            expected = _first_of(block.forward(*whole[0], **whole[1]))
            self._is_divided = True
            found = _first_of(block.forward(*part[0], **part[1]))
        except (RuntimeError, ValueError) as error:  # shapes that do not fit, on all ranks
            raise self._meets_otherwise(block, f"it fails on a part: {error}") from error
        finally:
            for module, was in training.items():
                module.training = was
        before, expected = _hidden(*part), self._parts.part(expected, 1)
        assert before is not None
        made = expected.double() - before.double() if before.shape == expected.shape else expected.double()
        apart = (found.double() - expected.double()).abs().amax() / made.abs().amax().clamp_min(1e-30)
        narrow = torch.is_autocast_enabled(found.device.type) or found.dtype in (
            torch.bfloat16,
            torch.float16,
        )
        worst = self._parts.peers.all_reduce_(apart.float(), "max")
        if float(worst) > (_MOST_APART_NARROW if narrow else _MOST_APART):
            raise self._meets_otherwise(block, f"relative difference {float(worst):.2g}")

    def _meets_otherwise(self, block: nn.Module, how: str) -> StrategyError:
        return StrategyError(
            "D0847",
            f"{self._name} ({type(block).__name__}) does not make the same of a part of a sequence as of the whole ({how}): "
            "tokens meet in it in another way than through torch.nn.functional.scaled_dot_product_attention, or it counts "
            "positions from the start of its input",
            where="mesh.context",
            fix="call attention by that name (transformers: attn_implementation='sdpa'), and make positions and rotary "
            "tables before the first block",
        )


def dividing(runtime: Runtime, options: Mapping[str, object]) -> ContextParallel:
    """Return what lets blocks work on parts of sequences in this run. Collective.

    Raises:
        StrategyError: D0849, for ring attention on a device for which torch has no kernel.
    """
    if runtime.mesh.size("context") == 1:
        return ContextParallel(SingleCollectives())
    peers = runtime.collectives.among(runtime.mesh.groups("context"))
    ring = None
    if options.get("context_attention") == "ring":
        if not runtime.device_backend.has_ring_attention:
            raise StrategyError(
                "D0849",
                f"context_parallel.attention is ring, but the device is {runtime.device.type}; torch has its kernels for "
                "cuda only",
                where="context_parallel.attention",
                fix="set context_parallel.attention: ulysses",
            )
        ring = ring_attention(runtime)
    return ContextParallel(peers, ring)


def ring_attention(runtime: Runtime) -> _Attention:
    """Return torch's attention over parts of sequences, between which keys and values travel (Liu et al., 2023). CUDA only.

    It is a prototype of torch (`torch.distributed.tensor.experimental`), and has not been run here. Parts are contiguous,
    so with a causal mask the last ranks have more to do than the first.
    """
    from torch.distributed.tensor.experimental import _context_parallel  # noqa: PLC0415 (slow, rarely needed)

    axes = dict(runtime.mesh.axes)
    mesh = init_device_mesh(runtime.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))["context"]
    _context_parallel._attention._cp_options.enable_load_balance = False
    before = F.scaled_dot_product_attention
    _context_parallel._attention._enable_context_parallel_dispatcher_impl(seq_dim=2, mesh=mesh)
    ring: _Attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = before
    return ring


def on_parts(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward of a block in a stack, in which attention is over whole sequences.

    Args:
        forward: The block's, unbound.
    """

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stack: Stack = vars(self)[_MARK]
        return stack.compute(self, forward, args, kwargs)

    return run


class _AllToAll(torch.autograd.Function):
    """Row j of (ranks, *s) goes to rank j; its gradient comes back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, peers: Collectives) -> Tensor:
        ctx.peers = peers
        return peers.all_to_all(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.peers.all_to_all(gradients[0].contiguous()), None


class _Join(torch.autograd.Function):
    """Parts of sequences (B, part, width) become whole; gradients of parts are scaled up, see the top of the file."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, parts: ContextParallel) -> Tensor:
        ctx.parts = parts
        return parts.peers.all_gather(part.contiguous()).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.parts.part(gradients[0], 1) * ctx.parts.size, None


@contextmanager
def _attending_over(parts: ContextParallel, length: int) -> Iterator[None]:
    """Let attention be over whole sequences, of which this rank has `length` tokens, on this thread."""
    before = getattr(_here, "now", None)
    _here.now = parts, length
    try:
        yield
    finally:
        _here.now = before


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    now = getattr(_here, "now", None)
    if now is not None and query.dim() == 4 and query.shape[2] == key.shape[2] == now[1]:
        return now[0].attention(query, key, value, *args, **kwargs)  # type: ignore[no-any-return]
    return _plain_attention(query, key, value, *args, **kwargs)  # keys that are whole: nothing has to travel


def _intercept_attention() -> None:
    """Put ourselves between callers of torch's attention and torch, for good; outside of blocks nothing changes."""
    F.scaled_dot_product_attention = _attention
    torch.backends.mha.set_fastpath_enabled(False)  # it would go around us


def _hidden(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states (B, length, width) among a block's arguments: its first tensor."""
    values = [*args, *(kwargs[name] for name in ("hidden_states",) if name in kwargs), *kwargs.values()]
    first = next((x for x in values if isinstance(x, Tensor)), None)
    return first if first is not None and first.dim() == 3 and first.is_floating_point() else None


def _first_of(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _dim_of_tokens(name: str, tensor: Tensor, batch: int, whole: int) -> int | None:
    """Return which dim of a block's argument counts the tokens of whole sequences; None for masks and all else.

    Args:
        name: Of the argument; empty for one given by position.
        tensor: The argument, or a part of it.
        batch: Number of sequences.
        whole: Their length.
    """
    shape = tuple(tensor.shape)
    if "mask" in name or tensor.dtype is torch.bool:
        return 1 if "padding" in name and shape == (batch, whole) else None
    if not name and shape[-2:] == (whole, whole) and tensor.is_floating_point():
        return None
    if len(shape) == 4:  # a rotary table with a dim for heads
        return 2 if shape[1:3] == (1, whole) else None
    if len(shape) in (2, 3) and shape[1] == whole and shape[0] in (1, batch):
        return 1
    return 0 if shape and len(shape) < 4 and shape[0] == whole else None
