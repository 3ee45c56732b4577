"""Which samples are mine, in which order, and where did I stop?"""

from distrib.data.agreement import agree_on_loader
from distrib.data.live import LiveLoaders
from distrib.data.loader import PreparedDataLoader
from distrib.data.metrics import gather_true_rows, refuse_after_the_loop
from distrib.data.options import DataOptions
from distrib.data.sharding import Share

__all__ = [
    "DataOptions",
    "LiveLoaders",
    "PreparedDataLoader",
    "Share",
    "agree_on_loader",
    "gather_true_rows",
    "refuse_after_the_loop",
]
