"""A small GPT that learns to write Python, byte by byte, from Python's own standard library.

    DISTRIB_CONFIG_FILE=examples/gpt.yaml python examples/gpt.py                # one process
    distrib launch --config examples/gpt.yaml examples/gpt.py                   # two, as the file says
    distrib launch --config examples/gpt.yaml examples/gpt.py --progress        # on a terminal

Stop it whenever you like: either command goes on from the last checkpoint, with the very next sample.
"""

import argparse
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from distrib import Accelerator

CONTEXT = 64  # bytes that a prediction may look back on


class Corpus(Dataset):
    """Windows of CONTEXT bytes, and for each byte the one that follows it."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.py"))
        text = b"\n".join(file.read_bytes() for file in files)
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self):
        return (len(self.data) - 1) // CONTEXT

    def __getitem__(self, i):
        window = self.data[i * CONTEXT : (i + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.head_width = width // heads  # not the number of heads: mesh.tensor deals them out
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):  # (B, T, width)
        normed = self.norm1(x)
        q, k, v = (
            project(normed).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width=96, layers=3, heads=4):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x):  # (B, T) int64 -> (B, T, 256)
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places(places))))


def loss_of(model, x, y):
    """Return (B,) losses, each the mean over a window, in nats per byte."""
    return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1)


@torch.no_grad()
def evaluate(accelerator, model, loader):
    model.eval()
    losses = [accelerator.gather_for_metrics(loss_of(model, x, y)) for x, y in loader]
    model.train()
    return torch.cat(losses).mean().item()


def schedule(step, steps, warm_up=10):
    """Return the factor of the learning rate: up in a line, down in half a cosine."""
    return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))


def show(line, step, args):
    """One line that renews itself, or a line now and then."""
    if args.progress:
        print(f"\r{line}", end="" if step < args.steps else "\n", flush=True)
    elif step % args.log_every == 0 or step in (1, args.steps):
        print(line, flush=True)


def train(args):
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, args.steps))
    corpus = Corpus(args.corpus)
    held_out = range(0, len(corpus), len(corpus) // 100)
    learned = sorted(set(range(len(corpus))) - set(held_out))
    loader = DataLoader(Subset(corpus, learned), batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(Subset(corpus, held_out), batch_size=args.batch_size)
    model, optimizer, scheduler, loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, loader, test_loader
    )
    resumed = accelerator.load_state()
    if resumed:
        accelerator.print(f"resumed from {resumed} at step {optimizer.num_steps}", flush=True)

    begin, windows, losses = time.perf_counter(), 0, []
    while optimizer.num_steps < args.steps:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = loss_of(model, x, y)
                accelerator.backward(loss.mean())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather_for_metrics(loss.detach()))
            if not accelerator.sync_gradients:
                continue
            step, found = optimizer.num_steps, torch.cat(losses)
            losses, windows = [], windows + len(found)
            if accelerator.is_main_process:
                lr, rate = scheduler.get_last_lr()[0], windows * CONTEXT / (time.perf_counter() - begin)
                line = f"step {step:4d}/{args.steps}  loss {found.mean():.4f}  lr {lr:.1e}  {rate:7,.0f} tokens/s"
                show(line, step, args)
            if step % args.save_every == 0:
                accelerator.save_state()
            if step == args.steps:
                break
    loss = evaluate(accelerator, model, test_loader)
    accelerator.print(f"held-out loss {loss:.4f} nats per byte after {optimizer.num_steps} steps")
    final = accelerator.project_dir / "model"
    accelerator.save_model(model, final)
    accelerator.print(f"model written to {final}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=sys.stdout.isatty(),
        help="renew one line at every step instead; the default on a terminal, which ranks of a launch are not on",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="windows per rank and micro-step")
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")))
    train(parser.parse_args())
