"""Handwritten digits: train, evaluate exactly, save, and go on where an earlier run stopped.

    python examples/digits.py                                          # one process
    distrib launch -n 2 --cpu examples/digits.py                       # two
    distrib launch --config examples/digits.yaml examples/digits.py    # two, as the file says

Ask for more `--epochs` and it goes on from its last checkpoint, on any number of processes. The images come with
scikit-learn (`pip install scikit-learn`).
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from distrib import Accelerator


def digits():
    """Return 1500 images to learn from and 297 to test with: (1, 8, 8) pixels from 0 to 1, and a label."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = TensorDataset(images, torch.tensor(labels))
    return random_split(data, [1500, 297], torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(64 * 4 * 4, 10),
    )


@torch.no_grad()
def evaluate(accelerator, model, loader):
    """Return the loss of every image and whether the answer was right: each image once, on any number of processes."""
    model.eval()
    losses, right = [], []
    for images, labels in loader:
        logits = model(images)
        found = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
        loss, hit = accelerator.gather_for_metrics(found)
        losses.append(loss)
        right.append(hit)
    model.train()
    return torch.cat(losses), torch.cat(right)


def main(epochs):
    accelerator = Accelerator(seed=0, global_batch_size=64, project_dir="runs/digits")
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    train_data, test_data = digits()
    train_loader = DataLoader(train_data, batch_size=64, shuffle=True)
    test_loader = DataLoader(test_data, batch_size=64)
    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, test_loader
    )
    if accelerator.load_state():
        accelerator.print(f"resumed after epoch {train_loader.epoch}, step {optimizer.num_steps}")

    for epoch in range(train_loader.epoch, epochs):
        for images, labels in train_loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        accelerator.save_state()
        losses, right = evaluate(accelerator, model, test_loader)
        accuracy = f"accuracy {right.float().mean():.1%} ({right.sum()} of {len(right)})"
        accelerator.print(f"epoch {epoch + 1}: test loss {losses.mean():.4f}, {accuracy}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    main(parser.parse_args().epochs)
