"""What the schema knows and this version does not have yet.

An explicit setting of any of it is refused, even to its default. Whoever builds a feature deletes its name here.
"""

from __future__ import annotations

from typing import Final

# Keys, or whole sections, of which no value can be set.
KEYS: Final = frozenset({
    "checkpoint.on_signal",
    "watch.heartbeat_s", "watch.silence_s", "watch.report_s", "watch.verify_collectives", "watch.nonfinite",
    "launch.preempt_grace_s",
})  # fmt: skip


class AllBut(tuple[object, ...]):
    """The built values of a key whose values are not all names: whatever names nothing `planned` is built.

    Args:
        built: What an error suggests.
        planned: Names that are not built.
    """

    planned: tuple[str, ...]

    def __new__(cls, *built: object, planned: tuple[str, ...]) -> AllBut:
        """Make it from the names that are built."""
        self = super().__new__(cls, built)
        self.planned = planned
        return self

    def __contains__(self, value: object) -> bool:
        return not any(x in self.planned for x in (value if isinstance(value, tuple) else (value,)))


# Keys of which only these values can be set; a row goes when all that the schema allows is built.
BUILT_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "tracking.log_with": AllBut("jsonl", "tensorboard", planned=("wandb", "mlflow")),
    "launch.backend": ("local", "tpu"),
    "launch.nnodes": (1,),
}


def is_built(key: str) -> bool:
    """Say whether any value of a dotted key can be set."""
    return key not in KEYS and key.partition(".")[0] not in KEYS
