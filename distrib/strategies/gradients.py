"""Operations on the gradients that lie on this rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scale_and_check(gradients: Sequence[Tensor], factor: float) -> bool:
    """Multiply in place and say whether all is finite, in one pass per device and dtype, as torch's own scaler does."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    found = []
    for (device, dtype), group in alike.items():
        found.append(torch.zeros((), device=device))
        if dtype is torch.float64:  # the kernel's factor has 24 bits
            torch._foreach_mul_(group, factor)
        scale = torch.tensor(1.0 if dtype is torch.float64 else factor, dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(group, found[-1], scale)
    return not sum(map(float, found))


def norm_to_the_power(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Return sum(|x| ** norm_type) over all elements, 0-d; for the infinity norm the largest |x|.

    Norms of parts are joined by adding these powers, or by the larger of two.
    """
    parts = [x for x in tensors if x.numel()]
    if not parts:
        return torch.zeros((), device=device)
    joined = torch.stack([x.to(device, _wide(x)) for x in torch._foreach_norm(parts, norm_type)])
    return joined.max() if norm_type == torch.inf else joined.pow(norm_type).sum()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
