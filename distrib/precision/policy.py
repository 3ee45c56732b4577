"""Number formats as a value."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from distrib.config.schema import PrecisionSection
from distrib.devices.base import DeviceBackend
from distrib.errors import ConfigError, StrategyError

LossScaling = Literal["none", "dynamic"]
_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPES = {"fp32": torch.float32, **_COMPUTE}


@dataclass(frozen=True)
class PrecisionPolicy:
    """Which number format is used where.

    Attributes:
        name: The setting it came from, or what is computed in: "no", "bf16", "fp16", "fp8".
        param: dtype in which parameters and optimizer state are kept; None leaves them as they are. Float64 stays.
        compute: dtype of matrix products under autocast; None for no autocast.
        reduce: dtype in which gradients are reduced; None for that of the gradient.
        output: dtype to which floating-point model outputs are converted; None leaves them.
        loss_scaling: "dynamic" for fp16, else "none".
        fp32_modules: Patterns (as of file names) of the names of modules that compute in float32 all the same.
        fp8: Whether linear layers multiply in float8, where `compute` is that of all else.
    """

    name: str = "no"
    param: torch.dtype | None = None
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    output: torch.dtype | None = None
    loss_scaling: LossScaling = "none"
    fp32_modules: tuple[str, ...] = ()
    fp8: bool = False


def resolve_precision(setting: object, device: DeviceBackend, *, where: str | None = None) -> PrecisionPolicy:
    """Turn the setting `mixed_precision` into a policy that the device supports.

    Raises:
        StrategyError: D0801, if the device cannot compute in that format; D0856, for fp8 without torchao.
        ConfigError: D0124, for a mapping whose formats do not fit together.
    """
    if setting == "no":
        return PrecisionPolicy()
    if isinstance(setting, PrecisionSection):
        policy = _spelled_out(setting, where)
    elif setting == "fp8":
        policy = PrecisionPolicy("fp8", compute=torch.bfloat16, output=torch.float32, fp8=True)
    else:
        scaling: LossScaling = "dynamic" if setting == "fp16" else "none"
        compute = _COMPUTE[str(setting)]
        policy = PrecisionPolicy(str(setting), compute=compute, output=torch.float32, loss_scaling=scaling)
    wanted = {"fp8": torch.float8_e4m3fn} if policy.fp8 else {}
    wanted |= {name: x for name, x in _COMPUTE.items() if x in (policy.compute, policy.param)}
    for name, dtype in wanted.items():
        fits, reason = device.supports(dtype)
        if not fits:
            fix = "use bf16 or no" if name == "fp8" else "use no"
            raise StrategyError(
                "D0801", f"{device.name} does not support {name}: {reason}", where=where, fix=fix
            )
    if policy.fp8 and find_spec("torchao") is None:
        raise StrategyError(
            "D0856",
            "mixed_precision fp8 needs torchao, which is not installed",
            where=where,
            fix="pip install torchao, or distrib[fp8]; or use bf16",
        )
    return policy


def _spelled_out(section: PrecisionSection, where: str | None) -> PrecisionPolicy:
    """Return the policy of a mapping, in which every role has its own format."""
    compute = "bf16" if section.compute == "fp8" else section.compute
    if section.param not in ("fp32", compute):
        raise ConfigError(
            "D0124",
            f"param is {section.param} and compute is {section.compute}; expected parameters in fp32, or in the "
            "format that is computed in",
            where=where,
            fix=f"set param: fp32 or param: {compute}",
        )
    if section.loss_scaling == "dynamic" and section.compute != "fp16":
        raise ConfigError(
            "D0124",
            f"loss_scaling is dynamic and compute is {section.compute}, whose range is that of fp32",
            where=where,
            fix="set loss_scaling: none, or compute: fp16",
        )
    return PrecisionPolicy(
        "no" if section.compute == "fp32" else section.compute,
        param=_DTYPES[section.param],
        compute=_COMPUTE.get(compute),
        reduce=_DTYPES[section.reduce],
        output=_DTYPES[section.output],
        loss_scaling=section.loss_scaling,
        fp32_modules=section.fp32_modules,
        fp8=section.compute == "fp8",
    )
