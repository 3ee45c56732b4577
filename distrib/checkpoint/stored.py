"""The tensors of a checkpoint as a state that reads each one when it is asked for."""

from __future__ import annotations

from functools import partial

from distrib.checkpoint.plan import whole_box
from distrib.checkpoint.reader import Reader
from distrib.state import ShardedState, Slice


def stored_state(reader: Reader, prefix: str) -> ShardedState:
    """Describe the stored tensors whose names begin with `prefix`, whole, as one process would hold them.

    Nothing is read before a slice's `get`, and nothing is kept after it: whoever takes one at a time has one in memory.
    """
    tensors = {
        name: (
            Slice(
                name, x.spec.shape, x.spec.dtype, whole_box(x.spec.shape), get=partial(reader.tensor, name)
            ),
        )
        for name, x in reader.manifest.tensors.items()
        if name.startswith(prefix)
    }
    aliases = {name: target for name, target in reader.manifest.aliases.items() if target in tensors}
    return ShardedState(tensors, aliases=aliases)
