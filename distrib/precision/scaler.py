"""Loss scaling for fp16, whose gradients would otherwise vanish (Micikevicius et al., "Mixed Precision Training", 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INITIAL_SCALE = 2.0**16


class LossScaler:
    """The factor on every loss, adapted to what the gradients bear; one per accelerator, equal on all ranks.

    The rule and the defaults are those of `torch.amp.GradScaler`, and so are the keys of its state. The factor is a
    power of two, so that taking it out again is exact.

    Args:
        scale: The first factor.
        growth_factor: What it is multiplied by after `growth_interval` good steps in a row.
        backoff_factor: What it is multiplied by after a step whose gradients were not finite.
        growth_interval: Steps.
    """

    def __init__(
        self,
        scale: float = INITIAL_SCALE,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.scale = scale
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval
        self.sum_factor: float | None = None  # on losses that are sums, so that they are as small as means
        self._good_steps = 0
        self.skipped_in_a_row = 0

    def update(self, *, finite: bool) -> None:
        """Adapt the factor to one more step's gradients."""
        if not finite:
            self.scale *= self.backoff_factor
            self._good_steps = 0
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self._good_steps += 1
        if self._good_steps == self.growth_interval:
            self.scale *= self.growth_factor
            self._good_steps = 0

    def get_scale(self) -> float:
        """Return the factor, as torch's scaler does."""
        return self.scale

    def is_enabled(self) -> bool:
        """Return True, as torch's scaler does when it is in use."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the factor, its parameters and how near the next growth is."""
        return {
            "scale": self.scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._good_steps,
            "sum_factor": self.sum_factor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the state of torch's scaler fits too."""
        self.scale = float(state["scale"])
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval, self._good_steps = state["growth_interval"], state["_growth_tracker"]
        self.sum_factor = state.get("sum_factor")
        self.skipped_in_a_row = 0
