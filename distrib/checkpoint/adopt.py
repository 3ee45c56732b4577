"""A converted checkpoint as the run that loads it would have written it.

Other programs keep an optimizer's state by number, and do not say of which class an optimizer or a scheduler is. A
conversion leaves these open: parameters are named by their place ("param_groups.0.3"), kinds are None. The run that
loads it knows both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch.optim import Optimizer

from distrib.checkpoint.format import Manifest
from distrib.checkpoint.reader import Reader
from distrib.strategies.slices import Names, named_parameters, optimizer_prefix

CONVERTED = "converted"  # key of the manifest's info that only conversions have


def is_conversion(manifest: Manifest) -> bool:
    """Whether a checkpoint was made from another program's; it has no positions of loaders and no random states."""
    return CONVERTED in manifest.info


def place_name(group: int, place: int) -> str:
    """Return the name of a parameter of which only the place in its optimizer is known."""
    return f"param_groups.{group}.{place}"


def adopt(reader: Reader, optimizers: Sequence[Optimizer], names: Names, schedulers: Sequence[Any]) -> Reader:
    """Return `reader` with the names and kinds of this run where a conversion has left them open.

    Args:
        reader: An open checkpoint; one that is no conversion is returned as it is.
        optimizers: The users' own ones, in the order of their preparation.
        names: The name of each parameter, from `distrib.strategies.slices.parameter_names`.
        schedulers: The users' own ones, in the order of their preparation.
    """
    if not is_conversion(reader.manifest):
        return reader
    return _Adopted(reader, optimizers, names, [type(x).__name__ for x in schedulers])


class _Adopted(Reader):
    def __init__(
        self, reader: Reader, optimizers: Sequence[Optimizer], names: Names, schedulers: Sequence[str]
    ) -> None:
        self._kinds = [type(x).__name__ for x in optimizers]
        self._places = [_places(x, names) for x in optimizers]
        self._scheduler_kinds = schedulers
        tensors = {self._name(name): x for name, x in reader.manifest.tensors.items()}
        super().__init__(reader._directory, replace(reader.manifest, tensors=tensors), reader._collectives)

    @cached_property
    def objects(self) -> dict[str, Any]:
        """The stored objects, optimizers with the parameters' names and their class."""
        found = dict(super().objects)
        for index, (kind, places) in enumerate(zip(self._kinds, self._places, strict=True)):
            key = optimizer_prefix(index).rstrip("/")
            if key in found:
                found[key] = _named(found[key], kind, places)
        return found

    @cached_property
    def schedulers(self) -> list[dict[str, Any]]:
        """The stored state dicts, with the schedulers' classes."""
        kinds = [*self._scheduler_kinds, *[None] * len(super().schedulers)]
        return [
            {**state, "kind": state["kind"] or kind}
            for state, kind in zip(super().schedulers, kinds, strict=False)
        ]

    def _name(self, stored: str) -> str:
        for index, places in enumerate(self._places):
            prefix = optimizer_prefix(index)
            if stored.startswith(prefix):
                key, _, name = stored.removeprefix(prefix).partition(".")
                return f"{prefix}{key}.{places.get(name, name)}"
        return stored


def _places(optimizer: Optimizer, names: Names) -> dict[str, str]:
    """Map the name by place of each parameter of an optimizer to its own."""
    each = iter(named_parameters(optimizer, names))
    return {
        place_name(number, place): next(each)[0]
        for number, group in enumerate(optimizer.param_groups)
        for place in range(len(group["params"]))
    }


def _named(stored: Mapping[str, Any], kind: str, places: Mapping[str, str]) -> dict[str, Any]:
    groups = []
    for number, group in enumerate(stored["param_groups"]):
        named = [places.get(name, name) for name in group["params"]]
        here = [name for place, name in places.items() if place.startswith(place_name(number, 0)[:-1])]
        same = sorted(named) == sorted(
            here
        )  # another order: DeepSpeed deals parameters out to the ranks in turn
        groups.append({**group, "params": here if same else named})
    state = {places.get(name, name): values for name, values in stored["state"].items()}
    return {"kind": stored["kind"] or kind, "param_groups": groups, "state": state}
