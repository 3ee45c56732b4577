"""Checkpoints of other programs as ours: read without their code, tensor by tensor, and without running a pickle."""

from distrib.checkpoint.convert.assemble import Converted, convert

__all__ = ["Converted", "convert"]
