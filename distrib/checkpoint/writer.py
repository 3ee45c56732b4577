"""Saving: every rank writes its own share into a hidden sibling; rank 0 writes the manifest and swaps it in."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from distrib import __version__
from distrib.checkpoint.agreement import collect, on_main
from distrib.checkpoint.codec import encode
from distrib.checkpoint.format import (
    CUSTOM,
    DTYPES,
    ITEMSIZE,
    FileRecord,
    Manifest,
    StoredSlice,
    StoredTensor,
    bounded,
    check_group,
    checksum,
    code_of,
    group_of,
    stored_key,
)
from distrib.checkpoint.location import Location, Url, locate
from distrib.checkpoint.parallel import each, num_threads
from distrib.checkpoint.place import Draft, Place, draft_at, take_place
from distrib.checkpoint.plan import (
    Held,
    Shape,
    Share,
    Where,
    WritePlan,
    canonical,
    plan_writes,
    size_of,
    whole_box,
)
from distrib.checkpoint.staging import Arena
from distrib.checkpoint.storage import Storage
from distrib.checkpoint.tensorfile import Entry, header, in_file_order, record_of, stream_tensors
from distrib.collectives.base import Collectives
from distrib.errors import CheckpointError
from distrib.state import Interval, LoaderPosition, ShardedState, Slice, TensorSpec, whole

OBJECTS, LOADERS, SCHEDULERS, SCALER = "objects.json", "loaders.json", "schedulers.json", "scaler.json"
CUSTOM_OBJECTS = f"{CUSTOM}/objects.json"
_RESERVED = ("rng", CUSTOM)
_VISIBLE_S = 65.0  # nfs(5), acdirmax: a client may remember for 60 s that a directory is not there
_LOOK_S = 0.25  # between two looks
_Owned = Mapping[tuple[str, Where], Slice]  # what a rank writes

_BLOCK = 64 * 2**20  # bytes of a further file written at a time


@dataclass(frozen=True)
class Contents:
    """What one rank gives to a checkpoint.

    Attributes:
        state: This rank's slices of models and optimizers. Its objects are merged over the ranks.
        rng: This rank's random states, from `distrib.checkpoint.rng.capture`.
        loaders: Positions of the loaders; like all that follows, rank 0's is stored.
        schedulers: State dicts of the schedulers.
        scaler: State dict of the loss scaler, if there is one.
        custom: State dicts of the user's own objects.
        counters: Numbers such as step and epoch.
        config: The run's configuration, JSON-like.
        info: Strategy and the like, for people.
        files: Further files, by their names in the checkpoint: those that this rank writes.
        file_sizes: Bytes of all ranks' further files, the same on every rank.
    """

    state: ShardedState
    rng: Any = None
    loaders: Sequence[LoaderPosition] = ()
    schedulers: Sequence[Mapping[str, Any]] = ()
    scaler: Mapping[str, Any] | None = None
    custom: Sequence[Any] | Mapping[str, Any] = ()
    counters: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes | memoryview] = field(default_factory=dict)
    file_sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Announcement:
    """What a rank tells the others before anything is written; equal ones travel once."""

    held: tuple[Held, ...]
    aliases: tuple[tuple[str, str], ...]
    objects: bytes


@dataclass(frozen=True)
class _Shelf:
    """What a rank has ready to write; `extras` are rank 0's values for the manifest."""

    slices: Mapping[tuple[str, Where], Slice]
    documents: Mapping[str, bytes | memoryview]
    announcement: _Announcement
    extras: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know before anything is written."""

    plan: WritePlan
    aliases: Mapping[str, str]
    objects: bytes


@dataclass(frozen=True)
class _Receipt:
    """What a rank has written."""

    files: Mapping[str, FileRecord]
    slices: Sequence[tuple[Held, StoredSlice]]


def save(
    directory: str | Path | Url,
    contents: Contents,
    collectives: Collectives,
    *,
    durable: bool = True,
    storage: Storage | None = None,
) -> Location:
    """Write the checkpoint `directory`, or leave what is there as it was. Collective.

    Args:
        directory: On a file system that all ranks see, or the URL of an object store. An older checkpoint there is
            replaced in one step.
        contents: This rank's part.
        collectives: The ranks that save together; their number is the stored world size.
        durable: Wait until all bytes are on the medium before the checkpoint becomes visible. Without it a crash
            of the machine, not of the job, may lose or damage it; damage is found at load. Means nothing to a store.
        storage: The operations on local files; tests make them fail.

    Returns:
        The absolute path, or the URL.

    Raises:
        CheckpointError: on every rank, if a value cannot be stored, the ranks' slices do not make up whole
            tensors, something else is in the way, or any rank cannot write.
    """
    return begin(directory, contents, collectives, durable=durable, storage=storage).finish(collectives)


def begin(
    directory: str | Path | Url,
    contents: Contents,
    collectives: Collectives,
    *,
    durable: bool = True,
    storage: Storage | None = None,
    arena: Arena | None = None,
) -> Saving:
    """Plan a save and take its place on the disk, and write no tensor yet. Collective. As `save` otherwise.

    With an `arena`, what this rank is going to write is copied there: from now on the model may change.
    """
    target, rank, files = locate(directory), collectives.rank, storage or Storage()
    prepared: list[_Shelf] = []

    def prepare() -> str:
        prepared.append(_prepare(contents, rank))
        return checksum(repr(prepared[0].announcement).encode())

    digests = collect(collectives, "preparing the checkpoint", prepare)
    shelf = prepared[0]
    shares, said = _exchange(shelf.announcement, digests, collectives)
    own: list[tuple[_Agreed, _Owned]] = []
    places: list[Place] = []  # rank 0's one

    def start() -> Location | None:
        agreed = _agree(shares, said)
        if rank == 0:
            places.append(take_place(target, files, durable=durable))
            _make_room(places[0], agreed.plan, contents.file_sizes)
        slices = {(x.name, x.where): shelf.slices[x.name, x.where] for x in agreed.plan.owned[rank]}
        own.append((agreed, _staged(slices, arena) if arena else slices))
        return places[0].temp if places else None

    try:
        temp = collect(collectives, "starting the checkpoint", start)[0]
    except BaseException:
        for place in places:
            place.release()
        raise
    assert temp is not None  # rank 0's
    writer = _ShareWriter(partial(draft_at, temp, files, durable=durable), rank, str(temp))
    # copies from a device belong to the caller's stream; in the background the other threads are for the training
    if isinstance(temp, Path) and arena is None and not torch.accelerator.is_available():
        writer.threads = num_threads()
    return Saving(target, shelf, *own[0], places, writer)


class Saving:
    """A save that has been planned and has its place; made by `begin`, and to be ended by `finish` on every rank."""

    def __init__(
        self,
        target: Location,
        shelf: _Shelf,
        agreed: _Agreed,
        slices: _Owned,
        places: Sequence[Place],
        writer: _ShareWriter,
    ) -> None:
        self.target = target
        self._shelf, self._agreed, self._slices = shelf, agreed, slices
        self._places, self._writer = places, writer

    def finish(self, collectives: Collectives) -> Location:
        """Write this rank's share and show the checkpoint when every rank has. Collective.

        Returns:
            The absolute path, or the URL.

        Raises:
            CheckpointError: on every rank, if any cannot write; what was there before is there still.
        """
        try:
            receipts = collect(collectives, "writing the checkpoint", self._write)
            on_main(
                collectives,
                "completing the checkpoint",
                lambda: self._complete(receipts),
            )
        finally:
            self.give_up()
        return self.target

    def give_up(self) -> None:
        """Remove what is not the checkpoint, and let others save there."""
        for place in self._places:
            place.release()

    def _complete(self, receipts: Sequence[_Receipt]) -> None:
        place = self._places[0]
        place.complete(_manifest(self._shelf, self._agreed, receipts, place.folder))

    def _write(self) -> _Receipt:
        main = self._writer.rank == 0
        documents = (
            {**self._shelf.documents, OBJECTS: self._agreed.objects} if main else self._shelf.documents
        )
        return self._writer.write(self._agreed.plan.owned[self._writer.rank], self._slices, documents)


def _staged(slices: _Owned, arena: Arena) -> _Owned:
    """Return the slices with copies for their tensors."""
    copies = arena.copies([part.get().detach() for part in slices.values()])
    return {
        key: dataclasses.replace(part, get=partial(_value, copy))
        for (key, part), copy in zip(slices.items(), copies, strict=True)
    }


def _value(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _prepare(contents: Contents, rank: int) -> _Shelf:
    """Turn what this rank gives into slices and documents; nothing is written and nobody is asked."""
    slices = {
        (s.name, canonical(s.where, s.global_shape)): s
        for parts in contents.state.tensors.values()
        for s in parts
    }
    _check_names(name for name, _ in slices)
    name = f"rng/rank-{rank:05d}.json"
    documents: dict[str, bytes | memoryview] = {name: _json(name, encode(contents.rng, "rng"))}
    documents |= contents.files
    extras: dict[str, Mapping[str, Any]] = {}
    if rank == 0:
        documents |= _common_documents(contents, slices)
        extras = {
            "counters": encode(dict(contents.counters), "counters"),
            "config": encode(dict(contents.config), "config"),
            "info": encode(dict(contents.info), "info"),
        }
    held = tuple(
        Held(s.name, s.global_shape, code_of(s.name, s.dtype), where) for (_, where), s in slices.items()
    )
    objects = _json(OBJECTS, encode(dict(contents.state.objects), "objects"))
    return _Shelf(
        slices, documents, _Announcement(held, tuple(contents.state.aliases.items()), objects), extras
    )


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        check_group(name)
        if group_of(name) in _RESERVED:
            raise CheckpointError(
                "D0716",
                f"tensor {name!r} lies in the group {group_of(name)!r}, which distrib uses itself",
                fix="this is a fault of the strategy's sharded_state; report it",
            )


def _common_documents(contents: Contents, slices: dict[tuple[str, Where], Slice]) -> dict[str, bytes]:
    """Return rank 0's documents; large tensors in the user's objects are added to `slices`."""

    def spill(path: str, tensor: torch.Tensor) -> str:
        name = f"{CUSTOM}/{path}"
        slices[name, whole_box(tuple(tensor.shape))] = whole(name, tensor)
        return name

    custom = dict(contents.custom) if isinstance(contents.custom, Mapping) else list(contents.custom)
    documents = {
        LOADERS: _json(
            LOADERS, [encode(vars(position), f"loader {i}") for i, position in enumerate(contents.loaders)]
        ),
        SCHEDULERS: _json(
            SCHEDULERS, [encode(dict(x), f"scheduler {i}") for i, x in enumerate(contents.schedulers)]
        ),
        CUSTOM_OBJECTS: _json(CUSTOM_OBJECTS, encode(custom, "custom", spill)),
    }
    if contents.scaler is not None:
        documents[SCALER] = _json(SCALER, encode(dict(contents.scaler), "scaler"))
    return documents


def _json(name: str, value: Any) -> bytes:
    return bounded(json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii"), name)


def _exchange(
    mine: _Announcement, digests: Sequence[str], collectives: Collectives
) -> tuple[list[Share], list[_Announcement]]:
    """Return what each group of ranks holds, and the distinct announcements.

    Equal announcements travel once, sent by the lowest rank that has one; where all are equal, as under DDP, none does.
    """
    groups: dict[str, list[int]] = {}
    for rank, found in enumerate(digests):
        groups.setdefault(found, []).append(rank)
    if len(groups) == 1:
        said = [mine]
    else:
        first = {ranks[0] for ranks in groups.values()}
        announced = collectives.gather_object(mine if collectives.rank in first else None)
        said = [announced[ranks[0]] for ranks in groups.values()]
    return [Share(tuple(ranks), x.held) for ranks, x in zip(groups.values(), said, strict=True)], said


def _agree(shares: Sequence[Share], said: Sequence[_Announcement]) -> _Agreed:
    plan = plan_writes(shares, ITEMSIZE)
    aliases = _merge([dict(x.aliases) for x in said], "the aliases")
    objects = _merge([json.loads(x.objects) for x in said], "the objects")
    stored = {item.name for owned in plan.owned for item in owned}
    for name, target in aliases.items():
        if target not in stored or name in stored:
            raise CheckpointError(
                "D0710",
                f"alias {name!r} -> {target!r} leads to no stored tensor, or hides one",
                fix="this is a fault of the strategy's sharded_state; report it",
            )
    return _Agreed(plan, aliases, _json(OBJECTS, objects))


def _merge(values: Sequence[dict[str, Any]], path: str) -> dict[str, Any]:
    """Unite what ranks say about one thing: dicts key by key, all else must be equal."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for value in values for key in value):
        found = [value[key] for value in values if key in value]
        below = f"{path}[{key!r}]"
        if all(isinstance(x, dict) and "$" not in x for x in found):
            merged[key] = _merge(found, below)
            continue
        other = next((x for x in found if x != found[0]), None)
        if other is not None:
            raise CheckpointError(
                "D0718",
                f"ranks disagree on {below}: {found[0]!r:.80} and {other!r:.80}",
                fix="keep optimizers and schedulers equal on all ranks",
            )
        merged[key] = found[0]
    return merged


def _make_room(place: Place, plan: WritePlan, files: Mapping[str, int]) -> None:
    items = [item for owned in plan.owned for item in owned]
    data = sum(size_of(item.where) * ITEMSIZE[item.dtype] for item in items)
    folders = {group_of(item.name) for item in items} | set(_RESERVED)
    folders |= {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
    place.make_room(sorted(folders), data + sum(files.values()))


class _ShareWriter:
    """Writes one rank's files; no two ranks share a file."""

    def __init__(self, draft: Callable[[], Draft], rank: int, where: str) -> None:
        self.draft, self.rank, self.where = draft, rank, where
        self.threads = 1  # files that are written at a time
        self.files: dict[str, FileRecord] = {}
        self.stored: list[tuple[Held, StoredSlice]] = []

    def write(
        self,
        owned: Sequence[Held],
        slices: Mapping[tuple[str, Where], Slice],
        documents: Mapping[str, bytes | memoryview],
    ) -> _Receipt:
        """Write one safetensors file per group of tensors, several at a time, and the documents."""
        draft = self.draft()
        self._check_visible(draft)
        groups: dict[str, list[Held]] = {}
        for item in owned:
            groups.setdefault(group_of(item.name), []).append(item)

        def write_group(group: str) -> None:
            self._write_group(draft, group, groups[group], slices)

        for _ in each(write_group, sorted(groups), self.threads):
            pass
        for name, data in documents.items():
            with draft.writing(name, len(data)) as write:
                for start in range(0, len(data), _BLOCK):
                    write(memoryview(data)[start : start + _BLOCK])
            self.files[name] = record_of(data)
        return _Receipt(self.files, self.stored)

    def _check_visible(self, draft: Draft) -> None:
        end = time.monotonic() + _VISIBLE_S
        while not draft.is_visible():
            if time.monotonic() > end:
                raise CheckpointError(
                    "D0717",
                    f"host {platform.node()} does not see what rank 0 has made",
                    where=self.where,
                    fix="save to a file system or store that all nodes share",
                )
            time.sleep(_LOOK_S)

    def _write_group(
        self, draft: Draft, group: str, items: list[Held], slices: Mapping[tuple[str, Where], Slice]
    ) -> None:
        keyed = sorted(
            ((stored_key(item.name, item.shape, item.where), item) for item in items),
            key=lambda pair: in_file_order(pair[1].dtype, pair[0]),
        )
        entries = [Entry(key, _stored_shape(x), x.dtype, slices[x.name, x.where].get) for key, x in keyed]
        file = f"{group}/rank-{self.rank:05d}.safetensors"
        head = header(entries, {"format": "pt"})
        with draft.writing(file, len(head) + sum(entry.nbytes for entry in entries)) as write:
            written = stream_tensors(write, head, entries)
        self.files[file] = written.record
        for (_, item), (offset, xxh3) in zip(keyed, written.parts, strict=True):
            self.stored.append((item, StoredSlice(item.where, file, offset, xxh3)))


def _stored_shape(item: Held) -> Shape:
    return (size_of(item.where),) if isinstance(item.where, Interval) else item.where.size


def _manifest(shelf: _Shelf, agreed: _Agreed, receipts: Sequence[_Receipt], folder: str) -> Manifest:
    tensors: dict[str, tuple[TensorSpec, list[StoredSlice]]] = {}
    for item, stored in (pair for receipt in receipts for pair in receipt.slices):
        spec = TensorSpec(item.shape, DTYPES[item.dtype])
        tensors.setdefault(item.name, (spec, []))[1].append(stored)
    versions = {
        "distrib": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "host": platform.node(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return Manifest(
        world_size=len(receipts),
        files={name: record for receipt in receipts for name, record in receipt.files.items()},
        tensors={name: StoredTensor(spec, tuple(slices)) for name, (spec, slices) in tensors.items()},
        aliases=agreed.aliases,
        counters=shelf.extras["counters"],
        config=shelf.extras["config"],
        info={**versions, **shelf.extras["info"]},
        folder=folder,
    )
