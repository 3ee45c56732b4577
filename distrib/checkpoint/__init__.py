"""Checkpoints: a directory that is complete or absent, readable under any strategy and number of ranks."""

from distrib.checkpoint.export import export_model
from distrib.checkpoint.format import Manifest
from distrib.checkpoint.location import Location, Url, locate, locate_below
from distrib.checkpoint.opening import inspect, latest, verify
from distrib.checkpoint.reader import Reader, open_checkpoint
from distrib.checkpoint.retention import retain
from distrib.checkpoint.writer import Contents, Saving, begin, save

__all__ = [
    "Contents",
    "Location",
    "Manifest",
    "Reader",
    "Saving",
    "Url",
    "begin",
    "export_model",
    "inspect",
    "latest",
    "locate",
    "locate_below",
    "open_checkpoint",
    "retain",
    "save",
    "verify",
]
