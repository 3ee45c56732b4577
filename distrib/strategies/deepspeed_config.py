"""DeepSpeed's configuration: what this run's settings make of it, and a user's own file, checked key by key.

What is decided here for every strategy (when a window ends, clipping, loss scaling, number formats) cannot be decided in the
file as well: it may say the same, or "auto". The keys and types of its sections are DeepSpeed's own pydantic models.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from distrib.config.schema import show
from distrib.errors import ConfigError, StrategyError, did_you_mean
from distrib.precision.policy import PrecisionPolicy
from distrib.state import Runtime

Tree = Mapping[str, Any]
AUTO: Final = "auto"

# Sections whose keys are those of one of DeepSpeed's models: name -> module and class.
_MODELS: Final = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
}
# Sections that DeepSpeed reads key by key.
_LISTED: Final = {
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "flops_profiler": (
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file",
    ),
}  # fmt: skip
CLIENT: Final = ("optimizer", "scheduler")  # sections about what the script itself makes
_SIZES: Final = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Keys with one value: name -> its types.
_VALUES: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(_SIZES, (int,)),
    "gradient_clipping": (int, float),
    "communication_data_type": (str,),
    "steps_per_print": (int, type(None)),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "dump_state": (bool,),
    "disable_python_gc": (bool,),
    "log_level": (str,),
    "zero_allow_untested_optimizer": (bool,),
    "zero_force_ds_cpu_optimizer": (bool,),
}
_OFFLOADS: Final = {
    "offload_optimizer": 1,
    "offload_param": 3,
}  # what can be offloaded -> the least stage that does
_COMMUNICATION: Final = ("fp32", "bf16", "fp16")
_SCALING: Final = (
    "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale",
)  # fmt: skip
_CLIP: Final = "call accelerator.clip_grad_norm_ in the loop; in the file, leave it out or write 0"
# What DeepSpeed has and a run of this library does otherwise, or not: dotted key -> what to do instead.
_REFUSED: Final = {
    "amp": "set mixed_precision",
    "activation_checkpointing": "set activation_checkpointing in the run's own settings",
    "torch_autocast": "set mixed_precision",
    "data_types": "set mixed_precision",
    "prescale_gradients": "leave it out: gradients are averaged",
    "gradient_predivide_factor": "leave it out: gradients are averaged",
    "gradient_allreduce_op": "leave it out: gradients are averaged",
    "sparse_gradients": "make embeddings with sparse=False",
    "managed_gradient_accumulation": "leave it out: accumulate decides when a window ends",
    "data_efficiency": "sample in the DataLoader",
    "curriculum_learning": "sample in the DataLoader",
    "dataloader_drop_last": "set data.tail: drop",
    "checkpoint": "save_state and load_state write and read checkpoints",
    "compile": "set compile.scope",
    "tensor_parallel": "set mesh.tensor with strategy: fsdp",
    "sequence_parallel_size": "set mesh.context, which divides sequences between the ranks of any model with blocks",
    "pipeline": "set mesh.pipeline with strategy: fsdp",
    "elasticity": "the launcher restarts runs: launch.max_restarts",
    "autotuning": "leave it out",
    "hybrid_engine": "generate inside accelerator.gathered(model)",
    "zero_optimization.zenflow": "leave it out",
    "zero_optimization.parameter_alignment": "leave it out",
    "zero_optimization.legacy_stage1": "leave it out",
    "zero_optimization.elastic_checkpoint": "checkpoints load at any world size as they are",
    "zero_optimization.cpu_offload": "write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "write offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory inside offload_optimizer and offload_param",
    "zero_optimization.offload_optimizer.super_offload": "leave it out",
    "zero_optimization.offload_optimizer.ratio": "leave it out: all optimizer state is offloaded, or none",
    "zero_optimization.zero_quantized_nontrainable_weights": "leave it out: frozen weights stay exact",
    "bf16.immediate_grad_update": "leave it out",
    "bf16.bf16_master_weights_and_grads": "leave it out: masters are float32",
    "bf16.bf16_optimizer_states": "leave it out: optimizer state is float32",
    "fp16.fp16_master_weights_and_grads": "leave it out: masters are float32",
    "fp16.auto_cast": "leave it out: autocast sees to inputs",
}
# of a model's hidden size h, as transformers resolves them
_OF_HIDDEN_SIZE: Final = {
    "reduce_bucket_size": lambda h: h * h,
    "stage3_prefetch_bucket_size": lambda h: 9 * h * h // 10,
    "stage3_param_persistence_threshold": lambda h: 10 * h,
}
_MOST_IN_A_BUCKET: Final = (
    500_000_000  # DeepSpeed's own default; a bucket of a small model need not be longer than it
)


@dataclass(frozen=True)
class UserFile:
    """A user's own DeepSpeed configuration.

    Attributes:
        path: The file, or the setting that holds what it says; empty if there is none.
        tree: What it says.
    """

    path: str = ""
    tree: Tree = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Return the place of a dotted key, for messages."""
        return f"{self.path} ({key})"

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key."""
        found: Any = self.tree
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found


@dataclass(frozen=True)
class Settings:
    """What this run's own configuration says, as far as DeepSpeed's can contradict it.

    Attributes:
        stage: `deepspeed.zero_stage`, which a file may decide if it is not set.
        stage_is_set: Whether it is.
        offload: `deepspeed.offload_optimizer` and `offload_param`, by name.
        nvme_path: `deepspeed.nvme_path`; None if it is not set.
        global_batch_size: As there; None if it is not set.
        accumulation: `gradient_accumulation_steps`; None if it is not set.
        precision: Number formats.
        world_size: Number of ranks.
        readers: How many of them read different samples.
        device_type: torch's name of the device: "cpu", "cuda".
    """

    stage: int
    stage_is_set: bool
    offload: Mapping[str, str]
    nvme_path: str | None
    global_batch_size: int | None
    accumulation: int | None
    precision: PrecisionPolicy
    world_size: int
    readers: int
    device_type: str

    @classmethod
    def of(cls, options: Mapping[str, object], runtime: Runtime) -> Settings:
        """Collect them from a strategy's options and the run."""
        explicit: Any = options.get("explicit", {})
        return cls(
            stage=int(str(options.get("zero_stage", 2))),
            stage_is_set="deepspeed.zero_stage" in explicit,
            offload={name: str(options.get(name, "none")) for name in _OFFLOADS},
            nvme_path=None if (path := options.get("nvme_path")) is None else str(path),
            global_batch_size=explicit.get("global_batch_size"),
            accumulation=explicit.get("gradient_accumulation_steps"),
            precision=runtime.precision,
            world_size=runtime.collectives.world_size,
            readers=runtime.readers.world_size,
            device_type=runtime.device.type,
        )


@dataclass(frozen=True)
class Seen:
    """What `prepare` sees of a model.

    Attributes:
        numel: Elements of all parameters.
        largest: Elements of the largest one.
        hidden_size: Of a model that says it in its configuration, as those of transformers do; else None.
    """

    numel: int
    hidden_size: int | None
    largest: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Seen:
        """Look at a model."""
        sizes = [getattr(x, "ds_numel", x.numel()) for x in model.parameters()]
        config = getattr(model, "config", None)
        config = getattr(config, "text_config", None) or config
        size = getattr(config, "hidden_size", None)
        return cls(sum(sizes), size if isinstance(size, int) else None, max(sizes, default=1))


def read_user_file(path: object) -> UserFile:
    """Read a user's own file; None is none, and a mapping is what would stand in it.

    Raises:
        ConfigError: D0880, if it cannot be read; D0881, if it holds no JSON object.
    """
    if path is None:
        return UserFile()
    if isinstance(path, Mapping):
        return UserFile("deepspeed.config", dict(path))
    name = str(path)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            "D0880",
            f"cannot read {name}: {reason}",
            where="deepspeed.config",
            fix="correct the path; a relative one begins where the run was started",
        ) from None
    try:
        tree = json.loads(text, object_pairs_hook=lambda pairs: _without_repeats(pairs, name))
    except json.JSONDecodeError as error:
        raise ConfigError(
            "D0881",
            f"not JSON: {error.msg} at column {error.colno}",
            where=f"{name}:{error.lineno}",
            fix="correct the file there; JSON has no comments and no comma after the last entry",
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            "D0881", f"the file holds {show(tree)}; expected an object of DeepSpeed's keys", where=name
        )
    return UserFile(name, tree)


def check(user: UserFile, settings: Settings) -> None:
    """Refuse a file that DeepSpeed would misread, or that contradicts this run's own settings.

    Raises:
        ConfigError: D0882, for a key that does not exist; D0883, for a wrong value; D0884, for a contradiction, with both
            values; D0885, for an "auto" that nothing resolves; D0886, for what is decided or done elsewhere; D0887, for
            options that need another stage.
    """
    for key, value in user.tree.items():
        if key not in CLIENT:
            _check_key(user, key, value)
    _check_formats(user, settings)
    _check_sizes(user, settings)
    stated = user.get("gradient_clipping", 0)
    if stated not in (0, AUTO):
        raise contradiction(user, "gradient_clipping", stated, "clipping is the loop's", _CLIP)
    _check_zero(user, settings)


def stage_of(user: UserFile, settings: Settings) -> int:
    """Return ZeRO's stage: the file's, if it says one, else that of the settings."""
    stated = user.get("zero_optimization.stage", AUTO)
    return settings.stage if stated == AUTO else int(stated)


def engine_config(
    user: UserFile, settings: Settings, seen: Seen, narrow: torch.dtype | None
) -> dict[str, Any]:
    """Return what an engine is made with: the user's file, with what is decided here, and every "auto" resolved.

    Args:
        user: The file, checked.
        settings: This run's own.
        seen: The model.
        narrow: The format that parameters are kept in to compute with; None for that of the model.

    Raises:
        ConfigError: D0885, if an "auto" needs a model that says its hidden size.
    """
    stage = stage_of(user, settings)
    own = {key: value for key, value in user.tree.items() if key not in (*_SIZES, *CLIENT, "fp16", "bf16")}
    reduce = settings.precision.reduce
    config: dict[str, Any] = {
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        **({"communication_data_type": _name(reduce)} if reduce is not None else {}),
        **own,
        "train_micro_batch_size_per_gpu": 1,  # only its reports of speed use it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero_config(user, settings, seen, stage),
    }
    micro = user.get("train_micro_batch_size_per_gpu", AUTO)
    if micro != AUTO:
        config["train_micro_batch_size_per_gpu"] = micro
    if narrow is torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if narrow is torch.float16:
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}
    if narrow is not None and stage >= 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def unused_scaling(user: UserFile) -> list[str]:
    """Return the options of DeepSpeed's loss scale that a file has, and that do nothing here."""
    return [f"fp16.{name}" for name in _SCALING if f"{user.get(f'fp16.{name}', AUTO)}" != AUTO]


def zero_options() -> Iterator[str]:
    """Yield the dotted keys that DeepSpeed has in `zero_optimization`."""
    module, _, name = _MODELS["zero_optimization"].partition(":")
    yield from _keys_of(getattr(importlib.import_module(module), name), "zero_optimization")


def _keys_of(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, entry in model.model_fields.items():
        yield f"{prefix}.{name}"
        if (inner := _model_in(entry.annotation)) is not None:
            yield from _keys_of(inner, f"{prefix}.{name}")


def refuse_precision(policy: PrecisionPolicy, stage: int) -> None:
    """Refuse number formats that ZeRO's stages do not have.

    Raises:
        StrategyError: D0879.
    """
    problem = ""
    if policy.fp8:
        problem = "computes in fp8"
    elif policy.compute is not None and stage > 0 and policy.fp32_modules:
        problem = "has fp32_modules, but ZeRO keeps all parameters in one format"
    elif policy.param not in (None, torch.float32):
        problem = f"keeps parameters in {_name(policy.param)}, but ZeRO's masters are float32"
    if problem:
        raise StrategyError(
            "D0879",
            f"mixed_precision {problem}",
            where="mixed_precision",
            fix="use no, bf16 or fp16, or a mapping without that; or choose strategy: fsdp",
        )


def _zero_config(user: UserFile, settings: Settings, seen: Seen, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {**user.get("zero_optimization", {}), "stage": stage}
    for name, device in settings.offload.items():
        if device != "none":
            zero[name] = {**zero.get(name, {}), "device": device}
        if zero.get(name, {}).get("device") == "nvme":
            path = zero[name].get("nvme_path", settings.nvme_path)
            zero[name] = {**zero[name], "nvme_path": path}
            if name == "offload_param":  # DeepSpeed's own default takes gigabytes, whatever the model
                zero[name].setdefault("buffer_size", -(-seen.largest // settings.world_size))
    if stage in (1, 2) and zero.get("offload_optimizer", {}).get("device", "none") == "none":
        zero.setdefault("compute_grad_norm", False)  # clipping makes its own, when it is asked for
    if stage == 1:
        zero["overlap_comm"] = False  # it exchanges at the window's end
    for name, value in list(zero.items()):
        if value == AUTO:
            zero[name] = _resolved(user, name, seen)
    zero.setdefault("reduce_bucket_size", min(max(seen.numel, 1), _MOST_IN_A_BUCKET))
    return zero


def _resolved(user: UserFile, name: str, seen: Seen) -> int:
    if seen.hidden_size is None:
        raise ConfigError(
            "D0885",
            "is auto, which is resolved from the hidden size that a model of transformers has in its configuration; this "
            "model says none",
            where=user.where(f"zero_optimization.{name}"),
            fix="write a number, or leave it out for a default",
        )
    return int(_OF_HIDDEN_SIZE[name](seen.hidden_size))


def _check_key(user: UserFile, key: str, value: Any) -> None:
    if key in _REFUSED:
        raise _refusal(user, key)
    if key in _VALUES:
        _check_value(user, key, value)
    elif key in _LISTED:
        _check_section(user, key, value)
        _check_names(user, key, value, _LISTED[key])
    elif key in _MODELS:
        _check_section(user, key, value)
        module, _, name = _MODELS[key].partition(":")
        _check_model(user, key, value, getattr(importlib.import_module(module), name))
    else:
        raise unknown(user, key, [*_VALUES, *_LISTED, *_MODELS, *CLIENT])


def _check_value(user: UserFile, key: str, value: Any) -> None:
    types = _VALUES[key]
    fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if key in _SIZES and fits:
        fits = value >= 1
    if key == "communication_data_type" and value not in _COMMUNICATION:
        raise wrong(user, key, value, f"one of {', '.join(_COMMUNICATION)}")
    if not fits and not (value == AUTO and key in (*_SIZES, "gradient_clipping")):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        wanted = "a whole number of at least 1" if key in _SIZES else words.get(types[-1], words[types[0]])
        raise wrong(user, key, value, wanted)


def _check_section(user: UserFile, key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise wrong(user, key, value, "an object of keys")


def _check_model(user: UserFile, key: str, tree: Mapping[str, Any], model: type[BaseModel]) -> None:
    known = {alias: (name, f) for name, f in model.model_fields.items() for alias in (name, f.alias or name)}
    _check_names(user, key, tree, list(known))
    for name, value in tree.items():
        inner = _model_in(known[name][1].annotation)
        if f"{key}.{name}" in _REFUSED and value not in (False, None, known[name][1].default):
            raise _refusal(user, f"{key}.{name}")
        if inner is not None and value is not None:
            _check_section(user, f"{key}.{name}", value)
            _check_model(user, f"{key}.{name}", value, inner)
    for name, value in _autos(tree):
        if f"{key}.{name}" not in ("fp16.enabled", "bf16.enabled", "zero_optimization.stage") and not (
            key == "zero_optimization" and name in _OF_HIDDEN_SIZE
        ):
            may = ", ".join(["fp16.enabled", "bf16.enabled", *_OF_HIDDEN_SIZE])
            raise ConfigError(
                "D0885",
                f"is {show(value)}, which nothing resolves; auto is known for batch sizes, gradient_clipping, {may}",
                where=user.where(f"{key}.{name}"),
                fix="write a value, or leave it out",
            )
    plain = {name: x for name, x in tree.items() if x != AUTO and not (key == "fp16" and name in _SCALING)}
    try:
        model(**plain)
    except (ValidationError, AssertionError) as error:
        first: Any = (
            error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        )
        place = ".".join([key, *map(str, first["loc"])])
        raise wrong(user, place, user.get(place), first["msg"].lower()) from None


def _check_names(user: UserFile, key: str, tree: Tree, known: Sequence[str]) -> None:
    for name in tree:
        if name not in known:
            raise unknown(user, f"{key}.{name}", [f"{key}.{x}" for x in known])


def _check_formats(user: UserFile, settings: Settings) -> None:
    computed = settings.precision.compute
    stated = {name: user.get(f"{name}.enabled", AUTO) for name in ("fp16", "bf16")}
    if stated["fp16"] is True and stated["bf16"] is True:
        raise contradiction(
            user,
            "fp16.enabled",
            True,
            "bf16.enabled is true too",
            "set one of them to false, or both to auto",
        )
    for name, enabled in stated.items():
        is_ours = computed is not None and _name(computed) == name
        if enabled != AUTO and name in user.tree and enabled is not is_ours:
            raise contradiction(
                user,
                f"{name}.enabled",
                enabled,
                f"mixed_precision is {settings.precision.name}",
                f"set mixed_precision: {name if enabled else 'no'}, or {name}.enabled to auto",
            )


def _check_sizes(user: UserFile, settings: Settings) -> None:
    total, micro, steps = (None if user.get(x, AUTO) == AUTO else int(user.get(x)) for x in _SIZES)
    ranks = settings.readers
    if total is not None and micro is not None and steps is not None and total != micro * steps * ranks:
        raise contradiction(
            user,
            "train_batch_size",
            total,
            "train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks is "
            f"{micro} x {steps} x {ranks} = {micro * steps * ranks}",
            "correct one of them, or set it to auto",
        )
    is_product = micro is not None and steps is not None and settings.global_batch_size is None
    if total is not None and not is_product and total != settings.global_batch_size:
        raise _other_size(user, "train_batch_size", total, "global_batch_size", settings.global_batch_size)
    expected = _steps_of(settings, micro)
    if steps is not None and expected is not None and steps != expected:
        name = "gradient_accumulation_steps"
        raise _other_size(user, name, steps, name, settings.accumulation)


def _steps_of(settings: Settings, micro: int | None) -> float | None:
    """Return how many micro-steps this run's settings make of a window; None if a loader's batches decide it."""
    if settings.global_batch_size is None:
        return settings.accumulation or 1
    return None if micro is None else settings.global_batch_size / (micro * settings.readers)


def _other_size(user: UserFile, key: str, stated: int, name: str, ours: int | None) -> ConfigError:
    says = f"{name} is {'not set' if ours is None else ours}"
    return contradiction(user, key, stated, says, f"set {name}: {stated}, or {key} in the file to auto")


def _check_zero(user: UserFile, settings: Settings) -> None:
    stage, stated = stage_of(user, settings), user.get("zero_optimization.stage", AUTO)
    if settings.stage_is_set and stated not in (AUTO, settings.stage):
        raise contradiction(
            user,
            "zero_optimization.stage",
            stated,
            f"deepspeed.zero_stage is {settings.stage}",
            "remove one of them",
        )
    devices = [_check_offload(user, settings, name, stage) for name in _OFFLOADS]
    if settings.nvme_path is not None and "nvme" not in devices:
        raise ConfigError(
            "D0887",
            f"is {settings.nvme_path}, but nothing is offloaded to nvme",
            where="deepspeed.nvme_path",
            fix="set deepspeed.offload_optimizer or offload_param to nvme, or remove it",
        )
    _check_plus_plus(user, settings, stage)
    if stage == 1 and user.get("zero_optimization.overlap_comm") is True:
        raise ConfigError(
            "D0887",
            "is true, but the stage is 1, where gradients are exchanged at the end of a window",
            where=user.where("zero_optimization.overlap_comm"),
            fix="leave it out, or set stage: 2",
        )


def _check_offload(user: UserFile, settings: Settings, name: str, stage: int) -> str:
    """Check where `name` is to be kept, and return it: "none", "cpu" or "nvme"."""
    in_file, ours = user.get(f"zero_optimization.{name}.device", "none"), settings.offload[name]
    if "none" not in (in_file, ours) and in_file != ours:
        raise contradiction(
            user,
            f"zero_optimization.{name}.device",
            in_file,
            f"deepspeed.{name} is {ours}",
            "remove one of them",
        )
    device = in_file if in_file != "none" else ours
    where = user.where(f"zero_optimization.{name}") if in_file != "none" else f"deepspeed.{name}"
    if device == "nvme":
        _check_nvme_path(user, settings, name, where)
    least = 3 if device == "nvme" else _OFFLOADS[name]
    if device != "none" and stage < least:
        raise ConfigError(
            "D0887",
            f"is {device}, but the stage is {stage}; it needs {'stage 3' if least == 3 else 'a stage of at least 1'}",
            where=where,
            fix=f"set deepspeed.zero_stage: {least}, or leave {name} out",
        )
    return str(device)


def _check_nvme_path(user: UserFile, settings: Settings, name: str, where: str) -> None:
    in_file = user.get(f"zero_optimization.{name}.nvme_path")
    if in_file is None and settings.nvme_path is None:
        raise ConfigError(
            "D0941",
            "is nvme, but nothing says in which folder of which disk",
            where=where,
            fix="set deepspeed.nvme_path to a folder of a local disk",
        )
    if None not in (in_file, settings.nvme_path) and in_file != settings.nvme_path:
        raise contradiction(
            user,
            f"zero_optimization.{name}.nvme_path",
            in_file,
            f"deepspeed.nvme_path is {settings.nvme_path}",
            "remove one of them",
        )


def _check_plus_plus(user: UserFile, settings: Settings, stage: int) -> None:
    """Check the options of ZeRO++."""
    for name in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"):
        key = f"zero_optimization.{name}"
        value = user.get(key, default=False)
        if value in (False, 0, 1) and value is not True:
            continue
        if stage < 3:
            raise ConfigError(
                "D0887",
                f"is {show(value)}, but the stage is {stage}; it needs stage 3",
                where=user.where(key),
                fix="set stage: 3, or leave it out",
            )
        if value is True and settings.device_type != "cuda":
            raise ConfigError(
                "D0942",
                f"is true, but the device is {settings.device_type}; DeepSpeed has kernels that quantize for cuda only",
                where=user.where(key),
                fix="leave it out on this device",
            )
        if value is not True and settings.world_size % value:
            raise ConfigError(
                "D0943",
                f"is {value}, which does not divide the {settings.world_size} ranks of this run",
                where=user.where(key),
                fix="set it to the number of ranks on a node, or leave it out",
            )


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _autos(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value.lower() == AUTO:
            yield f"{prefix}{name}", value


def _without_repeats(pairs: Sequence[tuple[str, Any]], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(
                "D0881", f"key {name!r} stands twice in one object", where=path, fix="remove one of them"
            )
        found[name] = value
    return found


def unknown(user: UserFile, key: str, known: Sequence[str]) -> ConfigError:
    """Return the error for a key that does not exist."""
    return ConfigError(
        "D0882",
        f"DeepSpeed has no key {key!r}{did_you_mean(key, known)}",
        where=user.where(key),
        fix="correct or remove it: DeepSpeed itself would pass over it, or stop far from here",
    )


def wrong(user: UserFile, key: str, value: Any, wanted: str) -> ConfigError:
    """Return the error for a value that a key cannot have."""
    return ConfigError(
        "D0883",
        f"got {show(value)}; expected {wanted}"
        if not wanted.startswith(("input", "value"))
        else f"got {show(value)}: {wanted}",
        where=user.where(key),
        fix="give it such a value, or leave it out",
    )


def contradiction(user: UserFile, key: str, stated: Any, ours: str, fix: str) -> ConfigError:
    """Return the error for a key that says something else than the run does."""
    return ConfigError("D0884", f"is {show(stated)}, but {ours}", where=user.where(key), fix=fix)


def _refusal(user: UserFile, key: str) -> ConfigError:
    return ConfigError(
        "D0886",
        "is decided or done elsewhere in a run of distrib, so it cannot stand in DeepSpeed's file",
        where=user.where(key),
        fix=_REFUSED[key],
    )


def _name(dtype: torch.dtype | None) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(
        dtype or torch.float32, "fp32"
    )
