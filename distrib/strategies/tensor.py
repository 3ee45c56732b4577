"""Tensor parallelism: matrix products divided over ranks, by a plan of module names (torch's `parallelize_module`).

A plan says of linear and embedding modules how their weight is divided: `colwise` by outputs, `rowwise` by inputs. A
`rowwise` module takes what `colwise` ones before it have left divided, and adds up; between the two, only operations on
single elements or whole attention heads are right. Shoeybi et al., "Megatron-LM" (2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from distrib.errors import StrategyError, did_you_mean

STYLES = ("colwise", "colwise_gather_output", "rowwise")
_OF_TRANSFORMERS = {"embedding_rowwise": "rowwise", "colwise_rep": "colwise_gather_output"}
_COLWISE = frozenset({
    "q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv", "gate_proj", "up_proj", "fc1", "c_fc",
    "w1", "w3",
})  # fmt: skip
_ROWWISE = frozenset({"o_proj", "out_proj", "wo", "down_proj", "fc2", "c_proj", "w2"})


@dataclass(frozen=True)
class TensorPlan:
    """How modules are divided.

    Attributes:
        styles: Module name -> one of `STYLES`.
        reason: Where the plan comes from.
    """

    styles: Mapping[str, str]
    reason: str


def find_plan(model: nn.Module, size: int, wanted: Sequence[str] | None = None) -> TensorPlan:
    """Resolve the plan of a model: the user's, else the model's own (transformers), else by common names.

    Args:
        model: A plain module.
        size: Ranks that share each matrix product.
        wanted: "PATTERN=STYLE" each, patterns of module names as of file names; None to find them.

    Raises:
        StrategyError: D0833 if a pattern fits no module, or nothing is to be divided; D0834 if something does not divide.
    """
    if wanted is not None:
        plan = TensorPlan(_resolve(model, dict(map(_parse, wanted))), "tensor_parallel.plan")
    elif own := getattr(model, "_tp_plan", None):
        plan = TensorPlan(_of_transformers(model, own), "the model's own plan")
    else:
        plan = TensorPlan(dict(_by_names(model)), "names of common decoder layers")
    if not plan.styles:
        raise StrategyError(
            "D0833",
            f"mesh.tensor is {size}, but nothing says how the modules of {type(model).__name__} are divided",
            where="tensor_parallel.plan",
            fix='name them, such as ["layers.*.q_proj=colwise", "layers.*.o_proj=rowwise"]; linear layers and embeddings '
            "can be divided",
        )
    for name, style in plan.styles.items():
        _check(name, model.get_submodule(name), style, size)
    _check_heads(model, size)
    return plan


class _WhereDivided:
    """Lets a module that has whole parameters compute as any other, as inside of `gathered`."""

    def _prepare_input_fn(self, layouts: Any, desired: Any, module: nn.Module, inputs: Any, mesh: Any) -> Any:
        if not isinstance(module.weight, DTensor):
            return inputs
        return super()._prepare_input_fn(layouts, desired, module, inputs, mesh)  # type: ignore[misc]

    def _prepare_output_fn(
        self, layouts: Any, to_local: Any, module: nn.Module, outputs: Any, mesh: Any
    ) -> Any:
        if not isinstance(outputs, DTensor):
            return outputs
        return super()._prepare_output_fn(layouts, to_local, module, outputs, mesh)  # type: ignore[misc]


class Colwise(_WhereDivided, ColwiseParallel):
    """A module divided by outputs."""


class Rowwise(_WhereDivided, RowwiseParallel):
    """A module divided by inputs."""


def parallelise(
    model: nn.Module, mesh: DeviceMesh, plan: TensorPlan, styles: Mapping[str, ParallelStyle] | None = None
) -> None:
    """Divide the modules of a plan over a one-dimensional mesh, in place; every rank has the same whole values.

    Args:
        model: A plain module.
        mesh: The ranks that share matrix products.
        plan: How its modules are divided.
        styles: Module name -> what stands in for the plan's style.

    Raises:
        StrategyError: D0834, if weights that are tied would be divided differently.
    """
    tied = [places for places in _places(model).values() if len(places) > 1]
    parallelize_module(
        model,
        mesh,
        {
            **{name: _style(model.get_submodule(name), style) for name, style in plan.styles.items()},
            **(styles or {}),
        },
        src_data_rank=None,
    )
    for (first, name), *others in tied:
        kept: Any = first._parameters[name]
        for module, other in others:
            if _layout(module._parameters[other]) != _layout(kept):
                raise StrategyError(
                    "D0834",
                    f"weights of {type(first).__name__} and {type(module).__name__} are tied, but the plan divides them "
                    "differently",
                    where="tensor_parallel.plan",
                    fix="let the plan have both or neither; an embedding (rowwise) and a head (colwise) divide alike",
                )
            module._parameters[other] = kept


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Put whole parameters in the places of divided ones; what is done to them inside is not taken back. Collective."""
    found = [(places[0][0]._parameters[places[0][1]], places) for places in _places(model).values()]
    divided: list[tuple[Any, list[tuple[nn.Module, str]]]] = [x for x in found if isinstance(x[0], DTensor)]
    for parameter, places in divided:
        whole = nn.Parameter(parameter.detach().full_tensor(), requires_grad=parameter.requires_grad)
        for module, name in places:
            module._parameters[name] = whole
    try:
        yield
    finally:
        for parameter, places in divided:
            for module, name in places:
                module._parameters[name] = parameter


def _parse(entry: str) -> tuple[str, str]:
    pattern, _, style = entry.partition("=")
    return pattern, style


def _resolve(model: nn.Module, patterns: Mapping[str, str]) -> dict[str, str]:
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, str] = {}
    for pattern, style in patterns.items():
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise StrategyError(
                "D0833",
                f"{pattern!r} fits no module of {type(model).__name__}{did_you_mean(pattern, names)}",
                where="tensor_parallel.plan",
                fix="correct the pattern; names are those of model.named_modules()",
            )
        found.update(dict.fromkeys(fitting, style))
    return found


def _of_transformers(model: nn.Module, own: Mapping[str, str]) -> dict[str, str]:
    names = [name for name, _ in model.named_modules()]
    own = {pattern: style for pattern, style in own.items() if any(fnmatchcase(x, pattern) for x in names)}
    styles = {pattern: _OF_TRANSFORMERS.get(style, style) for pattern, style in own.items()}
    unknown = sorted({style for style in styles.values() if style not in STYLES})
    if unknown:
        raise StrategyError(
            "D0833",
            f"the own plan of {type(model).__name__} has the style {unknown[0]!r}; known are {', '.join(STYLES)}",
            where="tensor_parallel.plan",
            fix="give a plan without it, or set mesh.tensor: 1",
        )
    return _resolve(model, styles)


def _by_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    parents = dict(model.named_modules())
    for name, module in parents.items():
        parent, _, leaf = name.rpartition(".")
        if not isinstance(module, nn.Linear) or isinstance(parents[parent], nn.MultiheadAttention):
            continue
        if leaf in _COLWISE or leaf in _ROWWISE:
            yield name, "colwise" if leaf in _COLWISE else "rowwise"


def _check(name: str, module: nn.Module, style: str, size: int) -> None:
    if not isinstance(module, (nn.Linear, nn.Embedding)) or (
        style == "colwise" and isinstance(module, nn.Embedding)
    ):
        raise StrategyError(
            "D0834",
            f"{name} is a {type(module).__name__}, which cannot be divided {style}",
            where="tensor_parallel.plan",
            fix="divide nn.Linear (colwise, colwise_gather_output, rowwise) and nn.Embedding (rowwise) only",
        )
    divided = module.weight.shape[1 if style == "rowwise" and isinstance(module, nn.Linear) else 0]
    if divided % size:
        raise StrategyError(
            "D0834",
            f"{name} has {divided} {'inputs' if style == 'rowwise' else 'outputs'}, which do not divide by mesh.tensor ({size})",
            where="tensor_parallel.plan",
            fix="choose a size of mesh.tensor that divides it, or leave the module out of the plan",
        )


def _check_heads(model: nn.Module, size: int) -> None:
    """Refuse attention whose heads do not divide; transformers' configs say how many there are."""
    config = getattr(model, "config", None)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % size:
            raise StrategyError(
                "D0834",
                f"{type(model).__name__} has {key} = {heads}, which does not divide by mesh.tensor ({size})",
                where="mesh.tensor",
                fix="choose a size that divides the number of heads",
            )


def _style(module: nn.Module, style: str) -> ParallelStyle:
    if style == "rowwise":
        return Rowwise(input_layouts=Replicate()) if isinstance(module, nn.Embedding) else Rowwise()
    return Colwise(output_layouts=Replicate()) if style == "colwise_gather_output" else Colwise()


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return where each parameter stands, by its id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return found


def _layout(parameter: Any) -> Any:
    return parameter.placements if isinstance(parameter, DTensor) else None
