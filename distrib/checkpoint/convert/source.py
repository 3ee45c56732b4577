"""What a converter finds in another program's checkpoint: tensors that can be read one by one, and the rest as values."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from distrib.checkpoint.format import DTYPES
from distrib.checkpoint.plan import Where, numel, pieces, whole_box
from distrib.checkpoint.transfer import sub_tensor
from distrib.errors import CheckpointError

_WRAPPERS = re.compile(r"(?:_orig_mod|_orig_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Stored:
    """A tensor of the source.

    Attributes:
        shape: Of the whole tensor.
        dtype: Its dtype.
        parts: Slices that are together all of it, each with what reads it.
        same: Equal for tensors that are tied: one memory under two names. None where the source does not tell.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[Where, Callable[[], torch.Tensor]], ...]
    same: Hashable = None

    def read(self) -> torch.Tensor:
        """Return the whole tensor; for small ones."""
        if len(self.parts) == 1:
            return self.parts[0][1]()
        full = torch.empty(self.shape, dtype=self.dtype)
        for where, get in self.parts:
            flat = get().reshape(-1)
            for box, offset in pieces(where, self.shape):
                sub_tensor(full, box).copy_(flat.narrow(0, offset, numel(box.size)).view(box.size))
        return full


@dataclass(frozen=True)
class Found:
    """All that a source holds.

    Attributes:
        kind: What wrote it: "accelerate", "torch.save".
        models: Of each model, name -> `Stored`; a value that is no tensor stands for itself.
        optimizers: Of each optimizer, a state dict as torch makes it, with `Stored` for tensors.
        schedulers: State dicts.
        scaler: State dict of a loss scaler.
        custom: State dicts of objects of the user's.
        step: Optimizer steps, where the source says it.
        left_out: What is not taken over, and why: for people.
    """

    kind: str
    models: Sequence[Mapping[str, Any]]
    optimizers: Sequence[Mapping[str, Any]] = ()
    schedulers: Sequence[Mapping[str, Any]] = ()
    scaler: Mapping[str, Any] | None = None
    custom: Sequence[Any] = ()
    step: int | None = None
    left_out: Sequence[str] = field(default_factory=list)


def of_tensor(tensor: torch.Tensor, where: str) -> Stored:
    """Return a tensor that is in memory, or mapped into it, as part of a source.

    Raises:
        CheckpointError: if it is no plain dense tensor.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise CheckpointError(
            "D0724",
            f"is a {type(tensor).__name__} of layout {tensor.layout}; expected a plain dense tensor",
            where=where,
            fix="save the full tensors: of an FSDP2 model, torch.distributed.checkpoint.state_dict with full_state_dict=True",
        )
    data, shape = tensor.detach(), tuple(tensor.shape)
    same = (data.data_ptr(), shape, data.stride(), data.dtype) if data.numel() else None
    return Stored(shape, data.dtype, ((whole_box(shape), partial(_itself, data)),), same)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def stored_tree(value: Any, where: str) -> Any:
    """Return a tree of dicts and lists with each tensor as `Stored`."""
    if isinstance(value, torch.Tensor):
        return of_tensor(value, where)
    if isinstance(value, Mapping):
        return {key: stored_tree(x, f"{where}: {key}") for key, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(stored_tree(x, f"{where}[{at}]") for at, x in enumerate(value))
    return value


def values_of(tree: Any) -> Any:
    """Return a tree with each `Stored` read."""
    if isinstance(tree, Stored):
        return tree.read()
    if isinstance(tree, Mapping):
        return {key: values_of(x) for key, x in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(values_of, tree))
    return tree


def plain_names(names: Iterable[Any], where: str) -> dict[str, str]:
    """Map each name to that in the plain module, without what wrappers add.

    Raises:
        CheckpointError: if one is no text, or two become one.
    """
    names = list(names)
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None:
        refuse(where, f"names a tensor {odd!r}")
    cut = {name: _WRAPPERS.sub("", name) for name in names}
    while cut and all(name.startswith("module.") for name in cut.values()):
        cut = {name: plain.removeprefix("module.") for name, plain in cut.items()}
    seen: dict[str, str] = {}
    for name, plain in cut.items():
        if plain in seen:
            refuse(where, f"has {seen[plain]!r} and {name!r}, which are one name without their wrappers")
        seen[plain] = name
    return cut


def dtype_of(code: str, where: str) -> torch.dtype:
    """Return the dtype of a safetensors code."""
    if code not in DTYPES:
        refuse(where, f"has dtype {code}; expected one of {', '.join(DTYPES)}")
    return DTYPES[code]


def beside(folder: Path, name: object, listed_in: Path) -> Path:
    """Return the file that a list names; only plain names within the folder are followed.

    Raises:
        CheckpointError: if the name leads elsewhere, or there is no such file.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        refuse(str(listed_in), f"names the file {name!r}, which does not lie beside it")
    if not (folder / name).is_file():
        refuse(str(listed_in), f"names the file {name!r}, which is not there")
    return folder / name


def numbered_files(folder: Path, stem: str, ending: str) -> Iterator[Path]:
    """Yield stem.ending, stem_1.ending, stem_2.ending ... as far as they are there."""
    at = 0
    while (path := folder / f"{stem}{f'_{at}' if at else ''}{ending}").is_file():
        yield path
        at += 1


def refuse(where: str, problem: str) -> NoReturn:
    """Raise the error of a source that contradicts itself."""
    raise CheckpointError(
        "D0723",
        problem,
        where=where,
        fix="copy the checkpoint again from where it is whole, or convert another one",
    )
