"""How the ranks are laid out along named axes. Pure arithmetic, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distrib.errors import ConfigError

AXES = (
    "pipeline",
    "replicate",
    "shard",
    "context",
    "tensor",
    "expert",
)  # neighbours talk most along the last ones
DATA_AXES = ("replicate", "shard")  # along them ranks read different samples


@dataclass(frozen=True)
class Mesh:
    """Axis names and sizes, outermost first; their product is the world size."""

    axes: tuple[tuple[str, int], ...]

    def size(self, axis: str) -> int:
        """Return the size of `axis`, 1 when the mesh does not have it."""
        return dict(self.axes).get(axis, 1)

    @property
    def data_parallel_size(self) -> int:
        """How many ranks read different samples: what divides the global batch."""
        return math.prod(map(self.size, DATA_AXES))

    def groups(self, *axes: str) -> list[list[int]]:
        """Return the groups of ranks that differ along `axes` only, each in ascending order; every rank is in one."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(math.prod(size for _, size in self.axes)):
            place = self.coordinates(rank)
            found.setdefault(tuple(n for axis, n in place.items() if axis not in axes), []).append(rank)
        return list(found.values())

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the place of `rank` along each axis; the last axis varies fastest."""
        place: dict[str, int] = {}
        for axis, size in reversed(self.axes):
            rank, place[axis] = divmod(rank, size)
        return dict(reversed(place.items()))


def resolve_mesh(
    sizes: Mapping[str, int], world_size: int, *, free: Sequence[str] = (), where: str | None = None
) -> Mesh:
    """Fill in the one size that is -1 and check that the product is the world size.

    Args:
        sizes: axis -> size, at most one of them -1; axes that are missing have size 1.
        world_size: Number of ranks.
        free: Where no size is -1, the first of these axes that is missing takes what is left.
        where: Place to name in an error, such as "train.yaml:7 (mesh)".

    Raises:
        ConfigError: if the sizes cannot multiply to the world size.
    """
    filled = {axis: sizes.get(axis, 1) for axis in AXES}
    missing = [axis for axis in free if axis not in sizes]
    if missing and -1 not in filled.values():
        filled[missing[0]] = -1
    unknown = [axis for axis, size in filled.items() if size == -1]
    known = math.prod(size for size in filled.values() if size != -1)
    product = " x ".join(f"{axis} ({size})" for axis, size in filled.items() if size != 1)
    if len(unknown) > 1:
        raise ConfigError(
            "D0110", f"mesh has several free axes: {product}; expected at most one -1", where=where,
            fix="give all but one of them a size",
        )  # fmt: skip
    if unknown and world_size % known == 0:
        filled[unknown[0]] = world_size // known
    elif unknown or known != world_size:
        raise ConfigError(
            "D0112",
            f"mesh does not fit: {product or 'all axes 1'} = {known if not unknown else f'{known} x ?'}, "
            f"but the world size is {world_size}; expected a product of {world_size}",
            where=where,
            fix="set one axis to -1 to fill what is left",
        )
    return Mesh(tuple(filled.items()))
