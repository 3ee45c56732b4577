"""Stage 3 with optimizer state or parameters on a disk (DeepSpeed's ZeRO-Infinity).

DeepSpeed keeps each large flat tensor in a file of its own and reads it into buffers when a step or a forward needs it. In
between, checkpoints look into these files: they are mapped into memory, so that a save or a load holds no more of them
than what it works on. Small tensors (less than `aio.block_size`) stay in memory.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.errors import StrategyError
from distrib.state import TensorSpec
from distrib.strategies.deepspeed_errors import Origin
from distrib.strategies.deepspeed_state import Partitioned

_PREFIX: Final = "distrib-"  # of folders in `nvme_path`
_IN_USE: Final = "in_use"  # a file in each
_GRADIENTS: Final = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


def uses_disk(config: Mapping[str, Any]) -> bool:
    """Whether an engine's configuration offloads anything to a disk."""
    return bool(_on_disk(config))


def parameters_on_disk(config: Mapping[str, Any]) -> bool:
    """Whether an engine's configuration offloads parameters to a disk."""
    return "offload_param" in _on_disk(config)


def async_io_compiles() -> bool:
    """Whether DeepSpeed's operation that reads and writes files can be compiled; a small program is, to find out."""
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    builder = accelerator.create_op_builder("AsyncIOBuilder")
    return builder is not None and builder.NAME == "async_io" and bool(builder.is_compatible(verbose=False))


def require_async_io(extensions: Path, compiles: Callable[[], bool] = async_io_compiles) -> None:
    """Refuse to go on without DeepSpeed's operation that reads and writes files, or what it is compiled from.

    Args:
        extensions: Folder of compiled operations.
        compiles: Says whether it could be compiled into it.

    Raises:
        StrategyError: D0940.
    """
    if any((extensions / "async_io").glob("*.so")):
        return
    if not compiles():
        raise StrategyError(
            "D0940",
            "offload to nvme needs DeepSpeed's operation async_io, which cannot be compiled here: libaio, its header or a "
            "compiler is missing",
            where="deepspeed.offload_optimizer, deepspeed.offload_param",
            fix="apt-get install libaio-dev g++ (Fedora: libaio-devel gcc-c++); or offload to cpu",
        )


def with_own_folders(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with a new folder inside of each `nvme_path`.

    DeepSpeed numbers its files from 0 and empties their folder when an engine is made, so that two engines, or two runs on
    a node, would take each other's. A folder is removed when its process ends, or by the next that makes one beside it.

    Raises:
        StrategyError: D0944, if no folder can be made there.
    """
    zero = dict(config["zero_optimization"])
    for name in _on_disk(config):
        path = Path(zero[name]["nvme_path"])
        try:
            path.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            folder = _new_folder(path)
        except OSError as error:
            raise StrategyError(
                "D0944",
                f"cannot make a folder in {path}: {error.strerror}",
                where="deepspeed.nvme_path",
                fix="name a folder of a local disk in which this user may write",
            ) from None
        zero[name] = {**zero[name], "nvme_path": str(folder)}
    return {**config, "zero_optimization": zero}


def _new_folder(path: Path) -> Path:
    """Make a folder that is this process's for as long as it lives, which a lock on a file in it says."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))
    new = folder / f"{_IN_USE}.new"
    lock = new.open("w")  # closed by the end of the process
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(folder / _IN_USE)
    atexit.register(_remove, folder, lock, os.getpid())
    return folder


def _remove(folder: Path, lock: IO[str], pid: int) -> None:
    if os.getpid() == pid:  # not in a process that it has forked
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _remove_abandoned(path: Path) -> None:
    """Remove folders of processes that have died without doing so."""
    for found in path.glob(f"{_PREFIX}*/{_IN_USE}"):
        with contextlib.suppress(OSError), found.open("a") as lock:  # another rank may be faster
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(found.parent, ignore_errors=True)


def _on_disk(config: Mapping[str, Any]) -> list[str]:
    zero = config["zero_optimization"]
    names = ("offload_optimizer", "offload_param")
    return [name for name in names if zero.get(name, {}).get("device") == "nvme"]


class OnDisk(Partitioned):
    """Stage 3, where flat tensors may be empty, and their values in files."""

    def __init__(self, engine: Any, given: Optimizer, origin: Origin) -> None:
        super().__init__(engine, given, origin)
        if self.zero.optimizer_swapper is not None:
            self.zero.optimizer_swapper.swap_out_gradients = self._keep_gradients

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        fragment = self.fragment(parameter)
        files = self._files_of(fragment.flat)
        if fragment.flat is None or not files:
            return super().state_of(parameter)
        numel = self._numel_of(parameter)
        return {
            key: fragment.part_of(_mapped(files[id(x)], numel, x.dtype)) if id(x) in files else x
            for key, x in self.base.state.get(fragment.flat, {}).items()
        }

    def allocate(self, wanted: Mapping[nn.Parameter, Mapping[str, TensorSpec]]) -> None:
        super().allocate(wanted)
        swapper = self.zero.optimizer_swapper
        for group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            if not self._is_on_disk(group):
                continue
            info = swapper.swap_params_info[flat.ds_id]
            info.tensors, info.has_state_tensors = info.tensors[:1], False
            numel = int(self.zero.fp16_partitioned_groups_flat_numel[group])
            state = self.base.state.get(flat, {})
            for value in [x for x in state.values() if isinstance(x, Tensor) and x.shape == flat.shape]:
                value.data = torch.empty(numel, dtype=value.dtype)  # of its real size, by which it is found
            swapper._update_param_state_info(info, flat)
            for context in info.tensors[1:]:
                with Path(context.swap_path).open("ab") as file:
                    file.truncate(swapper._io_aligned_numel(numel) * swapper.swap_element_size)
                context.release_memory()

    @contextmanager
    def _whole_parameters(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gather one after the other: what is read from the disk is in one of few buffers, and given back at once."""
        on_disk: list[Any] = [x for x in parameters if _is_swapped(x)]
        with ExitStack() as stack:
            for x in parameters:
                stack.enter_context(self._whole_parameter(x))
            try:
                yield
            finally:
                if on_disk:  # forwards have read ahead, and taken buffers
                    on_disk[0].nvme_swapper.synchronize_reads()
                    on_disk[0].nvme_swapper.remove_partition_and_release_buffers(on_disk)

    @contextmanager
    def _whole_parameter(self, parameter: Any) -> Iterator[None]:
        with super()._whole_parameters([parameter]):
            if _is_swapped(parameter):
                parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
            try:
                yield
            finally:
                if _is_swapped(parameter):
                    parameter.nvme_swapper.swap_in([parameter], async_op=False)

    def _is_on_disk(self, group: int) -> bool:
        return bool(self.zero._swappable_optimizer_subgroup(group))

    def _files_of(self, flat: Tensor | None) -> dict[int, str]:
        """Return where the values of a flat tensor and of its state are, by id; nothing if they are in memory."""
        swapper = self.zero.optimizer_swapper
        info = None if swapper is None or flat is None else swapper.swap_params_info.get(flat.ds_id)  # type: ignore[attr-defined]
        return {} if info is None else {id(x.compute_tensor): x.swap_path for x in info.tensors}

    def _numel_of(self, parameter: nn.Parameter) -> int:
        group, *_ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return int(self.zero.fp16_partitioned_groups_flat_numel[group])

    def _values_of(self, group: int) -> Tensor:
        flat = self.zero.fp32_partitioned_groups_flat[group]
        files = self._files_of(flat)
        if not files:
            return super()._values_of(group)
        return _mapped(files[id(flat)], int(self.zero.fp16_partitioned_groups_flat_numel[group]), flat.dtype)

    def _computed(self, parameter: Any) -> Tensor:
        part, swapper = parameter.ds_tensor, parameter.nvme_swapper
        if part.status.name == "AVAILABLE":
            return super()._computed(parameter)
        swapper.synchronize_writes()
        return _mapped(swapper.get_path(parameter, must_exist=True), part.ds_numel, swapper.dtype)

    def _refresh_group(self, group: int) -> None:
        on_disk = self._is_on_disk(group)
        if on_disk:
            self.zero._optimizer_states_and_gradient_swap_in(group)
        super()._refresh_group(group)
        if on_disk:
            self.zero._release_swap_buffers(group)

    def _finish(self) -> None:
        """Gradients are averaged already, and go to the disk for the step alone: until then they are scaled and clipped."""
        self._set_boundary(at_end=False)

    def _finished(self, wanted: Collection[int]) -> list[Tensor]:
        gradients = getattr(self.zero, _GRADIENTS)
        parameters: list[Any] = [x for x in self.trained() if id(x) in wanted]
        bounds = [self._bounds(x) for x in parameters]
        return [
            gradients[x.ds_id].view(-1)[: stop - start]
            for x, (start, stop) in zip(parameters, bounds, strict=True)
        ]

    def _keep_gradients(
        self, parameter: Any, gradient_offsets: list[int], gradient_tensors: list[Tensor]
    ) -> None:
        """Let a step find gradients in memory, where they are anyway.

        DeepSpeed 0.19 writes them to files too, and reads them back wrong where a parameter begins at an odd place: a direct
        read into memory that is not aligned fails, and nothing looks at that.
        """
        info = self.zero.optimizer_swapper.swap_params_info[parameter.ds_id]
        info.unswapped_gradients = dict(zip(gradient_offsets, gradient_tensors, strict=True))

    def _hand_over(self) -> None:
        # all of them: flat gradients are read into memory that has other values
        parameters: list[Any] = [x for x in self.trained() if len(set(self._bounds(x))) > 1]
        self.zero._offload_boundary_param_ids |= {x.ds_id for x in parameters}
        self.zero.finalize_gradient_accumulation_boundary()


def _is_swapped(parameter: Any) -> bool:
    location = parameter.ds_tensor.final_location
    return location is not None and location.value == "nvme"


def _mapped(path: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the first elements of a file as a tensor; what is written into it is written into the file."""
    return torch.from_file(path, shared=True, size=numel, dtype=dtype)
