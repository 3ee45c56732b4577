"""The one object that a training script talks to. It owns no back-end knowledge: each call goes to the part that knows."""

from __future__ import annotations

import atexit
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from distrib.checkpoint import Location, Url, latest, locate, locate_below, retain
from distrib.checkpoint.agreement import on_main
from distrib.checkpoint.background import Background, Pending
from distrib.checkpoint.companions import write_model
from distrib.checkpoint.export import Include
from distrib.checkpoint.hooks import Hook, HookHandle, Hooks
from distrib.checkpoint.place import is_unwritable
from distrib.checkpoint.planner import Planner
from distrib.checkpoint.retention import Best
from distrib.collectives.inputs import check_rank, check_tensors
from distrib.collectives.split import split
from distrib.collectives.sync import check_in_sync
from distrib.collectives.trees import map_tensors
from distrib.config import RunConfig
from distrib.data import (
    DataOptions,
    LiveLoaders,
    PreparedDataLoader,
    Share,
    agree_on_loader,
    gather_true_rows,
    refuse_after_the_loop,
)
from distrib.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NotBuiltError,
    NotBuiltNameError,
    StrategyError,
)
from distrib.frames import call_site
from distrib.logging import notice
from distrib.precision import LossScaler, autocast, remove_precision
from distrib.run_state import RunState, begin_save, load_run
from distrib.seeding import derive, part_noise_streams, set_seed
from distrib.startup import read_config, start
from distrib.state import TrainState
from distrib.strategies.pipeline_run import Batch
from distrib.strategies.slices import plain_name
from distrib.topology import Mesh, Topology
from distrib.tracking import TRACKERS, Session, Tracker, split_names
from distrib.training import Accumulation, PreparedOptimizer, PreparedScheduler

F = TypeVar("F", bound=Callable[..., Any])

_NOT_BUILT = frozenset({"profile", "progress", "should_stop"})


@dataclass(frozen=True)
class SaveHandle:
    """A checkpoint at `path`, which is complete, or being written in the background."""

    path: Location
    _pending: Pending | None = None

    @property
    def done(self) -> bool:
        """Whether writing has ended, well or not."""
        return self._pending is None or not self._pending.is_alive()

    def wait(self) -> Location:
        """Return the path once the checkpoint is complete.

        Raises:
            CheckpointError: if it could not be written, and nobody has been told of it so far.
        """
        return self.path if self._pending is None else self._pending.wait()


class Accelerator:
    """Runs a plain training loop on whatever was launched: one device, or many ranks.

    Args:
        config: Settings, or a file of them. Default: what `distrib launch` passed, else the file that
            DISTRIB_CONFIG_FILE names, else defaults.
        strategy: "auto", "single", "ddp", "fsdp", "deepspeed" or "xla".
        mixed_precision: "no", "bf16", "fp16" or "fp8".
        gradient_accumulation_steps: Micro-steps per optimizer step; 1 by default. Not together with the next.
        global_batch_size: Samples per optimizer step over all ranks.
        project_dir: Where relative paths of outputs begin; the working directory by default.
        log_with: A tracker's name, a `distrib.tracking.Tracker` of your own, or a list of these.
        seed: Seed of everything random; `set_seed` may be used instead.
        cpu: True to stay on the CPU, like `device: cpu`; False leaves the device to the settings.

    Raises:
        ConfigError: if a value is wrong, or contradicts what was set at launch.
        TopologyError: if the ranks cannot be told apart or cannot meet.
    """

    def __init__(
        self,
        config: RunConfig | str | Path | None = None,
        *,
        strategy: str | None = None,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
        global_batch_size: int | None = None,
        project_dir: str | Path | None = None,
        log_with: Any = None,
        seed: int | None = None,
        cpu: bool | None = None,
    ) -> None:
        tracker_names, own_trackers = split_names(log_with)
        arguments = {
            "strategy": strategy,
            "mixed_precision": mixed_precision,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "global_batch_size": global_batch_size,
            "project_dir": None if project_dir is None else str(project_dir),
            "tracking.log_with": tracker_names,
            "seed": seed,
            "cpu": cpu,
        }
        set_here = {key: value for key, value in arguments.items() if value is not None}
        env = os.environ  # noqa: TID251 (the constructor is an edge)
        self._config = read_config(config, set_here, env, call_site())
        started = start(self._config, env)
        self._runtime, self._strategy = started.runtime, started.strategy
        if self._config.seed is not None:
            set_seed(self._config.seed)
        self._seed: int | None = None
        self._live = LiveLoaders()
        self._run = RunState()
        self._run.scaler = LossScaler() if self._runtime.precision.loss_scaling == "dynamic" else None
        self._accumulation = self._new_accumulation()
        self._last_norm: Tensor | None = None
        self._triggered = False
        self._tracking = Session(
            self._config.tracking.log_with,
            own_trackers,
            TRACKERS,
            self._runtime.collectives,
            self._runtime.readers,
        )
        self._background = Background(self._runtime.collectives)
        self._planner = Planner()
        self._told_of_unprepared = False
        self._save_hooks, self._load_hooks = Hooks(), Hooks()
        atexit.register(self._runtime.collectives.close)
        if self.is_main_process:
            notice(started.summary)

    def __getattr__(self, name: str) -> Any:
        if name in _NOT_BUILT:
            raise NotBuiltNameError(f"Accelerator.{name}")
        raise AttributeError(f"'Accelerator' object has no attribute {name!r}")

    # Who and where

    @property
    def config(self) -> RunConfig:
        """The settings of this run."""
        return self._config

    @property
    def topology(self) -> Topology:
        """This process's place in the job."""
        return self._runtime.topology

    @property
    def mesh(self) -> Mesh:
        """How the ranks are laid out."""
        return self._runtime.mesh

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._runtime.device

    @property
    def num_processes(self) -> int:
        """World size."""
        return self.topology.world_size

    @property
    def process_index(self) -> int:
        """Global rank."""
        return self.topology.rank

    @property
    def local_process_index(self) -> int:
        """Rank on this node."""
        return self.topology.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.topology.is_main

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.topology.is_local_main

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return self.topology.is_last

    @property
    def mixed_precision(self) -> str:
        """Name of the precision policy: "no", "bf16", "fp16", "fp8"."""
        return self._runtime.precision.name

    @property
    def scaler(self) -> LossScaler | None:
        """The loss scaler of fp16; None for number formats that need none."""
        return self._run.scaler

    @property
    def project_dir(self) -> Path:
        """Where relative paths of outputs begin.

        Raises:
            CheckpointError: if it is a URL, below which only checkpoints can lie.
        """
        if isinstance(locate(self._config.project_dir), Url):
            raise CheckpointError(
                "D0741",
                "is a URL; trackers and other outputs than checkpoints need a directory",
                where=f"project_dir ({self._config.project_dir})",
                fix="set checkpoint.dir to the URL, and project_dir to a directory",
            )
        return Path(self._config.project_dir)

    # Prepare

    def prepare(self, *objects: Any) -> Any:
        """Make models, optimizers, schedulers and data loaders ready for this run, in any order. Collective.

        What is prepared already, and None, come back unchanged.

        Returns:
            The prepared objects in the same order; for one argument, that object alone.

        Raises:
            StrategyError: for an object of another kind.
        """
        kinds = [self._role(x) for x in objects]
        new = {id(x): (x, kind) for x, kind in zip(objects, kinds, strict=True)}.values()
        new_models = [x for x, kind in new if kind == "model"]
        new_optimizers = [x for x, kind in new if kind == "optimizer"]
        if new_models or new_optimizers:
            self._prepare_trained(new_models, new_optimizers)
        for x, kind in new:
            if kind == "loader":
                self._prepare_loader(x)
            elif kind == "scheduler":
                self._run.schedulers.append(PreparedScheduler(x, self._run.optimizers))
                self._run.remember(x, self._run.schedulers[-1])
        prepared = tuple(self._run.prepared(x) for x in objects)
        return prepared[0] if len(prepared) == 1 else prepared

    def prepare_model(self, model: nn.Module, *, evaluation_mode: bool = False) -> nn.Module:
        """Prepare one model; in evaluation mode it is placed but never trained nor saved. Collective."""
        if evaluation_mode:
            return self._strategy.prepare_for_evaluation(model)
        prepared: nn.Module = self.prepare(model)
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer) -> PreparedOptimizer:
        """Prepare one optimizer. Collective."""
        prepared: PreparedOptimizer = self.prepare(optimizer)
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> PreparedScheduler:
        """Prepare one learning-rate scheduler."""
        prepared: PreparedScheduler = self.prepare(scheduler)
        return prepared

    def prepare_data_loader(
        self, data_loader: DataLoader[Any], *, is_distributed: bool | None = None
    ) -> PreparedDataLoader:
        """Prepare one data loader. Collective.

        Args:
            data_loader: The user's.
            is_distributed: For iterable data: whether each rank's stream is a part of its own already. None finds out
                where the data set tells (Hugging Face's `split_dataset_by_node`), and takes it for whole elsewhere.
        """
        if self._role(data_loader) == "loader":
            self._prepare_loader(data_loader, is_distributed=is_distributed)
        prepared: PreparedDataLoader = self.prepare(data_loader)
        return prepared

    def _role(self, x: Any) -> str:
        if x is None or self._run.is_prepared(x) or self._run.is_compiled_since(x):
            return "done"
        if isinstance(x, nn.Module):
            return "model"
        if isinstance(x, Optimizer):
            return "optimizer"
        if isinstance(x, DataLoader):
            return "loader"
        if hasattr(x, "step") and hasattr(x, "state_dict") and hasattr(x, "optimizer"):
            return "scheduler"
        raise StrategyError(
            "D0804",
            f"cannot prepare a {type(x).__name__}; expected a model, optimizer, scheduler or DataLoader",
            fix="leave it out of prepare; it works as it is, or wrap its data in a torch.utils.data.DataLoader",
        )

    def _prepare_trained(self, models: list[nn.Module], optimizers: list[Optimizer]) -> None:
        seed = self._run_seed()
        state = self._strategy.prepare(TrainState(tuple(models), tuple(optimizers)))
        for known in self._run.optimizers:
            known.find_parameters()
        self._run.models.extend(state.models)
        for model, wrapped in zip(models, state.models, strict=True):
            self._run.remember(model, wrapped)
        for given, own in zip(optimizers, state.optimizers, strict=True):
            self._run.optimizers.append(PreparedOptimizer(own, self._strategy, self._accumulation))
            self._run.remember(given, self._run.optimizers[-1])
        if models:
            part_noise_streams(self._runtime.readers.rank, seed)

    def _new_accumulation(self) -> Accumulation:
        return Accumulation(
            self._strategy,
            self._runtime,
            self._live,
            self.gradient_accumulation_steps,
            scaler=self._run.scaler,
            names=lambda: self._strategy.parameter_names(self._run.models),
        )

    def _prepare_loader(self, loader: DataLoader[Any], *, is_distributed: bool | None = None) -> None:
        index = len(self._run.loaders)
        seed = agree_on_loader(loader, index, self._runtime.collectives)
        if seed is None:
            seed = derive(self._run_seed(), "loader", index) if index else self._run_seed()
        has_tail = self._config.is_set("data.tail")
        options = DataOptions(
            rank=self._runtime.readers.rank,
            world_size=self._runtime.readers.world_size,
            device=self.device,
            tail=self._config.data.tail if has_tail else self._strategy.capabilities.tail,
            tail_is_wish=not has_tail,
            seed=seed,
            global_batch_size=self._config.global_batch_size,
            accumulation=self._config.gradient_accumulation_steps or 1,
            collectives=self._runtime.readers,
            device_backend=self._runtime.device_backend,
            prefetch=self._config.data.prefetch,
            dispatch=self._config.data.dispatch,
            is_distributed=is_distributed,
        )
        prepared = PreparedDataLoader(loader, options, self._live, lambda: bool(self._run.optimizers))
        self._run.loaders.append(prepared)
        self._run.remember(loader, prepared)

    def _run_seed(self) -> int:
        """The seed of all streams: `seed=`, else the last `set_seed`, else what torch drew; rank 0's. Collective."""
        if self._seed is None:
            asked_for = self._config.seed
            drawn = torch.initial_seed() if asked_for is None else asked_for
            everyone = self._runtime.collectives.gather_object((asked_for, drawn))
            for rank, (other, _) in enumerate(everyone):
                if other != everyone[0][0]:
                    raise ConfigError(
                        "D0123",
                        f"rank 0 has seed {everyone[0][0]}, rank {rank} has seed {other}; expected one for all ranks",
                        fix="give all ranks the same seed; what must differ by rank, such as dropout, does so by itself",
                    )
            self._seed = int(everyone[0][1])
        return self._seed

    # The step

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        """Return the context of one micro-step: gradients are exchanged and steps are real only at a window's end.

        The batch that a prepared loader yielded last says whether it is the window's last; without a prepared
        loader, every `gradient_accumulation_steps`-th call is.
        """
        return self._accumulation.scopes.get(models) or self._accumulation.accumulate(models)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which gradients of `model` stay on the rank."""
        return self._strategy.gradient_sync((model,), enabled=False)

    def join_uneven_inputs(
        self, models: nn.Module | Sequence[nn.Module], even_batches: bool | None = None  # noqa: FBT001
    ) -> AbstractContextManager[None]:  # fmt: skip
        """Return a context in which a rank may run out of batches first; it then takes part without gradients.

        For loops over data that are not a prepared loader's: a prepared one gives every rank equally many batches.
        Inside, call `backward` once per forward and without `count=`. Where gradients are not averaged between
        ranks, the context does nothing.

        Args:
            models: Prepared models.
            even_batches: Accelerate's switch for its loaders; it has no meaning here, and is warned about.

        Raises:
            StrategyError: if a model talks in ways that a rank without batches could not follow.
        """
        if even_batches is not None:
            warnings.warn(
                f"join_uneven_inputs: even_batches={even_batches} has no meaning here, since a prepared loader gives "
                "every rank equally many batches; data.tail says how an epoch ends",
                stacklevel=2,
            )
        join = getattr(self._strategy, "join_uneven_inputs", None)
        return nullcontext() if join is None else join([models] if isinstance(models, nn.Module) else models)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the run's precision, for computations outside a prepared model."""
        return autocast(self._runtime.precision, self.device)

    def backward(self, loss: Tensor, *, count: int | Tensor | None = None, **kwargs: Any) -> None:
        """Accumulate gradients so that the step sees the mean over the whole global batch.

        Args:
            loss: 0-d. Without `count`, the mean over this rank's samples; with it, a sum.
            count: What the sum counts on this rank: tokens, unmasked labels, ... The gradient is divided once,
                by the total over micro-steps and ranks; `.grad` is the undivided sum before clip or step.
            kwargs: Not built yet.

        Raises:
            TrainingError: if mean and sum, or unequal counts, meet in one window.
        """
        if kwargs:
            raise NotBuiltError(f"backward({', '.join(kwargs)}=...)")
        if not self._run.models:
            self._tell_of_unprepared()
        factor = self._accumulation.enter(loss, count)
        self._strategy.backward(loss if factor == 1 else loss * factor)

    def _tell_of_unprepared(self) -> None:
        """Say once that ranks train apart: nobody has been told which gradients are to be averaged."""
        if not self._told_of_unprepared and self.num_processes > 1 and self.is_main_process:
            notice(
                f"warning: backward on {self.num_processes} ranks, but no model has been prepared, so that each rank trains "
                "one of its own; give model and optimizer to prepare"
            )
        self._told_of_unprepared = True

    def pipeline_step(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        loss_function: Callable[[Any, Any], Tensor],
        *,
        count: int | Tensor | None = None,
        microbatches: int | None = None,
    ) -> Tensor:
        """Run forward, loss and backward of one micro-step, through all stages of a model that is cut. Collective.

        Under `torch.no_grad` there is no backward. A model that is not cut runs all of it at once, with the same result.

        Args:
            model: A prepared model; called as `model(inputs)`.
            inputs: A tensor (rows, *s), or tensors of equally many rows in any nesting.
            targets: The same; None if the loss needs none.
            loss_function: Called as `loss_function(outputs, targets)`, once for each microbatch; what it needs of the
                batch has to be in `targets`. Returns the mean over its rows; with `count` a sum.
            count: What the sums count, as in `backward`.
            microbatches: Into how many parts the batch is cut; by default `pipeline.microbatches`.

        Returns:
            The mean loss over this rank's batch, 0-d and detached, the same on all ranks that hold parts of the model.

        Raises:
            TrainingError: as `backward`.
            StrategyError: if the batch cannot be cut, or a unit returns what cannot travel.
        """
        batch = Batch(inputs, targets, loss_function, microbatches=microbatches)
        return self._accumulation.step_through(model, batch, count)

    def pipeline_forward(self, model: nn.Module, inputs: Any, *, microbatches: int | None = None) -> Any:
        """Return the outputs of a model that may be cut into stages, without gradients. Collective.

        Args:
            model: A prepared model; called as `model(inputs)`.
            inputs: A tensor (rows, *s), or tensors of equally many rows in any nesting.
            microbatches: Into how many parts the batch is cut; by default `pipeline.microbatches`.

        Returns:
            Tensors (rows, *t), the same on all ranks that hold parts of the model.
        """
        runner = self._strategy.runner_of(model)
        if runner is not None:
            return runner.forward(Batch(inputs, microbatches=microbatches))
        with torch.no_grad():
            return model(inputs)

    def clip_grad_norm_(
        self, parameters: Iterable[nn.Parameter] | nn.Parameter, max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """Scale gradients so that their norm is at most `max_norm`, at a window's end; else do nothing. Collective.

        Returns:
            0-d: the global norm before clipping; in mid-window, that of the last complete window (0 at first).
        """
        if self._accumulation.closes:
            listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            parameters = self._strategy.as_prepared(listed)  # type: ignore[arg-type]
            if self._accumulation.divides:
                self._accumulation.finish_for(parameters)
            self._last_norm = self._strategy.clip_grad_norm_(parameters, max_norm, norm_type)
        return torch.zeros((), device=self.device) if self._last_norm is None else self._last_norm

    def clip_grad_value_(self, parameters: Iterable[nn.Parameter] | nn.Parameter, clip_value: float) -> None:
        """Clamp gradients to [-clip_value, clip_value], at a window's end; else do nothing. Collective."""
        if self._accumulation.closes:
            listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            parameters = self._strategy.as_prepared(listed)  # type: ignore[arg-type]
            if self._accumulation.divides:
                self._accumulation.finish_for(parameters)
            self._strategy.clip_grad_value_(parameters, clip_value)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step where no global batch size is set."""
        return self._config.gradient_accumulation_steps or 1

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-step ends its window, so that a step is real."""
        if self._accumulation.scope is None:
            self._accumulation.bind_loader()
        return self._accumulation.closes

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step at a window's end left the parameters unchanged."""
        return any(optimizer.skipped for optimizer in self._run.optimizers)

    @property
    def batch_size(self) -> int:
        """True samples of this rank in the current batch; 0 if its batch is a stand-in.

        Raises:
            DataError: if no prepared loader is being read.
        """
        return self._share().size

    @property
    def sample_mask(self) -> Tensor:
        """(rows,) bool on `device`: which rows of the current batch are samples, not stand-ins or padding."""
        share = self._share()
        return torch.arange(share.rows, device=self.device) < share.size

    def _share(self) -> Share:
        loader = self._live.current
        if loader is None or loader.share is None:
            raise DataError(
                "D0505", "batch_size and sample_mask are known only inside a loop over a prepared loader"
            )
        return loader.share

    # Values between ranks

    def gather(self, x: Any) -> Any:
        """Concatenate each tensor of `x` over all ranks along dim 0, in rank order. Collective.

        Of ranks that read the same samples, as those that share a matrix product do, one counts.

        Args:
            x: Tensors (n, *s) in any nesting; n may differ between ranks. A 0-d tensor counts as (1,).

        Raises:
            CollectiveError: on every rank, if one does something else; with both calls and their lines.
            DataError: for numbers, arrays, and a nesting without tensors.
        """
        found = self._runtime.readers.gather(x)
        check_tensors("gather", x)
        return found

    def gather_for_metrics(
        self, x: Any, use_gather_object: bool = False, *, loader: PreparedDataLoader | None = None  # noqa: FBT001, FBT002
    ) -> Any:  # fmt: skip
        """Gather one value per sample of the current batch: each sample once, in sample order. Collective.

        Args:
            x: Tensors (rows, *s) in any nesting, or a list of one object per row.
            use_gather_object: Gather picklable objects instead of tensors.
            loader: The prepared loader that `x` belongs to; the one that yielded last by default.

        Raises:
            DataError: if a leading dim is not the batch's number of rows.
        """
        current = loader or self._live.current
        if current is None:
            refuse_after_the_loop(self._live.last_ended)
        return gather_true_rows(x, current, self._runtime.readers, objects=use_gather_object)

    def reduce(self, x: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Reduce each tensor of `x` elementwise over all ranks, then multiply by `scale`. Collective.

        Of ranks that read the same samples, as those that share a matrix product do, one counts.

        Args:
            x: Tensors in any nesting, equal shapes on all ranks.
            reduction: "sum", "mean", "max", "min"; or "none" to do nothing.
            scale: Factor of the result.

        Raises:
            CollectiveError: on every rank, if one does something else; with both calls and their lines.
            DataError: for numbers, arrays, and a nesting without tensors.
        """
        if reduction == "none":
            return x
        reduced = self._runtime.readers.reduce(x, _reduction(reduction))
        check_tensors("reduce", x)
        return reduced if scale == 1.0 else map_tensors(lambda tensor: tensor * scale, reduced)

    def broadcast(self, x: Any, from_process: int = 0) -> Any:
        """Return rank `from_process`'s tensors on every rank; the others give some of equal shapes. Collective.

        Raises:
            CollectiveError: if there is no such rank; on every rank, if one does something else.
            DataError: for numbers, arrays, and a nesting without tensors.
        """
        found = self._runtime.collectives.broadcast(x, from_process)
        check_tensors("broadcast", x)
        return found

    def pad_across_processes(
        self, x: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False  # noqa: FBT001, FBT002
    ) -> Any:  # fmt: skip
        """Fill up `dim` of each tensor of `x` to the largest size on any rank, in one small exchange. Collective.

        Args:
            x: Tensors in any nesting. One that has no such dim comes back as a copy.
            dim: What is filled up; negative counts from the end.
            pad_index: What with.
            pad_first: Whether the filling goes before the data.

        Raises:
            DataError: if no tensor has such a dim; for numbers, arrays, and a nesting without tensors.
        """
        found = self._runtime.collectives.pad(x, dim, pad_index, first=pad_first)
        check_tensors("pad_across_processes", x)
        return found

    def gather_object(self, x: Any) -> list[Any]:
        """Return every rank's picklable object, in rank order. Collective."""
        return self._runtime.collectives.gather_object(x)

    def broadcast_object(self, x: Any, from_process: int = 0) -> Any:
        """Return rank `from_process`'s picklable object on every rank. Collective."""
        return self._runtime.collectives.broadcast_object(x, from_process)

    def wait_for_everyone(self) -> None:
        """Return when every rank has called it. Collective."""
        self._runtime.collectives.barrier("wait_for_everyone")

    def check_in_sync(self, *models: nn.Module) -> None:
        """Compare every parameter and buffer over the ranks, bit by bit. Collective.

        Args:
            models: Prepared or plain; all prepared ones by default.

        Raises:
            StrategyError: on every rank, naming the first tensor that differs and which ranks hold what.
        """
        tensors = [self._strategy.replicated(model) for model in models or self._run.models]
        check_in_sync(tensors, self._runtime.collectives)

    # Checkpoints

    def save_state(
        self,
        output_dir: str | Path | Url | None = None,
        *,
        blocking: bool = True,
        durable: bool = True,
        metrics: Mapping[str, float] | None = None,
        allow_pickle: bool = False,
    ) -> SaveHandle:
        """Write models, optimizers, schedulers, data positions and generators, whole or not at all. Collective.

        Args:
            output_dir: Exactly this directory, or URL of an object store ("s3://bucket/run/best"), replacing a checkpoint
                there in one step. Default: `<project_dir>/<checkpoint.dir>/step-<n>`, of which the newest
                `checkpoint.keep_last` are kept.
            blocking: False returns when the state has been copied to host memory, and writes it in the background.
                The next save, `load_state` and `end_training` wait for that, and so does the end of the process.
            durable: Flush to the disk before the checkpoint becomes visible.
            metrics: Numbers that say how good this state is, such as {"loss": 0.3}; rank 0's are stored. With
                `checkpoint.keep_best`, the best checkpoints stay.
            allow_pickle: Store what a registered object's `state_dict` has as a pickle where it can be stored in no other
                way. `load_state` opens it only with `allow_pickle=True`.

        Raises:
            CheckpointError: on every rank if one cannot write; an older checkpoint stays as it was. An error in the
                background is raised by `wait` of the handle, else by the next call that waits for it.
        """
        self._background.wait()
        directory = (
            locate(output_dir) if output_dir is not None else self._checkpoints / f"step-{self._run.step:08d}"
        )
        info = {
            "strategy": type(self._strategy).__name__,
            "config": {**self._config.set_values(), **self._strategy.used_settings()},
            **self._tracking.stored(),
        }
        keep = self._config.checkpoint
        saving = begin_save(
            directory,
            self._run,
            self._strategy,
            self._runtime,
            info,
            metrics=metrics or {},
            best_metric=keep.best_metric if keep.keep_best and output_dir is None else None,
            hooks=self._save_hooks,
            durable=durable,
            allow_pickle=allow_pickle,
            arena=None if blocking else self._background.arena,
            planner=self._planner,
        )
        best = Best(str(keep.best_metric), keep.best_mode, keep.keep_best) if keep.keep_best else None

        def after() -> None:
            if output_dir is not None or keep.keep_last is None or not self.is_main_process:
                return
            try:
                retain(self._checkpoints, keep.keep_last, keep_every=keep.keep_every, best=best)
            except (CheckpointError, OSError) as error:  # no failure: the new one is complete
                notice(f"warning: {error}")

        if not blocking:
            return SaveHandle(directory, self._background.start(saving, after))
        saving.finish(self._runtime.collectives)
        after()
        return SaveHandle(directory)

    def load_state(
        self,
        input_dir: str | Path | Url | None = None,
        *,
        strict: bool = True,
        ignore: Iterable[str] = (),
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> Location | None:
        """Continue where a checkpoint stood; prepare everything first. Collective.

        The next loop over a prepared loader goes on with the very next sample, once.

        Args:
            input_dir: A checkpoint's directory or URL. Default: the newest complete one of the run, if there is one.
            strict: False takes what the checkpoint and the run have in common: tensors, loaders, schedulers and registered
                objects that only one of them has are left as they are. A wrong shape is refused all the same.
            ignore: Shell patterns of parameters that stay as they are, and what optimizers know of them: "model/head.*";
                "model_1/..." for the second model.
            verify: Compare checksums, not only sizes.
            allow_pickle: Open the pickles of registered objects that `save_state(allow_pickle=True)` has stored. They run
                whatever code they name, so only for a checkpoint that you trust.

        Returns:
            The checkpoint's directory; None if no `input_dir` was given and the run has no checkpoint so far.

        Raises:
            CheckpointError: if it is incomplete, damaged, or does not fit; nothing is changed then.
        """
        self._background.wait()
        directory = locate(input_dir) if input_dir is not None else self._newest()
        if directory is None:
            return None
        info = load_run(
            directory,
            self._run,
            self._strategy,
            self._runtime,
            hooks=self._load_hooks,
            verify=verify,
            strict=strict,
            ignore=tuple([ignore] if isinstance(ignore, str) else ignore),
            allow_pickle=allow_pickle,
        )
        self._accumulation.reset()
        self._tracking.go_on(info)
        return directory

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and restore these too, by their `state_dict` and `load_state_dict`, in the order of registration.

        Raises:
            StrategyError: if one has no such methods.
        """
        for x in objects:
            if not (hasattr(x, "state_dict") and hasattr(x, "load_state_dict")):
                raise StrategyError(
                    "D0805",
                    f"cannot register a {type(x).__name__}: it lacks state_dict and load_state_dict",
                    fix="give it both methods, or put its values into an object that has them",
                )
        self._run.custom.extend(objects)

    def register_save_state_pre_hook(self, hook: Hook) -> HookHandle:
        """Let `save_state` call `hook(models, weights, output_dir)` on every rank before it saves.

        The hook may take `models[i]` or `weights[i]` out of its list: that model is then not saved, if rank 0 does so.
        What it writes below `output_dir` becomes part of the checkpoint. If it raises on any rank, nothing is saved.

        Args:
            hook: Gets the prepared models; a read-only mapping for each, plain name -> this rank's tensor; and the path
                of an empty folder of this rank, named like the checkpoint. Register it on every rank.

        Returns:
            A handle, whose `remove()` takes the hook out.
        """
        return self._save_hooks.add(hook)

    def register_load_state_pre_hook(self, hook: Hook) -> HookHandle:
        """Let `load_state` call `hook(models, input_dir)` on every rank, before it changes anything.

        The hook may take `models[i]` out of the list, on every rank: that model is then left to the hook.

        Args:
            hook: Gets the prepared models, and the path of the checkpoint's directory; for a checkpoint at a URL, that
                of a folder with the files of the save's hooks. Register it on every rank.

        Returns:
            A handle, whose `remove()` takes the hook out.
        """
        return self._load_hooks.add(hook)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | Path,
        max_shard_size: str | int = "10GB",
        *,
        dtype: torch.dtype | None = None,
        include: Include | None = None,
        adapter: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Write the model in the Hugging Face layout, as `from_pretrained` loads it. Collective.

        That is model.safetensors, or shards and their index, and `config.json` and `generation_config.json` of a model of
        transformers.

        Args:
            model: A prepared or a plain model.
            save_directory: Made if it is missing.
            max_shard_size: Largest file, in bytes or such as "5GB".
            dtype: Number format of floating-point weights in the file; their own by default.
            include: Shell patterns of names ("head.*"), or a function of a name; all weights by default.
            adapter: Name of an adapter of a PEFT model: only it is written, as PEFT reads it.
            tokenizer: Saved beside the weights; anything with `save_pretrained`.

        Raises:
            CheckpointError: on every rank, if there is nothing to write, or rank 0 cannot.
        """
        if isinstance(locate(save_directory), Url):
            raise CheckpointError(
                "D0741",
                "is a URL; a model is written to a directory",
                where=f"save_model ({save_directory})",
                fix="write it to a directory, and upload that: huggingface_hub's upload_folder, aws s3 cp --recursive",
            )
        write_model(
            Path(save_directory),
            self._strategy.unwrap(model),
            self._strategy.sharded_state(TrainState((model,))),
            self._runtime.collectives,
            max_shard_size=max_shard_size,
            dtype=dtype,
            include=include,
            adapter=adapter,
            tokenizer=tokenizer,
        )

    def get_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return the plain model's state dict, on every rank. Collective."""
        return {plain_name(name): value for name, value in self._strategy.whole_state_dict(model).items()}

    @contextmanager
    def gathered(self, *models: nn.Module) -> Iterator[Any]:
        """Let prepared models have whole parameters inside: for generation, for looking at them, for changing them.

        What the body changes in place stays, if every rank makes the same change. Collective.

        Returns:
            A context that gives the plain model; a tuple of them for several.
        """
        with ExitStack() as open_ones:
            plain = tuple(open_ones.enter_context(self._strategy.gathered(model)) for model in models)
            yield plain[0] if len(plain) == 1 else plain

    def skip_first_batches(self, loader: PreparedDataLoader, num_batches: int = 0) -> PreparedDataLoader:
        """Let the next loop over `loader` start at the epoch's batch `num_batches`, reading none before it.

        A position that `load_state` restored wins, with a notice: it already knows what was consumed.

        Raises:
            DataError: if the loader is not prepared.
        """
        if not isinstance(loader, PreparedDataLoader):
            raise DataError(
                "D0506",
                f"skip_first_batches needs a prepared loader, got a {type(loader).__name__}",
                fix="prepare it first",
            )
        if not loader.has_restored_position:
            loader.skip(num_batches)
        elif self.is_main_process:
            notice("skip_first_batches: load_state has restored the position; nothing more is skipped")
        return loader

    @property
    def _checkpoints(self) -> Location:
        return locate_below(self._config.project_dir, self._config.checkpoint.dir)

    def _newest(self) -> Location | None:
        """Return rank 0's newest complete checkpoint, so that all ranks load the same. Collective."""

        def look() -> Location | None:
            found = latest(self._checkpoints)
            if found is None:
                notice(f"no checkpoint in {self._checkpoints}: the run starts at its beginning")
            if is_unwritable(self._checkpoints):  # better now than after hours of training
                notice(
                    f"warning: {self._checkpoints} cannot be written to, so save_state is going to fail there"
                )
            return found

        return on_main(self._runtime.collectives, "looking for the newest checkpoint", look)

    # Models

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True  # noqa: FBT001, FBT002
    ) -> nn.Module:  # fmt: skip
        """Return the user's own module.

        Args:
            model: A prepared or a plain model.
            keep_fp32_wrapper: False also takes the precision off its forward.
            keep_torch_compile: False also returns the module that was compiled.
        """
        plain = self._strategy.unwrap(model)
        if not keep_torch_compile:
            plain = getattr(plain, "_orig_mod", plain)
        return plain if keep_fp32_wrapper else remove_precision(plain)

    def free_memory(self, *objects: Any) -> Any:
        """Forget all that was prepared or registered, but hooks, and give memory that is not used back.

        Returns:
            A None for each object.
        """
        self._run = RunState(scaler=self._run.scaler)
        self._live = LiveLoaders()
        self._accumulation = self._new_accumulation()
        self._background.arena.release()
        self._runtime.device_backend.empty_cache()
        return None if len(objects) == 1 else (None,) * len(objects)

    # Process control

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main process only."""
        if self.is_main_process:
            print(*args, **kwargs)  # noqa: T201 (it is the user's print)

    def on_main_process(self, function: F) -> F:
        """Let `function` run on rank 0 only; elsewhere it returns None."""
        return _only(lambda: self.is_main_process, function)

    def on_local_main_process(self, function: F) -> F:
        """Let `function` run on the first rank of each node only; elsewhere it returns None."""
        return _only(lambda: self.is_local_main_process, function)

    def on_last_process(self, function: F) -> F:
        """Let `function` run on the highest rank only; elsewhere it returns None."""
        return _only(lambda: self.is_last_process, function)

    def on_process(self, function: F | None = None, process_index: int | None = None) -> Any:
        """Let `function` run on one rank only; elsewhere it returns None. Also usable as a decorator with arguments."""
        chosen = check_rank("on_process: rank", process_index, self.num_processes)
        if function is None:
            return functools.partial(self.on_process, process_index=chosen)
        return _only(lambda: self.process_index == chosen, function)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, then on all others. Collective.

        The others wait as long as it takes; no device is involved. What the body raises is raised on them too.
        """
        with self._runtime.collectives.first("main", place=self.process_index, members=self.num_processes):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Run the body on the first rank of each node first, then on the node's others. Collective."""
        place = self.topology
        with self._runtime.collectives.first(
            f"node {place.node_rank}", place=place.local_rank, members=place.local_world_size
        ):
            yield

    @contextmanager
    def split_between_processes(self, x: Any, apply_padding: bool = False) -> Iterator[Any]:  # noqa: FBT001, FBT002
        """Give each rank its part of a collection: contiguous, in order, the first ranks one item more.

        Ranks that read the same samples get the same part.

        Args:
            x: The same list, tuple, range, array or tensor (n, ...) on every rank, or a dict of such of one length.
            apply_padding: Give every rank as many items as the first has, by repeating the last item of `x`.

        Raises:
            DataError: for anything else.
        """
        yield split(x, self._runtime.readers.rank, self._runtime.readers.world_size, padded=apply_padding)

    def set_trigger(self) -> None:
        """Let the next `check_trigger` be true on every rank."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Return whether any rank has called `set_trigger` since the last check. Collective."""
        mine, self._triggered = torch.tensor(self._triggered, device="cpu"), False
        return bool(self._runtime.collectives.reduce(mine, "max"))

    # Tracking

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Start the trackers of `tracking.log_with` on the main rank. Collective.

        After `load_state` they go on with the runs that the checkpoint names, where they can.

        Args:
            project_name: Names the run's record: a file or folder in `project_dir`.
            config: Settings to be recorded with it.
            init_kwargs: Options of a tracker, by its name.

        Raises:
            StrategyError: on every rank, if a tracker is not installed or has no such option.
        """
        self._tracking.start(project_name, self.project_dir, config, init_kwargs or {})

    @property
    def trackers(self) -> list[Tracker]:
        """The running trackers; on other ranks than the main one, stand-ins that do nothing."""
        return self._tracking.trackers

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Return a running tracker; on other ranks than the main one, a stand-in that does nothing.

        Args:
            name: Such as "tensorboard".
            unwrap: Return the object behind it, such as a SummaryWriter; None on other ranks.

        Raises:
            StrategyError: if it does not run.
        """
        tracker = self._tracking.get(name)
        return tracker.tracker if unwrap else tracker

    def log(self, values: Mapping[str, Any], step: int | None = None) -> dict[str, float]:
        """Reduce values over the ranks, all in one collective, and let the main rank's trackers write them. Collective.

        Args:
            values: Name -> `distrib.tracking.Mean`, `Sum`, `Max` or `Min`; a bare number or 0-d tensor is a Mean.
            step: When they were measured.

        Returns:
            The reduced values, equal on every rank.

        Raises:
            DataError: for a value that is no number.
            CollectiveError: on every rank, if they do not log the same names.
        """
        return self._tracking.log(values, step)

    def end_training(self) -> None:
        """Wait for a save in the background, close the trackers and leave the process group; called at exit too.

        Raises:
            CheckpointError: if that save failed and nobody has been told so far.
        """
        self._background.wait()
        self._background.arena.release()
        self._tracking.finish()
        self._runtime.collectives.close()
        atexit.unregister(self._runtime.collectives.close)


def _only(condition: Callable[[], bool], function: F) -> F:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if condition() else None

    return run  # type: ignore[return-value]


def _reduction(name: str) -> Any:
    if name not in ("sum", "mean", "max", "min"):
        raise DataError("D0507", f"unknown reduction {name!r}; expected sum, mean, max, min or none")
    return name
