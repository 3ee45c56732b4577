"""Which prepared loader is being read now: the last live one that yielded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distrib.data.loader import PreparedDataLoader


class LiveLoaders:
    """The loaders in iteration, innermost last. One per accelerator.

    When an evaluation loop inside a training loop ends, the training loader is current again.

    Attributes:
        current: The loader that yielded last and is not at its end.
        last_ended: The one whose loop ended last.
    """

    def __init__(self) -> None:
        self._stack: list[PreparedDataLoader] = []
        self.current: PreparedDataLoader | None = None
        self.last_ended: PreparedDataLoader | None = None

    def yielded(self, loader: PreparedDataLoader) -> None:
        """Make `loader` the current one."""
        if self.current is loader:
            return
        if loader in self._stack:
            self._stack.remove(loader)
        self._stack.append(loader)
        self.current = loader

    def ended(self, loader: PreparedDataLoader) -> None:
        """Take out a loader whose loop has ended, by exhaustion or by `break`."""
        if loader in self._stack:
            self._stack.remove(loader)
            self.current = self._stack[-1] if self._stack else None
            self.last_ended = loader

    def stepped(self) -> None:
        """Note that an optimizer has stepped: the windows yielded so far are used up."""
        for loader in self._stack:
            loader.stepped()
