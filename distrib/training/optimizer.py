"""The optimizer that a training loop sees."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer

from distrib.errors import NotBuiltError
from distrib.strategies.base import Strategy
from distrib.training.window import Window

if TYPE_CHECKING:
    from distrib.training.accumulation import Accumulation

_PARAMETERS = itemgetter("params")


class PreparedOptimizer(Optimizer):
    """Steps and clears gradients only where a window allows it; everything else is the user's optimizer's.

    `zero_grad` may stand anywhere in the loop: it clears gradients unless a window is open that still needs them.

    Attributes:
        optimizer: The user's own optimizer.
        num_steps: Real steps taken since the run began, over restarts.
        stepped: Whether the last call of `step` changed the parameters.
        skipped: Whether the last step at a window's end left them unchanged.
        content: What lies in `.grad`: nothing, gradients of an open window of several micro-steps, or those of a
            window that is over. A loss does not tell which optimizers it is for, so one that is for another
            optimizer must not make "used" gradients "open" ones.
        is_unfinished: Whether the last loss came in a micro-step that did not close its window.
    """

    def __init__(self, optimizer: Optimizer, strategy: Strategy, accumulation: Accumulation) -> None:
        self.optimizer = optimizer
        self._strategy, self._accumulation = strategy, accumulation
        self._clears_itself = type(strategy).clear_gradients is Strategy.clear_gradients
        self.parameter_ids: frozenset[int] = frozenset()
        self.find_parameters()
        self.num_steps = 0
        self.stepped = False
        self.skipped = False
        self.window = Window()
        self.content: Literal["nothing", "open", "used"] = "nothing"
        self.is_unfinished = False
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
        added = self.optimizer.param_groups[-1]
        added["params"] = self._strategy.as_prepared(added["params"])
        self.find_parameters()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step at the window's end; between, do nothing.

        Raises:
            TrainingError: in the middle of a global batch without `accumulate`.
        """
        if closure is not None:
            raise NotBuiltError("optimizer.step(closure)", fix="call backward before step()")
        accumulation, window = self._accumulation, self.window
        if accumulation.scope is None:
            accumulation.check_may_step()
        self.stepped = False
        if not accumulation.closes:
            self.is_unfinished = True
            if self.content == "nothing":
                self.content = "open"
            return
        if accumulation.divides and not window.divided:
            accumulation.finish(self)
        self.stepped = not window.unusable and self._strategy.step(self.optimizer).stepped
        self.skipped = not self.stepped
        self.num_steps += self.stepped
        self.content, self.is_unfinished = "used", False
        accumulation.stepped(self)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 (torch's signature)
        """Clear the gradients, unless an open window still adds to them."""
        if self.content != "open" or self._accumulation.was_left():
            self.content, self.is_unfinished = "nothing", False
            self.window.serial = self.window.kind = None
            if self._clears_itself:
                self.optimizer.zero_grad(set_to_none)
            else:
                self._strategy.clear_gradients(self.optimizer, set_to_none=set_to_none)

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters of all groups."""
        return list(chain.from_iterable(map(_PARAMETERS, self.optimizer.param_groups)))

    def find_parameters(self) -> None:
        """Note which parameters the groups hold: they have changed."""
        self.parameter_ids = frozenset(id(parameter) for parameter in self.parameters())

    def trains(self, model: nn.Module) -> bool:
        """Whether any parameter of `model` is this optimizer's."""
        return any(id(parameter) in self.parameter_ids for parameter in self._strategy.parameters(model))

    def abandon(self) -> None:
        """Forget the open window with its gradients: it will be replayed from its beginning."""
        self.content = "used"
        self.zero_grad()

    def rescale(self, factor: float) -> None:
        """Multiply the gradients of the open window: the loss scale has changed meanwhile."""
        self._strategy.scale_gradients_(self.parameters(), factor)
