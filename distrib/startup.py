"""From settings and environment to a running job: what an accelerator does once, when it is built."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distrib.collectives import connect_ranks
from distrib.config import RunConfig, from_wire, load_config, with_code
from distrib.config.schema import default_of, sections, show, value_at
from distrib.devices import choose_device
from distrib.errors import ConfigError, StrategyError
from distrib.precision import resolve_precision
from distrib.state import Runtime
from distrib.strategies import Capabilities, Strategy, choose_strategy
from distrib.topology import DATA_AXES, Mesh, detect_topology, resolve_mesh
from distrib.topology.threads import threads_per_rank, usable_cores

# section of the configuration -> the axis of the mesh that it is about
_ABOUT = {"tensor_parallel": "tensor", "context_parallel": "context", "pipeline": "pipeline"}


@dataclasses.dataclass(frozen=True)
class Startup:
    """What was decided, and the line that says so."""

    runtime: Runtime
    strategy: Strategy
    summary: str


def read_config(given: object, arguments: Mapping[str, Any], env: Mapping[str, str], where: str) -> RunConfig:
    """Return the settings of this run: the launcher's or a file's, and those that the script gives.

    Args:
        given: The accelerator's first argument: a RunConfig, a path or None.
        arguments: Dotted key -> value of its keyword arguments that are not None, and `cpu`.
        env: The process's environment.
        where: "file:line" of the script's call.

    Raises:
        ConfigError: if the script contradicts what was set at launch, or a value is wrong.
    """
    values = dict(arguments)
    cpu = values.pop("cpu", None)
    if cpu is not None and not isinstance(cpu, bool):
        raise ConfigError(
            "D0106",
            f"got {show(cpu)}; expected True, False or None",
            where=f"{where} (cpu)",
            fix="pass cpu=True to stay on the CPU, or leave it out",
        )
    if cpu:
        values["device"] = "cpu"
    return with_code(_before_arguments(given, env, where), values, where)


def _before_arguments(given: object, env: Mapping[str, str], where: str) -> RunConfig:
    launched = env.get("DISTRIB_CONFIG")
    if given is None:
        return from_wire(launched) if launched else load_config(env=env, cwd=Path.cwd(), read_cwd=False)
    if isinstance(given, RunConfig):
        own = given
    else:  # what the launcher passed already has the environment's settings in it
        path = _path_of(given, where)
        own = load_config(file=path, env={} if launched else env, cwd=Path.cwd(), read_cwd=False)
    return with_code(from_wire(launched), own.set_values(), where) if launched else own


def _path_of(given: object, where: str) -> str:
    path = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if isinstance(path, str) and path:
        return path
    raise ConfigError(
        "D0106",
        f"got {show(given)}; expected a RunConfig, or the path of a YAML or JSON file",
        where=f"{where} (config)",
        fix="leave it out, or pass RunConfig(seed=0, ...) or 'run.yaml'",
    )


def start(config: RunConfig, env: Mapping[str, str]) -> Startup:
    """Find out where we are, take the device, meet the other ranks and make the strategy. Collective.

    Raises:
        DistribError: of the part that does not fit, before any other rank is waited for where that is possible.
    """
    topology = detect_topology(env)
    backend, device_reason = choose_device(
        config.device, topology.local_world_size, env=env, where=_where(config, "device")
    )
    name, strategy, strategy_reason = choose_strategy(
        config.strategy, topology.world_size, backend.name, where=_where(config, "strategy")
    )
    options = {**_options_of(name, config), "env": env}
    places = strategy.begin(topology, backend, options)
    mesh = _mesh(config, name, strategy.capabilities, places.number)
    device = backend.bind(topology.local_rank)
    precision = resolve_precision(config.mixed_precision, backend, where=_where(config, "mixed_precision"))
    if config.matmul_precision is not None:
        torch.set_float32_matmul_precision(config.matmul_precision)
    threads, threads_reason = threads_per_rank(env, usable_cores(), topology.local_world_size)
    if topology.world_size > 1:
        torch.set_num_threads(threads)
    collectives = connect_ranks(
        topology,
        backend,
        device,
        config.watch.stall_timeout_s,
        rendezvous_timeout_s=config.launch.rdzv_timeout_s,
    )
    readers = collectives.among(places.readers(mesh, topology.world_size))
    runtime = Runtime(topology, mesh, device, backend, collectives, readers, precision)
    summary = (
        f"{topology.world_size} process{'es' if topology.world_size > 1 else ''} ({topology.source}), "
        f"strategy {name} ({strategy_reason}), device {device} ({device_reason}), precision {precision.name}"
        + (f", matmul precision {config.matmul_precision}, " if config.matmul_precision else ", ")
        + f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} each"
        + (f" ({threads_reason})" if topology.world_size > 1 else "")
        + (f", config {config.file}" if config.file else "")
    )
    return Startup(runtime, strategy(runtime, options), summary)


def _mesh(config: RunConfig, strategy: str, knows: Capabilities, world_size: int) -> Mesh:
    """Return the mesh; an axis without a size, the strategy's free one if it may be, takes what is left.

    Raises:
        ConfigError: if the sizes do not multiply to the world size.
        StrategyError: D0832, if ranks are asked for along an axis that the strategy does not know; D0841, along two that
            do not go together; D0859, along that of experts.
    """
    sizes = {axis: size for axis, size in config.mesh.model_dump().items() if config.is_set(f"mesh.{axis}")}
    free = [axis for axis in (knows.free_axis, *DATA_AXES) if axis in knows.axes]
    first = next(iter(sizes), "replicate")
    mesh = resolve_mesh(sizes, world_size, free=free, where=_where(config, f"mesh.{first}"))
    _refuse_experts(config, mesh)
    for axis, size in mesh.axes:
        if size > 1 and axis not in knows.axes:
            raise StrategyError(
                "D0832",
                f"mesh.{axis} is {size}, but strategy {strategy} lays ranks out along {', '.join(knows.axes)} only",
                where=_where(config, f"mesh.{axis}"),
                fix="leave it out, or choose another strategy",
            )
    for one, other in knows.apart:
        if mesh.size(one) > 1 and mesh.size(other) > 1:
            raise StrategyError(
                "D0841",
                f"mesh.{one} is {mesh.size(one)} and mesh.{other} is {mesh.size(other)}, but strategy {strategy} does not "
                "divide a model along both",
                where=_where(config, f"mesh.{one}"),
                fix="leave one of them out",
            )
    _refuse_without_effect(config, mesh)
    return mesh


def _refuse_experts(config: RunConfig, mesh: Mesh) -> None:
    """Refuse an axis of experts, with what to do instead.

    Raises:
        StrategyError: D0859.
    """
    if mesh.size("expert") == 1:
        return
    raise StrategyError(
        "D0859",
        f"mesh.expert is {mesh.size('expert')}, but experts have no axis of their own: each model's mixture layer "
        "would have to send tokens to the ranks of their experts, and torch has no style for that",
        where=_where(config, "mesh.expert"),
        fix="leave it out: under fsdp every expert is sharded over mesh.shard like other parameters, under ddp every rank "
        "has all experts; docs/sharding.md (Limits) says what that costs",
    )


def _refuse_without_effect(config: RunConfig, mesh: Mesh) -> None:
    """Refuse settings about an axis along which there is one rank, and a combination that is not built.

    Raises:
        ConfigError: D0107.
    """
    for section, axis in _ABOUT.items():
        for key in sections()[section].model_fields:
            name = f"{section}.{key}"
            if config.is_set(name) and value_at(config, name) != default_of(name) and mesh.size(axis) == 1:
                raise ConfigError(
                    "D0107",
                    f"{name} does nothing, since mesh.{axis} is 1",
                    where=_where(config, name),
                    fix=f"set mesh.{axis}, or remove {name}",
                )
    if mesh.size("context") > 1 and config.compile.scope != "none":
        raise ConfigError(
            "D0107",
            f"compile.scope is {config.compile.scope}, but mesh.context is {mesh.size('context')}; blocks that work on "
            "parts of sequences are not compiled",
            where=_where(config, "compile.scope"),
            fix="remove one of the two",
        )


def _options_of(name: str, config: RunConfig) -> dict[str, object]:
    """Return the section of a strategy, with the keys that are of every strategy."""
    section = getattr(config, name, None)
    return {
        **(section.model_dump() if section else {}),
        "sync_batchnorm": config.sync_batchnorm,
        "activation_checkpointing": config.activation_checkpointing,
        "compile": config.compile.model_dump(),
        **config.tensor_parallel.model_dump(),
        "context_attention": config.context_parallel.attention,
        "pipeline": config.pipeline.model_dump(),
        "explicit": config.set_values(),
    }


def _where(config: RunConfig, key: str) -> str:
    source = config.source(key)
    return f"{source.where} ({key})" if source.where else key
