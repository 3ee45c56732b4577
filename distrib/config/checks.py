"""From settings of several layers to one set of values, or to every problem that they have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from distrib.config import not_built
from distrib.config.problems import raise_all
from distrib.config.schema import (
    MAX_COUNT,
    Values,
    canonical,
    default_of,
    expected,
    is_valid,
    keys,
    names_of,
    nested,
    sections,
    show,
)
from distrib.config.settings import PRECEDENCE, Overridden, Setting
from distrib.errors import ConfigError, NotBuiltError, did_you_mean


@dataclass(frozen=True)
class Resolved:
    """The outcome: valid values, the setting behind each explicit one, and what lost."""

    values: Values
    winners: Mapping[str, Setting]
    overridden: tuple[Overridden, ...]


def resolve(settings: Iterable[Setting], problems: Sequence[ConfigError] = ()) -> Resolved:
    """Check all settings and let the highest layer win for each key.

    Args:
        settings: In any order.
        problems: What was found wrong before, to be raised together with what is found here.

    Raises:
        ConfigError: with every problem at once.
    """
    ranked = sorted(settings, key=lambda setting: PRECEDENCE.index(setting.source.kind))
    found = {index: problem for index, setting in enumerate(ranked) if (problem := _check_one(setting))}
    found.update(_repeated(ranked))
    valid = [_canonical(setting) for index, setting in enumerate(ranked) if index not in found]
    winners = {setting.key: setting for setting in valid}
    raise_all([*problems, *found.values(), *_not_built_values(winners), *_check_together(winners)])
    values = Values.model_validate(nested({key: setting.value for key, setting in winners.items()}))
    losers = [setting for setting in valid if setting.value != winners[setting.key].value]
    return Resolved(values, winners, tuple(Overridden(winners[loser.key], loser) for loser in losers))


def _canonical(setting: Setting) -> Setting:
    return Setting(setting.key, canonical(setting.key, setting.value), setting.source)


def _repeated(ranked: Sequence[Setting]) -> dict[int, ConfigError]:
    """Find keys that one layer sets in two spellings, such as `mesh.shard:` beside `mesh: {shard: }`."""
    first: dict[tuple[str, str], Setting] = {}
    problems = {}
    for index, setting in enumerate(ranked):
        before = first.setdefault((setting.key, setting.source.kind), setting)
        if before is not setting:
            problem = f"{setting.key} is set to {show(setting.value)}, but {before.source.where} sets it too"
            problems[index] = ConfigError("D0104", problem, where=setting.where, fix="remove one of them")
    return problems


def _check_one(setting: Setting) -> ConfigError | None:
    if setting.key in sections():
        fields = ", ".join(sections()[setting.key].model_fields)
        return _wrong(setting, f"a mapping with some of {fields}", f"write {setting.key}: {{key: value}}")
    if setting.key not in keys():
        return _unknown(setting)
    if not not_built.is_built(setting.key):
        return _key_not_built(setting)
    if is_valid(setting.key, setting.value):
        return None
    return _wrong(setting, expected(setting.key), _how_to_mend(setting))


def _wrong(setting: Setting, wanted: str, fix: str) -> ConfigError:
    near = did_you_mean(setting.value, names_of(setting.key)) if _is_misspelt(setting) else ""
    too_long = isinstance(setting.value, int) and setting.value > MAX_COUNT
    near = ", with fewer than 1000 digits" if too_long else near
    problem = f"got {show(setting.value)}; expected {wanted}{near}"
    return ConfigError("D0106", problem, where=setting.where, fix=fix)


def _is_misspelt(setting: Setting) -> bool:
    return setting.key in keys() and isinstance(setting.value, str)


_YES_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _how_to_mend(setting: Setting) -> str:
    key, value, default = setting.key, setting.value, default_of(setting.key)
    meant = _YES_NO.get(value.lower()) if isinstance(value, str) else None
    if meant and (isinstance(default, bool) or "true" in expected(key)):
        return f"write {meant}: only true and false are booleans"
    if value is False and "no" in names_of(key):
        return "write no"
    return f"give {key} such a value, or leave it out (default: {show(default)})"


_OF_ACCELERATE: Final = {  # key -> ours, or empty
    "compute_environment": "",
    "debug": "",
    "deepspeed_config": "a section `deepspeed:`",
    "distributed_type": "strategy",
    "downcast_bf16": "",
    "dynamo_config": "a section `compile:`",
    "fsdp_config": "a section `fsdp:`",
    "gpu_ids": "the variable CUDA_VISIBLE_DEVICES",
    "machine_rank": "",
    "main_process_port": "launch.master_port",
    "main_training_function": "",
    "num_machines": "launch.nnodes",
    "num_processes": "launch.nproc_per_node",
    "rdzv_backend": "",
    "same_network": "",
    "use_cpu": "device: cpu",
}


def _unknown(setting: Setting) -> ConfigError:
    key, known = setting.key, (*keys(), *sections())
    same_name = [name for name in keys() if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if setting.source.kind == "env":
        near = did_you_mean(setting.source.where, map(variable_of, same_name or known))
    else:
        near = f"; did you mean {same_name[0]!r}?" if same_name else did_you_mean(key, known)
    return ConfigError(
        "D0105",
        f"unknown key {key!r}{near}",
        where=setting.where,
        fix=_said_otherwise(key) or "correct or remove it; docs/config.md lists every key",
    )


def _said_otherwise(key: str) -> str:
    """How to say what a key of Accelerate's configuration file says; empty for all others."""
    if key.partition(".")[0] not in _OF_ACCELERATE:
        return ""
    ours = _OF_ACCELERATE[key.partition(".")[0]]
    return f"this is a key of Accelerate's file; {f'ours is {ours}' if ours else 'leave it out, nothing here needs it'}"


def variable_of(key: str) -> str:
    """Return the environment variable that sets a dotted key: "mesh.shard" -> "DISTRIB_MESH__SHARD"."""
    return f"DISTRIB_{key.replace('.', '__').upper()}"


def _key_not_built(setting: Setting) -> NotBuiltError:
    key = setting.key
    return NotBuiltError(
        key,
        problem=f"{key} is set to {show(setting.value)}, but this version does not have {key} yet",
        where=setting.where,
        fix=f"leave {key} out",
    )


def _value_not_built(setting: Setting) -> NotBuiltError | None:
    key, value = setting.key, setting.value
    built = not_built.BUILT_VALUES.get(key)
    from_elsewhere = isinstance(value, str) and bool(names_of(key)) and value not in names_of(key)
    if built is None or value in built or from_elsewhere:
        return None
    available = ", ".join(name if isinstance(name, str) else show(name) for name in built)
    return NotBuiltError(
        key,
        problem=f"{key} is set to {show(value)}, but this version does not have that yet; it has {available}",
        where=setting.where,
        fix=f"set {key} to {available}" if len(built) == 1 else f"set {key} to one of {available}",
    )


def _not_built_values(winners: Mapping[str, Setting]) -> list[ConfigError]:
    return [problem for setting in winners.values() if (problem := _value_not_built(setting))]


def _check_together(winners: Mapping[str, Setting]) -> list[ConfigError]:
    return [
        *_one_batch_size(winners),
        *_options_of_another_strategy(winners),
        *_best_by_what(winners),
        *_compiling(winners),
    ]


def _compiling(winners: Mapping[str, Setting]) -> list[ConfigError]:
    """Find settings of torch.compile that would do nothing, or that the backend cannot follow."""
    scope, mode, backend = (winners.get(f"compile.{name}") for name in ("scope", "mode", "backend"))
    if scope is None or scope.value == "none":
        return [
            ConfigError(
                "D0107",
                f"this is an option of torch.compile, but compile.scope is {'not set' if scope is None else 'none'}",
                where=setting.where,
                fix="remove it, or set compile.scope to model or blocks",
            )
            for setting in winners.values()
            # A higher layer may switch off what a file sets up.
            if setting.key.startswith("compile.") and setting is not scope
            if scope is None or setting.source.kind == scope.source.kind
        ]
    problems = []
    if backend is not None and backend.value != "inductor" and mode is not None and mode.value != "default":
        problems.append(
            ConfigError(
                "D0107",
                f"compile.mode is {mode.value}, which only the backend inductor has; compile.backend is "
                f"{backend.value} at {backend.source.where}",
                where=mode.where,
                fix="remove compile.mode, or compile.backend",
            )
        )
    recomputed = winners.get("activation_checkpointing")
    if backend is not None and recomputed is not None and recomputed.value != "none":
        problems += _recomputing_and(backend, recomputed)
    return problems


def _recomputing_and(backend: Setting, recomputed: Setting) -> list[ConfigError]:
    if str(backend.value).startswith(("inductor", "aot_")):
        return []
    return [
        ConfigError(
            "D0107",
            f"activation_checkpointing is {recomputed.value} at {recomputed.source.where}, but compile.backend is "
            f"{show(backend.value)}, which may draw other random numbers when it recomputes; expected inductor or one "
            "whose name begins with aot_",
            where=backend.where,
            fix="set compile.backend to inductor or aot_eager",
        )
    ]


def _best_by_what(winners: Mapping[str, Setting]) -> list[ConfigError]:
    best, metric = winners.get("checkpoint.keep_best"), winners.get("checkpoint.best_metric")
    if best is None or best.value is None or (metric is not None and metric.value is not None):
        return []
    return [
        ConfigError(
            "D0107",
            "the best checkpoints are to be kept, but not by which metric; expected checkpoint.best_metric too",
            where=best.where,
            fix='set checkpoint.best_metric to a name that save_state(metrics={"loss": value}) uses',
        )
    ]


def _one_batch_size(winners: Mapping[str, Setting]) -> list[ConfigError]:
    pair = [winners.get("global_batch_size"), winners.get("gradient_accumulation_steps")]
    given = [setting for setting in pair if setting is not None and setting.value is not None]
    if len(given) < len(pair):
        return []
    batch, steps = given
    return [
        ConfigError(
            "D0107",
            f"global_batch_size is {batch.value}, but gradient_accumulation_steps is {steps.value} "
            f"at {steps.source.where}; expected one of the two, since either decides the other",
            where=batch.where,
            fix="remove one of them, or set it to null",
        )
    ]


def _options_of_another_strategy(winners: Mapping[str, Setting]) -> list[ConfigError]:
    chosen = winners.get("strategy")
    if chosen is None or chosen.value == "auto":
        return []
    others = set(names_of("strategy")) - {chosen.value}
    # A higher layer may switch the strategy of a file that has options for its own one.
    idle = [
        s
        for s in winners.values()
        if s.key.partition(".")[0] in others and s.source.kind == chosen.source.kind
    ]
    return [
        ConfigError(
            "D0107",
            f"this is an option of the strategy {setting.key.partition('.')[0]}, "
            f"but strategy is {chosen.value} at {chosen.source.where}",
            where=setting.where,
            fix=f"remove it, or set strategy to {setting.key.partition('.')[0]}",
        )
        for setting in idle
    ]
