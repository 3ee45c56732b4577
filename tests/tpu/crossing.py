"""Parts of runs: from a checkpoint or the beginning, for some steps, to a checkpoint. In either virtual environment.

As a program it takes a JSON list of jobs and the name of a file, and writes there what rank 0 of two returned.
"""

from __future__ import annotations

import json
import sys

import torch

from distrib import Accelerator, RunConfig
from distrib.testing import run_ranks
from tests.contract.plain import loader_for, make_model, make_optimizer, per_sample_loss

SAMPLES, BATCH = 44, 8  # 44: the fifth step of an epoch is smaller, and step 5 is followed by another one


def part(settings, micro, load, steps, save):
    """Take `steps` steps and return the parameters and the number of the last step."""
    config = RunConfig(seed=5, global_batch_size=BATCH, data={"tail": "exact"}, **settings)
    accelerator = Accelerator(config)
    model = make_model(torch.float32)
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    model, optimizer, schedule, loader = accelerator.prepare(
        model, optimizer, schedule, loader_for(SAMPLES, micro, shuffle=True, dtype=torch.float32)
    )
    if load is not None:
        accelerator.load_state(load)
    done = 0
    while done < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(per_sample_loss(model, batch).mean())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
                if done == steps:
                    break
    if save is not None:
        accelerator.save_state(save)
    found = {name: value.detach().cpu() for name, value in accelerator.get_state_dict(model).items()}
    return found, optimizer.num_steps


def parts(jobs):
    """Run one part after the other; a job has the arguments of `part`."""
    return [part(*job) for job in jobs]


if __name__ == "__main__":
    torch.save(run_ranks(parts, 2, json.loads(sys.argv[1]))[0], sys.argv[2])
