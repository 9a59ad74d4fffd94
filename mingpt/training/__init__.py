"""The parts of a training run that the loop in ``mingpt.trainer`` is made of.

``optimizers`` has AdamW, Muon and the schedules; ``batches`` says which examples each batch has; ``precision`` is the
floating-point format of matrix products; ``metrics`` is the progress bar and the file of metrics.
"""

from mingpt.training.batches import IndexBatches, JointDataset
from mingpt.training.metrics import RUNTIME_KEYS, watch
from mingpt.training.optimizers import Muon, build_optimizer, learning_rate_factor
from mingpt.training.precision import autocast, resolve_precision

__all__ = [
    "RUNTIME_KEYS", "IndexBatches", "JointDataset", "Muon", "autocast", "build_optimizer", "learning_rate_factor",
    "resolve_precision", "watch",
]  # fmt: skip
