"""TPUs and other PJRT devices through torch-xla: one process for each device, or one program for all of them (SPMD).

What a step computes is recorded and runs as one graph, cut once, behind the optimizer's step.
"""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.weak import WeakIdKeyDictionary

from distrib.collectives.xla import ranks_disagree
from distrib.devices.base import DeviceBackend
from distrib.devices.xla_runtime import PjrtBackend, pjrt_device
from distrib.errors import StrategyError
from distrib.logging import notice
from distrib.seeding import seed_too
from distrib.state import Runtime, ShardedState, TensorSpec, TrainState
from distrib.strategies import meta, slices, xla_check, xla_health
from distrib.strategies.base import Capabilities, Places, StepResult
from distrib.strategies.blocks import Forwards
from distrib.strategies.placing import apply_policy
from distrib.strategies.single import Single
from distrib.strategies.xla_replicas import Replicas, refuse_strays
from distrib.strategies.xla_spmd import Spmd
from distrib.strategies.xla_state import move, to_fill, to_save
from distrib.strategies.xla_step import DeviceStep, Recompilations, refuse_fused
from distrib.topology import Topology

_STEPPED: Final = StepResult(stepped=True)
_COMPILER: Final = "openxla"  # what torch-xla calls itself among the backends of torch.compile


class Xla(Single):
    """Whole models on each device with averaged gradients, or one model that the compiler divides over a mesh."""

    capabilities: ClassVar[Capabilities] = Capabilities(("xla",), axes=("replicate", "shard"), tail="pad")

    @classmethod
    def begin(cls, topology: Topology, backend: DeviceBackend, options: Mapping[str, object]) -> Places:
        assert isinstance(backend, PjrtBackend), "no other strategy's device comes here"
        backend.check_installation()
        runtime: Any = importlib.import_module("torch_xla.runtime")
        _refuse_options(options, topology)
        if options["compile_cache"] is not None:
            _keep_compiled(runtime, Path(str(options["compile_cache"])), topology, options)
        if runtime.is_spmd() and not options["spmd"]:
            raise StrategyError(
                "D0891",
                "xla.spmd is false, but this process has one program for all devices already",
                where="xla.spmd",
                fix="set it to true, take XLA_USE_SPMD out of the environment, or begin in a fresh process",
            )
        if options["spmd"]:
            if not runtime.is_spmd():
                runtime.use_spmd()
            if runtime.process_count() != topology.world_size:
                raise ranks_disagree(runtime.process_count(), topology.world_size, topology.source)
            return Places(int(runtime.global_runtime_device_count()), is_one_program=True)
        backend.on_host = _on_host(options, topology)
        if topology.world_size > 1 and not backend.on_host:
            pjrt: Any = importlib.import_module("torch_xla._internal.pjrt")
            pjrt.initialize_multiprocess(topology.local_rank, topology.local_world_size)
            if runtime.world_size() != topology.world_size:
                raise ranks_disagree(runtime.world_size(), topology.world_size, topology.source)
        return Places(topology.world_size)

    def __init__(self, runtime: Runtime, options: Mapping[str, object]) -> None:
        super().__init__(runtime, _with_own_compiler(options))
        if runtime.mesh.size("shard") > 1 and not options["spmd"]:
            raise StrategyError(
                "D0900",
                f"mesh.shard is {runtime.mesh.size('shard')}, but processes that have a device each hold whole models",
                where="mesh.shard",
                fix="set xla.spmd: true, where one process lays parameters out over its devices; or leave mesh.shard out",
            )
        backend = runtime.device_backend
        assert isinstance(backend, PjrtBackend), "no other device comes here"
        self._graph = backend.graph
        self._layout: Replicas | Spmd
        if options["spmd"]:
            self._layout = Spmd(runtime, self._graph)
            backend.lay_out = self._layout.lay_out
            if runtime.topology.is_main:
                notice(f"xla.spmd: {self._layout.describe()}")
        else:
            self._layout = Replicas(runtime, self._graph, on_host=backend.on_host)
        self._step = DeviceStep(runtime.device)
        self.recompilations = Recompilations(say=runtime.topology.is_main)
        self._cuts_each = options["barrier"] == "micro_step"
        self._trained: list[weakref.ref[nn.Module]] = []
        self._averaged = WeakIdKeyDictionary()  # parameters of trained models
        self._quiet: dict[int, int] = {}  # id of a model -> how many contexts keep its gradients on the rank
        self._is_seeded = False
        seed_too("xla", backend.seed)

    def prepare(self, state: TrainState) -> TrainState:
        for optimizer in state.optimizers:
            refuse_fused(optimizer)
        if state.models and not self._is_seeded:  # unless the script seeds again, as its other generators
            self._is_seeded = True
            self.runtime.device_backend.seed(self.runtime.collectives.broadcast_object(torch.initial_seed()))
        state = super().prepare(state)
        return replace(state, models=tuple(map(self._wrap, state.models)))

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        return self._layout.wrap(self.place(model))

    def place(self, model: nn.Module) -> nn.Module:
        with self._replaced.watching(model):
            if meta.is_empty(model):
                meta.materialise(model, self.runtime.device, self.runtime.collectives)
            self._layout.equalise(model)
            Forwards(self.options, self._parts, say=self.runtime.topology.is_main).replace(model)
            move(model, self.runtime.device)
        return apply_policy(model, self.runtime)

    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        if enabled or self._layout.alone:
            return nullcontext()
        return _Quiet(self._quiet, [id(self.unwrap(model)) for model in models])

    def backward(self, loss: Tensor) -> None:
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "device_ready_queues_" in str(error):
                raise _too_early() from error
            raise
        self._graph.has_backward = True
        if not self._layout.alone:
            for reference in self._trained:
                model = reference()
                if model is not None and not self._quiet.get(id(model)):
                    self._layout.average(model)
        if self._cuts_each:
            self._graph.run()

    def step(self, optimizer: Optimizer) -> StepResult:
        if not self._layout.alone:
            refuse_strays(optimizer, self._averaged)
        self._step(optimizer)
        self.recompilations.note(self._graph.cut())
        return _STEPPED

    def sharded_state(self, state: TrainState) -> ShardedState:
        for model in state.models:
            self._layout.spread_buffers(self.unwrap(model))
        self._graph.run(wait=True)  # one graph for all, not one for each tensor that is read
        return to_save(super().sharded_state(state), self._layout.parts_to_save)

    @contextmanager
    def loading(
        self,
        state: TrainState,
        stored: Mapping[str, TensorSpec],
        objects: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> Iterator[ShardedState]:
        models = [self.unwrap(model) for model in state.models]
        names = slices.parameter_names(models)
        describe = partial(super().sharded_state, state)
        with slices.loading_in_place(
            state, models, describe, names, stored, objects, strict=strict, empty_for=self._layout.empty_for
        ) as found:
            self._graph.run(wait=True)
            yield to_fill(found, self._layout.parts_to_fill)
        self._graph.run()

    def whole_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return the plain model's state dict with whole tensors in host memory, on every rank. Collective."""
        self._layout.spread_buffers(self.unwrap(model))
        self._graph.run()
        state = self.unwrap(model).state_dict()
        return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in state.items()}

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        self._layout.spread_buffers(self.unwrap(model))
        with self._layout.open(model):
            yield self.unwrap(model)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self._layout.unwrap(model)

    def used_settings(self) -> dict[str, Any]:
        return {"xla.torch_xla": str(importlib.import_module("torch_xla").__version__)}

    def join_uneven_inputs(self, models: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Refuse what cannot be: a rank without batches could not follow the graph of the others.

        Raises:
            StrategyError: D0810, with several ranks.
        """
        if self._layout.alone:
            return nullcontext()
        raise StrategyError(
            "D0810",
            "join_uneven_inputs cannot be used under xla: a rank without batches would have to run the others' graph",
            fix="give every rank the same number of batches, as a prepared loader does",
        )

    def _wrap(self, model: nn.Module) -> nn.Module:
        if isinstance(model, AveragedModel):  # it follows what is trained
            self._layout.annotate(model)
            return model
        if any(x.requires_grad for x in model.parameters()):
            self.recompilations.watch(model)
            self._trained = [x for x in self._trained if x() is not None] + [weakref.ref(model)]
            self._averaged.update(dict.fromkeys(model.parameters(), True))
        return self._layout.wrap(model)


class _Quiet:
    """Keeps the gradients of some models on the rank; can be entered again and again, and within itself."""

    def __init__(self, counts: dict[int, int], ids: Sequence[int]) -> None:
        self._counts, self._ids = counts, ids

    def __enter__(self) -> None:
        for x in self._ids:
            self._counts[x] = self._counts.get(x, 0) + 1

    def __exit__(self, *error: object) -> None:
        for x in self._ids:
            self._counts[x] -= 1


def _on_host(options: Mapping[str, object], topology: Topology) -> bool:
    """Whether values travel between ranks through host memory: the CPU client cannot send any itself."""
    env: Any = options["env"]
    if options["host_collectives"] == "auto":
        return topology.world_size > 1 and pjrt_device(env) == "CPU"
    return options["host_collectives"] is True


def _keep_compiled(runtime: Any, folder: Path, topology: Topology, options: Mapping[str, object]) -> None:
    """Let compiled graphs be kept on disk; processes that compile for themselves have a folder each."""
    if topology.world_size > 1 and not options["spmd"]:
        folder = folder / f"rank-{topology.rank:05d}"
    env: Any = options["env"]
    if env.get("XLA_PERSISTENT_CACHE_PATH") == str(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        runtime.initialize_cache(str(folder))
    except AssertionError as error:
        raise StrategyError(
            "D0899",
            f"{folder} cannot be used any more: this process has compiled something already",
            where="xla.compile_cache",
            fix="make the Accelerator before anything is computed on the device, and one cache for all of a process",
        ) from error


def _refuse_options(options: Mapping[str, object], topology: Topology) -> None:
    """Refuse settings of every strategy that this one cannot follow.

    Raises:
        StrategyError: D0894 to D0896.
    """
    if options["sync_batchnorm"] and not options["spmd"] and topology.world_size > 1:
        raise StrategyError(
            "D0894",
            "sync_batchnorm is true, but replicas on XLA devices do not exchange statistics within a forward",
            where="sync_batchnorm",
            fix="set xla.spmd: true, where BatchNorm sees the whole batch by itself; or leave it out",
        )
    if options["activation_checkpointing"] != "none":
        raise StrategyError(
            "D0895",
            f"activation_checkpointing is {options['activation_checkpointing']}, but torch's checkpoints do not know "
            "XLA's generator, and the compiler would merge the second forward with the first",
            where="activation_checkpointing",
            fix="leave it out, and put torch_xla.utils.checkpoint.checkpoint around the blocks of the model yourself",
        )
    compiling: Any = options["compile"]
    explicit: Any = options["explicit"]
    backend = explicit.get("compile.backend", _COMPILER)
    if compiling["scope"] != "none" and backend != _COMPILER:
        raise StrategyError(
            "D0896",
            f"compile.backend is {backend}, but only {_COMPILER} compiles for XLA devices",
            where="compile.backend",
            fix="leave it out",
        )


def _too_early() -> StrategyError:
    # torch's engine makes its threads at the first backward, one for each device that it knows then
    return StrategyError(
        "D0893",
        "torch's autograd engine does not know the XLA device: a backward had run in this process before the "
        "Accelerator was made",
        fix="make the Accelerator before the first backward, even one on the CPU",
    )


def _with_own_compiler(options: Mapping[str, object]) -> dict[str, object]:
    compiling: Any = options["compile"]
    return {**options, "compile": {**compiling, "backend": _COMPILER}}


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Look at this machine (`health [CONFIG]`), or train a little on its devices (`check [--spmd]`)."""
    command, *rest = arguments or [""]
    if command == "health":
        return xla_health.main(rest, env)
    if command == "check":
        return xla_check.main(rest, env)
    sys.stderr.write("usage: python -m distrib.strategies.xla health [CONFIG] | check [--spmd]\n")
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ))  # noqa: TID251 (a program is an edge)
