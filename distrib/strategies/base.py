"""The seam of a strategy. A new strategy is one new file with a subclass, and one line in `distrib.strategies`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.devices.base import DeviceBackend
from distrib.state import Runtime, ShardedState, TensorSpec, TrainState
from distrib.strategies import slices
from distrib.topology import DATA_AXES, Mesh, Topology

if TYPE_CHECKING:
    from distrib.strategies.pipeline_run import Runner


@dataclass(frozen=True)
class Capabilities:
    """What callers may ask of a strategy instead of asking which one it is.

    Attributes:
        devices: Device names it runs on.
        max_models: How many models one run may prepare; None for any number.
        model_and_optimizer_together: Whether `prepare` must see a model and its optimizer in one call.
        accumulates_itself: Whether it counts micro-steps on its own.
        scales_loss_itself: Whether it owns the fp16 loss scale.
        whole_replicas: Whether every rank that reads different samples holds whole parameters.
        max_world_size: Largest number of ranks it runs on; None for any number.
        axes: Axes of the mesh that it lays ranks out along.
        free_axis: The one that takes the ranks for which no size is set.
        apart: Pairs of axes of which only one may have several ranks.
        tail: How loaders end their epochs where the settings do not say.
    """

    devices: tuple[str, ...]
    max_models: int | None = None
    model_and_optimizer_together: bool = False
    accumulates_itself: bool = False
    scales_loss_itself: bool = False
    whole_replicas: bool = True
    max_world_size: int | None = None
    axes: tuple[str, ...] = ("replicate",)
    free_axis: str = "replicate"
    apart: tuple[tuple[str, str], ...] = ()
    tail: Literal["exact", "pad", "drop"] = "exact"


@dataclass(frozen=True)
class Places:
    """What the axes of the mesh are made of.

    Attributes:
        number: How many places there are.
        is_one_program: Whether they are the devices of one program, for which every rank reads every sample; else they
            are the ranks.
    """

    number: int
    is_one_program: bool = False

    def readers(self, mesh: Mesh, world_size: int) -> list[list[int]]:
        """Return the groups of ranks in which each rank reads other samples; every rank is in one."""
        if self.is_one_program:
            return [[rank] for rank in range(world_size)]
        return mesh.groups(*DATA_AXES)


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step; `reason` says why a step was skipped."""

    stepped: bool
    reason: str = ""


class Strategy(ABC):
    """How parameters, gradients and optimizer state lie over the ranks, and when ranks talk.

    Args:
        runtime: All that a strategy may know about the run.
        options: Its own section of the configuration, key -> value.
    """

    capabilities: ClassVar[Capabilities]

    def __init__(self, runtime: Runtime, options: Mapping[str, object]) -> None:
        self.runtime, self.options = runtime, options

    @classmethod
    def begin(cls, topology: Topology, backend: DeviceBackend, options: Mapping[str, object]) -> Places:  # noqa: ARG003
        """Do what has to be done before the device is touched, and say how many places the mesh has.

        Args:
            topology: This process's place in the job.
            backend: The device's kind, not bound yet.
            options: As for the class.
        """
        return Places(topology.world_size)

    @abstractmethod
    def prepare(self, state: TrainState) -> TrainState:
        """Move and wrap models and optimizers. Collective.

        Returns:
            The same roles in the same order; each model as torch's own wrapper, or itself.
        """

    @abstractmethod
    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        """Place a model that is never trained: equal on all ranks, no gradient machinery. Collective."""

    @abstractmethod
    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-step; with `enabled` false its gradients stay on the rank.

        The context can be entered again and again: it is made once, not in each step.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`; averaged over ranks when the micro-step synchronises."""

    @abstractmethod
    def scale_gradients_(
        self, parameters: Iterable[nn.Parameter], factor: float, *, check_finite: bool = False
    ) -> bool:
        """Multiply the gradients of `parameters` in place.

        Returns:
            With `check_finite`, whether all of them are finite, the same answer on every rank; else True.
        """

    @abstractmethod
    def clip_grad_norm_(
        self, parameters: Sequence[nn.Parameter], max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        """Scale gradients in place so that their joint norm is at most `max_norm`. Collective.

        Returns:
            The true global norm before clipping, 0-d, whatever the sharding.
        """

    @abstractmethod
    def clip_grad_value_(self, parameters: Sequence[nn.Parameter], clip_value: float) -> None:
        """Clamp gradients in place to [-clip_value, clip_value]."""

    @abstractmethod
    def step(self, optimizer: Optimizer) -> StepResult:
        """Step the user's optimizer. Collective."""

    @abstractmethod
    def sharded_state(self, state: TrainState) -> ShardedState:
        """Say which slices of which logical tensors this rank holds, by names of the plain module."""

    @abstractmethod
    def loading(
        self,
        state: TrainState,
        stored: Mapping[str, TensorSpec],
        objects: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> AbstractContextManager[ShardedState]:
        """Return the context around a reader that fills the slices it yields.

        Entering creates optimizer state that `stored` has and the optimizer lacks; leaving restores `objects`
        (param groups, other state) and refreshes what depends on the filled tensors. Without `strict`, parameter groups
        that hold other parameters than the stored ones keep their options.
        """

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of a prepared model as optimizers know them."""
        return list(model.parameters())

    def as_prepared(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return what stands in the places of parameters that may have been listed before `prepare`."""
        return list(parameters)

    def clear_gradients(self, optimizer: Optimizer, *, set_to_none: bool) -> None:
        """Clear the gradients of an optimizer's parameters, wherever they lie."""
        optimizer.zero_grad(set_to_none=set_to_none)

    def parameter_names(self, models: Sequence[nn.Module]) -> dict[int, str]:
        """Return the name in the plain module of each parameter that optimizers know, by its id."""
        return slices.parameter_names([self.unwrap(model) for model in models])

    def replicated(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the parameters and buffers that should be the same on all ranks, by their names in the plain module."""
        plain = self.unwrap(model)
        named = [*plain.named_parameters(), *plain.named_buffers()]
        return {slices.plain_name(name): value for name, value in named}

    def whole_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return the plain model's state dict with whole tensors, on every rank. Collective."""
        with self.gathered(model) as plain:
            return plain.state_dict()

    def used_settings(self) -> dict[str, Any]:
        """Return what a back-end was set up with beyond the run's own settings, dotted key -> value, for checkpoints."""
        return {}

    def runner_of(self, model: nn.Module) -> Runner | None:
        """Return what runs batches through a model that is cut into stages; None for a model with a forward."""
        return None

    @abstractmethod
    def gathered(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Return a context in which the plain model has whole parameters. Collective."""

    @abstractmethod
    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the user's own module below this strategy's wrapper."""
