"""What the settings ask of a model's forwards under every strategy: parts of sequences, checkpointing, `torch.compile`.

Forwards are replaced on the instances, as precision does: modules keep their classes, names and hooks. From the inside
out a forward works on parts, is recomputed, compiled, run under autocast; hooks, such as those that gather a sharded unit, are around all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import nn

from distrib.logging import notice
from distrib.strategies.compiling import Forward, compiling
from distrib.strategies.context import ContextParallel, on_parts
from distrib.strategies.fsdp_units import find_units
from distrib.strategies.recomputing import recomputing

# marks on replaced forwards
_ON_PARTS, _RECOMPUTES, _COMPILED = "_distrib_on_parts", "_distrib_recomputes", "_distrib_compiled"


class Forwards:
    """Applies `mesh.context`, `activation_checkpointing` and `compile` to models.

    Args:
        options: Of the strategy; it has the keys of the latter two names.
        parts: Divides sequences.
        say: Whether this rank tells what was done.
    """

    def __init__(self, options: Mapping[str, Any], parts: ContextParallel, *, say: bool) -> None:
        self._parts = parts
        self._recompute = options.get("activation_checkpointing", "none")
        self._compile: Mapping[str, Any] = options.get("compile", {"scope": "none"})
        self._say = say

    def replace(self, model: nn.Module, wanted: Sequence[str] | None = None) -> None:
        """Replace forwards of a model, in place; what is replaced already stays.

        Args:
            model: The user's own, or what `torch.compile` made of it.
            wanted: Names of the classes of its blocks; None to find them.

        Raises:
            StrategyError: if the backend of `compile` does not exist.
        """
        root: nn.Module = getattr(model, "_orig_mod", model)
        scope = self._compile["scope"]
        if self._recompute == "none" and scope == "none" and self._parts.size == 1:
            return
        names, reason = outermost(root, wanted)
        blocks = [root.get_submodule(name) for name in names]
        if self._parts.size > 1:
            self._divide_sequences_in(root, names)
        if self._recompute != "none":
            self._recompute_in(root, blocks, reason)
        if scope != "none":
            self._compile_in(model, [root] if scope == "model" else blocks, reason)

    def _divide_sequences_in(self, root: nn.Module, names: list[str]) -> None:
        divided = self._parts.divide(root, names)
        _replace([root.get_submodule(name) for name in divided], _ON_PARTS, on_parts)
        blocks = f"{len(divided)} blocks" if len(divided) != 1 else "1 block"
        self._tell(
            f"context parallel: {blocks} of {type(root).__name__} over {self._parts.size} ranks"
            if divided
            else f"warning: mesh.context does nothing for {type(root).__name__}: it has no list of repeated blocks"
        )

    def _recompute_in(self, root: nn.Module, blocks: list[nn.Module], reason: str) -> None:
        setting = f"activation_checkpointing {self._recompute}"
        if _checkpoints_itself(root):
            self._tell(f"{setting}: {type(root).__name__} has checkpoints of its own, and keeps these alone")
            return
        self._tell(f"{setting}: {_number(blocks)} of {type(root).__name__} ({reason})")
        selective = self._recompute == "selective"
        inner = [getattr(block, "_orig_mod", block) for block in blocks]
        _replace(inner, _RECOMPUTES, lambda forward: recomputing(forward, selective=selective))

    def _compile_in(self, model: nn.Module, modules: list[nn.Module], reason: str) -> None:
        options = self._compile
        kind = type(getattr(model, "_orig_mod", model)).__name__
        if any(map(_is_compiled, model.modules())):
            self._tell(f"compile: {kind} is compiled already, and stays as it is")
            return
        what = (
            f"{kind} as a whole"
            if options["scope"] == "model"
            else f"{_number(modules)} of {kind} ({reason})"
        )
        self._tell(f"compile: {what}, backend {options['backend']}")
        names = {id(module): name for name, module in model.named_modules()}
        _replace(modules, _COMPILED, lambda forward: compiling(forward, options, names, say=self._say))

    def _tell(self, text: str) -> None:
        if self._say:
            notice(text)


def outermost(root: nn.Module, wanted: Sequence[str] | None) -> tuple[list[str], str]:
    """Return the blocks of a model by name, each once and none inside of another, and why these."""
    units = find_units(root, wanted)
    names: list[str] = []
    seen: set[int] = set()
    for name in units.names:  # outer ones come first
        block = root.get_submodule(name)
        if id(block) not in seen:
            names.append(name)
            seen.update(map(id, block.modules()))
    return names, units.reason


def _replace(modules: list[nn.Module], mark: str, made_of: Callable[[Forward], Forward]) -> None:
    """Replace the forward of each module by what `made_of` makes of it; equal forwards share one.

    A method bound to the instance is taken apart and bound again, so that a copy of a module computes with its own
    parameters.
    """
    made: dict[Any, Forward] = {}
    for module in modules:
        now: Any = vars(module).get("forward") or type(module).forward
        if getattr(now, mark, False):
            continue
        own = getattr(now, "__self__", None) is module
        plain = now.__func__ if own else now
        if plain not in made:
            unbound = plain if own or "forward" not in vars(module) else _taking_self(plain)
            made[plain] = made_of(unbound)
            vars(made[plain]).update({**_marks_of(plain), mark: True})
        module.forward = MethodType(made[plain], module)


def _marks_of(forward: Any) -> dict[str, bool]:
    return {mark: True for mark in (_ON_PARTS, _RECOMPUTES, _COMPILED) if getattr(forward, mark, False)}


def _taking_self(forward: Forward) -> Forward:
    """Return a forward that was put on an instance, as one that takes the module first."""

    def run(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    run.__name__ = "forward"  # by which a copy that was pickled finds its own
    return run


def _checkpoints_itself(root: nn.Module) -> bool:
    """Whether a model of transformers has its checkpoints switched on, or a block is in torch's CheckpointWrapper."""
    return any(
        getattr(module, "gradient_checkpointing", False) or hasattr(module, "_checkpoint_wrapped_module")
        for module in root.modules()
    )


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _number(blocks: list[nn.Module]) -> str:
    return f"{len(blocks)} block{'' if len(blocks) == 1 else 's'}" if blocks else "nothing"
