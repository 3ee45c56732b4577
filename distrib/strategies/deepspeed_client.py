"""What a user's DeepSpeed file says of optimizer and schedule, which are the script's own objects here: it has to agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch.optim import Optimizer

from distrib.config.schema import show
from distrib.errors import ConfigError, did_you_mean
from distrib.strategies.deepspeed_config import AUTO, UserFile, contradiction, unknown, wrong

# DeepSpeed's name -> the classes that do what it stands for; its Adam decouples weight decay unless told otherwise.
_CLASSES: Final[Mapping[str, tuple[str, ...]]] = {
    "adam": ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"),
    "adamw": ("AdamW", "FusedAdam", "DeepSpeedCPUAdam"),
    "adagrad": ("Adagrad", "DeepSpeedCPUAdagrad"),
    "lamb": ("FusedLamb", "Lamb"),
    "lion": ("FusedLion", "DeepSpeedCPULion", "Lion"),
    "muon": ("Muon",),
}
_HOW: Final = ("torch_adam", "adam_w_mode", "fused")  # which implementation DeepSpeed would have made
_SCHEDULES: Final = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
_IN_THE_SCRIPT: Final = "the script's is what counts"


def check_sections(user: UserFile) -> None:
    """Refuse sections that DeepSpeed would not understand, and a schedule whose numbers nobody would follow.

    Raises:
        ConfigError: D0882, for a key that does not exist; D0883, for a wrong value; D0884, for a schedule with values.
    """
    for section, known in (
        ("optimizer", ("type", "params", "legacy_fusion")),
        ("scheduler", ("type", "params")),
    ):
        tree = user.tree.get(section)
        if tree is None:
            continue
        if not isinstance(tree, dict):
            raise wrong(user, section, tree, "an object of keys")
        for name in tree:
            if name not in known:
                raise unknown(user, f"{section}.{name}", [f"{section}.{x}" for x in known])
        if not isinstance(tree.get("params", {}), dict):
            raise wrong(user, f"{section}.params", tree["params"], "an object of keys")
    if "optimizer" in user.tree:
        _check_type(user, "optimizer", [*_CLASSES, *_torch_names()])
    if "scheduler" in user.tree:
        _check_type(user, "scheduler", _SCHEDULES)
        _refuse_schedule(user)


def check_optimizer(user: UserFile, optimizer: Optimizer) -> None:
    """Compare the file's section with the script's optimizer; "auto" takes the script's value.

    Raises:
        ConfigError: D0884, for another class or another value, with both; D0882, for a parameter that it does not have.
    """
    kind = user.get("optimizer.type")
    if kind is None or kind == AUTO:
        return
    name = type(optimizer).__name__
    if name not in _CLASSES.get(kind.lower(), (kind,)) or _is_other_adam(user, name):
        raise contradiction(
            user,
            "optimizer.type",
            kind,
            f"the script prepares a {name}",
            f"build it in the script, or remove optimizer from the file: {_IN_THE_SCRIPT}",
        )
    for key, stated in _stated(user, "optimizer"):
        if key in _HOW:
            continue
        where = f"optimizer.params.{key}"
        if key not in optimizer.defaults:
            raise unknown(user, where, [f"optimizer.params.{x}" for x in optimizer.defaults])
        ours = optimizer.defaults[key]
        if not _is_same(stated, ours):
            raise contradiction(
                user,
                where,
                stated,
                f"{name} in the script has {show(ours)}",
                "set it to auto, or correct one of them",
            )


def resolved_optimizer(user: UserFile, optimizer: Optimizer) -> dict[str, Any]:
    """Return the file's section with the script's values, for what is logged and stored; nothing, if it has none."""
    if "optimizer" not in user.tree:
        return {}
    keys = [key for key in user.get("optimizer.params", {}) if key in optimizer.defaults]
    values = {key: _plain(optimizer.defaults[key]) for key in keys}
    return {"optimizer": {"type": type(optimizer).__name__, "params": values}}


def _check_type(user: UserFile, section: str, known: tuple[str, ...] | list[str]) -> None:
    kind = user.get(f"{section}.type")
    if kind is None:
        raise wrong(user, f"{section}.type", kind, f"a name such as {known[0]}")
    is_known = isinstance(kind, str) and (kind in known or kind.lower() in (*_CLASSES, AUTO))
    if not is_known:
        raise ConfigError(
            "D0883",
            f"got {show(kind)}; DeepSpeed knows no such {section}{did_you_mean(str(kind), known)}",
            where=user.where(f"{section}.type"),
            fix=f"correct it, or remove {section} from the file: {_IN_THE_SCRIPT}",
        )


def _refuse_schedule(user: UserFile) -> None:
    """Refuse numbers for a schedule, of which nothing tells whether the script's follows them."""
    key, stated = next(_stated(user, "scheduler"), ("", None))
    if key:
        raise contradiction(
            user,
            f"scheduler.params.{key}",
            stated,
            "the schedule is that of the script, which is given to prepare",
            "build it there, for instance with torch.optim.lr_scheduler, and set this to auto",
        )


def _is_other_adam(user: UserFile, name: str) -> bool:
    """Whether the file wants Adam's own weight decay of a class that decouples it."""
    return name == "AdamW" and user.get("optimizer.params.adam_w_mode", default=True) is False


def _stated(user: UserFile, section: str) -> Iterator[tuple[str, Any]]:
    for key, value in user.get(f"{section}.params", {}).items():
        if not (isinstance(value, str) and value.lower() == AUTO):
            yield key, value


def _torch_names() -> list[str]:
    return [name for name, x in vars(torch.optim).items() if isinstance(x, type) and issubclass(x, Optimizer)]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _is_same(stated: Any, ours: Any) -> bool:
    ours = _plain(ours)
    return (
        list(stated) == list(ours)
        if isinstance(ours, tuple | list) and isinstance(stated, list)
        else bool(stated == ours)
    )
