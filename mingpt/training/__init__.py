"""The parts of a training run that the loop in ``mingpt.trainer`` is made of.

``optimizers`` has AdamW, Muon and the schedules; ``batches`` says which examples each batch has; ``precision`` is the
floating-point format of the forward pass; ``metrics`` logs a run: a progress bar, a JSON-lines file, TensorBoard;
``signals`` has a run finish its iteration before it stops.
"""

from mingpt.training.batches import JointDataset, index_batches, is_batched, shard_indices
from mingpt.training.metrics import RUNTIME_KEYS, MetricsLogger, read_metrics
from mingpt.training.optimizers import Muon, build_optimizer, learning_rate_factor
from mingpt.training.precision import autocast, resolve_precision

__all__ = [
    "RUNTIME_KEYS", "JointDataset", "MetricsLogger", "Muon", "autocast", "build_optimizer", "index_batches",
    "is_batched", "learning_rate_factor", "read_metrics", "resolve_precision", "shard_indices",
]  # fmt: skip
