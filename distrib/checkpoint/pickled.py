"""State of registered objects that only pickle can store: each in a tensor of bytes, opened only if the caller says so.

Opening a pickle runs whatever code it names, so this is the only module that does, and it asks for a permission that no
default gives. `docs/checkpoints.md` has the rules.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch

from distrib.checkpoint.codec import Pickled, encode
from distrib.checkpoint.format import PICKLED, Manifest, checksum
from distrib.errors import CheckpointError
from distrib.state import Slice, whole


def packed(
    objects: Sequence[Any], *, allow_pickle: bool, stores: bool
) -> tuple[list[Any], dict[str, tuple[Slice, ...]]]:
    """Return the objects' states as a checkpoint takes them, and the tensors of those that have to be pickled.

    Args:
        objects: What was registered.
        allow_pickle: Whether a state that can be stored in no other way is pickled.
        stores: Whether this rank's states are those that are stored; elsewhere nothing is looked at.

    Raises:
        CheckpointError: if a state can be stored in no other way and `allow_pickle` is off, or cannot be pickled either.
    """
    states: list[Any] = []
    pickles: dict[str, tuple[Slice, ...]] = {}
    for index, item in enumerate(objects):
        state = item.state_dict()
        if stores and not _is_plain(state, index, item, allow_pickle=allow_pickle):
            name = f"{PICKLED}/{index}.{_class_of(item)}"
            pickles[name] = (whole(name, _pickle(state, index, item)),)
            state = Pickled(name)
        states.append(state)
    return states, pickles


def unpacked(states: Sequence[Any], manifest: Manifest, *, allow_pickle: bool, where: str) -> list[Any]:
    """Return stored states as they were given; those that were pickled only with `allow_pickle`.

    The checksum of a pickle is compared before it is opened, whatever was compared when the checkpoint was.

    Args:
        states: What the checkpoint has for the objects that are going to take them, in their order.
        manifest: The checkpoint's.
        allow_pickle: Whether to run the code that pickles name.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: if one is a pickle and `allow_pickle` is off, it is damaged, or it cannot be opened.
    """
    found = [(index, state) for index, state in enumerate(states) if isinstance(state, Pickled)]
    if found and not allow_pickle:
        names = ", ".join(f"{index} ({_stored_class(state)})" for index, state in found)
        raise CheckpointError(
            "D0761",
            f"the state of registered object {names} is stored as a pickle, which runs whatever code it names",
            where=where,
            fix="if you trust whoever wrote the checkpoint: load_state(allow_pickle=True)",
        )
    opened = {index: _unpickle(index, state, manifest, where) for index, state in found}
    return [opened.get(index, state) for index, state in enumerate(states)]


def _is_plain(state: Any, index: int, item: Any, *, allow_pickle: bool) -> bool:
    try:
        encode(state, f"custom[{index}]", lambda path, _: path)
    except CheckpointError as error:
        if not allow_pickle:
            raise CheckpointError(
                error.code,
                f"registered object {index} ({_class_of(item)}): {error.problem}",
                where=error.where,
                fix=f"{error.fix}; or save_state(allow_pickle=True), and load_state(allow_pickle=True) where you trust it",
            ) from error
        return False
    return True


def _pickle(state: Any, index: int, item: Any) -> torch.Tensor:
    try:
        data = pickle.dumps(state)
    except Exception as error:  # a user's own __reduce__ may raise anything
        raise CheckpointError(
            "D0760",
            f"the state of registered object {index} ({_class_of(item)}) cannot be pickled either: "
            f"{type(error).__name__}: {error}",
            fix="leave out of its state_dict() what belongs to this process: locks, open files, functions made in functions",
        ) from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _unpickle(index: int, state: Pickled, manifest: Manifest, where: str) -> Any:
    stored = manifest.tensors[state.name].slices
    if len(stored) != 1 or stored[0].xxh3 != checksum(state.data):
        raise CheckpointError(
            "D0706",
            f"the pickle of registered object {index} ({_stored_class(state)}) is damaged",
            where=where,
            fix="load another checkpoint, or copy this one again from where it is whole",
        )
    try:
        return pickle.loads(state.data)  # noqa: S301 (the caller has said allow_pickle=True)
    except Exception as error:  # it runs any code, which may raise anything
        raise CheckpointError(
            "D0762",
            f"the pickle of registered object {index} ({_stored_class(state)}) cannot be opened: "
            f"{type(error).__name__}: {error}",
            where=where,
            fix="make the classes and modules that it names importable here, under the names that they had",
        ) from error


def _class_of(item: Any) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"


def _stored_class(state: Pickled) -> str:
    return state.name.partition(".")[2]
