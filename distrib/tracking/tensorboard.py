"""Event files for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrib.tracking.base import Tracker, optional_module


class TensorBoardTracker(Tracker):
    """Writes scalars and images below `<project_dir>/<project>`; `init_kwargs` go to torch's SummaryWriter.

    A run that goes on in the same folder hides what was logged after its checkpoint, as TensorBoard does it:
    https://pytorch.org/docs/stable/tensorboard.html (purge_step)
    """

    name = "tensorboard"

    def __init__(self) -> None:
        self._module = optional_module("torch.utils.tensorboard", tracker=self.name, extra="tensorboard")
        self._writer: Any = None

    @property
    def tracker(self) -> Any:
        """The SummaryWriter of torch."""
        return self._writer

    def start(
        self, project: str, folder: Path, config: Mapping[str, Any] | None, options: Mapping[str, Any]
    ) -> None:
        log_dir = str(options.get("log_dir", folder / project))
        self.run_id = str(
            options.get("log_dir", project)
        )  # without project_dir, which may be mounted elsewhere
        purge: dict[str, int] = {}
        if self.earlier and self.earlier.run == self.run_id and self.earlier.step is not None:
            purge["purge_step"] = self.earlier.step + 1
        self._writer = self._module.SummaryWriter(**{**purge, **options, "log_dir": log_dir})
        if config:
            text = json.dumps(dict(config), indent=2, default=str)
            self._writer.add_text("config", f"```json\n{text}\n```")
            self._writer.flush()

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def log_images(self, images: Mapping[str, Any], step: int | None = None, **options: Any) -> None:
        for name, batch in images.items():
            self._writer.add_images(name, batch, global_step=step, **options)

    def finish(self) -> None:
        self._writer.close()
