"""The README's example, with the model and the data that it leaves to the reader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

README = Path(__file__).parents[2] / "README.md"
FEATURES, CLASSES, SAMPLES = 64, 3, 600


class MyModel(nn.Linear):
    """A classifier that knows nothing at first, and learns even at the low rates of the schedule's warm-up."""

    def __init__(self) -> None:
        super().__init__(FEATURES, CLASSES, bias=False)
        nn.init.zeros_(self.weight)


def python_blocks() -> list[str]:
    """Return the code of every Python block."""
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def example() -> str:
    """Return the block that trains."""
    (found,) = [block for block in python_blocks() if "accelerator.prepare(" in block]
    return found


def dataset() -> TensorDataset:
    """Return samples whose class shows in every third feature."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(SAMPLES) % CLASSES
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x + (torch.arange(FEATURES) % CLASSES == y[:, None]), y)


def run_example() -> dict[str, Any]:
    """Run the example in the working directory; return the names that it leaves."""
    names: dict[str, Any] = {"MyModel": MyModel, "dataset": dataset()}
    exec(compile(example(), str(README), "exec"), names)
    return names


def accuracy(model: nn.Module) -> float:
    """Return the share of samples that the model tells right."""
    x, y = dataset().tensors
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).float().mean())
