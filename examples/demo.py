"""What `make demo` runs: train a small GPT on two processes, lose one of them, and go on as if nothing had happened.

Everything that it claims at the end has been checked; it exits with 1 if anything does not hold.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent  # where the launches run
STEPS, SAVE_EVERY, KILL_AT = 80, 20, 50
STEP_LINE = re.compile(r"step +(\d+)/\d+ +loss ([\d.]+).* ([\d,]+) tokens/s")


class Screen:
    """Where the demo writes: whole lines and, on a terminal, one line at the end that renews itself."""

    def __init__(self, out):
        self.out, self.renews, self.open = out, out.isatty(), False

    def line(self, text=""):
        """Write a line below all others; a progress line that stands there stays as it is."""
        self.out.write(f"{self.newline()}{text}\n")
        self.out.flush()

    def progress(self, text, *, keep):
        """Write a line in place of the last progress line; where lines cannot be renewed, only if it is to be kept."""
        if self.renews:
            room = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be renewed
            self.out.write(f"\r{text[:room]}\x1b[K")
            self.open = True
            self.out.flush()
        elif keep:
            self.line(text)

    def newline(self):
        """Return what ends the progress line, if there is one."""
        was_open, self.open = self.open, False
        return "\n" if was_open else ""


class Launch:
    """One launch of the training, whose output is shown as it comes."""

    def __init__(self, folder, screen, kill_at=None):
        self.screen = screen
        self.losses = {}  # step -> loss, as printed
        self.rate = ""  # tokens/s, as printed last
        self.lines = []
        self.killed = None  # pid
        command = [
            *("distrib", "launch", "--config", "examples/gpt.yaml", "--set", f"project_dir={folder}"),
            *("examples/gpt.py", "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--log-every", "1"),
        ]
        screen.line(f"$ {' '.join(command)}")
        with subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                self.follow(process, kill_at)
            except KeyboardInterrupt:  # the launcher has got it too
                self.follow(process)
                raise
        self.exit_code = process.returncode
        if not self.losses:
            raise SystemExit(f"demo: no step was trained; the launch ended with exit code {self.exit_code}")

    def follow(self, process, kill_at=None):
        """Show what a launch prints until it ends; let it lose rank 1 after step `kill_at`."""
        for line in process.stdout:
            step = self.note(line.rstrip())
            if step is not None and step == kill_at:
                self.killed = kill_rank(1, process.pid)
                self.screen.line(f"\n--- rank 1 (process {self.killed}) gets SIGKILL now ---\n")

    def note(self, line):
        """Show a line; return the step that it reports, if any."""
        self.lines.append(line)
        found = STEP_LINE.search(line)
        if not found:
            self.screen.line(line)
            return None
        step, self.rate = int(found[1]), found[3]
        self.losses[step] = float(found[2])
        self.screen.progress(line, keep=step == 1 or step % 10 == 0)
        return step


def kill_rank(rank, launcher):
    """End one rank of a launch with SIGKILL, as the kernel does when memory runs out; return its pid."""
    children = psutil.Process(
        launcher
    ).children()  # a guard, the preloader, and the ranks, forked in their order
    ranks = [child for child in children if "gpt.py" in " ".join(child.cmdline())][1:]
    if rank >= len(ranks):
        raise SystemExit(f"demo: found no rank {rank} below process {launcher}")
    ranks[rank].kill()
    return ranks[rank].pid


def newest_checkpoint(folder):
    """Return the step of the newest complete checkpoint; an incomplete one has no such name."""
    return max(int(path.name[len("step-") :]) for path in (folder / "checkpoints").glob("step-*"))


def main(folder):
    screen, place = Screen(sys.stdout), ROOT / folder
    shutil.rmtree(place, ignore_errors=True)
    screen.line(f"--- 1. train on two processes; rank 1 is killed after step {KILL_AT} ---\n")
    first = Launch(folder, screen, kill_at=KILL_AT)
    saved = newest_checkpoint(place)
    screen.line("\n--- 2. the same command again ---\n")
    second = Launch(folder, screen)

    resumed_at, reached = min(second.losses) - 1, max(first.losses)
    twice = sorted(set(first.losses) & set(second.losses))
    start, end = first.losses[1], second.losses[STEPS]
    report = any(f"rank 1 (process {first.killed}" in line for line in first.lines)
    checks = {
        f"the launcher named rank 1 (process {first.killed}) and ended with 137 (128 + SIGKILL)": report
        and first.exit_code == 137,
        f"killed after step {reached}, resumed from the checkpoint of step {resumed_at}": resumed_at == saved,
        f"steps {saved + 1} to {reached}, trained twice, have the same losses": all(
            first.losses[step] == second.losses[step] for step in twice
        ),
        f"loss fell from {start:.2f} to {end:.2f}": end < 0.6 * start,
        f"{second.rate} tokens/s on two processes": second.exit_code == 0,
        f"the model is in {folder}/model/model.safetensors": (place / "model/model.safetensors").is_file(),
    }
    screen.line("\n--- 3. what happened ---\n")
    for claim, holds in checks.items():
        screen.line(f"{'ok  ' if holds else 'FAIL'}  {claim}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/demo", help="for what is written; emptied first")
    try:
        sys.exit(main(parser.parse_args().folder))
    except KeyboardInterrupt:
        sys.exit(130)
