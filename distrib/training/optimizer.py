"""The optimizer that a training loop sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from distrib.errors import NotBuiltError

if TYPE_CHECKING:
    from distrib.data import LiveLoaders
    from distrib.strategies.base import Strategy
    from distrib.training.accumulation import Accumulation


class PreparedOptimizer(Optimizer):
    """Steps and clears gradients only where a window allows it; everything else is the user's optimizer's.

    `zero_grad` may stand anywhere in the loop: it clears gradients unless a window is open that still needs them.

    Attributes:
        optimizer: The user's own optimizer.
        num_steps: Real steps taken since the run began, over restarts.
        stepped: Whether the last call of `step` changed the parameters.
    """

    def __init__(
        self, optimizer: Optimizer, strategy: Strategy, accumulation: Accumulation, live: LiveLoaders
    ) -> None:
        self.optimizer = optimizer
        self._strategy, self._accumulation, self._live = strategy, accumulation, live
        self.parameter_ids = frozenset(id(parameter) for parameter in self.parameters())
        self.num_steps = 0
        self.stepped = False
        self.skipped = False
        self.divided = False
        self._holds = False  # gradients of an open window lie in .grad
        accumulation.add(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The user's optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The user's optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The user's optimizer's defaults."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"PreparedOptimizer({self.optimizer!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a prepared optimizer belongs to its process; pickle its state_dict() instead")

    def state_dict(self) -> dict[str, Any]:
        """Return the user's optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the user's optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the user's optimizer."""
        self.optimizer.add_param_group(param_group)
        self.parameter_ids = frozenset(id(parameter) for parameter in self.parameters())

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step at the window's end; between, do nothing.

        Raises:
            TrainingError: in the middle of a global batch without `accumulate`.
        """
        if closure is not None:
            raise NotBuiltError("optimizer.step(closure)", fix="call backward before step()")
        accumulation = self._accumulation
        accumulation.check_may_step()
        self.stepped = False
        if not accumulation.closes:
            self._holds = True
            return
        counted = accumulation.finish(self.parameters())
        self.stepped = counted and self._strategy.step(self.optimizer).stepped
        self.skipped = not self.stepped
        self.num_steps += self.stepped
        self._holds = False
        self._live.stepped()

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's signature)
        """Clear the gradients, unless an open window still adds to them."""
        if self._holds:
            self._accumulation.bind()  # a loop that was left in mid-window has begun anew
        if not self._holds:
            self.optimizer.zero_grad(set_to_none=set_to_none)

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters of all groups."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def trains(self, model: nn.Module) -> bool:
        """Whether any parameter of `model` is this optimizer's."""
        return any(id(parameter) in self.parameter_ids for parameter in model.parameters())

    def open_window(self) -> None:
        """A new window begins: what lies in .grad is no longer needed."""
        self._holds = self.divided = False

    def note_backward(self, *, closing: bool) -> None:
        """Gradients of the open window have been added; `closing` if they were its last."""
        self._holds = not closing
