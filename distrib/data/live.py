"""Which prepared loader is being read now: the last live one that yielded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distrib.data.loader import PreparedDataLoader


class LiveLoaders:
    """The loaders in iteration, innermost last. One per accelerator.

    When an evaluation loop inside a training loop ends, the training loader is current again.

    Attributes:
        stack: All of them.
        current: The loader that yielded last and is not at its end.
        last_ended: The one whose loop ended last.
    """

    def __init__(self) -> None:
        self.stack: list[PreparedDataLoader] = []
        self.current: PreparedDataLoader | None = None
        self.last_ended: PreparedDataLoader | None = None

    def yielded(self, loader: PreparedDataLoader) -> None:
        """Make `loader` the current one."""
        if self.current is loader:
            return
        if loader in self.stack:
            self.stack.remove(loader)
        self.stack.append(loader)
        self.current = loader

    def ended(self, loader: PreparedDataLoader) -> None:
        """Take out a loader whose loop has ended, by exhaustion or by `break`."""
        if loader in self.stack:
            self.stack.remove(loader)
            self.current = self.stack[-1] if self.stack else None
            self.last_ended = loader
