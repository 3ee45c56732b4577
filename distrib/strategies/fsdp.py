"""Every rank holds a part of each parameter, of its gradient and of its optimizer state (torch's `fully_shard`, FSDP2)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from distrib.collectives.sync import take_over
from distrib.errors import StrategyError
from distrib.logging import notice
from distrib.precision.autocast import matching
from distrib.state import Runtime, ShardedState, TensorSpec, TrainState
from distrib.strategies import batchnorm, dtensors, fsdp_state, meta, slices
from distrib.strategies.base import Capabilities, StepResult, Strategy
from distrib.strategies.blocks import Forwards
from distrib.strategies.context import dividing
from distrib.strategies.fsdp_units import (
    find_units,
    is_never_called,
    refuse_unshardable,
    unshardable,
    without_shared,
)
from distrib.strategies.gradients import norm_to_the_power, scale_and_check
from distrib.strategies.pipeline import (
    Cut,
    Pipelining,
    forget_state_of_others,
    loading_own_part,
    not_whole,
    own_part,
    refuse_backward,
    whole_state_dict,
)
from distrib.strategies.pipeline_run import Runner
from distrib.strategies.placing import (
    Replaced,
    apply_policy,
    move_state,
    refuse_half_precision,
    refuse_replaced,
    refuse_wrapped,
    root_of,
    spread_buffers,
)
from distrib.strategies.sequence import SequenceParallel, cannot_divide
from distrib.strategies.tensor import TensorPlan, find_plan, parallelise, whole_parameters

_STEPPED = StepResult(stepped=True)
_QUIET = "_distrib_quiet"  # attribute of a model: how many contexts keep its gradients on the rank
_LEFT = (
    "_distrib_unexchanged"  # attribute of a model: whether micro-steps have ever kept gradients on the rank
)
_LOOKED = "_distrib_looked"  # attribute of a model: whether its output has been looked into
_GATHERED = "_distrib_gathered"  # attribute of a model: whether it is in `gathered`
_RUNNER = "_distrib_runner"  # attribute of a model that is cut into stages: runs batches through them
_MOST_APART = (
    1e-3  # relative difference of gradients that should be equal; one that is divided differs by about 1
)


class FSDP(Strategy):
    """`fully_shard` on the repeated blocks of each model and on the model itself.

    Parameters become `DTensor`s in place: the module stays the user's own object, under the same names. A world of one
    rank has nothing to shard, and its models stay as they are.

    Options: `reshard_after_forward` (false keeps parameters whole between forward and backward: only gradients and
    optimizer state are sharded then), `cpu_offload`, `wrap` ("auto" or class names), `reduce_each_micro_step` (less
    memory while gradients accumulate, for more communication), `prefetch` (units that are asked for ahead).
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        ("cpu", "cuda", "xpu"), whole_replicas=False,
        axes=("pipeline", "replicate", "shard", "context", "tensor"), free_axis="shard",
        apart=(("pipeline", "context"), ("pipeline", "tensor")),
    )  # fmt: skip

    def __init__(self, runtime: Runtime, options: Mapping[str, object]) -> None:
        super().__init__(runtime, options)
        wrap = options.get("wrap", "auto")
        self._wrap = None if wrap == "auto" else tuple(wrap) if isinstance(wrap, tuple) else (str(wrap),)
        self._reshards = options.get("reshard_after_forward", True) is True
        self._prefetch = int(str(options.get("prefetch", 1)))
        self._always_reduces = options.get("reduce_each_micro_step") is True
        self._batch_norms = batchnorm.BatchNorms(runtime, synchronize=options.get("sync_batchnorm") is True)
        self._alone = runtime.collectives.world_size == 1
        # ranks that share sequences hold different parts of parameters, too
        self._data = runtime.mesh.data_parallel_size * runtime.mesh.size("context")
        self._tensor = runtime.mesh.size("tensor")
        plan = options.get("plan", "auto")
        self._plan = tuple(plan) if isinstance(plan, tuple) else None
        on_cpu = runtime.device.type == "cpu"
        self._offload = (
            CPUOffloadPolicy(pin_memory=not on_cpu) if options.get("cpu_offload") is True else OffloadPolicy()
        )
        idle = {"cpu_offload": options.get("cpu_offload") is True, "prefetch": self._prefetch > 1}
        for key in (key for key, is_set in idle.items() if is_set and self._data == 1):
            self._say(f"fsdp.{key} does nothing here: no ranks read different samples, so nothing is sharded")
        self._device_mesh: Any = None if self._alone else self._make_mesh()
        self._parts = dividing(runtime, options)
        self._pipelining = Pipelining(runtime, options) if runtime.mesh.size("pipeline") > 1 else None
        self._replaced = Replaced()
        self.as_prepared = self._replaced.now  # type: ignore[method-assign]  # one call less in every step
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._tensor_peers = runtime.collectives.among(runtime.mesh.groups("tensor"))
        self._compared: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._names = WeakIdKeyDictionary()  # parameter as optimizers know it -> name
        self._sequences: weakref.WeakKeyDictionary[nn.Module, SequenceParallel] = weakref.WeakKeyDictionary()

    def prepare(self, state: TrainState) -> TrainState:
        for model in state.models:
            refuse_wrapped(model)
            if self.runtime.precision.loss_scaling == "dynamic":
                refuse_half_precision(model)
            self._place(model)
        self._optimizers.update(state.optimizers)
        for optimizer in self._optimizers:  # also those that came before their model
            self._replaced.point(optimizer, dtensors.cut)
            move_state(optimizer)
            forget_state_of_others(optimizer)
        return state

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        self._place(model)
        return model

    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        roots = [x for model in models for x in self._roots_of(model) if isinstance(x, FSDPModule)]
        return nullcontext() if enabled or self._always_reduces or not roots else _NoSync(roots)

    def backward(self, loss: Tensor) -> None:
        if self._pipelining is not None:
            raise refuse_backward()
        loss.backward()  # type: ignore[no-untyped-call]

    def scale_gradients_(
        self, parameters: Iterable[nn.Parameter], factor: float, *, check_finite: bool = False
    ) -> bool:
        parameters = list(parameters)
        gradients = dtensors.local_gradients(parameters)
        if not check_finite:
            gradients += self._unexchanged(parameters)
            if gradients:
                torch._foreach_mul_(gradients, factor)
            return True
        is_bad = torch.tensor(
            not scale_and_check(gradients, factor), dtype=torch.float32, device=self._device
        )
        return not bool(self.runtime.collectives.all_reduce_(is_bad, "max"))

    def clip_grad_norm_(
        self, parameters: Sequence[nn.Parameter], max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        self._reshard_all()
        norm_type = float(norm_type)
        alike: dict[int, list[Tensor]] = {}  # number of different parts of the whole -> local gradients
        for parameter in parameters:
            if parameter.grad is not None:
                alike.setdefault(dtensors.num_parts(parameter.grad), []).append(
                    dtensors.local(parameter.grad)
                )
        powers = [
            (norm_to_the_power(gradients, norm_type, self._device), parts)
            for parts, gradients in alike.items()
        ]
        # of one dtype on all ranks, also where no gradient is
        wide = torch.float64 if any(x.dtype is torch.float64 for x in parameters) else torch.float32
        total = torch.zeros((), dtype=wide, device=self._device)
        if norm_type == torch.inf:
            for power, _ in powers:
                total = torch.maximum(total, power)
            total = self.runtime.collectives.all_reduce_(total, "max")
        else:  # a part is on ranks of a stage / parts ranks, all of which add it
            ranks = self.runtime.collectives.world_size // self.runtime.mesh.size("pipeline")
            for power, parts in powers:
                total = total + power * (parts / ranks)
            total = self.runtime.collectives.all_reduce_(total).pow(1 / norm_type)
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for gradients in alike.values():
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return total

    def clip_grad_value_(self, parameters: Sequence[nn.Parameter], clip_value: float) -> None:
        self._reshard_all()
        for gradient in dtensors.local_gradients(parameters):
            gradient.clamp_(-clip_value, clip_value)

    def step(self, optimizer: Optimizer) -> StepResult:
        if self._tensor > 1 and optimizer not in self._compared:
            self._compared.add(optimizer)
            self._compare_replicas(optimizer)
        self._reshard_all()  # what is whole after a forward would keep its old values
        optimizer.step()
        return _STEPPED

    def clear_gradients(self, optimizer: Optimizer, *, set_to_none: bool) -> None:
        optimizer.zero_grad(set_to_none=set_to_none)
        if any(vars(root).get(_LEFT) for root in self._roots):
            wanted = {id(x) for group in optimizer.param_groups for x in group["params"]}
            for root in self._roots:
                fsdp_state.forget_unexchanged(root, wanted)

    def runner_of(self, model: nn.Module) -> Runner | None:
        found: Runner | None = vars(root_of(model)).get(_RUNNER)
        return found

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        self._reshard([model])
        return list(model.parameters())

    def parameter_names(self, models: Sequence[nn.Module]) -> dict[int, str]:
        self._reshard(models)
        return super().parameter_names(models)

    def replicated(self, model: nn.Module) -> dict[str, Tensor]:
        if self._pipelining is not None:
            raise not_whole("check_in_sync")
        self._reshard([model])
        return {name: x for name, x in super().replicated(model).items() if not isinstance(x, DTensor)}

    def sharded_state(self, state: TrainState) -> ShardedState:
        models = [self.unwrap(model) for model in state.models]
        names = self.parameter_names(models)
        self._spread_buffers(models)
        found = slices.joined([
            *(slices.module_slices(m, slices.module_prefix(i), dtensors.slice_of) for i, m in enumerate(models)),
            *(
                slices.optimizer_slices(o, names, slices.optimizer_prefix(i), dtensors.slice_of)
                for i, o in enumerate(state.optimizers)
            ),
        ])  # fmt: skip
        if self._pipelining is None:
            return found
        return own_part(found, [vars(m)[_RUNNER].cut for m in models], len(state.optimizers))

    def loading(
        self,
        state: TrainState,
        stored: Mapping[str, TensorSpec],
        objects: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> AbstractContextManager[ShardedState]:
        models = [self.unwrap(model) for model in state.models]
        for model in models:
            for root in self._roots_of(model):
                fsdp_state.forget_aborted(root)
        loading = slices.loading_in_place(
            state,
            models,
            partial(self.sharded_state, state),
            self.parameter_names(models),
            stored,
            objects,
            strict=strict,
            empty_for=dtensors.empty,
        )
        return loading if self._pipelining is None else loading_own_part(loading, state.optimizers)

    def whole_state_dict(self, model: nn.Module) -> dict[str, Any]:
        self._spread_buffers([model])
        self._reshard([model])
        found = self.unwrap(model).state_dict()
        with dtensors.without_advice():
            whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}
        runner = self.runner_of(model)
        return whole if runner is None else whole_state_dict(runner.cut, whole)

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        """Let the model have whole parameters; what the body changes in them goes back into the shards.

        Every rank has to make the same changes. In mixed precision the whole parameters are in the compute dtype, and
        only parameters that were changed are taken back.
        """
        if self._pipelining is not None:
            raise not_whole("gathered")
        root = root_of(model)
        fsdp_state.reshard(root)
        self._spread_buffers([model])
        shards = {name: x for name, x in root.named_parameters() if isinstance(x, DTensor)}
        units = [x for x in root.modules() if isinstance(x, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(reshard_after_forward=False, recurse=False)
            unit.unshard()
        vars(root)[_GATHERED] = True
        sequence = self._sequences.get(root)
        try:
            with (
                fsdp_state.whole_state_dicts(root),
                whole_parameters(root),
                sequence.off() if sequence else nullcontext(),
            ):
                before = dict(root.named_parameters())
                yield self.unwrap(model)
                now = dict(root.named_parameters())
            refuse_replaced(before, now)
            for name, shard in shards.items():
                dtensors.take_back(shard, now[name])
        finally:
            vars(root)[_GATHERED] = False
            for unit in units:
                unit.set_reshard_after_forward(
                    reshard_after_forward=self._reshards and unit is not root, recurse=False
                )
                unit.reshard()

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def _unexchanged(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return whole gradients that micro-steps have left on this rank."""
        if not any(vars(root).get(_LEFT) for root in self._roots):
            return []
        wanted = set(map(id, parameters))
        return [x for root in self._roots for x in fsdp_state.unexchanged(root, wanted)]

    def _roots_of(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return what is the root of units: the model, or its stages on this rank."""
        runner = self.runner_of(model)
        return [root_of(model)] if runner is None else runner.cut.stages

    def _reshard(self, models: Sequence[nn.Module]) -> None:
        for model in models:
            for root in self._roots_of(model):
                fsdp_state.reshard(root)

    def _reshard_all(self) -> None:
        for root in self._roots:
            if not vars(root).get(_GATHERED):
                fsdp_state.reshard(root)

    @property
    def _device(self) -> torch.device:
        return self.runtime.device

    @property
    def _home(self) -> torch.device:
        """Where shards lie between steps."""
        offloads = isinstance(self._offload, CPUOffloadPolicy) and self._data > 1
        return torch.device("cpu") if offloads else self._device

    def _make_mesh(self) -> Any:
        mesh = self.runtime.mesh
        known = ("pipeline", "replicate", "shard", "tensor")
        axes = [x for x in known if x == "shard" or mesh.size(x) > 1]
        sizes = {axis: mesh.size(axis) for axis in axes}
        sizes["shard"] *= mesh.size("context")  # its neighbour
        made = init_device_mesh(self.runtime.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if len(axes) > 1:  # groups are connected through rank 0's store, which must not leave before all are
            self.runtime.collectives.barrier("making the mesh")
        return made

    @property
    def _data_mesh(self) -> Any:
        """The mesh without the axes along which ranks read the same samples."""
        mesh = self._device_mesh
        names = tuple(x for x in mesh.mesh_dim_names if x not in ("pipeline", "tensor"))
        return mesh[names] if names != mesh.mesh_dim_names else mesh

    def _say(self, text: str) -> None:
        if self.runtime.topology.is_main:
            notice(text)

    def _place(self, model: nn.Module) -> None:
        """Apply the precision policy, take rank 0's values over and shard the model, in place. Collective."""
        root = root_of(model)
        Forwards(self.options, self._parts, say=self.runtime.topology.is_main).replace(model, self._wrap)
        with self._replaced.watching(root):
            if self._alone:
                if meta.is_empty(root):
                    meta.materialise(root, self._device, self.runtime.collectives)
                apply_policy(model.to(self._device), self.runtime)
                return
            self._batch_norms.see_to(root)
            take_over(root, self.runtime.collectives)
            apply_policy(model, self.runtime)
            if self._tensor > 1:
                plan = find_plan(root, self._tensor, self._plan)
                self._divide_products(root, plan)
            is_empty, cut = meta.is_empty(root), self._cut_into_stages(model)
            parts: Sequence[nn.Module] = [root] if cut is None else cut.stages
            if self._data > 1:
                self._shard_units(root, parts)
            if is_empty:
                meta.materialise(root, self._home, self.runtime.collectives, dtensors.put)
            if cut is not None:
                cut.keep_own_part(moves=self._data == 1)
            self._names.update({x: slices.plain_name(name) for name, x in root.named_parameters()})
        for part in parts:
            fsdp_state.begin(part)
            self._roots.add(part)
            if isinstance(part, FSDPModule):
                part.register_forward_hook(_after_forward)
                part.zero_grad = MethodType(_zero_grad, part)  # type: ignore[method-assign]

    def _cut_into_stages(self, model: nn.Module) -> Cut | None:
        if self._pipelining is None:
            return None
        cut = self._pipelining.cut(model)
        vars(model)[_RUNNER] = Runner(cut, lambda stage: self.gradient_sync([stage], enabled=False))
        self._say(cut.layout)
        return cut

    def _divide_products(self, root: nn.Module, plan: TensorPlan) -> None:
        if self.runtime.precision.fp8:
            raise StrategyError(
                "D0857",
                f"mixed_precision is fp8 and mesh.tensor is {self._tensor}; torchao's float8 layers are not divided here",
                fix="use bf16, or leave mesh.tensor out",
            )
        mesh = self._device_mesh["tensor"]
        self._say(f"tensor parallel: {len(plan.styles)} modules over {self._tensor} ranks ({plan.reason})")
        if self.options.get("sequence") is not True:
            parallelise(root, mesh, plan)
            return
        if (size := self.runtime.mesh.size("context")) > 1:
            raise cannot_divide(f"mesh.context is {size}, which divides them already")
        sequence = self._sequences[root] = SequenceParallel(root, mesh, plan, self._wrap)
        parallelise(root, mesh, plan, sequence.styles)
        self._say(
            f"sequence parallel: hidden states are divided in {sum(map(len, sequence.parts.stacks))} blocks"
        )

    def _shard_units(self, root: nn.Module, parts: Sequence[nn.Module]) -> None:
        units = find_units(root, self._wrap)
        refuse_unshardable(root, units)
        wide, blocks = self._in_float32(root), [root.get_submodule(name) for name in units.names]
        for part in parts:
            self._shard_part(part, wide, blocks)
        self._say(f"fsdp: {type(root).__name__} in {len(units.names) + 1} units ({units.reason})")

    def _shard_part(self, part: nn.Module, wide: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> None:
        inside = set(part.modules())
        norms: list[nn.Module] = [x for x in wide if isinstance(x, _BatchNorm) and x in inside]
        alone = [
            [x] for x in reversed(wide) if x in inside and x not in norms
        ]  # inner ones before what is around them
        for modules in ([norms] if norms else []) + alone:  # all batch normalizations are one unit
            self._shard(modules, is_root=False, policy=MixedPrecisionPolicy())
        for block in reversed(blocks):
            if block in inside:
                self._shard([block], is_root=False)
        self._shard([part], is_root=True)
        if self._prefetch > 1:
            fsdp_state.prefetch([part, *(x for x in blocks if x in inside and x is not part)], self._prefetch)

    def _in_float32(self, root: nn.Module) -> list[nn.Module]:
        precision = self.runtime.precision
        if precision.compute is None:
            return []
        asked_for = [x for pattern in precision.fp32_modules for x in matching(root, pattern)]
        norms = [x for x in root.modules() if isinstance(x, _BatchNorm)]  # whose statistics are float32
        wanted = {*asked_for, *norms}
        found = [
            name
            for name, x in root.named_modules()
            if x in wanted and any(True for _ in x.parameters()) and type(x).forward is not nn.Module.forward
        ]
        found = [name for name in found if not is_never_called(root, name)]
        if tied := set(found) - set(without_shared(root, found)):
            raise unshardable(
                slices.listed(sorted(tied)),
                f"parameters are tied to others, which travel in {precision.name}",
                "leave it out of mixed_precision.fp32_modules",
            )
        return [root.get_submodule(name) for name in found]

    def _shard(
        self, modules: list[nn.Module], *, is_root: bool, policy: MixedPrecisionPolicy | None = None
    ) -> None:
        module = modules[0]
        if isinstance(module, FSDPModule):
            return
        precision = self.runtime.precision
        if policy is None:
            narrow = precision.compute if precision.param is not precision.compute else None
            reduce = precision.reduce or (torch.float32 if precision.compute is not None else None)
            # Inputs are converted by autocast where an operation wants it, as under every other strategy.
            policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=reduce, cast_forward_inputs=False)
        for each in modules:  # before torch's own hook, which an operation in place on a view would lose
            each.register_forward_hook(fsdp_state.without_views)
        fully_shard(
            modules if len(modules) > 1 else module,
            mesh=self._data_mesh,
            # The model's own unit comes first in the backward: resharding it would gather it again at once.
            reshard_after_forward=self._reshards and not is_root,
            mp_policy=policy,
            offload_policy=self._offload,
        )
        assert isinstance(module, FSDPModule)
        # A parameter that only some ranks used would else be missing from their part of the exchange (torch 2.13 and later).
        if hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True, recurse=False)

    def _compare_replicas(self, optimizer: Optimizer) -> None:
        """Find out, in an optimizer's first step, whether a plan leaves whole what works on divided values. Collective.

        What is whole on ranks that share matrix products sees the same values there, so it has the same gradient. Where
        it works on what is divided, each rank has only its part of the gradient, and the replicas would part.

        Raises:
            StrategyError: D0835, naming the parameters.
        """
        parameters = [x for group in optimizer.param_groups for x in group["params"] if x.grad is not None]
        whole = [x for x in parameters if not dtensors.is_divided_along("tensor", x)]
        mine = torch.stack([dtensors.local(x.grad).double().norm().cpu() for x in whole] or [torch.zeros(())])
        everyone = self._tensor_peers.gather(mine.view(1, -1))
        apart = (everyone - everyone[0]).abs().amax(0) > _MOST_APART * everyone.abs().amax(0)
        if bool(everyone.isfinite().all()) and bool(apart.any()):
            names = [self._names.get(x, "?") for x, differs in zip(whole, apart, strict=False) if differs]  # type: ignore[no-untyped-call]
            raise StrategyError(
                "D0835",
                f"ranks that share matrix products have different gradients of {slices.listed(names)}, which they hold "
                "whole: these work on values that are divided",
                where="tensor_parallel.plan",
                fix="end what is divided before them with rowwise or colwise_gather_output",
            )

    def _spread_buffers(self, models: Sequence[nn.Module]) -> None:
        """Give every rank the buffers of the first that holds them. Collective."""
        ranks = self.runtime.collectives if self._pipelining is None else self.runtime.readers
        spread_buffers(models, ranks)


class _NoSync:
    """Micro-steps of some models whose gradients stay on the rank, whole; can be entered again, also within itself."""

    def __init__(self, roots: Sequence[FSDPModule]) -> None:
        self._roots = roots

    def __enter__(self) -> None:
        self._change(1)

    def __exit__(self, *error: object) -> None:
        self._change(-1)

    def _change(self, by: int) -> None:
        for root in self._roots:
            depth = vars(root).get(_QUIET, 0) + by
            vars(root)[_QUIET] = depth
            vars(root)[_LEFT] = True  # from now on gradients may lie on the rank
            root.set_requires_gradient_sync(depth == 0)


def _after_forward(root: nn.Module, _: Any, output: Any) -> None:
    """Bring shards back where no backward is going to, and refuse an output in which torch finds no tensor."""
    if not torch.is_grad_enabled():
        if not vars(root).get(_GATHERED):
            fsdp_state.reshard(root)
        return
    if vars(root).get(_LOOKED):
        return
    vars(root)[_LOOKED] = True
    leaves = pytree.tree_leaves(output)
    if not any(isinstance(x, Tensor) and x.requires_grad for x in leaves) and (
        strange := [x for x in leaves if not isinstance(x, (Tensor, str, bytes, int, float, type(None)))]
    ):
        raise StrategyError(
            "D0836",
            f"the forward of {type(root).__name__} returns a {type(strange[0]).__name__}, in which torch looks for no "
            "tensors, so that nothing would be trained",
            fix="return tensors, tuples, lists, dicts or named tuples of them, or a class that is registered with "
            "torch.utils._pytree.register_pytree_node, as transformers' outputs are",
        )


def _zero_grad(root: nn.Module, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's signature)
    """Clear a model's gradients as its class does, and those that micro-steps have left on the rank."""
    type(root).zero_grad(root, set_to_none)
    if vars(root).get(_LEFT):
        fsdp_state.forget_unexchanged(root, {id(x) for x in root.parameters()})
