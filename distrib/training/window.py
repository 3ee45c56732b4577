"""What one optimizer's gradients consist of so far: the open window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from distrib.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

Count: TypeAlias = "float | Tensor"


class Window:
    """The losses whose gradients lie in one optimizer's `.grad`, from the first backward to the step.

    Attributes:
        serial: Which window of the run it is; None when there is none, so that the next backward opens one.
        kind: Whether its losses are means or sums; None before the first.
        micro_step: Number of the micro-step that `micro_count` belongs to.
        micro_count: What the sums of that micro-step count.
        total: What this rank has counted in the window.
        loss_scale: Factor that lies on the gradients, taken out by the one division.
        divided: Whether that has been done.
        unusable: Why there is nothing to step with, as far as the division told; empty if there is.
    """

    __slots__ = ("divided", "kind", "loss_scale", "micro_count", "micro_step", "serial", "total", "unusable")

    kind: Literal["mean", "sum"] | None
    micro_count: Count | None
    total: Count

    def __init__(self) -> None:
        self.serial: int | None = None
        self.open(None)

    def open(self, serial: int | None) -> None:
        """Begin a new window."""
        self.serial = serial
        self.kind = self.micro_count = None
        self.micro_step, self.total = -1, 0
        self.loss_scale = 1.0
        self.divided, self.unusable = False, ""

    def check_kind(self, kind: Literal["mean", "sum"]) -> None:
        """Refuse a loss of the other kind, and any loss once the gradients have been divided.

        Raises:
            TrainingError: D0602 or D0605.
        """
        if self.kind not in (None, kind):
            raise TrainingError(
                "D0602",
                "backward(loss) and backward(loss_sum, count=n) are mixed in one global batch",
                fix="use one of the two for all losses of a step",
            )
        if self.divided:
            raise TrainingError(
                "D0605",
                "backward after clipping in the same global batch: its gradients are divided already, and those of "
                "this loss would be added undivided",
                fix="call backward for all losses of a step before the first clip",
            )
        self.kind = kind

    def check_count(self, count: Count) -> None:
        """Refuse a second summed loss of a micro-step that counts otherwise: they share one division.

        Raises:
            TrainingError: D0603.
        """
        if bool(self.micro_count != count):
            raise TrainingError(
                "D0603",
                f"two backward calls of one micro-step count {float(self.micro_count or 0):g} and {float(count):g}; "
                "they share one division, so the counts must be equal",
                fix="add the losses up before one backward call, or normalise one of them yourself",
            )
