"""Whether all ranks hold the same model, by checksums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import nn

from distrib.collectives.base import Collectives
from distrib.collectives.packing import flat_bytes
from distrib.collectives.signature import named_ranks
from distrib.collectives.trees import structure
from distrib.errors import StrategyError


def check_in_sync(models: Sequence[Mapping[str, torch.Tensor]], collectives: Collectives) -> None:
    """Compare the named tensors of some models over the ranks, bit by bit. Collective.

    One exchange of 16 bytes for each tensor; every rank reads all its tensors once.

    Raises:
        StrategyError: on all ranks, naming the first tensor that differs and which ranks hold what.
    """
    tensors = _named_tensors(models)
    mine = torch.tensor(
        [[_digest(_kind(name, x).encode()), _digest_of(x)] for name, x in tensors],
        dtype=torch.int64,
        device="cpu",
    ).reshape(-1, 2)
    everyone = collectives.gather({"check_in_sync": mine, "size": torch.tensor([len(tensors)], device="cpu")})
    rows = [part.tolist() for part in torch.split(everyone["check_in_sync"], everyone["size"].tolist())]
    wrong = [
        i
        for i in range(max(map(len, rows), default=0))
        if len({tuple(of_rank[i]) if i < len(of_rank) else None for of_rank in rows}) > 1
    ]
    if wrong:
        raise _difference(wrong, tensors, rows)


def take_over(module: nn.Module, collectives: Collectives) -> None:
    """Give every rank rank 0's parameters and buffers; what is the same already does not travel. Collective.

    Raises:
        CollectiveError: if the ranks do not have the same tensors.
    """
    found = [x for x in (*module.parameters(), *module.buffers()) if not x.is_meta]
    mine = torch.tensor([[_digest_of(x) for x in found]], dtype=torch.int64, device="cpu")
    everyone = collectives.gather({"take over the model": mine})["take over the model"]
    differing = (everyone != everyone[:1]).any(0).tolist()
    with torch.no_grad():
        for x in (x for x, differs in zip(found, differing, strict=True) if differs):
            x.copy_(collectives.broadcast(x.detach()))


def _named_tensors(models: Sequence[Mapping[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"model {i}: {name}" if len(models) > 1 else name, x)
        for i, model in enumerate(models)
        for name, x in model.items()
    ]


def _difference(
    wrong: Sequence[int], tensors: Sequence[tuple[str, torch.Tensor]], rows: Sequence[Sequence[Sequence[int]]]
) -> StrategyError:
    i = wrong[0]
    groups: dict[tuple[int, ...] | None, list[int]] = {}
    for rank, of_rank in enumerate(rows):
        groups.setdefault(tuple(of_rank[i]) if i < len(of_rank) else None, []).append(rank)
    held = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks))
    first, *others = [named_ranks(ranks) for ranks in held]
    same_names = len({group[0] if group else None for group in groups}) == 1
    name = _kind(*tensors[i]) if i < len(tensors) else f"tensor number {i}, which this rank does not have"
    more = f"; {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
    what = "hold different values of" if same_names else "do not have the same tensors, beginning with"
    return StrategyError(
        "D0816",
        f"the ranks {what} {name}: {first} against {', '.join(others)}{more}",
        fix="find out what changed it on one rank only (an update outside the prepared optimizer, a rank's own "
        "checkpoint); running statistics of BatchNorm differ by design unless they are synchronised",
    )


def _kind(name: str, x: torch.Tensor) -> str:
    return f"{name} {structure(x)}"


def _digest_of(x: torch.Tensor) -> int:
    return _digest(flat_bytes(x.detach().cpu()).numpy().data)


def _digest(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data) - (1 << 63)
