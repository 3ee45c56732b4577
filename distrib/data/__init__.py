"""Which samples are mine, in which order, and where did I stop?"""

from distrib.data.live import LiveLoaders
from distrib.data.loader import DataOptions, PreparedDataLoader

__all__ = ["DataOptions", "LiveLoaders", "PreparedDataLoader"]
