"""Writing a model in the Hugging Face layout, gathered tensor by tensor.

`model.safetensors`, or `model-00001-of-000NN.safetensors` with `model.safetensors.index.json`:
https://huggingface.co/docs/transformers/big_models#sharded-checkpoints
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from distrib.checkpoint.adapters import STEM, adapter_key
from distrib.checkpoint.agreement import collect, on_main, together
from distrib.checkpoint.format import DTYPES, ITEMSIZE, code_of
from distrib.checkpoint.plan import Held, Shape, Share, Where, canonical, holders_of, numel, pieces, size_of
from distrib.checkpoint.storage import Storage, entries
from distrib.checkpoint.tensorfile import Entry, in_file_order, write_bytes, write_tensors
from distrib.checkpoint.transfer import sub_tensor
from distrib.collectives.base import Collectives
from distrib.collectives.packing import flat_bytes
from distrib.errors import CheckpointError
from distrib.state import ShardedState, Slice

_LITTLE = 2**20  # bytes, which a gather may waste on each rank
_ONE_FILE = 2**62  # bytes; PEFT reads one file only
Include = Sequence[str] | Callable[[str], bool]
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", re.IGNORECASE)
_Mine = Mapping[tuple[str, Where], Slice]
_UNITS = ("", "K", "M", "G", "T")


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the export: its name and dtype in the file, and which rank sends which part of it."""

    key: str
    shape: Shape
    stored: str
    dtype: str
    parts: tuple[tuple[int, Held], ...]

    @property
    def nbytes(self) -> int:
        return numel(self.shape) * ITEMSIZE[self.dtype]


def export_model(
    directory: str | Path,
    state: ShardedState,
    collectives: Collectives,
    *,
    prefix: str = "model/",
    max_shard_size: int | str = "10GB",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    include: Include | None = None,
    rename: Callable[[str], str] | None = None,
    stem: str = "model",
    durable: bool = True,
    storage: Storage | None = None,
) -> Path:
    """Write a model as Hugging Face libraries read it. Collective.

    Rank 0 writes; it holds one tensor at a time. Tied tensors are stored once, under the name that `state.aliases`
    leads to. Each file appears whole, under its final name, once all are written; files of an earlier export there
    are replaced, others are left alone.

    Args:
        directory: Made if it is missing; only rank 0 needs to see it.
        state: This rank's slices; tensors outside `prefix` are left out.
        collectives: The ranks that hold the model.
        prefix: What the names of the model's tensors begin with; cut off in the files.
        max_shard_size: Bytes of tensors in one file, or "5GB" (10**9), "5GiB" (2**30). A larger tensor has a file
            of its own.
        metadata: Texts for the files' headers; {"format": "pt"} by default, which transformers asks for.
        dtype: Converts floating-point tensors to it; None leaves them.
        include: Which tensors: shell patterns of names (without `prefix`), one of which must fit, or a function that
            is given a name; None for all.
        rename: Returns the name in the file for a name without `prefix`; None leaves it.
        stem: What the files' names begin with: "adapter_model" is what PEFT reads.
        durable: Wait until all bytes are on the medium.
        storage: The file operations; tests make them fail.

    Returns:
        The absolute path of the directory.

    Raises:
        CheckpointError: on every rank, if the slices do not make up whole tensors or rank 0 cannot write.
    """
    files = storage or Storage()
    target = Path(directory).absolute()
    mine = {
        (s.name, canonical(s.where, s.global_shape)): s
        for name, parts in state.tensors.items()
        for s in parts
        if name.startswith(prefix) and _included(name.removeprefix(prefix), include)
    }
    announced = collect(collectives, "preparing the export", lambda: _announce(mine))
    tensors = together(
        collectives, "planning the export", lambda: _tensors(announced, prefix, dtype, rename or str)
    )
    shards = together(collectives, "planning the export", lambda: _shards(tensors, _bytes(max_shard_size)))
    pending = {name: f".{name}.tmp-{secrets.token_hex(6)}" for name in _names(len(shards), stem)}
    try:
        on_main(collectives, "starting the export", lambda: files.make_dirs(target))
        for shard, temp in zip(shards, pending.values(), strict=True):
            writer = _ShardWriter(files, target / temp, metadata or {"format": "pt"}, durable=durable)
            together(collectives, "writing the export", partial(writer.write, shard, mine, collectives))
        index = _index(shards, list(pending)) if len(shards) > 1 else None
        on_main(
            collectives,
            "completing the export",
            lambda: _publish(files, target, stem, pending, index, durable=durable),
        )
    finally:
        if collectives.rank == 0:
            _discard(files, [target / temp for temp in pending.values()])
    return target


def export_adapter(
    directory: str | Path,
    state: ShardedState,
    collectives: Collectives,
    *,
    prefix: str = "model/",
    adapter: str = "default",
    include: Include | None = None,
    dtype: torch.dtype | None = None,
    durable: bool = True,
    storage: Storage | None = None,
) -> Path:
    """Write only an adapter's tensors, as `adapter_model.safetensors`, which PEFT reads. Collective.

    Args:
        directory: As for `export_model`, and so are `state`, `collectives`, `prefix`, `dtype`, `durable`, `storage`.
        state: This rank's slices.
        collectives: The ranks that hold the model.
        prefix: What the names of the model's tensors begin with.
        adapter: Which of the adapters in PEFT's model; its name is left out of the tensors' names.
        include: Which tensors, where their names do not tell (see `distrib.checkpoint.adapters`).
        dtype: Converts floating-point tensors to it.
        durable: Wait until all bytes are on the medium.
        storage: The file operations.

    Raises:
        CheckpointError: on every rank, if there is no such tensor, or rank 0 cannot write.
    """
    return export_model(
        directory,
        state,
        collectives,
        prefix=prefix,
        max_shard_size=_ONE_FILE,
        dtype=dtype,
        include=include or (lambda name: adapter_key(name, adapter) is not None),
        rename=lambda name: adapter_key(name, adapter) or name,
        stem=STEM,
        durable=durable,
        storage=storage,
    )


class _ShardWriter:
    """Writes one file on rank 0 while all ranks send what it needs."""

    def __init__(self, storage: Storage, path: Path, metadata: Mapping[str, str], *, durable: bool) -> None:
        self.storage, self.path, self.metadata, self.durable = storage, path, metadata, durable

    def write(self, shard: Sequence[_Tensor], mine: _Mine, collectives: Collectives) -> None:
        """Write the tensors of `shard`, in order. Collective."""
        stream = (_gather(tensor, mine, collectives) for tensor in shard)
        try:
            if collectives.rank == 0:
                get = partial(next, stream)
                entries = [Entry(x.key, x.shape, x.dtype, get) for x in shard]
                write_tensors(self.storage, self.path, entries, durable=self.durable, metadata=self.metadata)
        finally:
            for _ in stream:  # all that rank 0 did not take, if it failed: its peers must not wait for it
                pass


def _gather(tensor: _Tensor, mine: _Mine, collectives: Collectives) -> torch.Tensor:
    """Return a tensor whole on rank 0, and something empty elsewhere. Collective unless rank 0 has all of it."""
    own = [
        mine[held.name, held.where].get().detach() for rank, held in tensor.parts if rank == collectives.rank
    ]
    if any(rank for rank, _ in tensor.parts):
        sent = [flat_bytes(x) for x in own]
        device = next((s.get().device for s in mine.values()), torch.device("cpu"))
        move = _together if _is_even(tensor, collectives.world_size) else _one_by_one
        own = [x.view(DTYPES[tensor.stored]) for x in move(tensor, sent, device, collectives)]
    if collectives.rank:
        return torch.empty(0)
    return _assemble(tensor, own).to(DTYPES[tensor.dtype])


def _is_even(tensor: _Tensor, world_size: int) -> bool:
    """Whether a gather wastes little: it makes room for each rank as for the one that sends most."""
    sent: Counter[int] = Counter()
    for rank, held in tensor.parts:
        sent[rank] += _nbytes(held)
    total = sum(sent.values())
    return world_size * max(sent.values()) - total <= max(_LITTLE, total // 4)


def _together(
    tensor: _Tensor, sent: Sequence[torch.Tensor], device: torch.device, collectives: Collectives
) -> Iterable[torch.Tensor]:
    """Return the bytes of all parts, in order. Collective."""
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    received = collectives.gather(torch.cat([*sent, nothing]))
    return _cut(received, [_nbytes(held) for _, held in tensor.parts])


def _one_by_one(
    tensor: _Tensor, sent: Sequence[torch.Tensor], device: torch.device, collectives: Collectives
) -> Iterable[torch.Tensor]:
    """Return the bytes of all parts, in order, on rank 0; others have no more than one part at a time. Collective."""
    own, found = iter(sent), []
    blank = torch.empty(1, dtype=torch.uint8, device=device)
    for rank, held in tensor.parts:
        part = next(own) if rank == collectives.rank else blank.expand(_nbytes(held))
        if rank:
            part = collectives.broadcast(part, rank)
        if collectives.rank == 0:
            found.append(part)
    return found


def _assemble(tensor: _Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0].reshape(tensor.shape)
    full = torch.empty(tensor.shape, dtype=DTYPES[tensor.stored])
    for (_, held), data in zip(tensor.parts, parts, strict=True):
        flat = data.reshape(-1)
        for box, offset in pieces(held.where, tensor.shape):
            sub_tensor(full, box).copy_(flat.narrow(0, offset, numel(box.size)).view(box.size))
    return full


def _cut(flat: torch.Tensor, sizes: Iterable[int]) -> Iterator[torch.Tensor]:
    start = 0
    for size in sizes:
        yield flat.narrow(0, start, size)
        start += size


def _nbytes(held: Held) -> int:
    return size_of(held.where) * ITEMSIZE[held.dtype]


def _included(name: str, include: Include | None) -> bool:
    if include is None or callable(include):
        return include is None or include(name)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in include)


def _announce(mine: _Mine) -> tuple[Held, ...]:
    return tuple(
        Held(s.name, s.global_shape, code_of(s.name, s.dtype), where) for (_, where), s in mine.items()
    )


def _tensors(
    announced: Sequence[tuple[Held, ...]],
    prefix: str,
    dtype: torch.dtype | None,
    rename: Callable[[str], str],
) -> list[_Tensor]:
    """Return the tensors in the order of the model, each part from the lowest rank that has it."""
    holders = holders_of([Share((rank,), held) for rank, held in enumerate(announced)])
    parts: dict[str, list[tuple[int, Held]]] = {}
    for held, ranks in holders.items():
        parts.setdefault(held.name, []).append((min(ranks), held))
    if not parts:
        raise CheckpointError(
            "D0719",
            f"there is nothing to export: no tensor whose name begins with {prefix!r} is chosen",
            fix="export a model that has parameters (an adapter, if only adapters are written), or let include fit some names",
        )
    found = []
    for name, items in parts.items():
        held = items[0][1]
        by_rank = tuple(sorted(items, key=lambda item: item[0]))  # the order in which a gather lays them out
        found.append(
            _Tensor(
                rename(name.removeprefix(prefix)),
                held.shape,
                held.dtype,
                _converted(name, held.dtype, dtype),
                by_rank,
            )
        )
    return found


def _converted(name: str, stored: str, dtype: torch.dtype | None) -> str:
    return stored if dtype is None or not DTYPES[stored].is_floating_point else code_of(name, dtype)


def _shards(tensors: Sequence[_Tensor], most: int) -> list[list[_Tensor]]:
    """Cut the tensors, in order, into files of at most `most` bytes; each is then put into its file's order."""
    shards: list[list[_Tensor]] = []
    room = -1
    for tensor in tensors:
        if tensor.nbytes > room or not shards:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return [sorted(shard, key=lambda x: in_file_order(x.dtype, x.key)) for shard in shards]


def _bytes(size: int | str) -> int:
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    count = size if isinstance(size, int) else 0
    if match:
        count = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS.index(match[2].upper()))
    if count < 1:
        raise CheckpointError(
            "D0719",
            f"max_shard_size is {size!r}; expected a number of bytes, or text such as '5GB' or '500MiB'",
            fix="give it in that form",
        )
    return count


def _names(count: int, stem: str) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _index(shards: Sequence[Sequence[_Tensor]], names: Sequence[str]) -> bytes:
    weight_map = {x.key: name for shard, name in zip(shards, names, strict=True) for x in shard}
    total = sum(x.nbytes for shard in shards for x in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _publish(
    storage: Storage,
    target: Path,
    stem: str,
    pending: Mapping[str, str],
    index: bytes | None,
    *,
    durable: bool,
) -> None:
    """Give the files their names, write the index, and remove what an earlier export leaves over."""
    for name, hidden in pending.items():
        storage.rename(target / hidden, target / name)
    names, index_name = set(pending), f"{stem}.safetensors.index.json"
    if index is not None:
        names.add(index_name)
        temp = target / f".{index_name}.tmp-{secrets.token_hex(6)}"
        write_bytes(storage, temp, index, durable=durable)
        storage.rename(temp, target / index_name)
    ours = re.compile(rf"{re.escape(stem)}(?:-\d{{5}}-of-\d{{5}})?\.safetensors(?:\.index\.json)?")
    for name in entries(target):
        if ours.fullmatch(name) and name not in names:
            storage.unlink(target / name)
    if durable:
        storage.sync_dir(target)


def _discard(storage: Storage, paths: Iterable[Path]) -> None:
    """Remove temporary files that were not published; one that cannot be removed does not hide the reason."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.exists():
                storage.unlink(path)
