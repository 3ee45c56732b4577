"""Every rank holds a part of each parameter, of its gradient and of its optimizer state (torch's `fully_shard`, FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
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
from torch.optim import Optimizer

from distrib.collectives.sync import take_over
from distrib.logging import notice
from distrib.precision.autocast import matching
from distrib.state import Box, Runtime, ShardedState, Slice, TensorSpec, TrainState, whole
from distrib.strategies import batchnorm, meta, slices
from distrib.strategies.base import Capabilities, StepResult, Strategy
from distrib.strategies.fsdp_units import Units, find_units, tree
from distrib.strategies.gradients import norm_to_the_power, scale_and_check
from distrib.strategies.placing import (
    Replaced,
    apply_policy,
    move_state,
    refuse_half_precision,
    refuse_wrapped,
)

_STEPPED = StepResult(stepped=True)


class FSDP(Strategy):
    """`fully_shard` on the repeated blocks of each model and on the model itself.

    Parameters become `DTensor`s in place: the module stays the user's own object, under the same names. A world of one
    rank has nothing to shard, and its models stay as they are.

    Options: `reshard_after_forward` (false keeps parameters whole between forward and backward: only gradients and
    optimizer state are sharded then), `cpu_offload`, `wrap` ("auto" or class names), `reduce_each_micro_step` (less
    memory while gradients accumulate, for more communication).
    """

    capabilities: ClassVar[Capabilities] = Capabilities(("cpu", "cuda", "xpu"), axes=("replicate", "shard"))

    def __init__(self, runtime: Runtime, options: Mapping[str, object]) -> None:
        super().__init__(runtime, options)
        wrap = options.get("wrap", "auto")
        self._wrap = None if wrap == "auto" else tuple(wrap) if isinstance(wrap, tuple) else (str(wrap),)
        self._reshards = options.get("reshard_after_forward", True) is True
        self._always_reduces = options.get("reduce_each_micro_step") is True
        self._sync_batchnorm = options.get("sync_batchnorm") is True
        self._alone = runtime.collectives.world_size == 1
        self._replicas = runtime.mesh.size("replicate")
        on_cpu = runtime.device.type == "cpu"
        self._offload = (
            CPUOffloadPolicy(pin_memory=not on_cpu) if options.get("cpu_offload") is True else OffloadPolicy()
        )
        self._device_mesh = None if self._alone else self._make_mesh()
        self._replaced = Replaced()
        self._units: list[tuple[str, Units]] = []
        self._said_batchnorm = False

    def prepare(self, state: TrainState) -> TrainState:
        for model in state.models:
            refuse_wrapped(model)
            if self.runtime.precision.loss_scaling == "dynamic":
                refuse_half_precision(model)
            self._place(model)
        for optimizer in state.optimizers:
            self._replaced.point(optimizer, _cut)
            move_state(optimizer)
        return state

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        self._place(model)
        return model

    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        roots = [x for x in map(_root, models) if isinstance(x, FSDPModule)]
        return nullcontext() if enabled or self._always_reduces or not roots else _NoSync(roots)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def scale_gradients_(
        self, parameters: Iterable[nn.Parameter], factor: float, *, check_finite: bool = False
    ) -> bool:
        gradients = _local_gradients(parameters)
        if not check_finite:
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
        norm_type = float(norm_type)
        is_largest = norm_type == torch.inf
        power = norm_to_the_power(_local_gradients(parameters, DTensor), norm_type, self._device)
        power = self.runtime.collectives.all_reduce_(power, "max" if is_largest else "sum")
        whole_ones = norm_to_the_power(_local_gradients(parameters, whole=True), norm_type, self._device)
        if is_largest:
            total = torch.maximum(power, whole_ones)
        else:  # replicas of a shard have all been added
            total = (power / self._replicas + whole_ones).pow(1 / norm_type)
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for gradient in (gradients := _local_gradients(parameters)):
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return total.to(gradients[0].dtype) if gradients else total

    def clip_grad_value_(self, parameters: Sequence[nn.Parameter], clip_value: float) -> None:
        for gradient in _local_gradients(parameters):
            gradient.clamp_(-clip_value, clip_value)

    def step(self, optimizer: Optimizer) -> StepResult:
        optimizer.step()
        return _STEPPED

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        _reshard(_root(model))
        return list(model.parameters())

    def parameter_names(self, models: Sequence[nn.Module]) -> dict[int, str]:
        for model in models:
            _reshard(_root(model))
        return super().parameter_names(models)

    def replicated(self, model: nn.Module) -> dict[str, Tensor]:
        _reshard(_root(model))
        return {name: x for name, x in super().replicated(model).items() if not isinstance(x, DTensor)}

    def sharded_state(self, state: TrainState) -> ShardedState:
        models = [self.unwrap(model) for model in state.models]
        names = self.parameter_names(models)
        self._spread_buffers(models)
        return slices.joined([
            *(slices.module_slices(m, slices.module_prefix(i), _slice_of) for i, m in enumerate(models)),
            *(
                slices.optimizer_slices(o, names, slices.optimizer_prefix(i), _slice_of)
                for i, o in enumerate(state.optimizers)
            ),
        ])  # fmt: skip

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
            _forget_aborted(_root(model))
        return slices.loading_in_place(
            state,
            models,
            partial(self.sharded_state, state),
            self.parameter_names(models),
            stored,
            objects,
            strict=strict,
            empty_for=_empty_shard,
        )

    def whole_state_dict(self, model: nn.Module) -> dict[str, Any]:
        self._spread_buffers([model])
        found = self.unwrap(model).state_dict()
        return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        """Let the model have whole parameters; what the body changes in them goes back into the shards.

        Every rank has to make the same changes. In mixed precision the whole parameters are in the compute dtype, and
        only parameters that were changed are taken back.
        """
        root = _root(model)
        _reshard(root)
        self._spread_buffers([model])
        shards = {name: x for name, x in root.named_parameters() if isinstance(x, DTensor)}
        units = [x for x in root.modules() if isinstance(x, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(reshard_after_forward=False, recurse=False)
            unit.unshard()
        try:
            yield self.unwrap(model)
            for name, now in root.named_parameters():
                if name in shards:
                    _take_back(shards[name], now)
        finally:
            for unit in units:
                unit.set_reshard_after_forward(
                    reshard_after_forward=self._reshards and unit is not root, recurse=False
                )
                unit.reshard()

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def describe(self) -> str:
        """Return how each prepared model is divided into units, as a tree."""
        return "\n".join(f"{text}\n  ({units.reason})" for text, units in self._units)

    @property
    def _device(self) -> torch.device:
        return self.runtime.device

    @property
    def _home(self) -> torch.device:
        """Where shards lie between steps."""
        return torch.device("cpu") if isinstance(self._offload, CPUOffloadPolicy) else self._device

    def _make_mesh(self) -> Any:
        mesh = self.runtime.mesh
        axes = [axis for axis in ("replicate", "shard") if axis == "shard" or mesh.size(axis) > 1]
        return init_device_mesh(
            self.runtime.device.type, tuple(map(mesh.size, axes)), mesh_dim_names=tuple(axes)
        )

    def _place(self, model: nn.Module) -> None:
        """Apply the precision policy, take rank 0's values over and shard the model, in place. Collective."""
        root = _root(model)
        with self._replaced.watching(root):
            if self._alone:
                if meta.is_empty(root):
                    meta.materialise(root, self._device, self.runtime.collectives)
                apply_policy(model.to(self._device), self.runtime)
                return
            self._see_to_batchnorm(root)
            take_over(root, self.runtime.collectives)
            apply_policy(model, self.runtime)
            self._shard_units(root)
            if meta.is_empty(root):
                meta.materialise(root, self._home, self.runtime.collectives, _put_shard)

    def _shard_units(self, root: nn.Module) -> None:
        units = find_units(root, self._wrap)
        self._units.append((tree(root, units), units))
        for module in self._in_float32(root):
            self._shard(module, is_root=False, policy=MixedPrecisionPolicy())
        for name in reversed(units.names):  # inner ones before what is around them
            self._shard(root.get_submodule(name), is_root=False)
        self._shard(root, is_root=True)
        if self.runtime.topology.is_main:
            notice(f"fsdp: {type(root).__name__} in {len(units.names) + 1} units ({units.reason})")

    def _in_float32(self, root: nn.Module) -> list[nn.Module]:
        precision = self.runtime.precision
        if precision.compute is None:
            return []
        found = [x for pattern in precision.fp32_modules for x in matching(root, pattern)]
        return [x for x in dict.fromkeys(found) if any(True for _ in x.parameters())]

    def _shard(self, module: nn.Module, *, is_root: bool, policy: MixedPrecisionPolicy | None = None) -> None:
        if isinstance(module, FSDPModule):
            return
        precision = self.runtime.precision
        if policy is None:
            narrow = precision.compute if precision.param is not precision.compute else None
            reduce = precision.reduce or (torch.float32 if precision.compute is not None else None)
            # Inputs are converted by autocast where an operation wants it, as under every other strategy.
            policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=reduce, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=self._device_mesh,
            # The model's own unit comes first in the backward: resharding it would gather it again at once.
            reshard_after_forward=self._reshards and not is_root,
            mp_policy=policy,
            offload_policy=self._offload,
        )
        assert isinstance(module, FSDPModule)
        # A parameter that only some ranks used would else be missing from their part of the exchange.
        module.set_reduce_scatter_unused_params(True, recurse=False)

    def _see_to_batchnorm(self, model: nn.Module) -> None:
        if self._sync_batchnorm:
            batchnorm.synchronize_batchnorm(model, on_host=self._device.type == "cpu")
        elif (names := batchnorm.of_each_rank(model)) and not self._said_batchnorm:
            self._said_batchnorm = True
            if self.runtime.topology.is_main:
                batchnorm.warn_of_each_rank(names)

    def _spread_buffers(self, models: Sequence[nn.Module]) -> None:
        """Give every rank rank 0's buffers: the run goes on with them. Collective."""
        for model in models:
            buffers = dict(model.named_buffers()) if not self._alone else {}
            if buffers:
                for name, value in self.runtime.collectives.broadcast(buffers).items():
                    buffers[name].copy_(value)


class _NoSync:
    """Micro-steps of some models whose gradients stay on the rank, whole; can be entered again and again."""

    def __init__(self, roots: Sequence[FSDPModule]) -> None:
        self._roots = roots

    def __enter__(self) -> None:
        for root in self._roots:
            root.set_requires_gradient_sync(False)

    def __exit__(self, *error: object) -> None:
        for root in self._roots:
            root.set_requires_gradient_sync(True)


def _root(model: nn.Module) -> nn.Module:
    """Return the module that is sharded: the user's own, below what `torch.compile` puts around it."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def _reshard(root: nn.Module) -> None:
    """Bring the shards back as the module's parameters: after an evaluation some are left whole."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _forget_aborted(root: nn.Module) -> None:
    """Let a model whose last forward or backward was ended by an exception start anew (torch 2.13 and later can)."""
    reset = getattr(root, "reset_iter_state", None)
    if isinstance(root, FSDPModule) and root._get_fsdp_state()._is_root and reset is not None:
        reset()


def _local_gradients(
    parameters: Iterable[nn.Parameter], kind: type[Tensor] = Tensor, *, whole: bool = False
) -> list[Tensor]:
    """Return the gradients that lie on this rank: of shards as plain tensors; with `whole` only of what is no shard."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, kind) and not (whole and isinstance(gradient, DTensor)):
            found.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    return found


def _box(shard: DTensor) -> Box:
    """Return which part of the whole tensor lies on this rank; empty where there are fewer rows than ranks."""
    (chunk,) = shard.__create_chunk_list__()  # type: ignore[no-untyped-call]  # what torch's own checkpoints ask for
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _slice_of(name: str, tensor: Tensor) -> Slice:
    if not isinstance(tensor, DTensor):
        return whole(name, tensor)
    local = tensor.to_local()
    return Slice(name, tuple(tensor.shape), tensor.dtype, _box(tensor), lambda: local)


def _empty_shard(spec: TensorSpec, parameter: nn.Parameter) -> Tensor:
    return torch.empty_like(parameter.detach(), dtype=spec.dtype)


def _cut(value: Any, like: Tensor) -> Any:
    """Return this rank's part of optimizer state that every rank has whole."""
    if not isinstance(value, Tensor) or value.shape != like.shape or not isinstance(like, DTensor):
        return value
    cut = torch.empty_like(like.detach(), dtype=value.dtype)
    assert isinstance(cut, DTensor)
    cut.to_local().copy_(_part(value, _box(like)))
    return cut


def _put_shard(parameter: Tensor, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(_part(value, _box(parameter)))
    else:
        parameter.copy_(value)


def _part(tensor: Tensor, box: Box) -> Tensor:
    for dim, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


@torch.no_grad()
def _take_back(shard: DTensor, now: Tensor) -> None:
    local, new = shard.to_local(), _part(now.detach(), _box(shard))
    if not torch.equal(local.to(new.dtype), new):
        local.copy_(new)
