"""Directories of DeepSpeed's `ds_to_universal.py`: for each parameter a folder `zero/<name>` with whole tensors.

Beside them lie the `*_model_states.pt` of the checkpoint they were made from, which have everything that ZeRO does not divide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distrib.checkpoint.convert import deepspeed
from distrib.checkpoint.convert.pickles import load
from distrib.checkpoint.convert.source import Found, Stored, of_tensor, refuse, stored_tree

_COMMON = Path("zero") / "optimizer_state.pt"
_LATEST = "latest_universal"
_WEIGHTS = "fp32"


def fits(path: Path) -> bool:
    """Whether a source is for this converter."""
    return path.is_dir() and ((path / _COMMON).is_file() or (path / _LATEST).is_file())


def read(path: Path) -> Found:
    """Return what the directory holds, or the one in it that the file `latest_universal` names.

    Raises:
        CheckpointError: if files are missing or damaged, hold objects that would have to be unpickled, or belong to a
            model that was divided by other means than ZeRO.
    """
    folder = path if (path / _COMMON).is_file() else deepspeed.named_in(path, _LATEST)
    models, where = deepspeed.model_states(folder), str(folder)
    head, common = models[0], load(folder / _COMMON, inert=deepspeed.INERT)
    shapes = head.get("param_shapes")
    if not isinstance(shapes, list) or not isinstance(common, Mapping):
        refuse(where, "has no shapes of its parameters, or no optimizer state")
    weights: dict[str, Stored] = {}
    state: dict[str, dict[str, Any]] = {}
    for group, members in enumerate(shapes):
        steps = _kept_by_group(common, group, where)
        for name, shape in members.items():
            found = _tensors_of(folder, name, tuple(shape))
            if _WEIGHTS not in found:
                refuse(where, f"has no {_WEIGHTS}.pt of {name!r}")
            weights[name] = found.pop(_WEIGHTS)
            state[name] = {**steps, **found} if found else {}
    model = {**deepspeed.rest(models, deepspeed.stage_in(common), where), **weights}
    model |= {
        name: deepspeed.tied(model, target, where) for name, target in head.get("shared_params", {}).items()
    }
    groups = [
        {**group, "params": [name for number in group["params"] for name in shapes[number]]}
        for group in common.get("param_groups", ())
    ]
    schedulers = [head["lr_scheduler"]] if isinstance(head.get("lr_scheduler"), Mapping) else []
    optimizer = {"state": state, "param_groups": stored_tree(groups, where)}
    step = head.get("global_steps", 0) - head.get("skipped_steps", 0)
    return Found("deepspeed universal", [model], [optimizer], schedulers, step=step)


def _tensors_of(folder: Path, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return what `zero/<name>` has: the weights under "fp32", and state as the optimizer calls it."""
    if Path(name).name != name:
        refuse(str(folder), f"names a parameter {name!r}, which is no name of a folder")
    found: dict[str, Any] = {}
    for file in sorted((folder / "zero" / name).glob("*.pt")):
        value = load(file)
        tensor = value.get("param") if isinstance(value, Mapping) else value
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            found[file.stem] = stored_tree(tensor, str(file))
            continue
        if tensor.numel() != math.prod(shape):
            refuse(str(file), f"has {tensor.numel()} elements; expected those of a shape {shape}")
        found[file.stem] = of_tensor(tensor.view(shape), str(file))
    return found


def _kept_by_group(common: Mapping[str, Any], group: int, where: str) -> dict[str, Any]:
    """Return what stage 3 leaves with its flat tensors: the number of steps."""
    base = common.get("optimizer_state_dict")
    kept = base.get("state", {}).get(group, {}) if isinstance(base, Mapping) else {}
    return {
        key: stored_tree(x, f"{where}: {key}")
        for key, x in kept.items()
        if not isinstance(x, torch.Tensor) or x.dim() == 0
    }
