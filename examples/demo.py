"""What `make demo` runs: train a small GPT on two processes, lose one of them, and go on as if nothing had happened.

Everything that it claims at the end has been checked; it exits with 1 if anything does not hold.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
RUN = "runs/demo"  # below ROOT, where everything runs
STEPS, SAVE_EVERY, KILL_AT = 80, 20, 50
COMMAND = [
    *("distrib", "launch", "--config", "examples/gpt.yaml", "--set", f"project_dir={RUN}"),
    *("examples/gpt.py", "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--log-every", "1"),
]


class Launch:
    """One run of COMMAND. Its output is shown as it comes; progress renews one line if this is a terminal."""

    def __init__(self, kill_at=None):
        self.losses = {}  # step -> loss, as printed
        self.rates = []  # tokens/s
        self.lines = []
        self.killed = None  # pid
        command = [sys.executable, "-m", *COMMAND]
        print(f"$ {' '.join(COMMAND)}", flush=True)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout:
                step = self.note(line.rstrip())
                if kill_at is not None and step == kill_at:
                    self.killed = kill_rank(1, process.pid)
        self.exit_code = process.returncode

    def note(self, line):
        """Show a line; return the step that it reports, if any."""
        self.lines.append(line)
        found = re.search(r"step +(\d+)/\d+ +loss ([\d.]+).* ([\d,]+) tokens/s", line)
        if not found:
            print(line, flush=True)
            return None
        step = int(found[1])
        self.losses[step] = float(found[2])
        self.rates.append(float(found[3].replace(",", "")))
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if step in (KILL_AT, STEPS) else "", flush=True)
        elif step % 10 == 0 or step == 1:
            print(line, flush=True)
        return step


def kill_rank(rank, launcher):
    """End one rank of a launch with SIGKILL, as the kernel does when memory runs out; return its pid."""
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            process.kill()
            print(f"\n--- demo: killed rank {rank} (pid {process.pid}) with SIGKILL ---\n", flush=True)
            return process.pid
    raise SystemExit(f"demo: found no rank {rank} below process {launcher}")


def main():
    shutil.rmtree(ROOT / RUN, ignore_errors=True)
    print("--- 1. train on two processes; rank 1 will be killed in the middle ---\n", flush=True)
    first = Launch(kill_at=KILL_AT)
    print("\n--- 2. the same command again ---\n", flush=True)
    second = Launch()

    resumed_at = min(second.losses) - 1
    twice = sorted(set(first.losses) & set(second.losses))
    start, end = first.losses[1], second.losses[STEPS]
    report = any(f"rank 1 (process {first.killed}" in line for line in first.lines)
    checks = {
        f"the launcher named rank 1 (pid {first.killed}) and ended with 137 (128 + SIGKILL)": report
        and first.exit_code == 137,
        f"killed after step {max(first.losses)}, resumed from the checkpoint of step {resumed_at}": resumed_at
        == max(first.losses) // SAVE_EVERY * SAVE_EVERY,
        f"steps {twice[0]} to {twice[-1]}, trained twice, have the same losses": all(
            first.losses[step] == second.losses[step] for step in twice
        ),
        f"loss fell from {start:.2f} to {end:.2f}": end < 0.6 * start,
        f"{max(second.rates):,.0f} tokens/s on two processes": second.exit_code == 0,
        f"the model is in {RUN}/model/model.safetensors": (
            ROOT / RUN / "model" / "model.safetensors"
        ).is_file(),
    }
    print("\n--- 3. what happened ---\n")
    for claim, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'}  {claim}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
