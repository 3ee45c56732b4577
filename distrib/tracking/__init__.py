"""Where logged values go, and how values of several ranks become one.

A new tracker is one file with a subclass of `Tracker`, and one line here; another package adds its own through the
entry points "distrib.trackers".
"""

from __future__ import annotations

from distrib.registry import Registry
from distrib.tracking.base import Earlier, Tracker
from distrib.tracking.session import Session, split_names
from distrib.tracking.values import Max, Mean, Min, Sum, reduce_values

__all__ = [
    "TRACKERS",
    "Earlier",
    "Max",
    "Mean",
    "Min",
    "Session",
    "Sum",
    "Tracker",
    "reduce_values",
    "split_names",
]

TRACKERS: Registry[type[Tracker]] = Registry(
    "tracker",
    "distrib.trackers",
    {
        "jsonl": "distrib.tracking.jsonl:JsonlTracker",
        "tensorboard": "distrib.tracking.tensorboard:TensorBoardTracker",
    },
)
