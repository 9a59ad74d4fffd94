"""Which examples make each batch of a training run, and which of them each process has.

Legend: K datasets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from mingpt.datasets import CustomDataset
from mingpt.text import CorpusDataset, MixtureDataset, TextDataset

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, with the examples along the first axis."""

Shard = tuple[int, int]
"""A process's rank and the world size: which share of each batch is its own."""


TaskDataset = CustomDataset | TextDataset
"""Examples of tasks: what an adapter is trained on."""


class MapDataset(Protocol):
    """What a Trainer needs of a dataset: numbered pairs of tensors (x, y), of one shape each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Batch: ...


class BatchedDataset(Protocol):
    """A dataset that builds a batch at once and has an example for every index from 0 on, as CustomDataset."""

    def batch(self, indices: Any, /) -> Batch: ...


def is_batched(dataset: object) -> TypeGuard[BatchedDataset]:
    """Whether a dataset has a method ``batch``; an attribute of that name, such as a batch size, is none."""
    return callable(getattr(dataset, "batch", None))


def index_batches(
    n_examples: int | None, batch_size: int, start: int, seed: int, shard: Shard
) -> Iterator[Sequence[int]]:
    """Yield the indices of each batch, without end. A batch depends on its iteration's number only.

    Args:
        n_examples: they are drawn with replacement; None numbers them without end, and each is used once.
        batch_size: of all processes together.
        start: the first iteration's number.
        seed: of the draws.
        shard: the process whose share is wanted. Together the processes have the batch that one would have alone.
    """
    for iteration in itertools.count(start):
        indices = range(iteration * batch_size, (iteration + 1) * batch_size)
        if n_examples is not None:
            generator = torch.Generator().manual_seed((seed + iteration) % 2**63)
            indices = torch.randint(n_examples, (batch_size,), generator=generator).tolist()
        yield shard_indices(indices, shard)


def shard_indices(indices: Sequence[int], shard: Shard) -> Sequence[int]:
    """A process's share of a batch's indices: consecutive ones. Shares differ in size by one at most."""
    rank, world_size = shard
    return indices[len(indices) * rank // world_size : len(indices) * (rank + 1) // world_size]


class JointDataset:
    """K datasets whose examples share batches, grouped by dataset."""

    def __init__(self, datasets: Sequence[TaskDataset]):
        """Join ``datasets``, at least one.

        Raises:
            TypeError: for anything but a CustomDataset or a TextDataset.
            ValueError: if their lengths or prefix_paddings differ: a plain mean of the loss would favour the longer.
        """
        for dataset in datasets:
            if not isinstance(dataset, TaskDataset):
                expected = "datasets that share batches must be CustomDatasets or TextDatasets"
                raise TypeError(f"{expected}, got a {type(dataset).__name__}")
        sizes = sorted({(dataset.length, dataset.prefix_padding) for dataset in datasets})
        if len(sizes) != 1:
            found = sizes or "none"
            raise ValueError(f"datasets that share batches need one length and one prefix_padding, got {found}")
        self.datasets = tuple(datasets)
        ((self.length, self.prefix_padding),) = sizes

    def check_fits(self, vocab_size: int, block_size: int) -> None:
        """Check that each dataset fits a model, as ``CustomDataset.check_fits`` does."""
        for dataset in self.datasets:
            dataset.check_fits(vocab_size, block_size)

    def batch(self, parts: Sequence[tuple[int, Sequence[int]]]) -> Batch:
        """Build a batch: for each part, a dataset's number and the indices of its examples."""
        batches = [self.datasets[number].batch(indices) for number, indices in parts]
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def __getitems__(self, parts: Sequence[tuple[int, Sequence[int]]]) -> list[Batch]:
        return list(zip(*self.batch(parts), strict=True))

    def describe(self) -> list[dict[str, Any]]:
        """Each dataset's description."""
        return [dataset.describe() for dataset in self.datasets]


OwnDataset = TaskDataset | CorpusDataset | MixtureDataset | JointDataset
"""Those that know their placeholders, how many of a row's last tokens may be scored, and whether they fit a model."""
