"""What the fork server loads before the first rank: the imports that every rank would pay for."""

import torch
import torch._dynamo
import torch.distributed
import torch.nn.parallel

torch.set_num_threads(1)
