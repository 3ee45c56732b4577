"""Fit a small network to a function of two variables.

`diff examples/plain_loop.py examples/with_distrib.py` shows how this loop comes to run on any number of processes.
Both print the same loss.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator

accelerator = Accelerator(global_batch_size=64)
torch.manual_seed(0)
points = 4 * torch.rand(1000, 2, dtype=torch.float64) - 2  # in random order, so that nothing need be shuffled
heights = points.prod(dim=1, keepdim=True).sin()
model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1)).double()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20 * 16)
loader = DataLoader(TensorDataset(points, heights), batch_size=64)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

for _ in range(20):
    for x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

model = accelerator.unwrap_model(model).cpu()
with torch.no_grad():
    loss = nn.functional.mse_loss(model(points), heights)
accelerator.print(f"final loss {loss.item():.12f}")
