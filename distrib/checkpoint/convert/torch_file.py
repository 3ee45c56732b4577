"""What `torch.save` wrote: a state dict, or a dict that has one beside optimizer and more."""

from __future__ import annotations

from pathlib import Path

from distrib.checkpoint.convert.pickles import load
from distrib.checkpoint.convert.recognise import recognise
from distrib.checkpoint.convert.safetensor import read_file
from distrib.checkpoint.convert.source import Found, stored_tree


def fits(path: Path) -> bool:
    """Whether a source is for this converter."""
    return path.is_file()


def read(path: Path) -> Found:
    """Return what the file holds; a `.safetensors` file is a model."""
    if path.suffix == ".safetensors":
        return Found("safetensors", [read_file(path)])
    return recognise("torch.save", stored_tree(load(path), str(path)), str(path))
