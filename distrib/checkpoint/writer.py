"""Saving: every rank writes its own share into a hidden sibling; rank 0 writes the manifest and swaps it in."""

from __future__ import annotations

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
from distrib.checkpoint.agreement import Call, check_same_call, collect, on_main
from distrib.checkpoint.codec import encode
from distrib.checkpoint.format import (
    CUSTOM,
    DTYPES,
    FileRecord,
    Manifest,
    StoredSlice,
    StoredTensor,
    bounded,
    check_group,
    code_of,
    group_of,
    stored_key,
)
from distrib.checkpoint.location import Location, Url, locate
from distrib.checkpoint.parallel import each, num_threads
from distrib.checkpoint.place import Draft, Place, draft_at, take_place
from distrib.checkpoint.plan import Held, Shape, Where, canonical, size_of, whole_box
from distrib.checkpoint.planner import Digests, Holding, Planner, Said, WriteLayout, merged
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
_Tensors = Mapping[tuple[str, Where], Callable[[], torch.Tensor]]  # by name and place

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
class _Shelf:
    """What a rank has ready to write; `extras` are rank 0's values for the manifest."""

    slices: Mapping[tuple[str, Where], Slice]
    documents: Mapping[str, bytes | memoryview]
    holding: Holding
    objects: bytes
    extras: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Share:
    """What a rank writes; rank 0 has the objects of all ranks."""

    layout: WriteLayout
    tensors: _Tensors
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
    saving = begin(directory, lambda: contents, collectives, durable=durable, storage=storage)
    return saving.finish(collectives)


def begin(
    directory: str | Path | Url,
    contents: Callable[[], Contents],
    collectives: Collectives,
    *,
    call: Call | None = None,
    durable: bool = True,
    storage: Storage | None = None,
    arena: Arena | None = None,
    planner: Planner | None = None,
) -> Saving:
    """Plan a save and take its place on the disk, and write no tensor yet. Collective. As `save` otherwise.

    Args:
        directory: As for `save`.
        contents: Gives this rank's part; what it raises is raised on all ranks.
        collectives: As for `save`.
        call: To be compared over the ranks.
        durable: As for `save`.
        storage: As for `save`.
        arena: Where what this rank is going to write is copied: from now on the model may change.
        planner: That of earlier saves: what they agreed on is not planned again.
    """
    target, rank, files = locate(directory), collectives.rank, storage or Storage()
    planner, call = planner or Planner(), call or Call(str(target), 0, 0)
    prepared: list[tuple[Contents, _Shelf]] = []

    def prepare() -> tuple[Call, Digests | None]:
        given = contents()
        shelf = _prepare(given, rank)
        prepared.append((given, shelf))
        return call, planner.digests(shelf.holding, shelf.objects)

    answers = collect(collectives, "preparing the checkpoint", prepare)
    check_same_call([theirs for theirs, _ in answers])
    digests = [x for _, x in answers if x is not None]  # each is one: they have made the same call
    given, shelf = prepared[0]
    said = planner.exchange(shelf.holding, shelf.objects, digests, collectives)
    own: list[_Share] = []
    places: list[Place] = []  # rank 0's one

    def start() -> Location | None:
        layout = planner.layout(said, rank)
        objects = b""
        if rank == 0:
            objects = _objects_of_all(said)
            places.append(take_place(target, files, durable=durable))
            _make_room(places[0], layout, given.file_sizes)
        tensors = {(x.name, x.where): shelf.slices[x.name, x.where].get for x in layout.owned}
        own.append(_Share(layout, _staged(tensors, arena) if arena else tensors, objects))
        return places[0].temp if places else None

    try:
        temp = collect(collectives, "starting the checkpoint", start)[0]
    except BaseException:
        for place in places:
            place.release()
        raise
    assert temp is not None  # rank 0's
    planner.remember(own[0].layout, digests)
    writer = _ShareWriter(partial(draft_at, temp, files, durable=durable), rank, str(temp))
    # copies from a device belong to the caller's stream; in the background the other threads are for the training
    if isinstance(temp, Path) and arena is None and not torch.accelerator.is_available():
        writer.threads = num_threads()
    return Saving(target, shelf, own[0], places, writer)


class Saving:
    """A save that has been planned and has its place; made by `begin`, and to be ended by `finish` on every rank."""

    def __init__(
        self, target: Location, shelf: _Shelf, share: _Share, places: Sequence[Place], writer: _ShareWriter
    ) -> None:
        self.target = target
        self._shelf, self._share = shelf, share
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
        place.complete(_manifest(self._shelf, self._share.layout.aliases, receipts, place.folder))

    def _write(self) -> _Receipt:
        share, documents = self._share, self._shelf.documents
        if self._writer.rank == 0:
            documents = {**documents, OBJECTS: share.objects}
        return self._writer.write(share.layout.owned, share.tensors, documents)


def _staged(tensors: _Tensors, arena: Arena) -> _Tensors:
    """Return copies."""
    copies = arena.copies([get().detach() for get in tensors.values()])
    return {key: partial(_value, copy) for key, copy in zip(tensors, copies, strict=True)}


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
    return _Shelf(slices, documents, Holding(held, tuple(contents.state.aliases.items())), objects, extras)


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


def _objects_of_all(said: Said) -> bytes:
    if len(said.objects) == 1:
        return said.objects[0]
    return _json(OBJECTS, merged([json.loads(x) for x in said.objects], "the objects"))


def _make_room(place: Place, layout: WriteLayout, files: Mapping[str, int]) -> None:
    folders = layout.groups | set(_RESERVED)
    folders |= {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
    place.make_room(sorted(folders), layout.num_bytes + sum(files.values()))


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
        tensors: _Tensors,
        documents: Mapping[str, bytes | memoryview],
    ) -> _Receipt:
        """Write one safetensors file per group of tensors, several at a time, and the documents."""
        draft = self.draft()
        self._check_visible(draft)
        groups: dict[str, list[Held]] = {}
        for item in owned:
            groups.setdefault(group_of(item.name), []).append(item)

        def write_group(group: str) -> None:
            self._write_group(draft, group, groups[group], tensors)

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

    def _write_group(self, draft: Draft, group: str, items: list[Held], tensors: _Tensors) -> None:
        keyed = sorted(
            ((stored_key(item.name, item.shape, item.where), item) for item in items),
            key=lambda pair: in_file_order(pair[1].dtype, pair[0]),
        )
        entries = [Entry(key, _stored_shape(x), x.dtype, tensors[x.name, x.where]) for key, x in keyed]
        file = f"{group}/rank-{self.rank:05d}.safetensors"
        head = header(entries, {"format": "pt"})
        with draft.writing(file, len(head) + sum(entry.nbytes for entry in entries)) as write:
            written = stream_tensors(write, head, entries)
        self.files[file] = written.record
        for (_, item), (offset, xxh3) in zip(keyed, written.parts, strict=True):
            self.stored.append((item, StoredSlice(item.where, file, offset, xxh3)))


def _stored_shape(item: Held) -> Shape:
    return (size_of(item.where),) if isinstance(item.where, Interval) else item.where.size


def _manifest(
    shelf: _Shelf, aliases: Mapping[str, str], receipts: Sequence[_Receipt], folder: str
) -> Manifest:
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
        aliases=aliases,
        counters=shelf.extras["counters"],
        config=shelf.extras["config"],
        info={**versions, **shelf.extras["info"]},
        folder=folder,
    )
