"""Every test runs on one thread: on models this small, a second one costs more than it gives."""

import torch

torch.set_num_threads(1)
