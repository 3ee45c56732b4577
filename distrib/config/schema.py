"""Every key of a run's configuration: its type, bounds and default. What the keys mean stands in `docs/config.md`.

The models only say what a value may be. Whether a feature exists yet is `not_built.py`; what two keys may not say
together is `checks.py`.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class Expected:
    """What a value of an annotated type looks like, in words for an error message."""

    words: str


@dataclass(frozen=True)
class Names:
    """A text that is one of our names, or one that another package adds to the entry-point group `group`."""

    group: str
    builtin: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        if name in self.builtin or any(
            entry.name == name for entry in metadata.entry_points(group=self.group)
        ):
            return name
        raise ValueError(name)


MAX_COUNT = 10**999 - 1  # what a file can hold
_MAX_SEED = 2**63 - 1  # what a signed 64-bit integer, torch's generator and JSON readers all hold
_MAX_SECONDS = 1e9  # 31 years, which every timer can hold

Count = Annotated[int, Field(ge=1, le=MAX_COUNT), Expected("a whole number of at least 1")]
CountFromZero = Annotated[int, Field(ge=0, le=MAX_COUNT), Expected("a whole number of at least 0")]
AxisSize = Count | Literal[-1]
Seed = Annotated[int, Field(ge=0, le=_MAX_SEED), Expected(f"a whole number from 0 to {_MAX_SEED}")]
Port = Annotated[int, Field(ge=0, le=65535), Expected("a port from 0 (any free one) to 65535")]
Seconds = Annotated[
    float, Field(gt=0, le=_MAX_SECONDS), Expected("a number of seconds above 0 and up to 1e9")
]
SecondsFromZero = Annotated[
    float, Field(ge=0, le=_MAX_SECONDS), Expected("a number of seconds from 0 to 1e9")
]
PathText = Annotated[str, Field(min_length=1), Expected("a path")]
BackendName = Annotated[str, Field(min_length=1), Expected("the name of a backend of torch.compile")]
NodeRange = Annotated[
    str, Field(pattern=r"^[1-9][0-9]*:[1-9][0-9]*$"), Expected("a range FEWEST:MOST such as '2:4'")
]
Dtype = Literal["fp32", "bf16", "fp16"]
Strategy = Annotated[str, Names("distrib.strategies", ("auto", "single", "ddp", "fsdp", "deepspeed", "xla"))]
Device = Annotated[str, Names("distrib.devices", ("auto", "cpu", "cuda", "mps", "xpu", "xla"))]
Backend = Annotated[
    str,
    Names("distrib.backends", ("local", "elastic", "ssh", "slurm", "mpi", "kubernetes", "ray", "tpu")),
]
Tracker = Annotated[str, Names("distrib.trackers", ("jsonl", "tensorboard", "wandb", "mlflow"))]
Trackers = Annotated[
    tuple[Tracker, ...],
    Field(strict=False),  # files have lists, and a strict tuple takes none
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Expected("jsonl, tensorboard, wandb or mlflow, or a list of such"),
]


def _rank_numbers(value: object) -> object:
    """Take one number, or a text such as "0,3", for a list."""
    if isinstance(value, str) and all(part.strip().isdecimal() for part in value.split(",")):
        return tuple(int(part) for part in value.split(","))
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


ModuleNames = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*$")], ...],
    Field(strict=False),
    BeforeValidator(lambda value: tuple(value.split(",")) if isinstance(value, str) else value),
    Expected("the name of a module, or a list of such"),
]
ClassNames = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[^\W\d]\w*$")], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(lambda value: tuple(value.split(",")) if isinstance(value, str) else value),
    Expected("the name of a class of modules, or a list of such"),
]
HostNames = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[\w.:@-]+$")], ...],
    Field(strict=False),
    BeforeValidator(lambda value: tuple(value.split(",")) if isinstance(value, str) else value),
    Expected("the name of a host, or a list of such"),
]
Extent = Annotated[
    str,
    Field(pattern=r"^[1-9][0-9]*(x[1-9][0-9]*){1,2}$"),
    Expected("a layout of chips such as '2x4' or '2x2x2'"),
]
PlanEntries = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[^=]+=(colwise|colwise_gather_output|rowwise)$")], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(lambda value: tuple(value.split(",")) if isinstance(value, str) else value),
    Expected("a list of PATTERN=STYLE, where STYLE is colwise, colwise_gather_output or rowwise"),
]
RankNumbers = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_COUNT)], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_rank_numbers),
    Expected("the number of a rank, or a list of such"),
]


class Section(BaseModel):
    """A group of keys: frozen, no key beyond those declared, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PrecisionSection(Section):
    """`mixed_precision` spelled out: a number format for each role."""

    param: Dtype = "fp32"
    compute: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    reduce: Dtype = "fp32"
    output: Dtype = "fp32"
    loss_scaling: Literal["none", "dynamic"] = "none"
    fp32_modules: Annotated[tuple[str, ...], Field(strict=False)] = ()


class MeshSection(Section):
    """Sizes of the axes along which ranks are laid out; -1 is what is left."""

    replicate: AxisSize = -1
    shard: AxisSize = 1
    tensor: AxisSize = 1
    context: AxisSize = 1
    pipeline: AxisSize = 1
    expert: AxisSize = 1


class DdpSection(Section):
    """Options of the strategy of that name."""

    find_unused_parameters: bool | Literal["auto"] = "auto"
    static_graph: bool = False
    comm_hook: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    bucket_cap_mb: Count | None = None
    gradient_as_bucket_view: bool = False


class FsdpSection(Section):
    """Options of the strategy of that name."""

    reshard_after_forward: bool = True
    reduce_each_micro_step: bool = False
    cpu_offload: bool = False
    wrap: Literal["auto"] | ClassNames = "auto"
    prefetch: Count = 1


class TensorParallelSection(Section):
    """How matrix products are divided along the axis `mesh.tensor`."""

    plan: Literal["auto"] | PlanEntries = "auto"
    sequence: bool = False


class ContextParallelSection(Section):
    """How attention works on sequences that are divided along the axis `mesh.context`."""

    attention: Literal["ulysses", "ring"] = "ulysses"


class PipelineSection(Section):
    """How batches run through the stages that lie along the axis `mesh.pipeline`."""

    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = "1f1b"
    microbatches: Count | None = None
    stages_per_rank: Count = 1


class DeepspeedSection(Section):
    """Options of the strategy of that name."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: PathText | None = None
    config: PathText | Annotated[dict[str, Any], Expected("a mapping of DeepSpeed's keys")] | None = None


class XlaSection(Section):
    """Options of the strategy of that name."""

    spmd: bool = False
    host_collectives: bool | Literal["auto"] = "auto"
    compile_cache: PathText | None = None
    barrier: Literal["step", "micro_step"] = "step"


class CompileSection(Section):
    """What torch.compile is applied to, and how."""

    scope: Literal["none", "model", "blocks"] = "none"
    backend: BackendName = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    dynamic: bool | None = None


class DataSection(Section):
    """How loaders deal out samples."""

    tail: Literal["exact", "pad", "drop"] = "exact"
    prefetch: CountFromZero = 2
    dispatch: bool = False


class CheckpointSection(Section):
    """Where checkpoints go and how many stay."""

    dir: PathText = "checkpoints"
    keep_last: Count | None = 3
    keep_every: Count | None = None
    keep_best: Count | None = None
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    on_signal: bool = False


class TrackingSection(Section):
    """Where logged values go."""

    log_with: Trackers = ("jsonl",)


class WatchSection(Section):
    """How a run is watched, and after how long silence counts as failure."""

    heartbeat_s: Seconds = 2.0
    silence_s: Seconds = 30.0
    report_s: Seconds = 30.0
    stall_timeout_s: Seconds = 600.0
    verify_collectives: bool = False
    nonfinite: Literal["ignore", "warn", "raise"] = "warn"


class LaunchSection(Section):
    """How the launcher starts, stops and restarts workers."""

    backend: Backend = "local"
    nproc_per_node: Count | Literal["auto"] = "auto"
    nnodes: Count | NodeRange = 1
    hostfile: PathText | None = None
    master_port: Port = 0
    rdzv_timeout_s: Seconds = 300.0
    max_restarts: CountFromZero = 0
    start_method: Literal["fork", "spawn"] = "fork"
    preload: ModuleNames = ()
    grace_s: SecondsFromZero = 10.0
    preempt_grace_s: SecondsFromZero = 300.0
    log_dir: PathText | None = None
    show_ranks: RankNumbers | Literal["all"] = "all"
    numa: bool = False


class TpuSection(Section):
    """The workers on which the launch backend of that name starts the program, or which it asks GKE for."""

    name: str | None = None
    zone: str | None = None
    project: str | None = None
    workers: Count | None = None
    hosts: HostNames = ()
    folder: PathText | None = None
    python: PathText = "python3"
    accelerator: str | None = None
    topology: Extent | None = None
    image: str | None = None


class Values(Section):
    """All keys of one run."""

    strategy: Strategy = "auto"
    device: Device = "auto"
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"] | PrecisionSection = "no"
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    seed: Seed | None = None
    global_batch_size: Count | None = None
    gradient_accumulation_steps: Count | None = None
    project_dir: PathText = "."
    mesh: MeshSection = MeshSection()
    ddp: DdpSection = DdpSection()
    fsdp: FsdpSection = FsdpSection()
    tensor_parallel: TensorParallelSection = TensorParallelSection()
    context_parallel: ContextParallelSection = ContextParallelSection()
    pipeline: PipelineSection = PipelineSection()
    deepspeed: DeepspeedSection = DeepspeedSection()
    xla: XlaSection = XlaSection()
    compile: CompileSection = CompileSection()
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    sync_batchnorm: bool = False
    data: DataSection = DataSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    watch: WatchSection = WatchSection()
    launch: LaunchSection = LaunchSection()
    tpu: TpuSection = TpuSection()


@functools.cache
def sections() -> Mapping[str, type[Section]]:
    """Return the sections: name -> model, such as "mesh"."""
    fields = {name: field.annotation for name, field in Values.model_fields.items()}
    return {
        name: kind for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Section)
    }


@functools.cache
def keys() -> Mapping[str, Any]:
    """Return every key that holds a value, dotted, with its annotation: "seed", "mesh.shard"."""
    hints = typing.get_type_hints(Values, include_extras=True)
    found: dict[str, Any] = {}
    for name in Values.model_fields:
        if name not in sections():
            found[name] = hints[name]
            continue
        inner = typing.get_type_hints(sections()[name], include_extras=True)
        found.update({f"{name}.{key}": inner[key] for key in sections()[name].model_fields})
    return found


def value_at(values: Values, key: str) -> Any:
    """Return the value of a dotted key."""
    found: Any = values
    for part in key.split("."):
        found = getattr(found, part)
    return found


def default_of(key: str) -> Any:
    """Return the value that a dotted key has when nobody sets it."""
    return value_at(Values(), key)


def nested(flat: Mapping[str, object]) -> dict[str, Any]:
    """Turn dotted keys into sections: {"mesh.shard": 2} -> {"mesh": {"shard": 2}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def is_valid(key: str, value: object) -> bool:
    """Say whether the schema takes `value` for `key`."""
    try:
        canonical(key, value)
    except ValidationError:
        return False
    return True


def canonical(key: str, value: object) -> Any:
    """Return a valid value as the schema holds it: whole seconds as a float, a list as a tuple."""
    return value_at(Values.model_validate(nested({key: value})), key)


def names_of(key: str) -> tuple[str, ...]:
    """Return the texts that `key` may be; empty if it is not a choice among names."""
    return tuple(dict.fromkeys(_names(keys()[key])))


def _names(annotation: Any) -> list[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return [value for value in arguments if isinstance(value, str)]
    if origin is Annotated:
        return [name for extra in arguments if isinstance(extra, Names) for name in extra.builtin]
    return [name for argument in arguments for name in _names(argument)]


def expected(key: str) -> str:
    """Return in words what `key` may be: "a whole number of at least 1, or auto"."""
    parts = _words(keys()[key])
    if len(parts) == 1:
        return parts[0]
    between = ", or " if any(" " in part for part in parts) else " or "
    return ", ".join(parts[:-1]) + between + parts[-1]


def _words(annotation: Any) -> list[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        said = [extra.words for extra in arguments if isinstance(extra, Expected)]
        return said or [name for extra in arguments if isinstance(extra, Names) for name in extra.builtin]
    if origin in (typing.Union, types.UnionType):
        return [words for argument in arguments for words in _words(argument)]
    if origin is Literal:
        return [show(value) if not isinstance(value, str) else value for value in arguments]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [f"a mapping {{{', '.join(annotation.model_fields)}}}"]
    return {bool: ["true", "false"], str: ["text"], types.NoneType: ["null"]}[annotation]


def show(value: object) -> str:
    """Write a value as a config file would: true, null, 'text', 3."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    try:
        text = " ".join(repr(value).split()) if not isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no integer of more than some thousand digits
        text = f"<{type(value).__name__} with more digits than can be shown>"
    return text if len(text) <= 80 else f"{text[:77]}..."
