"""Number formats: the policy and its application to a model."""

from distrib.precision.policy import PrecisionPolicy, resolve_precision

__all__ = ["PrecisionPolicy", "resolve_precision"]
