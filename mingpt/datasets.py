"""Which examples exist, and which of them are for training and which for testing.

Legend: N examples, L row length, T = prefix_padding + 2 L - 1 tokens of an example.

Rows are random but not stateful: a row is a pure function of (seed, split, values, length, index). numpy's Philox
generator, keyed by a hash of those and counting from the block's number, makes a block of candidate rows; a stable
hash of each candidate says whether it is a training or a test row, and the first ``BLOCK_ROWS`` of the wanted split
are the block. Only the generator's raw 64-bit words are used: they are the same on every machine and in every version
of numpy, which its ready-made distributions are not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mingpt.tasks import Interval, Task, Values

SPLITS = ("train", "test")
SPLIT_VERSION = 1
"""Changes when any row of any split changes; recorded in every checkpoint."""

BLOCK_ROWS = 1024
IGNORED = -1
"""The target where no prediction is scored."""

_TEST_SHARE = 4  # one row in four is for testing
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class CustomDataset(torch.utils.data.Dataset):
    """Examples of one or several tasks, as token sequences for a GPT.

    Example ``i`` poses ``tasks[i % len(tasks)]`` on row ``i`` of that task's stream of rows. It is the sequence
    ``[0] * prefix_padding + input + solution``; ``x`` is all of it but the last token and ``y`` all but the first,
    with -1 (ignored) before the first token of the solution.

    The stream of rows has no end: any index from 0 on is valid, so that training need not repeat rows. ``len`` and
    iteration count ``size`` of them, which is what an evaluation over the whole dataset sees.
    """

    def __init__(
        self,
        split: str,
        tasks: Sequence[Task],
        length: int = 10,
        num_digits: int = 10,
        prefix_padding: int = 0,
        seed: int = 0,
        size: int = 10_000,
    ):
        """Describe the examples; nothing is drawn yet.

        Args:
            split: "train" or "test"; no input row is in both, whatever the tasks.
            tasks: at least one; a mixture gives each an equal share.
            length: L, elements of an input row.
            num_digits: the largest element of an input row.
            prefix_padding: how many zeros come before the input, the places of a prefix.
            seed: another seed gives other rows, and the same split.
            size: what ``len`` says.

        Raises:
            TypeError: if ``tasks`` is not a sequence of tasks.
            ValueError: for an unknown split, a size out of range, or a task that ``num_digits`` is too small for.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if not isinstance(tasks, list | tuple) or not all(isinstance(task, Task) for task in tasks):
            raise TypeError(f"tasks must be a list of tasks such as [SortAscending()], got {tasks!r}")
        if not tasks:
            raise ValueError("tasks is empty; give at least one task")
        for name, value, least in (
            ("length", length, 1),
            ("num_digits", num_digits, 2),
            ("prefix_padding", prefix_padding, 0),
            ("size", size, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        length, num_digits, prefix_padding, seed, size = map(int, (length, num_digits, prefix_padding, seed, size))
        self.split, self.tasks, self.seed, self.size = split, tuple(tasks), seed, size
        self.length, self.num_digits, self.prefix_padding = length, num_digits, prefix_padding
        self._streams: list[_RowStream] = []  # the different streams of rows
        self._stream_of_task: list[int] = []
        for task in self.tasks:
            stream = _RowStream(split, task.input_values(num_digits), task.has_repeats, length, seed)
            if stream.values.first.low > stream.values.first.high:
                raise ValueError(f"num_digits = {num_digits} leaves no rows for {task}; use at least 4")
            if self.output_values(task).all.low < 0:
                raise ValueError(f"{task} can produce {self.output_values(task).all.low}, and tokens are not negative")
            if stream not in self._streams:
                self._streams.append(stream)
            self._stream_of_task.append(self._streams.index(stream))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(self.size))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Example ``index``: ``x`` and ``y``, (T,) of int64 each.

        Raises:
            IndexError: for a negative index.
        """
        x, y = self.batch([index])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The examples of these indices, built at once; what a DataLoader calls for a batch."""
        return list(zip(*self.batch(indices), strict=True))

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> tuple[Tensor, Tensor]:
        """Build the examples of these indices at once: ``x`` and ``y``, (N, T) of int64 each.

        Raises:
            IndexError: for a negative index.
        """
        inputs, solutions = self.rows(indices)
        n_silent = self.prefix_padding + self.length - 1
        sequence = np.concatenate(
            [np.zeros((len(inputs), self.prefix_padding), dtype=np.int64), inputs, solutions], axis=1
        )
        y = sequence[:, 1:].copy()
        y[:, :n_silent] = IGNORED
        return torch.from_numpy(sequence[:, :-1]).contiguous(), torch.from_numpy(y)

    def rows(self, indices: Sequence[int] | np.ndarray | range) -> tuple[np.ndarray, np.ndarray]:
        """The input rows and solutions of these indices, (N, L) of int64 each.

        Raises:
            IndexError: for a negative index.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and indices.min() < 0:
            raise IndexError(f"index {indices.min()} is negative; a dataset's rows are numbered from 0 on without end")
        task_of_row = indices % len(self.tasks)
        inputs = np.empty((len(indices), self.length), dtype=np.int64)
        if len(self._streams) == 1:
            self._streams[0].take(indices, out=inputs)
        else:
            stream_of_row = np.asarray(self._stream_of_task)[task_of_row]
            for number, stream in enumerate(self._streams):
                places = np.flatnonzero(stream_of_row == number)
                inputs[places] = stream.take(indices[places])
        if len(self.tasks) == 1:
            return inputs, self.tasks[0].solve(inputs)
        solutions = np.empty_like(inputs)
        for number, task in enumerate(self.tasks):
            places = np.flatnonzero(task_of_row == number)
            solutions[places] = task.solve(inputs[places])
        return inputs, solutions

    def get_vocab_size(self) -> int:
        """How many tokens there are: num_digits + 3, more where a task can produce more."""
        return max(self.num_digits + 3, *(int(self.output_values(task).all.high) + 1 for task in self.tasks))

    def output_values(self, task: Task) -> Values:
        """The values that a solution of ``task`` can hold on this dataset's rows."""
        return task.output_values(task.input_values(self.num_digits), self.length)

    def get_block_size(self) -> int:
        """T, how many tokens the model reads: prefix places, input, and all of the solution but its last."""
        return self.prefix_padding + 2 * self.length - 1

    def check_fits(self, vocab_size: int, block_size: int) -> None:
        """Raise a ValueError if a model of these sizes cannot read the examples (a stand-in)."""
        if vocab_size < self.get_vocab_size() or block_size < self.get_block_size():
            raise ValueError(
                f"the model has vocab_size = {vocab_size} and block_size = {block_size}, the data needs "
                f"{self.get_vocab_size()} and {self.get_block_size()}"
            )

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the data: enough to build the dataset again with ``from_description``."""
        return {
            "split": self.split,
            "tasks": [str(task) for task in self.tasks],
            "length": self.length,
            "num_digits": self.num_digits,
            "prefix_padding": self.prefix_padding,
            "seed": self.seed,
            "size": self.size,
            "split_version": SPLIT_VERSION,
        }

    @classmethod
    def from_description(cls, description: dict[str, Any], **changes: Any) -> CustomDataset:
        """Build the dataset that ``describe`` described, with ``changes`` to its arguments.

        Raises:
            ValueError: if it was described by a version of this package with another split.
        """
        arguments = dict(description)
        version = arguments.pop("split_version")
        if version != SPLIT_VERSION:
            raise ValueError(
                f"the data was described with split version {version}, this package has {SPLIT_VERSION}: "
                "rows that were for training may be for testing now"
            )
        arguments["tasks"] = [Task.parse(name) for name in arguments["tasks"]]
        return cls(**(arguments | changes))

    def __repr__(self) -> str:
        return f"CustomDataset({', '.join(f'{k}={v!r}' for k, v in self.describe().items())})"


class _RowStream:
    """An endless, random-access sequence of input rows of one split."""

    def __init__(self, split: str, values: Values, has_repeats: bool, length: int, seed: int):
        self.split, self.values, self.has_repeats, self.length, self.seed = split, values, has_repeats, length, seed
        name = json.dumps([SPLIT_VERSION, seed, split, values, has_repeats, length])
        self._key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype="<u8")
        self._name = name
        self._blocks: dict[int, np.ndarray] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _RowStream) and self._name == other._name

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blocks": {}}  # a worker process makes its own

    def take(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows of these indices, (N, L)."""
        out = np.empty((len(indices), self.length), dtype=np.int64) if out is None else out
        blocks = indices // BLOCK_ROWS
        for number in np.unique(blocks):
            places = np.flatnonzero(blocks == number)
            out[places] = self._block(int(number))[indices[places] % BLOCK_ROWS]
        return out

    def _block(self, number: int) -> np.ndarray:
        """Block ``number``, (BLOCK_ROWS, L): made when first asked for, and kept while it is among the latest few."""
        if number not in self._blocks:
            while len(self._blocks) >= 16:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = self._make_block(number)
        return self._blocks[number]

    def _make_block(self, number: int) -> np.ndarray:
        bits = np.random.Philox(key=self._key, counter=[0, 0, 0, number])
        share = _TEST_SHARE if self.split == "test" else _TEST_SHARE / (_TEST_SHARE - 1)
        n_candidates = int(BLOCK_ROWS * share * 1.125)
        found: list[np.ndarray] = []
        for attempt in itertools.count():
            candidates = self._draw(bits, n_candidates)
            found.append(candidates[is_test_row(candidates) == (self.split == "test")])
            if sum(map(len, found)) >= BLOCK_ROWS:
                return np.concatenate(found)[:BLOCK_ROWS]
            if attempt == 100:
                raise ValueError(
                    f"the {self.split} split has too few rows of length {self.length} with values {self.values.all}; "
                    "use a larger length or num_digits"
                )
        raise AssertionError("unreachable")

    def _draw(self, bits: np.random.Philox, n: int) -> np.ndarray:
        """Draw n candidate rows of either split, (n, L)."""
        size = np.full(self.length, _size(self.values.rest), dtype=np.uint64)
        low = np.full(self.length, self.values.rest.low, dtype=np.int64)
        size[0], low[0] = _size(self.values.first), self.values.first.low
        rows = low + _scale(_random_words(bits, n * self.length).reshape(n, self.length), size)
        if self.has_repeats:
            # Every second row repeats the first few of its own elements, so it has few distinct values.
            few = max(1, self.length // 2)
            repeated = rows[1::2]
            choice = _scale(_random_words(bits, repeated.size), np.uint64(few)).reshape(repeated.shape)
            choice[:, 0] = 0  # the argument stays in the argument's range
            rows[1::2] = np.take_along_axis(repeated[:, :few], choice, axis=1)
        return rows


def is_test_row(rows: np.ndarray) -> np.ndarray:
    """Whether each input row (N, L) belongs to the test split, (N,) of bool: a stable hash says so for one in four.

    The hash is a polynomial of the row modulo 2^64, mixed by SplitMix64's finalizer (Steele et al. 2014).
    """
    weights = np.cumprod(np.full(rows.shape[-1], _HASH_MULTIPLIER))
    h = (rows.astype(np.uint64) * weights).sum(axis=-1, dtype=np.uint64)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    h = h ^ (h >> np.uint64(31))
    return h % np.uint64(_TEST_SHARE) == 0


def _size(interval: Interval) -> int:
    return interval.high - interval.low + 1


def _random_words(bits: np.random.Philox, n: int) -> np.ndarray:
    """n random 32-bit numbers as uint64: the two halves of each of the generator's words."""
    words = bits.random_raw((n + 1) // 2)
    return np.stack([words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)], axis=-1).reshape(-1)[:n]


def _scale(words: np.ndarray, size: np.ndarray | np.uint64) -> np.ndarray:
    """Turn random 32-bit words into integers below ``size``, uniform up to size / 2^32 (Lemire 2019)."""
    return ((words * size) >> np.uint64(32)).astype(np.int64)
