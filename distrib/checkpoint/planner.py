"""Before a byte is written all ranks know who writes what; a save like the one before asks and plans nothing again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distrib.checkpoint.format import ITEMSIZE, checksum, group_of
from distrib.checkpoint.plan import Held, Share, WritePlan, plan_writes, size_of
from distrib.collectives.base import Collectives
from distrib.errors import CheckpointError


@dataclass(frozen=True)
class Holding:
    """The slices that a rank holds, and what it calls by a second name."""

    held: tuple[Held, ...]
    aliases: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Digests:
    """What every rank tells every other: enough to see who holds the same, and what need not be asked again.

    Attributes:
        holding: Of the rank's `Holding`.
        objects: Of its objects as JSON.
        known: Of all ranks' `holding` at the last save; "" before it.
    """

    holding: str
    objects: str
    known: str


@dataclass(frozen=True)
class WriteLayout:
    """Who writes what, as far as one rank has to know.

    Attributes:
        owned: The slices that this rank writes.
        groups: The groups of all ranks' slices.
        num_bytes: Of all ranks' slices.
        aliases: Second name of a tensor -> the name it is stored under.
    """

    owned: tuple[Held, ...]
    groups: frozenset[str]
    num_bytes: int
    aliases: dict[str, str]


@dataclass(frozen=True)
class Said:
    """What the ranks have said: each distinct thing once, with the ranks that say it.

    Attributes:
        holdings: None, if they hold what they held at the last save.
        objects: JSON.
    """

    holdings: Sequence[tuple[tuple[int, ...], Holding]] | None
    objects: Sequence[bytes]


class Planner:
    """Plans who writes what, and keeps the plan of the last save: most saves of a run are laid out like it.

    What it keeps grows with what one rank holds, not with the number of ranks.
    """

    def __init__(self) -> None:
        self._mine: Holding | None = None
        self._digest = self._known = ""
        self._layout: WriteLayout | None = None

    def digests(self, mine: Holding, objects: bytes) -> Digests:
        """Return what the others need to know before `exchange`."""
        if mine != self._mine:
            self._mine, self._digest = mine, checksum(repr(mine).encode())
        return Digests(self._digest, checksum(objects), self._known)

    def exchange(
        self, mine: Holding, objects: bytes, digests: Sequence[Digests], collectives: Collectives
    ) -> Said:
        """Let the lowest rank of those that say the same say it to all; what all say is not sent. Collective.

        Args:
            mine: This rank's slices.
            objects: This rank's objects.
            digests: Of all ranks, by rank.
            collectives: The ranks.
        """
        known = _joined(digests)
        is_known = self._layout is not None and all(x.known == known for x in digests)
        holders = [] if is_known else _alike(x.holding for x in digests)
        speakers = _alike(x.objects for x in digests)
        said = [(mine, objects)] * len(digests)
        if len(holders) > 1 or len(speakers) > 1:
            first = collectives.rank in {ranks[0] for ranks in holders}
            speaks = collectives.rank in {ranks[0] for ranks in speakers}
            said = collectives.gather_object((mine if first else None, objects if speaks else b""))
        return Said(
            None if is_known else [(ranks, said[ranks[0]][0]) for ranks in holders],
            [said[ranks[0]][1] for ranks in speakers],
        )

    def layout(self, said: Said, rank: int) -> WriteLayout:
        """Return who writes what. The same on all ranks, but for what each of them writes.

        Raises:
            CheckpointError: if the slices are not each tensor exactly once, or an alias leads nowhere.
        """
        if said.holdings is None:
            assert self._layout is not None, "it is known only if it was made"
            return self._layout
        plan = plan_writes([Share(ranks, x.held) for ranks, x in said.holdings], ITEMSIZE)
        aliases = merged([dict(x.aliases) for _, x in said.holdings], "the aliases")
        return _layout(plan, aliases, rank)

    def remember(self, layout: WriteLayout, digests: Sequence[Digests]) -> None:
        """Keep what all ranks have agreed on. To be called where it is sure that they have."""
        self._layout, self._known = layout, _joined(digests)


def _joined(digests: Sequence[Digests]) -> str:
    return checksum("".join(x.holding for x in digests).encode())


def _alike(values: Iterable[str]) -> list[tuple[int, ...]]:
    """Return the ranks that have the same value, by the order of their lowest."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return list(map(tuple, groups.values()))


def _layout(plan: WritePlan, aliases: dict[str, str], rank: int) -> WriteLayout:
    items = [item for owned in plan.owned for item in owned]
    stored = {item.name for item in items}
    for name, target in aliases.items():
        if target not in stored or name in stored:
            raise CheckpointError(
                "D0710",
                f"alias {name!r} -> {target!r} leads to no stored tensor, or hides one",
                fix="this is a fault of the strategy's sharded_state; report it",
            )
    num_bytes = sum(size_of(item.where) * ITEMSIZE[item.dtype] for item in items)
    return WriteLayout(plan.owned[rank], frozenset(map(group_of, stored)), num_bytes, aliases)


def merged(values: Sequence[dict[str, Any]], path: str) -> dict[str, Any]:
    """Unite what ranks say about one thing: dicts key by key, all else must be equal.

    Raises:
        CheckpointError: if it is not.
    """
    union: dict[str, Any] = {}
    for key in dict.fromkeys(key for value in values for key in value):
        found = [value[key] for value in values if key in value]
        below = f"{path}[{key!r}]"
        if all(isinstance(x, dict) and "$" not in x for x in found):
            union[key] = merged(found, below)
            continue
        other = next((x for x in found if x != found[0]), None)
        if other is not None:
            raise CheckpointError(
                "D0718",
                f"ranks disagree on {below}: {found[0]!r:.80} and {other!r:.80}",
                fix="keep optimizers and schedulers equal on all ranks",
            )
        union[key] = found[0]
    return union
