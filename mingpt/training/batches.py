"""Which examples make each batch of a training run, and which of them are each process's.

Legend: K datasets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mingpt.datasets import CustomDataset

Batch = tuple[Tensor, Tensor]
Indices = TypeVar("Indices", range, list[int])


Shard = tuple[int, int]
"""A process's number, and how many there are: which part of a batch is its own."""


class IndexBatches:
    """For each iteration from ``start`` on, the indices of its examples: a function of the iteration's number only.

    Several processes share out the same examples that one would have.
    """

    def __init__(self, dataset: Any, batch_size: int, start: int, seed: int, part: Shard = (0, 1)):
        self.n_examples = None if hasattr(dataset, "batch") else len(dataset)
        self.batch_size, self.start, self.seed, self.part = batch_size, start, seed, part

    def __iter__(self) -> Iterator[Any]:
        iteration = self.start
        while True:
            if self.n_examples is None:
                yield shard_indices(range(iteration * self.batch_size, (iteration + 1) * self.batch_size), self.part)
            else:
                generator = torch.Generator().manual_seed((self.seed + iteration) % 2**63)
                everyones = torch.randint(self.n_examples, (self.batch_size,), generator=generator).tolist()
                yield shard_indices(everyones, self.part)
            iteration += 1


def shard_indices(indices: Indices, part: Shard) -> Indices:
    """A process's part of a batch's indices: consecutive ones, as many as the others have, or one more or less."""
    number, n_parts = part
    return indices[len(indices) * number // n_parts : len(indices) * (number + 1) // n_parts]


class JointDataset:
    """The same examples of each of K datasets, grouped by dataset: n indices are K * n examples.

    The indices are those of a whole batch and follow one another; a process's part is taken of each dataset. Where only
    some of the datasets are ``chosen``, they share the examples of the others; so that none is repeated, ``is_shared``
    numbers them with enough room between two batches.
    """

    def __init__(self, datasets: Sequence[CustomDataset], is_shared: bool, part: Shard = (0, 1)):
        self.datasets, self.chosen, self.part = datasets, list(range(len(datasets))), part
        self.stride = len(datasets) if is_shared else 1

    def n_rows(self, batch_size: int) -> int:
        """How many examples a chosen dataset has in a batch."""
        return batch_size * len(self.datasets) // len(self.chosen)

    def batch(self, indices: Sequence[int]) -> Batch:
        first = indices[0] * self.stride
        own = shard_indices(range(first, first + self.n_rows(len(indices))), self.part)
        batches = [self.datasets[number].batch(own) for number in self.chosen]
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        return list(zip(*self.batch(indices), strict=True))

    def describe(self) -> list[dict[str, Any]]:
        return [dataset.describe() for dataset in self.datasets]
