"""DeepSpeed's ZeRO: optimizer state, gradients and parameters divided over the ranks, with this library's semantics.

DeepSpeed lays out, exchanges and updates. When a window ends, what it is divided by, clipped to and scaled with is decided
here as under every other strategy, so its own accumulation, clipping, loss scaling and schedulers are off.

`python -m distrib.strategies.deepspeed build-ops` compiles DeepSpeed's operations ahead of a run.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.collectives.sync import take_over
from distrib.devices import choose_device
from distrib.errors import DistribError, StrategyError
from distrib.logging import notice
from distrib.state import Runtime, ShardedState, Slice, TensorSpec, TrainState, whole
from distrib.strategies import batchnorm, meta, slices
from distrib.strategies.base import Capabilities, StepResult, Strategy
from distrib.strategies.blocks import Forwards
from distrib.strategies.context import dividing
from distrib.strategies.deepspeed_client import check_optimizer, check_sections, resolved_optimizer
from distrib.strategies.deepspeed_config import (
    Seen,
    Settings,
    UserFile,
    check,
    engine_config,
    read_user_file,
    refuse_precision,
    stage_of,
    unused_scaling,
)
from distrib.strategies.deepspeed_errors import Origin, told
from distrib.strategies.deepspeed_nvme import (
    OnDisk,
    parameters_on_disk,
    require_async_io,
    uses_disk,
    with_own_folders,
)
from distrib.strategies.deepspeed_ops import build_ops, has_float16, join_process_group, load_deepspeed
from distrib.strategies.deepspeed_pairs import (
    copy_for_engine,
    exact_values,
    match_norms,
    pairs_of,
    put_back,
    refuse_batchnorm,
    refuse_begun,
    refuse_matrices,
    refuse_sparse,
    refuse_stepped,
    refuse_wide,
)
from distrib.strategies.deepspeed_state import LAYOUTS, Held
from distrib.strategies.gradients import norm_to_the_power, scale_and_check
from distrib.strategies.placing import (
    Replaced,
    apply_policy,
    refuse_half_precision,
    refuse_replaced,
    refuse_wrapped,
    root_of,
    spread_buffers,
)

if TYPE_CHECKING:
    from distrib.accelerator import Accelerator

_ANY_MODEL = Seen(1, 1)  # one that is not there yet
_CONFIGURATION = "_distrib_deepspeed_configuration"  # attribute of a model: what `configure` was given
_HELD = "_distrib_deepspeed"  # attribute of a model and of its optimizer
_LOG = logging.getLogger(__name__)
_STEPPED = StepResult(stepped=True)
_NOT_FINITE = StepResult(stepped=False, reason="DeepSpeed found gradients that are not finite")


class DeepSpeed(Strategy):
    """A DeepSpeed engine for each pair of a model and its optimizer; the model stays the user's own object.

    Options: `zero_stage`, `offload_optimizer`, `offload_param`, and `config`, a file of DeepSpeed's own settings.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        ("cpu", "cuda"),
        model_and_optimizer_together=True,
        whole_replicas=False,
        axes=("shard", "context"),
        free_axis="shard",
    )

    def __init__(self, runtime: Runtime, options: Mapping[str, object]) -> None:
        super().__init__(runtime, options)
        self._user, self._settings = read_user_file(options.get("config")), Settings.of(options, runtime)
        env: Any = options["env"]
        self._deepspeed = load_deepspeed(env, runtime.device.type, runtime.topology.local_rank)
        check(self._user, self._settings)
        check_sections(self._user)
        refuse_precision(runtime.precision, self._stage)
        self._extensions = Path(env["TORCH_EXTENSIONS_DIR"])
        join_process_group(self._deepspeed, runtime)
        self._parts = dividing(runtime, options)
        self._replaced = Replaced()
        self._engines: list[weakref.ref[Held]] = []  # in the order in which all ranks have made them
        self._batch_norms = batchnorm.BatchNorms(runtime, synchronize=options.get("sync_batchnorm") is True)
        self._used: list[dict[str, Any]] = []
        self._say_unused(self._user)

    def prepare(self, state: TrainState) -> TrainState:
        for model in state.models:
            refuse_wrapped(model)
            if self.runtime.precision.loss_scaling == "dynamic":
                refuse_half_precision(model)
            self._place(model)
        for optimizer in state.optimizers:
            self._replaced.point(optimizer)
        for model, optimizer in pairs_of(state):
            self._make_engine(model, optimizer)
        for model in state.models:
            if _held_of(model) is None and any(x.requires_grad for x in model.parameters()):
                self._say(
                    f"deepspeed: {type(model).__name__} was prepared without an optimizer: it stays whole on every "
                    "rank, and is not trained"
                )
        return state

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        self._place(model)
        return model

    def as_prepared(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return self._replaced.now(parameters)

    def gradient_sync(self, models: Sequence[nn.Module], *, enabled: bool) -> AbstractContextManager[None]:
        # Stages 0 and 1 exchange at a window's end, whatever is asked for here; 2 and 3 hold no whole gradients.
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        held = self._all_held()
        for x in held:
            x.before_backward()
        try:
            with told("a backward", *(x.origin for x in held)):
                loss.backward()  # type: ignore[no-untyped-call]
        except BaseException:
            for x in held:
                x.abort_backward()
            raise
        for x in held:
            x.after_backward()

    def scale_gradients_(
        self, parameters: Iterable[nn.Parameter], factor: float, *, check_finite: bool = False
    ) -> bool:
        wanted = {id(x) for x in parameters}
        # A loss scale can change in the midst of a window; all other divisions are made at its end.
        at_end = check_finite or self.runtime.precision.loss_scaling == "none"
        gradients = self._gradients(wanted, finished=at_end)
        if not check_finite:
            if gradients:
                torch._foreach_mul_(gradients, factor)
            return True
        is_finite = scale_and_check(gradients, factor)
        is_bad = torch.tensor(not is_finite, dtype=torch.float32, device=self.runtime.device)
        return not bool(self.runtime.collectives.all_reduce_(is_bad, "max"))

    def clip_grad_norm_(
        self, parameters: Sequence[nn.Parameter], max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        norm_type, wanted, device = float(norm_type), {id(x) for x in parameters}, self.runtime.device
        held = [x for x in self._all_held() if not x.ids.isdisjoint(wanted)]
        whole = self._gradients(wanted, finished=True, of=[x for x in held if x.stage == 0])
        parts = self._gradients(wanted, finished=True, of=[x for x in held if x.stage > 0])
        total = norm_to_the_power(parts, norm_type, device).to(torch.float32)
        if any(x.stage > 0 for x in held):
            op = "max" if norm_type == torch.inf else "sum"
            total = self.runtime.collectives.all_reduce_(total, op)  # type: ignore[arg-type]
        if whole:
            of_whole = norm_to_the_power(whole, norm_type, device).to(torch.float32)
            total = torch.maximum(total, of_whole) if norm_type == torch.inf else total + of_whole
        if norm_type != torch.inf:
            total = total.pow(1 / norm_type)
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for gradient in whole + parts:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return total

    def clip_grad_value_(self, parameters: Sequence[nn.Parameter], clip_value: float) -> None:
        for gradient in self._gradients({id(x) for x in parameters}, finished=True):
            gradient.clamp_(-clip_value, clip_value)

    def step(self, optimizer: Optimizer) -> StepResult:
        held = _held_by(optimizer)
        _refuse_new_groups(held)
        return _STEPPED if held.step() else _NOT_FINITE

    def clear_gradients(self, optimizer: Optimizer, *, set_to_none: bool) -> None:
        _held_by(optimizer).forget()

    def replicated(self, model: nn.Module) -> dict[str, Tensor]:
        found = super().replicated(model)
        held = _held_of(model)
        if held is None or held.stage < 3:
            return found
        divided = {id(x) for x in model.parameters()}
        return {name: x for name, x in found.items() if id(x) not in divided}

    def whole_state_dict(self, model: nn.Module) -> dict[str, Any]:
        held = _held_of(model)
        spread_buffers([model], self.runtime.collectives)
        masters: Mapping[int, Tensor] = {}
        if held is not None:
            with held.told("gathering parameters"):
                held.take_back_now()
                masters = held.whole_masters(self.runtime.collectives)
        return {
            name: masters.get(id(x), x.detach()) if isinstance(x, Tensor) else x
            for name, x in model.state_dict(keep_vars=True).items()
        }

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        """Let the model have whole parameters; what the body changes in them goes back to the masters.

        Every rank has to make the same changes. In mixed precision the whole parameters are in the compute dtype.
        """
        spread_buffers([model], self.runtime.collectives)
        held = _held_of(model)
        if held is None:
            yield model
            return
        before = dict(model.named_parameters())
        with held.told("gathering parameters"), held.gathered():
            yield model
            refuse_replaced(before, dict(model.named_parameters()))

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def used_settings(self) -> dict[str, Any]:
        return {"deepspeed.engines": self._used}

    @contextmanager
    def making_sharded(self) -> Iterator[None]:
        """Return a context in which transformers divides what it makes or loads; without stage 3 it does nothing."""
        if self._stage < 3:
            yield
            return
        if find_spec("transformers") is None or find_spec("accelerate") is None:
            raise StrategyError(
                "D0870",
                "transformers makes models sharded with the help of the packages transformers and accelerate, of which one "
                "is not installed",
                where="init_sharded",
                fix="pip install transformers accelerate; or load the model outside of it, whole on every rank",
            )
        integration = importlib.import_module("transformers.integrations.deepspeed")
        config = with_own_folders(
            engine_config(self._user, self._settings, _ANY_MODEL, self._kept_in(self._stage))
        )
        alive = integration.HfDeepSpeedConfig(config)  # transformers has only a weak reference
        try:
            with told("making a model sharded", Origin(config, self._user)):
                yield
        finally:
            integration.unset_hf_deepspeed_config()
            del alive

    def describe(self) -> str:
        """Return what is divided over how many ranks, a line for each engine."""
        what = ("nothing", "optimizer state", "optimizer state and gradients", "all of it")
        ranks = self.runtime.collectives.world_size
        return "\n".join(
            f"{type(x.module).__name__}: ZeRO stage {x.stage}, {what[x.stage]} divided over {ranks} ranks"
            for x in self._all_held()
        )

    def sharded_state(self, state: TrainState) -> ShardedState:
        spread_buffers(state.models, self.runtime.collectives)
        for held in filter(None, map(_held_of, state.models)):
            held.take_back_now()
        names = self.parameter_names(state.models)
        return slices.joined([
            *(self._model_slices(m, slices.module_prefix(i)) for i, m in enumerate(state.models)),
            *(
                self._optimizer_slices(o, names, slices.optimizer_prefix(i))
                for i, o in enumerate(state.optimizers)
            ),
        ])  # fmt: skip

    @contextmanager
    def loading(
        self,
        state: TrainState,
        stored: Mapping[str, TensorSpec],
        objects: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> Iterator[ShardedState]:
        names = self.parameter_names(state.models)
        held = [x for x in map(_held_of, state.models) if x is not None]
        before = [(x, dict(x.base.state)) for x in held]
        for x in held:
            x.refuse_gathered("load_state")
            with x.told("loading"):
                x.before_loading()

        def describe() -> ShardedState:
            for i, optimizer in enumerate(state.optimizers):
                self._allocate(optimizer, names, stored, slices.optimizer_prefix(i))
            return self.sharded_state(state)

        try:
            # The user's optimizers have options and names; what they remember is with DeepSpeed's.
            with slices.loading_in_place(
                state, state.models, describe, names, {}, objects, strict=strict
            ) as own:
                yield own
            for i, optimizer in enumerate(state.optimizers):
                self._restore_numbers(optimizer, names, objects.get(slices.optimizer_prefix(i).rstrip("/")))
        except BaseException:
            for x, old in before:
                x.base.state.clear()
                x.base.state.update(old)
            raise
        for x in held:
            with x.told("loading"):
                x.refresh()

    def _place(self, model: nn.Module) -> None:
        """Take rank 0's values over, apply the precision policy and move the model, in place. Collective."""
        root = root_of(model)
        if _held_of(model) is not None:
            return
        if self.runtime.collectives.world_size > 1:
            self._batch_norms.see_to(root)
        Forwards(self.options, self._parts, say=self.runtime.topology.is_main).replace(model)
        if meta.is_empty(root):
            with self._replaced.watching(root):
                meta.materialise(root, self.runtime.device, self.runtime.collectives)
        take_over(root, self.runtime.collectives)
        apply_policy(model.to(self.runtime.device), self.runtime)

    def _make_engine(self, model: nn.Module, optimizer: Optimizer) -> None:
        root = root_of(model)
        refuse_stepped(optimizer)
        refuse_wide(root)
        user, settings = self._configuration_of(root)
        check_optimizer(user, optimizer)
        stage = stage_of(user, settings)
        if stage > 0:
            refuse_sparse(root)
            refuse_matrices(optimizer)
        kept_in = self._kept_in(stage)
        if kept_in is not None:
            refuse_batchnorm(root)
        own = copy_for_engine(optimizer)
        config = engine_config(user, settings, Seen.of(root), kept_in)
        used = copy.deepcopy(config) | resolved_optimizer(user, optimizer)
        self._used.append(used)
        if self.runtime.topology.is_main:
            _LOG.debug("DeepSpeed's configuration for %s: %s", type(root).__name__, json.dumps(used))
        if uses_disk(config):
            refuse_begun(own)
            require_async_io(self._extensions)
            config = with_own_folders(config)
        layout = OnDisk if uses_disk(config) else LAYOUTS[stage]
        origin = Origin(config, user)
        exact = {} if kept_in is None else exact_values(root)
        with told(f"making an engine for {type(root).__name__}", origin):
            if kept_in is None and not has_float16() and parameters_on_disk(config):
                # DeepSpeed 0.19 would put float32 on the disk in bfloat16, unless it is asked this way.
                self._deepspeed.zero.Init(module=root, config_dict_or_path=config)
            engine, *_ = self._deepspeed.initialize(model=root, optimizer=own, config=config)
            put_back(engine, own)
            held = layout(engine, optimizer, origin)
            if exact:
                held.begin_with(exact)
        if engine.bfloat16_enabled() or engine.fp16_enabled():
            match_norms(root)
        vars(root)[_HELD] = vars(optimizer)[_HELD] = held
        self._engines = [x for x in self._engines if x() is not None] + [weakref.ref(held)]

    def _all_held(self) -> list[Held]:
        return [x for reference in self._engines if (x := reference()) is not None]

    @property
    def _stage(self) -> int:
        """Of models that have no configuration of their own."""
        return stage_of(self._user, self._settings)

    def _configuration_of(self, root: nn.Module) -> tuple[UserFile, Settings]:
        """Return what the user says of a model's engine: the run's own configuration, or that of `configure`."""
        own: UserFile | None = vars(root).get(_CONFIGURATION)
        if own is None:
            return self._user, self._settings
        settings = replace(
            self._settings,
            stage_is_set=False,
            offload=dict.fromkeys(self._settings.offload, "none"),
            nvme_path=None,
        )
        check(own, settings)
        check_sections(own)
        refuse_precision(self.runtime.precision, stage_of(own, settings))
        self._say_unused(own)
        return own, settings

    def _kept_in(self, stage: int) -> torch.dtype | None:
        """Return the format of the parameters that are computed with; None leaves them as they are, under autocast."""
        narrow = self.runtime.precision.compute
        if stage == 0 or (narrow is torch.float16 and not has_float16()):
            return None
        return narrow

    def _gradients(
        self, wanted: Collection[int], *, finished: bool, of: Sequence[Held] | None = None
    ) -> list[Tensor]:
        found: list[Tensor] = []
        for held in self._all_held() if of is None else of:
            if not held.ids.isdisjoint(wanted):
                if finished:
                    held.finish()
                found += held.tensors(wanted)
        return found

    def _model_slices(self, model: nn.Module, prefix: str) -> ShardedState:
        held = _held_of(model)
        if held is None:
            return slices.module_slices(model, prefix)
        parameters = {
            prefix + slices.plain_name(name): x for name, x in model.named_parameters(remove_duplicate=False)
        }

        def slice_of(name: str, tensor: Tensor) -> Slice:
            parameter = parameters.get(name)
            if parameter is None or not (held.stage == 3 or held.steps(parameter)):
                return whole(name, tensor)
            fragment = held.fragment(parameter)
            return fragment.slice_of(name, fragment.master)

        return slices.module_slices(model, prefix, slice_of)

    def _optimizer_slices(self, optimizer: Optimizer, names: slices.Names, prefix: str) -> ShardedState:
        held = _held_by(optimizer)
        tensors: dict[str, tuple[Slice, ...]] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for name, parameter in slices.named_parameters(optimizer, names):
            if not held.steps(parameter):
                continue
            fragment = held.fragment(parameter)
            for key, value in held.state_of(parameter).items():
                full = f"{prefix}{key}.{name}"
                if not isinstance(value, Tensor):
                    numbers.setdefault(name, {})[key] = value
                elif value.dim() == 0:
                    tensors[full] = (_shared(full, value),)
                elif value.shape != fragment.master.shape:  # such as the row sums of a matrix, in stage 0
                    tensors[full] = (whole(full, value),)
                else:
                    tensors[full] = (fragment.slice_of(full, value),)
        found = slices.optimizer_slices(optimizer, names, prefix)
        for name, values in numbers.items():
            found.objects[prefix.rstrip("/")]["state"].setdefault(name, {}).update(values)
        return slices.joined([found, ShardedState(tensors)])

    def _allocate(
        self, optimizer: Optimizer, names: slices.Names, stored: Mapping[str, TensorSpec], prefix: str
    ) -> None:
        keys: dict[str, dict[str, TensorSpec]] = {}
        for full, spec in stored.items():
            if full.startswith(prefix):
                key, _, name = full.removeprefix(prefix).partition(".")
                keys.setdefault(name, {})[key] = spec
        held = _held_by(optimizer)
        held.allocate({
            parameter: keys.get(name, {})
            for name, parameter in slices.named_parameters(optimizer, names)
            if held.steps(parameter)
        })  # fmt: skip

    def _restore_numbers(
        self, optimizer: Optimizer, names: slices.Names, stored: Mapping[str, Any] | None
    ) -> None:
        """Hand what an optimizer keeps outside of tensors, such as a number of steps, on to DeepSpeed's."""
        held = _held_by(optimizer)
        for name, parameter in slices.named_parameters(optimizer, names):
            values = (stored or {}).get("state", {}).get(name, {})
            if values and held.steps(parameter):
                flat = held.fragment(parameter).flat
                assert flat is not None, "it is stepped"
                held.base.state[flat].update(values)
        optimizer.state.clear()

    def _say_unused(self, user: UserFile) -> None:
        if names := unused_scaling(user):
            self._say(
                f"deepspeed: {', '.join(names)} in {user.path} do nothing: distrib scales losses (docs/numbers.md)"
            )
        if "scheduler" in user.tree:
            self._say(f"deepspeed: scheduler in {user.path} does nothing: the schedule is the script's")

    def _say(self, text: str) -> None:
        if self.runtime.topology.is_main:
            notice(text)


def _held_of(model: nn.Module) -> Held | None:
    root = root_of(model)
    held: Held | None = vars(root).get(_HELD)
    return held if held is not None and held.module is root else None  # a copy of a model has no engine


def _held_by(optimizer: Optimizer) -> Held:
    held: Held = vars(optimizer)[_HELD]
    return held


def _shared(name: str, value: Tensor) -> Slice:
    """Describe a number that all parameters of a flat tensor share; each stores it as its own."""

    def commit(filled: Tensor) -> None:
        value.copy_(filled)

    return replace(whole(name, value.clone()), commit=commit)


def _refuse_new_groups(held: Held) -> None:
    if sum(len(group["params"]) for group in held.given.param_groups) != len(held.ids):
        raise StrategyError(
            "D0878",
            f"{type(held.given).__name__} has got other parameters since it was prepared; DeepSpeed has laid its state "
            "out by then",
            fix="add parameter groups before prepare, frozen by requires_grad_(False) if they come later",
        )


@contextmanager
def init_sharded(accelerator: Accelerator) -> Iterator[None]:
    """Let models of transformers that are loaded inside be divided over the ranks at once, under stage 3. Collective.

    `from_pretrained` and `from_config` then never hold more than one parameter whole. Only for models that are trained:
    `prepare` each with its optimizer. Under other stages and strategies it does nothing.

    Args:
        accelerator: Whose strategy it is.

    Raises:
        StrategyError: D0870, if transformers or accelerate is not installed.
    """
    strategy = accelerator._strategy
    with strategy.making_sharded() if isinstance(strategy, DeepSpeed) else nullcontext():
        yield


def configure(model: nn.Module, config: str | os.PathLike[str] | Mapping[str, Any]) -> None:
    """Give a model's engine a DeepSpeed configuration of its own, before `prepare`, as for a teacher or an adversary.

    It stands in the place of `deepspeed.config`, `zero_stage`, `offload_optimizer`, `offload_param` and `nvme_path`. What it
    does not say has DeepSpeed's or this library's default; the stage is `zero_stage`.

    Args:
        model: It is prepared with its optimizer afterwards.
        config: A JSON file of DeepSpeed's, or a mapping with what would stand in one. It is checked in `prepare`.

    Raises:
        ConfigError: D0880, D0881, if the file cannot be read or holds no JSON object.
        StrategyError: D0949, if the model has an engine already.
    """
    root = root_of(model)
    if _held_of(model) is not None:
        raise StrategyError(
            "D0949",
            f"{type(root).__name__} is prepared already, so its engine has a configuration",
            where="configure",
            fix="call configure before prepare",
        )
    read = read_user_file(config)
    named = isinstance(config, Mapping)
    vars(root)[_CONFIGURATION] = UserFile(f"configure({type(root).__name__})", read.tree) if named else read


def main(arguments: Sequence[str], env: MutableMapping[str, str]) -> int:
    """Compile DeepSpeed's operations for this machine's device: `build-ops [BUILDER ...]`."""
    if not arguments or arguments[0] != "build-ops":
        sys.stderr.write("usage: python -m distrib.strategies.deepspeed build-ops [BUILDER ...]\n")
        return 2
    try:
        build_ops(env, choose_device("auto", 1)[0].name, tuple(arguments[1:]))
    except DistribError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ))  # noqa: TID251 (a program is an edge)
