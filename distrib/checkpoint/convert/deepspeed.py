"""Directories of DeepSpeed's `save_checkpoint`, ZeRO 0 to 3: `*_model_states.pt` and one `*_optim_states.pt` a rank.

ZeRO keeps the float32 weights and the optimizer's state flat. In stages 1 and 2 the parameters of a group lie one after
the other, and the ranks have equal parts of the whole; in stage 3 each parameter is divided over the ranks by itself.
Either way a rank has intervals of each parameter, which is how they are taken over. The layout is that which DeepSpeed's
own `zero_to_fp32.py` reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distrib.checkpoint.convert.pickles import load
from distrib.checkpoint.convert.source import Found, Stored, refuse, stored_tree
from distrib.errors import CheckpointError
from distrib.state import Interval

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class _Inert:
    """What stands for an object of DeepSpeed's: what it was made of, and no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args


# what stands for classes of DeepSpeed's in its files
INERT = [
    (_Inert, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]


class _Piece(NamedTuple):
    """Where a part of a parameter lies: from element `offset` of a rank's flat tensor of a group on."""

    rank: int
    group: int
    offset: int
    where: Interval


@dataclass(frozen=True)
class _Rank:
    """What one rank has of the optimizer: flat weights by group, and torch's state by group."""

    stage: int
    flats: Sequence[torch.Tensor]
    base: Mapping[str, Any]
    paddings: Sequence[Sequence[int]] | None
    scales_losses: bool


def fits(path: Path) -> bool:
    """Whether a source is for this converter."""
    return path.is_dir() and ((path / "latest").is_file() or any(_files(path, _MODEL)))


def read(path: Path) -> Found:
    """Return what the directory holds, or the one in it that the file `latest` names.

    Raises:
        CheckpointError: if files are missing or damaged, hold objects that would have to be unpickled, or belong to a
            model that was divided by other means than ZeRO.
    """
    folder = path if any(_files(path, _MODEL)) else named_in(path, "latest")
    models, where = model_states(folder), str(folder)
    head = models[0]
    ranks = [_rank(load(file, inert=INERT), file) for file in _files(folder, _OPTIM)]
    schedulers = [head["lr_scheduler"]] if isinstance(head.get("lr_scheduler"), Mapping) else []
    step = head.get("global_steps", 0) - head.get("skipped_steps", 0)
    if not ranks:
        return _without_zero(head, schedulers, step, where)
    left_out = ["the loss scale of fp16"] if ranks[0].scales_losses else []
    pieces = _pieces(head["param_shapes"], ranks, where)
    weights = {name: _stored(x, parts, [r.flats for r in ranks]) for name, (x, parts) in pieces.items()}
    model = {**rest(models, ranks[0].stage, where), **weights}
    model |= {name: tied(model, target, where) for name, target in head.get("shared_params", {}).items()}
    optimizer = _optimizer(pieces, head["param_shapes"], ranks, where)
    return Found("deepspeed", [model], [optimizer], schedulers, step=step, left_out=left_out)


def named_in(path: Path, file: str) -> Path:
    """Return the directory in `path` that a file there names."""
    name = (path / file).read_text(encoding="utf-8", errors="replace")[:256].strip()
    if Path(name).name != name or name in ("", "..") or not (path / name).is_dir():
        refuse(str(path / file), f"names {name!r}, which is no directory beside it")
    return path / name


def model_states(folder: Path) -> list[Mapping[str, Any]]:
    """Return what the files of the model hold, by rank; at least one."""
    models = [load(file, inert=INERT) for file in _files(folder, _MODEL)]
    if not models or not isinstance(models[0], Mapping) or "module" not in models[0]:
        refuse(str(folder), "has no *_model_states.pt with a module")
    return models


def stage_in(state: Mapping[str, Any]) -> int:
    """Return the stage that an optimizer's state says."""
    stage = state["zero_stage"]
    return int(stage.args[0] if isinstance(stage, _Inert) else stage)


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the files of all ranks, in the order of the ranks."""
    found = sorted(
        (int(match[1] or 0), int(match[2]), each)
        for each in folder.iterdir()
        if (match := pattern.fullmatch(each.name))
    )
    if any(model_rank for _, model_rank, _ in found):
        raise CheckpointError(
            "D0724",
            "holds a model that was divided by tensor or pipeline parallelism",
            where=str(folder),
            fix="convert it with DeepSpeed's own tools first (ds_to_universal.py, zero_to_fp32.py)",
        )
    if [rank for rank, _, _ in found] != list(range(len(found))):
        refuse(str(folder), f"has the files of ranks {[rank for rank, _, _ in found]}; some are missing")
    return [each for _, _, each in found]


def _rank(saved: Any, file: Path) -> _Rank:
    try:
        state = saved["optimizer_state_dict"]
        number = stage_in(state)
        flats = state["fp32_flat_groups" if number == 3 else "single_partition_of_fp32_groups"]
        base = state["optimizer_state_dict" if number == 3 else "base_optimizer_state"]
        if not all(isinstance(x, torch.Tensor) for x in flats) or not {"state", "param_groups"} <= {*base}:
            refuse(str(file), "has no flat weights, or no optimizer state beside them")
        scales = bool(state.get("dynamic_loss_scale"))
        return _Rank(number, flats, base, state.get("param_alignment_paddings"), scales)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        refuse(str(file), f"is not what ZeRO writes: {type(error).__name__}: {error}")


def _pieces(
    shapes: Sequence[Mapping[str, Any]], ranks: Sequence[_Rank], where: str
) -> dict[str, tuple[tuple[int, ...], list[_Piece]]]:
    """Map each trained parameter to its shape and the pieces that are together all of it."""
    if len({(len(rank.flats), rank.stage) for rank in ranks} | {(len(shapes), ranks[0].stage)}) != 1:
        refuse(where, f"has {len(shapes)} groups of parameters, and another number of flat tensors")
    found = {}
    for group, members in enumerate(shapes):
        cut = _of_stage_3 if ranks[0].stage == 3 else _of_stages_1_and_2
        for name, parts in cut(members, group, ranks):
            held = sum(part.where.stop - part.where.start for part in parts)
            if held != math.prod(members[name]):
                refuse(where, f"holds {held} of {math.prod(members[name])} elements of {name!r}")
            found[name] = (tuple(members[name]), parts)
    return found


def _of_stage_3(
    members: Mapping[str, Any], group: int, ranks: Sequence[_Rank]
) -> Iterator[tuple[str, list[_Piece]]]:
    offset = 0
    for name, shape in members.items():
        size = math.prod(shape)
        share = -(-size // len(ranks))
        bounds = [min(rank * share, size) for rank in range(len(ranks) + 1)]
        yield (
            name,
            [
                _Piece(rank, group, offset, Interval(start, stop))
                for rank, (start, stop) in enumerate(pairwise(bounds))
                if start < stop and offset + stop - start <= len(ranks[rank].flats[group])
            ],
        )
        offset += share


def _of_stages_1_and_2(
    members: Mapping[str, Any], group: int, ranks: Sequence[_Rank]
) -> Iterator[tuple[str, list[_Piece]]]:
    bounds = [0, *accumulate(len(rank.flats[group]) for rank in ranks)]
    paddings = ranks[0].paddings
    offset = 0
    for place, (name, shape) in enumerate(members.items()):
        size, parts = math.prod(shape), []
        for rank, (first, last) in enumerate(pairwise(bounds)):
            start, stop = max(first, offset), min(last, offset + size)
            if start < stop:
                parts.append(_Piece(rank, group, start - first, Interval(start - offset, stop - offset)))
        yield name, parts
        offset += size + (paddings[group][place] if paddings else 0)


def _stored(
    shape: tuple[int, ...], parts: Sequence[_Piece], flats: Sequence[Sequence[torch.Tensor]]
) -> Stored:
    dtype = flats[0][parts[0].group].dtype if parts else torch.float32
    return Stored(shape, dtype, tuple((part.where, partial(_cut, flats, part)) for part in parts))


def _cut(flats: Sequence[Sequence[torch.Tensor]], part: _Piece) -> torch.Tensor:
    flat, size = flats[part.rank][part.group], part.where.stop - part.where.start
    if part.offset + size > flat.numel():
        refuse(
            f"rank {part.rank}",
            f"has {flat.numel()} elements in group {part.group}; expected {part.offset + size}",
        )
    return flat.narrow(0, part.offset, size)


def rest(models: Sequence[Mapping[str, Any]], stage: int, where: str) -> dict[str, Any]:
    """Return buffers, frozen parameters, and what is no tensor; in stage 3 rank 0's module has no parameters."""
    head = models[0]
    trained = {name for members in head["param_shapes"] for name in members}
    buffers, tied = set(head.get("buffer_names", ())), head.get("shared_params", {})
    found: dict[str, Any] = {
        name: stored_tree(value, f"{where}: {name}")
        for name, value in head["module"].items()
        if name not in trained
        and name not in tied
        and (stage < 3 or name in buffers or not isinstance(value, torch.Tensor))
    }
    frozen = (head.get("frozen_param_shapes") or {}) if stage == 3 else {}
    for name, shape in frozen.items():
        fragments = [model["frozen_param_fragments"][name].reshape(-1) for model in models]
        size, share = math.prod(shape), fragments[0].numel()
        bounds = [min(rank * share, size) for rank in range(len(fragments) + 1)]
        parts = [
            _Piece(rank, 0, 0, Interval(start, stop))
            for rank, (start, stop) in enumerate(pairwise(bounds))
            if start < stop
        ]
        found[name] = _stored(tuple(shape), parts, [[x] for x in fragments])
    return found


def tied(model: dict[str, Any], target: str, where: str) -> Stored:
    """Return the tensor `target` under one more name."""
    if not isinstance(model.get(target), Stored):
        refuse(where, f"has a tensor that is tied to {target!r}, which is not there")
    stored: Stored = model[target]
    model[target] = Stored(stored.shape, stored.dtype, stored.parts, same=("tied", target))
    tied: Stored = model[target]
    return tied


def _optimizer(
    pieces: Mapping[str, tuple[tuple[int, ...], list[_Piece]]],
    shapes: Sequence[Mapping[str, Any]],
    ranks: Sequence[_Rank],
    where: str,
) -> dict[str, Any]:
    """Return torch's form of the optimizer's state, by the names of the parameters."""
    state: dict[str, dict[str, Any]] = {}
    for group, members in enumerate(shapes):
        own = [rank.base["state"].get(group, {}) for rank in ranks]
        for name in members:
            shape, parts = pieces[name]
            state[name] = {}
            for key, value in own[0].items():
                if isinstance(value, torch.Tensor) and value.dim():
                    flats = [{group: each[key]} for each in own]
                    state[name][key] = _stored(shape, parts, flats)  # type: ignore[arg-type]
                else:
                    state[name][key] = stored_tree(value, f"{where}: {key}")
    groups = [
        {**group, "params": [name for number in group["params"] for name in shapes[number]]}
        for group in ranks[0].base["param_groups"]
    ]
    return {"state": state, "param_groups": stored_tree(groups, where)}


def _without_zero(head: Mapping[str, Any], schedulers: list[Any], step: int, where: str) -> Found:
    """Return what stage 0 writes: a state dict, and torch's own optimizer state if that is what it is."""
    optimizer = head.get("optimizer")
    plain = isinstance(optimizer, Mapping) and {"state", "param_groups"} <= {*optimizer}
    return Found(
        "deepspeed",
        [stored_tree(head["module"], where)],
        [stored_tree(optimizer, where)] if plain else [],
        schedulers,
        step=step,
        left_out=[] if plain or optimizer is None else ["the optimizer: not kept as torch does it"],
    )
