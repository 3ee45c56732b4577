"""Collectives over torch.distributed.

Every operation starts with one exchange of a small header on the CPU. It carries a hash of what the rank is about
to do and the sizes the others need, so a mismatch becomes an error on every rank instead of wrong bytes or a hang,
and the data then travel packed: one operation for a gather or a broadcast, one per dtype for a reduction.
"""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from distrib.collectives.base import Collectives, ReduceOp
from distrib.collectives.trees import map_tensors, replace_tensors, structure, tensors
from distrib.errors import CollectiveError, TopologyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distrib.topology import Rendezvous, Topology

Tree = TypeVar("Tree")

_HEADER_SIZES = 62  # dim-0 sizes that fit into the first exchange; a larger tree costs a second one
_ALIGN = 16  # bytes; the widest dtype (complex128), so that any tensor can be viewed at its place in a packed buffer
_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


def connect(
    topology: Topology, comm_backend: str, device: torch.device, timeout_s: float, rendezvous_timeout_s: float
) -> ProcessGroupCollectives:
    """Join the job's process group, or adopt the one that the script has already made. Collective.

    Args:
        topology: Who this rank is; `world_size` > 1.
        comm_backend: Back-end for tensors on `device`: "gloo", "nccl". CPU tensors always travel over gloo.
        device: This rank's device.
        timeout_s: Seconds after which a collective that a peer does not join fails.
        rendezvous_timeout_s: Seconds to wait for the others at the start.

    Raises:
        TopologyError: if a group exists already and disagrees with `topology`, or the rendezvous fails.
    """
    if dist.is_initialized():
        _check_existing(topology)
        return ProcessGroupCollectives(device, owned=False)
    assert topology.rendezvous is not None, "a world of more than one rank has a rendezvous"
    backend = "gloo" if comm_backend == "gloo" else f"cpu:gloo,{device.type}:{comm_backend}"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = _store(topology, topology.rendezvous, timedelta(seconds=rendezvous_timeout_s))
        dist.init_process_group(
            backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
        )
    except (dist.DistError, RuntimeError, OSError) as error:
        address = f"{topology.rendezvous.host}:{topology.rendezvous.port}"
        raise TopologyError(
            "D0290",
            f"rank {topology.rank} of {topology.world_size} could not join the others at {address}: {error}",
            fix="check that every rank was started and that the address is reachable from all nodes",
        ) from error
    return ProcessGroupCollectives(device, owned=True)


def _check_existing(topology: Topology) -> None:
    found, expected = (dist.get_rank(), dist.get_world_size()), (topology.rank, topology.world_size)
    if found != expected:
        raise TopologyError(
            "D0291",
            f"the script's own process group says rank {found[0]} of {found[1]}, "
            f"{topology.source} says rank {expected[0]} of {expected[1]}",
            fix="leave init_process_group to the Accelerator, or start the script so that both agree",
        )


def _store(topology: Topology, rendezvous: Rendezvous, timeout: timedelta) -> Store:
    serves = topology.rank == 0 and not rendezvous.hosted_by_agent
    store: Store = TCPStore(
        rendezvous.host,
        rendezvous.port,
        topology.world_size,
        serves,
        timeout,
        wait_for_workers=False,
        master_listen_fd=_listen(rendezvous) if serves else None,
    )
    return PrefixStore(rendezvous.prefix, store) if rendezvous.prefix else store


def _listen(rendezvous: Rendezvous) -> int:
    """Listen on the rendezvous address only, so that no other network reaches the store; return the descriptor."""
    for host in (rendezvous.host, ""):  # "": the name may lead to us through a translated address
        server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # shares the launcher's reserved port
        try:
            server.bind((host, rendezvous.port))
        except OSError:
            server.close()
            if not host:
                raise
            continue
        server.listen(4096)
        return server.detach()
    raise AssertionError("unreachable: the last bind returns or raises")


class ProcessGroupCollectives(Collectives):
    """Collectives over torch's default process group.

    Args:
        device: Where objects' tensors live on this rank.
        owned: Whether `close` ends the group; False for a group that the script made.
    """

    def __init__(self, device: torch.device, *, owned: bool) -> None:
        self.device, self._owned = device, owned
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        with _peers("all_reduce"):
            dist.all_reduce(tensor, _OPS[op])
        return tensor.div_(self.world_size) if op == "mean" else tensor

    def reduce(self, tree: Tree, op: ReduceOp = "sum") -> Tree:
        leaves = tensors(tree)
        self._agree(f"reduce({op})", tree, ragged=False)
        flat = {
            dtype: torch.cat([x.reshape(-1) for x in leaves if x.dtype is dtype]) for dtype in _dtypes(leaves)
        }
        reduced = {
            dtype: self.all_reduce_(values, "sum" if op == "mean" else op) for dtype, values in flat.items()
        }
        if op == "mean":
            reduced = {dtype: values / self.world_size for dtype, values in reduced.items()}
        taken = dict.fromkeys(reduced, 0)

        def take(x: torch.Tensor) -> torch.Tensor:
            start = taken[x.dtype]
            taken[x.dtype] += x.numel()
            return reduced[x.dtype][start : start + x.numel()].view(x.shape)

        return map_tensors(take, tree)

    def gather(self, tree: Tree) -> Tree:
        tree = map_tensors(lambda x: x.reshape(x.shape or (1,)), tree)
        leaves = tensors(tree)
        sizes = self._agree("gather", tree, ragged=True)
        if not leaves:
            return tree
        layouts = [_layout(leaves, rows) for rows in sizes]
        width = max(total for _, total in layouts)
        mine = _pack(leaves, width)
        everyone = mine.new_empty(self.world_size, width)
        with _peers("gather"):
            dist.all_gather(list(everyone.unbind()), mine)
        parts = [_unpack(everyone[r], leaves, sizes[r], layouts[r][0]) for r in range(self.world_size)]
        return replace_tensors(tree, iter([torch.cat(column) for column in zip(*parts, strict=True)]))

    def broadcast(self, tree: Tree, source: int = 0) -> Tree:
        leaves = tensors(tree)
        self._agree(f"broadcast(from {source})", tree, ragged=False)
        if not leaves:
            return tree
        rows = [x.shape[0] if x.dim() else 1 for x in leaves]
        offsets, width = _layout(leaves, rows)
        buffer = _pack(leaves, width)
        with _peers("broadcast"):
            dist.broadcast(buffer, source)
        return replace_tensors(tree, iter(_unpack(buffer, leaves, rows, offsets)))

    def gather_object(self, value: Any) -> list[Any]:
        self._agree("gather_object", None, ragged=False)
        values: list[Any] = [None] * self.world_size
        with _peers("gather_object"):
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        self._agree(f"broadcast_object(from {source})", None, ragged=False)
        values = [value]
        with _peers("broadcast_object"):
            dist.broadcast_object_list(values, source)
        return values[0]

    def barrier(self, why: str) -> None:
        self._agree(f"barrier({why})", None, ragged=False)  # nobody leaves before everybody's header has come

    def close(self) -> None:
        if self._owned and dist.is_initialized():
            dist.destroy_process_group()
        self._owned = False

    def _agree(self, op: str, tree: Any, *, ragged: bool) -> list[list[int]]:
        """Exchange headers; return each rank's dim-0 sizes, or raise on all ranks if they are not doing the same."""
        signature = f"{op} of {structure(tree, ragged=ragged)}" if tree is not None else op
        sizes = [x.shape[0] for x in tensors(tree)] if ragged else []
        headers = self._exchange([_hash(signature), len(sizes), *sizes[:_HEADER_SIZES]], _HEADER_SIZES + 2)
        if any(header[0] != headers[0][0] for header in headers):
            self._raise_mismatch(signature)
        if len(sizes) <= _HEADER_SIZES:
            return [header[2 : 2 + len(sizes)] for header in headers]
        rest = self._exchange(sizes[_HEADER_SIZES:], len(sizes) - _HEADER_SIZES)
        return [header[2:] + more for header, more in zip(headers, rest, strict=True)]

    def _exchange(self, values: Sequence[int], length: int) -> list[list[int]]:
        mine = torch.zeros(length, dtype=torch.int64)
        mine[: len(values)] = torch.tensor(values, dtype=torch.int64)
        everyone = torch.empty(self.world_size, length, dtype=torch.int64)
        with _peers("the exchange of headers"):
            dist.all_gather(list(everyone.unbind()), mine)
        return cast("list[list[int]]", everyone.tolist())

    def _raise_mismatch(self, signature: str) -> None:
        calls: list[Any] = [None] * self.world_size
        with _peers("the report of a mismatch"):
            dist.all_gather_object(calls, f"{signature} at {_call_site()}")
        other = next(rank for rank, call in enumerate(calls) if call != calls[0])
        raise CollectiveError(
            "D0401",
            f"the ranks do not agree: rank 0 calls {calls[0]}, rank {other} calls {calls[other]}",
            fix="call the same operations in the same order on every rank, with equal structure, dtypes and shapes",
        )


def _dtypes(leaves: Sequence[torch.Tensor]) -> list[torch.dtype]:
    return list(dict.fromkeys(x.dtype for x in leaves))


def _layout(leaves: Sequence[torch.Tensor], rows: Sequence[int]) -> tuple[list[int], int]:
    """Return the byte offset of each leaf, were its dim 0 `rows[i]`, and the total width of a packed buffer."""
    offsets, at = [], 0
    for leaf, n in zip(leaves, rows, strict=True):
        offsets.append(at)
        row_bytes = (
            leaf.element_size() * leaf[:0].flatten(1).shape[1] if leaf.dim() > 1 else leaf.element_size()
        )
        at += -(-n * row_bytes // _ALIGN) * _ALIGN
    return offsets, at


def _pack(leaves: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Lay the leaves' bytes one after the other, zero-padded, on the device of the first leaf."""
    device = leaves[0].device
    buffer = torch.zeros(width, dtype=torch.uint8, device=device)
    offsets, _ = _layout(leaves, [x.shape[0] if x.dim() else 1 for x in leaves])
    for leaf, offset in zip(leaves, offsets, strict=True):
        data = leaf.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
        buffer[offset : offset + data.numel()] = data
    return buffer


def _unpack(
    buffer: torch.Tensor, leaves: Sequence[torch.Tensor], rows: Sequence[int], offsets: Sequence[int]
) -> list[torch.Tensor]:
    """Take leaves of the given dim-0 sizes out of a packed buffer, each on the device of its model leaf."""
    found = []
    for leaf, n, offset in zip(leaves, rows, offsets, strict=True):
        shape = (n, *leaf.shape[1:]) if leaf.dim() else ()
        count = torch.Size(shape).numel() * leaf.element_size()
        found.append(buffer[offset : offset + count].view(leaf.dtype).view(shape).to(leaf.device))
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _call_site() -> str:
    """Return "file:line" of the innermost frame outside this package."""
    frame = sys._getframe()
    package = str(Path(__file__).parents[1])
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@contextmanager
def _peers(op: str) -> Iterator[None]:
    """Turn what torch raises when a peer is lost into our error."""
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(
            "D0402",
            f"{op} failed: {error}",
            fix="look for the rank that ended or stopped first; this rank only followed it",
        ) from error
