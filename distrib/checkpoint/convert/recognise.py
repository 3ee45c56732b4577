"""Which part of a saved dict is the model, which the optimizer: by the keys that training programs use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distrib.checkpoint.convert.source import Found, Stored, values_of
from distrib.errors import CheckpointError

MODELS = ("model", "model_state_dict", "state_dict", "model_state", "module", "models")
OPTIMIZERS = (
    "optimizer",
    "optimizer_state_dict",
    "optimizer_states",
    "optim",
    "optimizer_state",
    "optimizers",
)
SCHEDULERS = (
    *("scheduler", "scheduler_state_dict", "lr_scheduler", "lr_scheduler_state_dict", "lr_schedulers"),
    "schedulers",
)
SCALERS = ("scaler", "scaler_state_dict", "grad_scaler")
STEPS = ("step", "global_step", "iteration", "iter_num", "num_steps")


def recognise(kind: str, tree: Any, where: str) -> Found:
    """Divide a tree into model, optimizers and the rest: nested under the usual keys, or all of it one model.

    Args:
        kind: What to call the source.
        tree: Dicts and lists with `Stored` for tensors.
        where: The file, for messages.

    Raises:
        CheckpointError: if no model can be told.
    """
    if not isinstance(tree, Mapping):
        raise _no_model(where, f"holds a {type(tree).__name__}")
    models = _part(tree, MODELS)
    if models is None:
        return _only_a_model(kind, tree, where)
    optimizers, schedulers = _part(tree, OPTIMIZERS) or (), _part(tree, SCHEDULERS) or ()
    scaler = next((tree[key] for key in SCALERS if isinstance(tree.get(key), Mapping)), None)
    step = next((value for key in STEPS if type(value := values_of(tree.get(key))) is int), None)
    known = {*MODELS, *OPTIMIZERS, *SCHEDULERS, *SCALERS, *STEPS}
    for model in models:
        _check_model(model, where)
    taken = [x for x in optimizers if "param_groups" in x and "state" in x]
    left_out = [f"{key!r}: not known" for key in tree if key not in known]
    left_out += ["an optimizer: no dict of state and param_groups"] * (len(optimizers) - len(taken))
    return Found(
        kind,
        models,
        taken,
        [values_of(x) for x in schedulers],
        values_of(scaler) if scaler is not None else None,
        step=step,
        left_out=left_out,
    )


def _only_a_model(kind: str, tree: Mapping[Any, Any], where: str) -> Found:
    if not any(isinstance(x, Stored) for x in tree.values()):
        raise _no_model(where, f"holds no tensors under its {len(tree)} keys ({_few(tree)})")
    _check_model(tree, where)
    return Found(kind, [tree])


def _part(tree: Mapping[Any, Any], keys: Sequence[str]) -> list[Mapping[Any, Any]] | None:
    """Return the state dicts under the first of `keys` that has one or a list of them."""
    for key in keys:
        value = tree.get(key)
        if isinstance(value, Mapping) and value:
            return [value]
        if isinstance(value, (list, tuple)) and value and all(isinstance(x, Mapping) for x in value):
            return list(value)
    return None


def _check_model(model: Mapping[Any, Any], where: str) -> None:
    nested = [key for key, x in model.items() if not isinstance(key, str) or _holds_tensors(x)]
    if nested or not any(isinstance(x, Stored) for x in model.values()):
        raise _no_model(where, f"has what should be a model, but holds {_few(nested or model)}")


def _holds_tensors(value: Any) -> bool:
    """Whether a value that is no tensor itself has tensors below it."""
    return isinstance(value, (Mapping, list, tuple)) and any(
        isinstance(x, Stored) or _holds_tensors(x)
        for x in (value.values() if isinstance(value, Mapping) else value)
    )


def _few(keys: Any) -> str:
    names = [repr(key) for key in keys]
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"


def _no_model(where: str, problem: str) -> CheckpointError:
    return CheckpointError(
        "D0724",
        f"{problem}; expected a model's state dict (name -> tensor), or one under a key such as 'model' or 'state_dict'",
        where=where,
        fix="save it again as {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}",
    )
