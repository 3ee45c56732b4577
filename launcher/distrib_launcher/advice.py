"""What to try after a failure, by what its message says. A table; the first row that fits is used."""

from __future__ import annotations

import re
import sys
from typing import Final

_ADVICE: Final = (
    (
        r"out of memory",
        "a smaller micro-batch, with gradient_accumulation_steps raised by as much; mixed_precision: bf16",
    ),
    (
        r"ModuleNotFoundError|No module named",
        f"{sys.executable} is what the ranks run: install the module there",
    ),
    (
        r"bus error|shared memory|/dev/shm",
        "make /dev/shm larger (docker: --shm-size), or use fewer data-loader workers",
    ),
    (r"address already in use|EADDRINUSE", "leave the port out, so that a free one is chosen"),
    (r"no space left on device|disk quota", "make room, or write elsewhere (project_dir, TMPDIR)"),
    (r"device-side assert", "CUDA_LAUNCH_BLOCKING=1 shows the line that is wrong; so does --device cpu"),
    (
        r"default process group has not been initialized",
        "make the Accelerator before anything that talks to other ranks",
    ),
    (r"finished reduction in the prior iteration", "set ddp.find_unused_parameters: true"),
    (
        r"freeze_support\(\)|safely importable",
        'put what the script starts under `if __name__ == "__main__":`',
    ),
    (r"\bnccl", "NCCL_DEBUG=INFO in the environment, to see which link or device it is"),
)


def advice_on(text: str) -> str:
    """Return what to try about an error, by its type and message; empty if nothing is known."""
    return next((advice for looks_like, advice in _ADVICE if re.search(looks_like, text, re.IGNORECASE)), "")
