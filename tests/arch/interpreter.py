"""A fresh interpreter, asked what it has loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy")


def asked(code: str, cwd: Path) -> Any:
    """Run `code`, which prints JSON as its last line on stdout, away from the repository; return what it says."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DISTRIB_")}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'launcher'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
