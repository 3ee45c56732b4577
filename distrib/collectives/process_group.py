"""Collectives over torch.distributed.

Every operation starts with one exchange on the CPU. It carries a hash of what the rank is about to do and what the
others need to know, so a mismatch becomes an error on every rank instead of wrong bytes or a hang. Small values in
host memory travel in that exchange itself; others then travel packed, in one operation for a gather or a broadcast
and in one per dtype for a reduction.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from distrib.collectives.base import Collectives, ReduceOp
from distrib.collectives.exchange import EMPTY, ROOM, Exchange, Heard, all_gather_single
from distrib.collectives.inputs import check_rank, dense_tensors
from distrib.collectives.packing import num_bytes, pack, unpack, unpack_rows
from distrib.collectives.padding import check_dim, padded, size_of
from distrib.collectives.reductions import Reduction
from distrib.collectives.signature import Signature, call_site, disagreement
from distrib.collectives.single import SingleCollectives
from distrib.collectives.store import join_store
from distrib.collectives.threads import let_threads_finish
from distrib.collectives.trees import map_tensors, replace_tensors, tensors
from distrib.collectives.turns import Turns
from distrib.errors import CollectiveError, TopologyError

if TYPE_CHECKING:
    from distrib.topology import Topology

T = TypeVar("T")
Tree = TypeVar("Tree")

_CPU = torch.device("cpu")
_OFF_CPU, _FAILED = (
    1,
    2,
)  # flags of an exchange: a tensor is not in host memory; the note says why there is no value
_REPORT = 1  # key of the exchange that tells about a mismatch; a hash is practically never so small
_NO_LIMIT = timedelta(days=30)
_MAX_REASON = 500  # characters
_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


_sharing: list[ProcessGroupCollectives] = []  # those over the default group; the last one to close ends it
_visiting: WeakKeyDictionary[dist.ProcessGroup, ProcessGroupCollectives] = (
    WeakKeyDictionary()
)  # by the default group


def connect(
    topology: Topology,
    comm_backend: str,
    device: torch.device,
    timeout_s: float,
    rendezvous_timeout_s: float,
    *,
    make: Callable[..., ProcessGroupCollectives] | None = None,
) -> ProcessGroupCollectives:
    """Join the job's process group, or adopt the one that the script has already made. Collective.

    Args:
        topology: Who this rank is; `world_size` > 1.
        comm_backend: Back-end for tensors on `device`: "gloo", "nccl". CPU tensors always travel over gloo.
        device: This rank's device.
        timeout_s: Seconds after which a collective that a peer does not join fails.
        rendezvous_timeout_s: Seconds to wait for the others at the start.
        make: Called as `make(device, owned=...)` for collectives of another class.

    Raises:
        TopologyError: if a group exists already and disagrees with `topology`, or the rendezvous fails.
    """
    make = make or ProcessGroupCollectives
    if dist.is_initialized():
        check_existing_group(topology)
        return _joined(make(device, owned=False))
    assert topology.rendezvous is not None, "a world of more than one rank has a rendezvous"
    backend = "gloo" if comm_backend == "gloo" else f"cpu:gloo,{device.type}:{comm_backend}"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = join_store(topology, topology.rendezvous, timedelta(seconds=rendezvous_timeout_s))
        dist.init_process_group(
            backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
        )
        # Nobody goes on, and perhaps ends and takes the store along, before all have found each other.
        dist.all_reduce(torch.zeros(1, device=_CPU))
    except (dist.DistError, RuntimeError, OSError) as error:
        address = f"{topology.rendezvous.host}:{topology.rendezvous.port}"
        raise TopologyError(
            "D0290",
            f"rank {topology.rank} of {topology.world_size} could not join the others at {address}: {error}",
            fix="check that every rank was started and that the address is reachable from all nodes",
        ) from error
    return _joined(make(device, owned=True))


def _joined(ours: ProcessGroupCollectives) -> ProcessGroupCollectives:
    _sharing.append(ours)
    return ours


def connected_ranks() -> Collectives:
    """Return collectives over the process group that exists already, for values in host memory. Collective.

    They are made once for each such group, and never end it.
    """
    default = dist.group.WORLD
    assert default is not None, "the default group exists"
    if default not in _visiting:
        _visiting[default] = ProcessGroupCollectives(_CPU, owned=False)
    return _visiting[default]


def check_existing_group(topology: Topology) -> None:
    """Refuse a group that the script has made, if it disagrees with `topology`.

    Raises:
        TopologyError: naming both ranks and world sizes.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    found, expected = (dist.get_rank(), dist.get_world_size()), (topology.rank, topology.world_size)
    if found != expected:
        raise TopologyError(
            "D0291",
            f"the script's own process group says rank {found[0]} of {found[1]}, "
            f"{topology.source} says rank {expected[0]} of {expected[1]}",
            fix="leave init_process_group to the Accelerator, or start the script so that both agree",
        )


class _Holding:
    """The block in which this rank goes first, while others wait for its end; one for a group and its parts."""

    block: str | None = None


class ProcessGroupCollectives(Collectives):
    """Collectives over torch's default process group. Collective.

    Args:
        device: This rank's device.
        owned: Whether `close` ends the group; False for a group that the script made.
    """

    _group: dist.ProcessGroup | None = None  # for tensors on the device; None for the default group
    _members: Sequence[int] | None = None  # the global ranks of a group that is not the default one

    def __init__(self, device: torch.device, *, owned: bool) -> None:
        self.device, self._owned = device, owned
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._cpu_group = _group_for_cpu()
        self._meet = Exchange(self.world_size, self._cpu_group)
        self._turns = Turns(dist.distributed_c10d._get_default_store(), self.rank)
        self._holding = _Holding()

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        group = self._cpu_group if tensor.is_cpu else self._group
        self._with_peers("all_reduce", dist.all_reduce, tensor, _OPS[op], group)
        return tensor.div_(self.world_size) if op == "mean" else tensor

    def reduce(self, tree: Tree, op: ReduceOp = "sum") -> Tree:
        leaves = dense_tensors("reduce", tree)
        reduction, off_cpu = Reduction(leaves, op), _off_cpu(leaves)
        rides = not off_cpu and reduction.num_bytes <= ROOM
        flat = reduction.flat(_CPU) if rides else []
        heard = self._agree(Signature(f"reduce({op})", tree), pack(flat, _CPU), flags=off_cpu)
        reduction.check()
        if rides and not any(heard.flags):
            of_ranks = [unpack(note, flat) for note in heard.notes]
            flat = [reduction.combined(parts) for parts in zip(*of_ranks, strict=True)]
        else:
            flat = reduction.flat(self._home(heard))
            for values in flat:
                self.all_reduce_(values, "sum" if op == "mean" else op)
        return replace_tensors(tree, iter(reduction.results(flat, self.world_size)))

    def gather(self, tree: Tree) -> Tree:
        dense_tensors("gather", tree)
        tree = map_tensors(lambda x: x.reshape(x.shape or (1,)), tree)
        leaves = tensors(tree)
        off_cpu = _off_cpu(leaves)
        sizes = _as_note([x.shape[0] for x in leaves])
        note = pack([] if off_cpu else leaves, _CPU, lead=sizes)
        heard = self._agree(Signature("gather", tree, ragged=True), note, flags=off_cpu)
        if not leaves:
            return tree
        rows = [_numbers(note[: sizes.numel()]) for note in heard.notes]
        if any(heard.flags):
            buffers = self._gather_packed(leaves, rows)
        else:
            buffers = [note[sizes.numel() :] for note in heard.notes]
        return replace_tensors(tree, iter(unpack_rows(buffers, leaves, rows)))

    def broadcast(self, tree: Tree, source: int = 0) -> Tree:
        leaves = dense_tensors("broadcast", tree)
        off_cpu, size = _off_cpu(leaves), num_bytes(leaves)
        rides = self.rank == source and not off_cpu and size <= ROOM
        signature = Signature(f"broadcast(from {source!r})", tree)
        heard = self._agree(signature, pack(leaves, _CPU) if rides else EMPTY, flags=off_cpu)
        source = check_rank("broadcast from rank", source, self.world_size)
        if size <= ROOM and not heard.flags[source]:
            buffer = heard.notes[source].clone()
        else:
            buffer = self._broadcast_packed(leaves, source, self._home(heard))
        return replace_tensors(tree, iter(unpack(buffer, leaves)))

    def pad(self, tree: Tree, dim: int = 0, value: float = 0, *, first: bool = False) -> Tree:
        leaves = dense_tensors("pad_across_processes", tree)
        signature = Signature(f"pad_across_processes(dim={dim})", tree, sizes=False)
        heard = self._agree(signature, _as_note([size_of(x, dim) for x in leaves]))
        check_dim(leaves, dim)
        largest = [max(sizes) for sizes in zip(*map(_numbers, heard.notes), strict=True)]
        new = [padded(x, dim, size, value, first=first) for x, size in zip(leaves, largest, strict=True)]
        return replace_tensors(tree, iter(new))

    def gather_object(self, value: Any) -> list[Any]:
        note, flags = _pickled(value)
        heard = self._agree(Signature("gather_object"), note, flags=flags)
        _check_pickled("gather_object", heard)
        return [_unpickled(note, rank) for rank, note in enumerate(heard.notes)]

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        note, flags = _pickled(value) if self.rank == source else (EMPTY, 0)
        rides = note if note.numel() <= ROOM else EMPTY
        signature = Signature(f"broadcast_object(from {source!r})")
        heard = self._agree(signature, rides, flags=flags, extra=note.numel())
        source = check_rank("broadcast_object from rank", source, self.world_size)
        _check_pickled("broadcast_object", heard)
        size = heard.extras[source]
        if size <= ROOM:
            note = heard.notes[source]
        else:
            note = note if self.rank == source else torch.empty(size, dtype=torch.uint8, device=_CPU)
            self._with_peers("broadcast_object", dist.broadcast, note, self._global(source), self._cpu_group)
        return value if self.rank == source else _unpickled(note, source)

    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(values, dtype=torch.int64, device=_CPU)
        everyone = torch.empty(self.world_size, len(values), dtype=torch.int64, device=_CPU)
        self._with_peers("exchange", all_gather_single, everyone.view(-1), mine, self._cpu_group)
        numbers: list[list[int]] = everyone.tolist()
        return numbers

    def scatter_(
        self, received: torch.Tensor, parts: Sequence[torch.Tensor] | None, source: int = 0
    ) -> torch.Tensor:
        sent = None if parts is None else list(parts)
        self._with_peers("scatter", dist.scatter, received, sent, self._global(source), self._cpu_group)
        return received

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        came, group = torch.empty_like(rows), self._cpu_group if rows.is_cpu else self._group
        self._with_peers("all_to_all", dist.all_to_all_single, came, rows, None, None, group)
        return came

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        everyone = tensor.new_empty(self.world_size, *tensor.shape)
        group = self._cpu_group if tensor.is_cpu else self._group
        self._with_peers("all_gather", all_gather_single, everyone.view(-1), tensor.view(-1), group)
        return everyone

    def barrier(self, why: str) -> None:
        # nobody leaves before everybody's frame has come
        self._agree(Signature(f"barrier({why})"), what=f"{why} at {call_site()}")

    @contextmanager
    def first(self, scope: str, *, place: int, members: int) -> Iterator[None]:
        if members == 1:
            yield
            return
        where = call_site()
        if place:
            self._turns.follow(scope, where, speaks=place == 1)
            yield
            return
        outer, self._holding.block = self._holding.block, f"the block at {where}"
        try:
            with self._turns.go_first(scope, where, members - 1):
                yield
        finally:
            self._holding.block = outer

    @contextmanager
    def in_turn(self, why: str) -> Iterator[None]:
        self.barrier(why)
        with self._turns.in_turn():
            yield

    def beside(self) -> Collectives:
        return _Beside(self)

    def among(self, groups: Sequence[Sequence[int]]) -> Collectives:
        mine = next(group for group in groups if self.rank in group)
        if len(mine) == self.world_size:
            return self
        return SingleCollectives() if len(mine) == 1 else _Part(self, groups, mine)

    def close(self) -> None:
        self._turns.close()
        let_threads_finish()
        if self in _sharing:
            _sharing.remove(self)
        if self._owned and _sharing:
            _sharing[0]._owned = True
        elif self._owned and dist.is_initialized():
            dist.destroy_process_group()
        self._owned = False

    def _agree(
        self,
        signature: Signature,
        note: torch.Tensor = EMPTY,
        *,
        flags: int = 0,
        extra: int = 0,
        what: str | None = None,
    ) -> Heard:
        """Exchange what the ranks are about to do, or raise on all of them if it is not the same."""
        heard = self._with_peers(
            what or signature.op, self._meet, signature.key, note, flags=flags, extra=extra
        )
        if heard.keys.count(signature.key) < self.world_size:
            self._raise_mismatch(signature)
        return heard

    def _raise_mismatch(self, signature: Signature) -> None:
        note, _ = _pickled(signature.call(call_site()))
        heard = self._with_peers("the report of a mismatch", self._meet, _REPORT, note)
        calls = [_unpickled(note, rank) for rank, note in enumerate(heard.notes)]
        raise CollectiveError(
            "D0401",
            f"the ranks do not agree: {disagreement(calls)}",
            fix="call the same operations in the same order on every rank, with equal structure, dtypes and shapes",
        )

    def _with_peers(self, what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call what needs the other ranks; turn what torch raises when one is lost into our error."""
        self._check_not_alone(what)
        self.in_flight = what
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            is_late = "timed out" in str(error).lower()
            raise CollectiveError(
                "D0402",
                f"{what} failed: {error}",
                fix="let every rank make this call, not only the main one; if the others were merely slow, raise "
                "watch.stall_timeout_s (--collective-timeout)"
                if is_late
                else "look for the rank that ended or stopped first; this rank only followed it",
            ) from error
        finally:
            self.in_flight = None

    def _check_not_alone(self, what: str) -> None:
        if self._holding.block is not None:
            raise CollectiveError(
                "D0406",
                f"{what} inside {self._holding.block}, in which the other ranks wait until this one has left it",
                fix="move the call out of the block; only work that one rank can do alone belongs into it",
            )

    def _gather_packed(
        self, leaves: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Return every rank's packed leaves, on this rank's device."""
        row_bytes = [
            num_bytes([x[:1]]) if x.shape[0] else num_bytes([x.new_empty(1, *x.shape[1:])]) for x in leaves
        ]
        width = max(sum(n * each for n, each in zip(of_rank, row_bytes, strict=True)) for of_rank in rows)
        mine = pack(leaves, self.device, width=width)
        everyone = mine.new_empty(self.world_size, width)
        if width:
            self._with_peers("gather", all_gather_single, everyone.view(-1), mine, self._group)
        return list(everyone)

    def _broadcast_packed(
        self, leaves: Sequence[torch.Tensor], source: int, device: torch.device
    ) -> torch.Tensor:
        if self.rank == source:
            buffer = pack(leaves, device)
        else:
            buffer = torch.empty(num_bytes(leaves), dtype=torch.uint8, device=device)
        group = self._cpu_group if buffer.is_cpu else self._group
        self._with_peers("broadcast", dist.broadcast, buffer, self._global(source), group)
        return buffer

    def _global(self, rank: int) -> int:
        """Return what torch calls a rank of this group."""
        return rank if self._members is None else self._members[rank]

    def _home(self, heard: Heard) -> torch.device:
        """Return where data are packed, the same kind of place on all ranks."""
        return self.device if any(heard.flags) else _CPU


class _Beside(ProcessGroupCollectives):
    """The same ranks over a gloo group of its own, which ends with the default group. Collective."""

    def __init__(self, main: ProcessGroupCollectives) -> None:
        self.device, self._owned = _CPU, False
        self.rank, self.world_size = main.rank, main.world_size
        self._cpu_group = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
        self._meet = Exchange(self.world_size, self._cpu_group)
        self._holding = _Holding()  # its own: another thread of each rank goes on while the main threads wait

    def close(self) -> None:
        """It ends with the default group."""


class _Part(ProcessGroupCollectives):
    """Some of the ranks, over groups that end with the default one. Collective, over all ranks."""

    def __init__(
        self, main: ProcessGroupCollectives, groups: Sequence[Sequence[int]], mine: Sequence[int]
    ) -> None:
        self.device, self._owned, self._members = main.device, False, list(mine)
        self.rank, self.world_size = mine.index(main.rank), len(mine)
        own = _new_group(groups)
        self._group = self._cpu_group = own
        if not any(device.type == _CPU.type for device in own._device_types):
            self._cpu_group = _new_group(groups, backend="gloo")
        self._meet = Exchange(self.world_size, self._cpu_group)
        self._turns, self._holding = main._turns, main._holding

    def close(self) -> None:
        """It ends with the default group."""


def _new_group(groups: Sequence[Sequence[int]], **options: str) -> dist.ProcessGroup:
    """Return this rank's own one of `groups`, all of which are made. Collective."""
    own: dist.ProcessGroup
    own, _ = dist.new_subgroups_by_enumeration([list(group) for group in groups], **options)  # type: ignore[no-untyped-call]
    return own


def _group_for_cpu() -> dist.ProcessGroup | None:
    """Return a group for tensors in host memory if the default one, made by the script, takes none. Collective."""
    default = dist.group.WORLD
    assert default is not None, "the default group exists"
    serves = any(device.type == _CPU.type for device in default._device_types)
    return None if serves else dist.new_group(backend="gloo")


def _off_cpu(leaves: Sequence[torch.Tensor]) -> int:
    return 0 if all(x.is_cpu for x in leaves) else _OFF_CPU


def _as_note(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=_CPU).view(torch.uint8)


def _numbers(note: torch.Tensor) -> list[int]:
    numbers: list[int] = note.view(torch.int64).tolist()
    return numbers


def _pickled(value: Any) -> tuple[torch.Tensor, int]:
    """Return a value as a note and no flag; or why it cannot be one, and the flag that says so."""
    try:
        data, flags = pickle.dumps(value), 0
    except Exception as error:  # noqa: BLE001 (a value's own code runs; every rank must learn of whatever it raises)
        data, flags = f"{type(error).__name__}: {error}"[:_MAX_REASON].encode()[:ROOM], _FAILED
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), flags


def _unpickled(note: torch.Tensor, rank: int) -> Any:
    try:
        return pickle.loads(note.numpy().data)  # noqa: S301 (from a rank of our own job)
    except Exception as error:
        raise CollectiveError(
            "D0405",
            f"the object of rank {rank} cannot be unpickled here: {type(error).__name__}: {error}",
            fix="define its class in a module that every rank can import",
        ) from error


def _check_pickled(op: str, heard: Heard) -> None:
    for rank, (note, flags) in enumerate(zip(heard.notes, heard.flags, strict=True)):
        if flags & _FAILED:
            raise CollectiveError(
                "D0404",
                f"{op}: rank {rank} cannot pickle its object: {bytes(note.numpy()).decode(errors='replace')}",
                fix="pass plain values, or objects of classes at module level",
            )
