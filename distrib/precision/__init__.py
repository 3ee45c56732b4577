"""Number formats: the policy, its application to a model, and the loss scaler that fp16 needs."""

from distrib.precision.autocast import apply_precision, autocast, matching, remove_precision
from distrib.precision.policy import PrecisionPolicy, resolve_precision
from distrib.precision.scaler import LossScaler

__all__ = [
    "LossScaler",
    "PrecisionPolicy",
    "apply_precision",
    "autocast",
    "matching",
    "remove_precision",
    "resolve_precision",
]
