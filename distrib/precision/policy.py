"""Number formats as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from distrib.devices.base import DeviceBackend
from distrib.errors import NotBuiltError, StrategyError

LossScaling = Literal["none", "dynamic"]
_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PrecisionPolicy:
    """Which number format is used where.

    Attributes:
        name: The setting it came from: "no", "bf16", "fp16".
        param: dtype in which parameters and optimizer state are kept; None leaves them as they are.
        compute: dtype of matrix products under autocast; None for no autocast.
        reduce: dtype in which gradients are reduced; None for that of the gradient.
        output: dtype to which floating-point model outputs are converted; None leaves them.
        loss_scaling: "dynamic" for fp16, else "none".
    """

    name: str = "no"
    param: torch.dtype | None = None
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    output: torch.dtype | None = None
    loss_scaling: LossScaling = "none"


def resolve_precision(name: object, device: DeviceBackend, *, where: str | None = None) -> PrecisionPolicy:
    """Turn the setting `mixed_precision` into a policy that the device supports.

    Raises:
        NotBuiltError: for fp8, which this version does not have.
        StrategyError: if the device cannot compute in that format.
    """
    if name == "no":
        return PrecisionPolicy()
    if name not in _COMPUTE:
        raise NotBuiltError(f"mixed_precision {name!r}", where=where, fix="use bf16, fp16 or no")
    compute = _COMPUTE[str(name)]
    fits, reason = device.supports(compute)
    if not fits:
        raise StrategyError(
            "D0801", f"{device.name} does not support {name}: {reason}", where=where, fix="use no"
        )
    scaling: LossScaling = "dynamic" if compute is torch.float16 else "none"
    return PrecisionPolicy(str(name), compute=compute, output=torch.float32, loss_scaling=scaling)
