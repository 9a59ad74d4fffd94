"""Which examples make each batch of a training run.

Legend: K datasets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mingpt.datasets import CustomDataset

Batch = tuple[Tensor, Tensor]


class IndexBatches:
    """For each iteration from ``start`` on, the indices of its examples: a function of the iteration's number only."""

    def __init__(self, dataset: Any, batch_size: int, start: int, seed: int):
        self.n_examples = None if hasattr(dataset, "batch") else len(dataset)
        self.batch_size, self.start, self.seed = batch_size, start, seed

    def __iter__(self) -> Iterator[Any]:
        iteration = self.start
        while True:
            if self.n_examples is None:
                yield range(iteration * self.batch_size, (iteration + 1) * self.batch_size)
            else:
                generator = torch.Generator().manual_seed((self.seed + iteration) % 2**63)
                yield torch.randint(self.n_examples, (self.batch_size,), generator=generator).tolist()
            iteration += 1


class JointDataset:
    """The same examples of each of K datasets, grouped by dataset: n indices are K * n examples.

    The indices of a batch follow one another. Where only some of the datasets are ``chosen``, they share the examples
    of the others; so that none is repeated, ``is_shared`` numbers them with enough room between two batches.
    """

    def __init__(self, datasets: Sequence[CustomDataset], is_shared: bool):
        self.datasets, self.chosen = datasets, list(range(len(datasets)))
        self.stride = len(datasets) if is_shared else 1

    def n_rows(self, batch_size: int) -> int:
        """How many examples a chosen dataset has in a batch."""
        return batch_size * len(self.datasets) // len(self.chosen)

    def batch(self, indices: Sequence[int]) -> Batch:
        first = indices[0] * self.stride
        own = range(first, first + self.n_rows(len(indices)))
        batches = [self.datasets[number].batch(own) for number in self.chosen]
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        return list(zip(*self.batch(indices), strict=True))

    def describe(self) -> list[dict[str, Any]]:
        return [dataset.describe() for dataset in self.datasets]
