"""From what a converter found to a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distrib.checkpoint.adopt import CONVERTED, place_name
from distrib.checkpoint.claim import is_checkpoint
from distrib.checkpoint.convert import accelerate, dcp, deepspeed, torch_file, universal
from distrib.checkpoint.convert.pickles import check_archive, is_archive
from distrib.checkpoint.convert.source import Found, Stored, plain_names, refuse, values_of
from distrib.checkpoint.progress import Progress, no_progress, watched
from distrib.checkpoint.writer import Contents, save
from distrib.collectives.single import SingleCollectives
from distrib.errors import CheckpointError
from distrib.state import ShardedState, Slice
from distrib.strategies.slices import joined, module_prefix, optimizer_prefix

Read = Callable[[Path], Found]
_ARCHIVES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class Converted:
    """What a conversion has made.

    Attributes:
        path: The checkpoint.
        kind: What wrote the source.
        step: The optimizer step that it stands at.
        left_out: What of the source is not in it, and why.
    """

    path: Path
    kind: str
    step: int
    left_out: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    durable: bool = True,
    progress: Progress = no_progress,
) -> Converted:
    """Make a checkpoint of ours from one of another program.

    Weights get the names of the plain module. An optimizer whose state is kept by number, as `torch.optim` does it, is
    stored by place; `load_state` puts it where the optimizer of the run has its parameters.

    Args:
        source: A file of `torch.save`, or a directory of Accelerate, torch.distributed.checkpoint or DeepSpeed.
        out: The checkpoint's directory; there must be no checkpoint yet.
        step: The number of optimizer steps; by default what the source says.
        allow_pickle: Run the code that pickled objects of the user's name; for sources that you trust.
        verify: Compare the checksums that torch.save has put into the source's files, as far as there are any.
        durable: Wait until all bytes are on the medium.
        progress: Told about the bytes written.

    Raises:
        CheckpointError: if the source is not known, damaged, or would have to be unpickled, or `out` is taken.
    """
    path, target = Path(source).absolute(), Path(out).absolute()
    if is_checkpoint(target):
        raise CheckpointError(
            "D0726",
            "there is a checkpoint already",
            where=str(target),
            fix="convert to another directory, or remove that one",
        )
    try:
        read = _reader_of(path, allow_pickle=allow_pickle, verify=verify)
        if verify:
            _check_archives(path)
        found = read(path)
        contents = _contents(found, str(path), step)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # the source's, not ours
        refuse(str(path), f"is not what its writer makes: {type(error).__name__}: {error}")
    except OSError as error:
        raise CheckpointError(
            "D0715",
            f"cannot be read: {error.strerror or error}",
            where=str(error.filename or path),
            fix="see to permissions and mounts",
        ) from error
    watching = replace(contents, state=watched(contents.state, progress))
    save(target, watching, SingleCollectives(), durable=durable)
    return Converted(target, found.kind, contents.counters["step"], tuple(found.left_out))


def _check_archives(source: Path) -> None:
    """Compare the checksums of all zip files that are going to be opened."""
    files = [source] if source.is_file() else sorted(x for x in source.rglob("*") if x.suffix in _ARCHIVES)
    for file in files:
        if file.is_file() and not file.name.startswith("random_states_"):  # which stay closed
            with file.open("rb") as opened:
                if is_archive(opened.read(4)):
                    check_archive(file, str(file))


def _reader_of(path: Path, *, allow_pickle: bool, verify: bool) -> Read:
    if not path.exists():
        raise CheckpointError("D0721", "does not exist", where=str(path), fix="correct the path")
    if is_checkpoint(path):
        raise CheckpointError(
            "D0721", "is a checkpoint of distrib already", where=str(path), fix="load it as it is"
        )
    readers: tuple[tuple[Callable[[Path], bool], Read], ...] = (
        (dcp.fits, partial(dcp.read, verify=verify)),
        (accelerate.fits, partial(accelerate.read, allow_pickle=allow_pickle, verify=verify)),
        (universal.fits, universal.read),  # has files of the next one's beside its own
        (deepspeed.fits, deepspeed.read),
        (torch_file.fits, torch_file.read),
    )
    for fits, read in readers:
        if fits(path):
            return read
    inside = sorted(each.name for each in path.iterdir())
    raise CheckpointError(
        "D0721",
        f"is no checkpoint of a known program; it holds {', '.join(inside[:8]) or 'nothing'}",
        where=str(path),
        fix="name a file of torch.save, or the directory that Accelerate's save_state, torch.distributed.checkpoint "
        "or DeepSpeed's save_checkpoint wrote",
    )


def _contents(found: Found, where: str, step: int | None) -> Contents:
    if not found.models:
        refuse(where, "holds no model")
    models = [_model(model, index, where) for index, model in enumerate(found.models)]
    owned = [{name.partition("/")[2] for name in (*x.tensors, *x.aliases)} for x in models]
    optimizers = [_optimizer(saved, index, owned, where) for index, saved in enumerate(found.optimizers)]
    counted = [_steps(saved, step if step is not None else found.step) for saved in found.optimizers]
    reached = max([step if step is not None else found.step or 0, *counted])
    return Contents(
        state=joined([*models, *optimizers]),
        schedulers=[{"kind": None, "state": state, "steps_seen": reached} for state in found.schedulers],
        scaler=found.scaler,
        custom=found.custom,
        counters={"step": reached, "optimizer_steps": counted},
        info={
            "strategy": f"(converted: {found.kind})",
            CONVERTED: {"from": found.kind, "source": where, "left_out": list(found.left_out)},
        },
    )


def _model(model: Mapping[str, Any], index: int, where: str) -> ShardedState:
    tensors: dict[str, tuple[Slice, ...]] = {}
    objects: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, plain in plain_names(model, where).items():
        value, full = model[name], module_prefix(index) + plain
        if not isinstance(value, Stored):
            objects[full] = value
        elif value.same is not None and value.same in first:
            aliases[full] = first[value.same]
        else:
            first.setdefault(value.same, full)
            tensors[full] = _slices(full, value)
    if not tensors:
        refuse(where, f"has no tensors in model {index}")
    return ShardedState(tensors, objects, aliases)


def _slices(name: str, value: Stored) -> tuple[Slice, ...]:
    return tuple(Slice(name, value.shape, value.dtype, box, get) for box, get in value.parts)


def _optimizer(saved: Mapping[str, Any], index: int, owned: Sequence[set[str]], where: str) -> ShardedState:
    """Describe an optimizer from torch's form of its state: by name where it has names, else by place."""
    prefix, groups = optimizer_prefix(index), _groups(saved, where)
    names = _parameter_names(groups, where)
    if 0 < index < len(owned):  # the n-th optimizer of the n-th model, whose parameters carry its number
        names = {key: f"model_{index}.{x}" if x in owned[index] else x for key, x in names.items()}
    state = saved["state"]
    tensors: dict[str, tuple[Slice, ...]] = {}
    others: dict[str, dict[str, Any]] = {}
    for key, values in enumerate(state) if isinstance(state, list) else state.items():
        name = names.get(str(key))
        if name is None:
            refuse(where, f"has optimizer state for {key!r}, which is in no parameter group")
        for what, value in values.items():
            full = f"{prefix}{what}.{name}"
            if isinstance(value, Stored):
                tensors[full] = _slices(full, value)
            else:
                others.setdefault(name, {})[what] = value
    described = [
        {
            **{what: values_of(value) for what, value in group.items() if what != "params"},
            "params": [names[str(key)] for key in group["params"]],
        }
        for group in groups
    ]
    objects = {"kind": None, "param_groups": described, "state": others}
    return ShardedState(tensors, {prefix.rstrip("/"): objects})


def _groups(saved: Mapping[str, Any], where: str) -> Sequence[Mapping[str, Any]]:
    groups = saved.get("param_groups")
    if not isinstance(saved.get("state"), (Mapping, list)) or not isinstance(groups, (list, tuple)):
        refuse(where, "has an optimizer without state and param_groups")
    if not all(isinstance(group, Mapping) and "params" in group for group in groups):
        refuse(where, "has a parameter group without params")
    return groups


def _parameter_names(groups: Sequence[Mapping[str, Any]], where: str) -> dict[str, str]:
    """Map what an optimizer's state is kept by, as text, to a name, or to a place where nothing tells the name.

    As text, because torch.distributed.checkpoint makes text of the numbers that torch.optim keeps it by.
    """
    found: dict[str, str] = {}
    for number, group in enumerate(groups):
        given, keys = group.get("param_names"), group["params"]
        for place, key in enumerate(keys):
            named = given[place] if isinstance(given, list) and len(given) == len(keys) else key
            found[str(key)] = named if isinstance(named, str) else place_name(number, place)
    plain = plain_names(list(found.values()), where)
    return {key: plain[name] for key, name in found.items()}


def _steps(saved: Mapping[str, Any], given: int | None) -> int:
    """Return how many steps an optimizer has taken: as given, else what its own counters say, else 0."""
    if given is not None:
        return given
    state = saved["state"]
    counters = [values_of(x.get("step", 0)) for x in (state if isinstance(state, list) else state.values())]
    return max((int(x.item() if isinstance(x, torch.Tensor) else x) for x in counters), default=0)
