"""What a script does itself when its state is saved or loaded: which models it takes over, and the files it adds.

A hook of a save writes into a folder of its own. When all have succeeded on every rank, its files become files of the
checkpoint, checksummed and shown with the rest or not at all; a hook of a load finds them in the checkpoint's directory.
"""

from __future__ import annotations

import itertools
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NoReturn

from torch import Tensor, nn

from distrib.checkpoint.agreement import collect
from distrib.checkpoint.format import MANIFEST, is_safe_name
from distrib.checkpoint.location import Url
from distrib.checkpoint.plan import whole_box
from distrib.checkpoint.reader import Reader
from distrib.checkpoint.writer import LOADERS, OBJECTS, SCALER, SCHEDULERS
from distrib.collectives.base import Collectives
from distrib.errors import CheckpointError
from distrib.state import ShardedState
from distrib.strategies.slices import module_prefix

Hook = Callable[..., Any]
_OURS: Final = frozenset({MANIFEST, OBJECTS, LOADERS, SCHEDULERS, SCALER})
_OUR_FOLDERS: Final = re.compile(r"(?:custom/objects\.json|[^/]+/rank-\d+\.(?:safetensors|json))")
_PIECE = 2**20  # bytes copied at a time


class Hooks:
    """Functions to be called, in the order in which they were added."""

    def __init__(self) -> None:
        self._hooks: dict[int, Hook] = {}
        self._numbers = itertools.count()

    def add(self, hook: Hook) -> HookHandle:
        """Call `hook` from now on."""
        number = next(self._numbers)
        self._hooks[number] = hook
        return HookHandle(self._hooks, number)

    def __len__(self) -> int:
        return len(self._hooks)

    def __iter__(self) -> Iterator[Hook]:
        return iter(list(self._hooks.values()))


class HookHandle:
    """Takes one hook out again."""

    def __init__(self, hooks: dict[int, Hook], number: int) -> None:
        self._hooks, self._number = hooks, number

    def remove(self) -> None:
        """Call the hook no more; safe to call twice."""
        self._hooks.pop(self._number, None)


class Weights(Mapping[str, Tensor]):
    """What this rank saves of one model: plain name -> the live tensor, tied names too. It cannot be changed.

    Two of them are equal only if they are the same, so that `list.remove` and `in` find one.
    """

    def __init__(self, state: ShardedState, prefix: str) -> None:
        names = [*state.tensors, *state.aliases]
        self._state, self._prefix = state, prefix
        self._names = [x.removeprefix(prefix) for x in names if x.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        full = self._prefix + name
        parts = self._state.tensors[self._state.aliases.get(full, full)]
        if len(parts) != 1 or parts[0].where != whole_box(tuple(parts[0].global_shape)):
            raise CheckpointError(
                "D0764",
                f"this rank holds only a part of {name!r}",
                where="a save_state hook",
                fix="take whole tensors from accelerator.get_state_dict(model), which every rank has to call",
            )
        return parts[0].get().detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Taken:
    """What the hooks of a save have done.

    Attributes:
        models: Indices of the models that they have taken over.
        sizes: Every file that they have written on any rank -> its bytes.
        files: Those that this rank adds to the checkpoint.
    """

    models: tuple[int, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, bytes | memoryview] = field(default_factory=dict)


def run_save_hooks(
    hooks: Hooks, models: Sequence[nn.Module], state: ShardedState, name: str, collectives: Collectives
) -> Taken:
    """Call all hooks on every rank, each with an empty folder of this rank. Collective.

    Rank 0 decides which models are taken over, for scripts mostly do so under `if is_main_process`. Of a file that
    several ranks have written the lowest rank's is taken.

    Args:
        hooks: Called with (models, weights, folder).
        models: As they were prepared.
        state: What would be saved.
        name: What the folder is called: the checkpoint's own name.
        collectives: The ranks.

    Raises:
        CheckpointError: on every rank, if a hook failed on any.
    """
    files: dict[str, bytes | memoryview] = {}

    def run() -> tuple[tuple[int, ...], dict[str, int]]:
        weights = [Weights(state, module_prefix(index)) for index in range(len(models))]
        lists: tuple[list[Any], ...] = (list(models), list(weights))
        # NFS keeps the names of removed files that are still mapped, so that their folder cannot be removed at once
        with TemporaryDirectory(prefix="distrib-", ignore_cleanup_errors=True) as above:
            folder = Path(above) / name
            folder.mkdir()
            _call(hooks, "save_state", *lists, str(folder))
            files.update(_written(folder))
        gone = {*_missing(models, lists[0], "models"), *_missing(weights, lists[1], "weights")}
        return tuple(sorted(gone)), {each: len(data) for each, data in files.items()}

    found = collect(collectives, "running the hooks", run)
    owners: dict[str, int] = {}
    for rank, (_, sizes) in enumerate(found):
        for each in sizes:
            owners.setdefault(each, rank)
    return Taken(
        found[0][0],
        {each: found[rank][1][each] for each, rank in owners.items()},
        {each: data for each, data in files.items() if owners[each] == collectives.rank},
    )


def run_load_hooks(
    hooks: Hooks, models: Sequence[nn.Module], reader: Reader, collectives: Collectives
) -> tuple[int, ...]:
    """Call all hooks on every rank; returns the indices of the models that they have loaded themselves. Collective.

    Args:
        hooks: Called with (models, folder): the checkpoint's directory, or for a URL one with the files of the
            save's hooks.
        models: As they were prepared.
        reader: The checkpoint.
        collectives: The ranks.

    Raises:
        CheckpointError: on every rank, if a hook failed on any, or they took other models on some rank.
    """

    def run() -> tuple[int, ...]:
        left = list(models)
        with _folder_of(reader) as folder:
            _call(hooks, "load_state", left, folder)
        return tuple(_missing(models, left, "models"))

    found = collect(collectives, "running the hooks", run)
    other = next((rank for rank, gone in enumerate(found) if gone != found[0]), None)
    if other is not None:
        raise CheckpointError(
            "D0764",
            f"the hooks took the models {list(found[0])} out of the list on rank 0, {list(found[other])} on rank {other}",
            where="a load_state hook",
            fix="load and take out the same models on every rank",
        )
    return found[0]


def without_models(state: ShardedState, models: Sequence[int]) -> ShardedState:
    """Return `state` without anything of these models; optimizers keep what they know of them."""
    prefixes = tuple(map(module_prefix, models))

    def rest(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: x for name, x in values.items() if not name.startswith(prefixes)}

    return ShardedState(rest(state.tensors), rest(state.objects), rest(state.aliases)) if models else state


def added_files(names: Sequence[str]) -> list[str]:
    """Return those of a checkpoint's files that hooks have added."""
    return [name for name in names if name not in _OURS and not _OUR_FOLDERS.fullmatch(name)]


def _call(hooks: Hooks, when: str, *arguments: Any) -> None:
    for hook in hooks:
        try:
            hook(*arguments)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a script's function raises, the other ranks have to hear of
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            raise CheckpointError(
                "D0763",
                f"the {when} hook {name} failed: {type(error).__name__}: {error}",
                fix=f"mend the hook, or take it out with the handle's remove(); {when} itself has changed nothing",
            ) from error


def _missing(given: Sequence[Any], left: Sequence[Any], what: str) -> list[int]:
    """Return the indices of what a hook has taken out; refuse what it has put in."""
    if any(all(x is not each for each in given) for x in left):
        raise CheckpointError(
            "D0764",
            f"a hook has put something into the list of {what}; it can only take out what is in it",
            fix="write what you want to save yourself, into the folder that the hook is given",
        )
    return [index for index, each in enumerate(given) if all(x is not each for x in left)]


def _written(folder: Path) -> dict[str, bytes | memoryview]:
    """Return the files below a folder, which is about to be removed: they are mapped, so they last as long as needed."""
    files: dict[str, bytes | memoryview] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            _refuse(name, "is no regular file")
        if path.is_dir():
            continue
        if not is_safe_name(name):
            _refuse(
                name,
                "has a name that a checkpoint cannot have: letters, digits and ._- only, no dot at the start",
            )
        if not added_files([name]):
            _refuse(name, "has the name of one of save_state's own files")
        files[name] = _mapped(path)
    return files


def _refuse(name: str, problem: str) -> NoReturn:
    raise CheckpointError(
        "D0765",
        f"the file {name!r} of a save_state hook {problem}",
        fix="give it another name, or write it somewhere else",
    )


def _mapped(path: Path) -> bytes | memoryview:
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@contextmanager
def _folder_of(reader: Reader) -> Iterator[str]:
    if not isinstance(reader.path, Url):
        yield str(reader.path)
        return
    with TemporaryDirectory(prefix="distrib-") as above:
        folder = Path(above) / reader.path.name
        folder.mkdir()
        for name in added_files(list(reader.manifest.files)):
            _fetch(reader, name, folder / name)
        yield str(folder)


def _fetch(reader: Reader, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = reader._directory
    with directory.open(name) as source, target.open("wb") as file:
        buffer = memoryview(bytearray(_PIECE))
        for at in range(0, source.size, _PIECE):
            view = buffer[: source.size - at]
            directory.read_into(source, name, view, at)
            file.write(view)
