"""Number formats: the policy and its application to a model."""

from distrib.precision.autocast import apply_precision, autocast, remove_precision
from distrib.precision.policy import PrecisionPolicy, resolve_precision

__all__ = ["PrecisionPolicy", "apply_precision", "autocast", "remove_precision", "resolve_precision"]
