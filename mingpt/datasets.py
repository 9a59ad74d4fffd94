"""Which examples exist, and which of them are for training, for validation and for testing.

Legend: N examples, L row length, T = prefix_padding + 2 L - 1 tokens of an example.

Rows are random but not stateful: a row is a pure function of (seed, split, values, length, index). numpy's Philox
generator, keyed by a hash of those and counting from the block's number, makes a block of candidate rows; a stable
hash of each candidate says which split it belongs to, and the first ``BLOCK_ROWS`` of the wanted split are the block.
Only the generator's raw 64-bit words are used: they are the same on every machine and in every version of numpy, which
its ready-made distributions are not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mingpt.algebra import AnyTask
from mingpt.tasks import Interval, Task, Values

SPLIT_VERSION = 2
"""Changes when any row of any split changes; recorded in every checkpoint. Version 2 has the test rows of version 1."""

SPLITS = {"train": 11 / 16, "validation": 1 / 16, "test": 1 / 4}
"""The splits, with the share of all rows in each. Choices are made on validation rows, publications on test rows."""

MAX_LENGTH = 4096
"""Of a row: a block of longer ones would take much memory, and 10 is what the experiments use."""

BLOCK_ROWS = 1024
IGNORED = -1
"""The target where no prediction is scored."""

_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Examples(torch.utils.data.Dataset):
    """What the datasets of tasks share: numbered examples without end, built a batch at a time."""

    size: int

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> tuple[Tensor, Tensor]:
        """Build the examples of these indices at once: ``x`` and ``y``, (N, T) of int64 each."""
        raise TypeError(f"{type(self).__name__} must define batch(self, indices)")

    def get_vocab_size(self) -> int:
        """How many tokens there are."""
        raise TypeError(f"{type(self).__name__} must define get_vocab_size(self)")

    def get_block_size(self) -> int:
        """T, how many tokens the model reads."""
        raise TypeError(f"{type(self).__name__} must define get_block_size(self)")

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

    def check_fits(self, vocab_size: int, block_size: int) -> None:
        """Check that a model of these sizes can read every example.

        Raises:
            ValueError: if its vocabulary or its block is too small, with both numbers.
        """
        check_fits(self.get_vocab_size(), self.get_block_size(), vocab_size, block_size)


class CustomDataset(Examples):
    """Examples of one or several tasks, as token sequences for a GPT.

    Example ``i`` poses ``tasks[i % len(tasks)]`` on row ``i`` of that task's stream of rows. It is the sequence
    ``[0] * prefix_padding + input + solution``; ``x`` is all of it but the last token and ``y`` all but the first,
    with -1 (ignored) before the first token of the solution.

    The stream of rows has no end: any index from 0 on is valid, so that training need not repeat rows. ``len`` and
    iteration count ``size`` of them, what an evaluation over the full dataset sees.
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
            split: "train", "validation" or "test"; no input row is in two of them, whatever the tasks.
            tasks: at least one; a mixture gives each an equal share.
            length: L, elements of an input row.
            num_digits: the largest element of an input row, where the task does not say otherwise.
            prefix_padding: how many zeros come before the input, the placeholders of a prefix.
            seed: another seed gives other rows, and the same split.
            size: what ``len`` says.

        Raises:
            TypeError: if ``tasks`` is not a sequence of at least one task, or a number is no integer.
            ValueError: for an unknown split, a size out of range, a task that ``num_digits`` is too small for, or one
                with negative tokens.
        """
        check_split(split)
        check_tasks(tasks, Task, "tasks such as [SortAscending()]")
        self.length = integer("length", length, 1, MAX_LENGTH)
        self.num_digits = integer("num_digits", num_digits, 2, 2**31 - 1)  # drawn from 32 random bits
        self.prefix_padding = integer("prefix_padding", prefix_padding, 0, MAX_LENGTH)
        self.size = integer("size", size, 1)
        self.seed = integer("seed", seed)
        self.split, self.tasks = split, tuple(tasks)
        self._streams: list[_RowStream] = []  # of each task
        self._outputs: list[Interval] = []
        for task in self.tasks:
            values = task.input_values(self.num_digits)
            if values.first.size < 1 or values.rest.size < 1:
                raise ValueError(f"num_digits = {num_digits} leaves no rows for {task}; use at least 4")
            self._outputs.append(self.output_values(task).all)
            for what, low in (("read", values.all.low), ("produce", self._outputs[-1].low)):
                if low < 0:
                    raise ValueError(f"{task} can {what} {low}, and tokens are not negative")
            self._streams.append(_RowStream(self.seed, split, values, task.has_repeats, self.length))

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> tuple[Tensor, Tensor]:
        """Build the examples of these indices at once: ``x`` and ``y``, (N, T) of int64 each.

        Raises:
            IndexError: for a negative index.
        """
        inputs, solutions = self.rows(indices)
        padding = np.zeros((len(inputs), self.prefix_padding), dtype=np.int64)
        sequence = np.concatenate([padding, inputs, solutions], axis=1)
        y = sequence[:, 1:].copy()
        y[:, : self.prefix_padding + self.length - 1] = IGNORED
        return torch.from_numpy(sequence[:, :-1]).contiguous(), torch.from_numpy(y)

    def rows(self, indices: Sequence[int] | np.ndarray | range) -> tuple[np.ndarray, np.ndarray]:
        """The input rows and solutions of these indices, (N, L) of int64 each.

        Raises:
            IndexError: for a negative index.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and indices.min() < 0:
            raise IndexError(f"index {indices.min()} is negative; a dataset's rows are numbered from 0 on without end")
        inputs = np.empty((len(indices), self.length), dtype=np.int64)
        solutions = np.empty_like(inputs)
        for number, (task, stream, promised) in enumerate(zip(self.tasks, self._streams, self._outputs, strict=True)):
            own = np.flatnonzero(indices % len(self.tasks) == number)
            inputs[own] = stream.take(indices[own])
            solutions[own] = _solve(task, inputs[own], promised)
        return inputs, solutions

    def context(self, n_tokens: int) -> np.ndarray:
        """Tokens that show what the tasks are, (n_tokens,) of int64: the first row and its solution, over and over."""
        inputs, solutions = self.rows([0])
        return np.resize(np.concatenate([inputs[0], solutions[0]]), n_tokens)

    def get_vocab_size(self) -> int:
        """How many tokens there are: num_digits + 3, more where a task reads or produces more."""
        inputs = (task.input_values(self.num_digits) for task in self.tasks)
        values = [*(each.all for each in inputs), *self._outputs]
        return max(self.num_digits + 3, *(int(each.high) + 1 for each in values))

    def output_values(self, task: Task) -> Values:
        """The values that a solution of ``task`` can hold on this dataset's rows."""
        return task.output_values(task.input_values(self.num_digits), self.length)

    def get_block_size(self) -> int:
        """T, how many tokens the model reads: placeholders, input, and all of the solution but its last."""
        return self.prefix_padding + 2 * self.length - 1

    def with_split(self, split: str) -> CustomDataset:
        """The dataset of another split that is otherwise the same."""
        return type(self)(**self._arguments() | {"split": split, "tasks": self.tasks})

    def rows_hash(self) -> str:
        """A checksum of the first 64 examples of each task: it changes when the code of a task does."""
        rows = np.concatenate(self.rows(range(64 * len(self.tasks))), axis=1)  # (64 K, 2 L)
        return hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the data: enough to build the dataset again with ``from_description``."""
        return self._arguments() | {"split_version": SPLIT_VERSION, "rows_hash": self.rows_hash()}

    @classmethod
    def from_description(cls, description: Mapping[str, Any], **changes: Any) -> CustomDataset:
        """Build the dataset that ``describe`` described, with ``changes`` to its arguments.

        The described rows are checked first, unless ``changes`` give other tasks.

        Raises:
            ValueError: if it was described by a version of this package with another split, or the code of one of
                its tasks has changed since.
        """
        arguments = dict(description)
        version, rows_hash = arguments.pop("split_version"), arguments.pop("rows_hash", None)
        if version != SPLIT_VERSION:
            raise ValueError(
                f"the data was described with split version {version}, this package has {SPLIT_VERSION}: "
                "rows that were for training may be for testing now"
            )
        if "tasks" not in changes:
            arguments["tasks"] = [Task.parse(name) for name in arguments["tasks"]]
            if rows_hash is not None and cls(**arguments).rows_hash() != rows_hash:
                names = ", ".join(map(str, arguments["tasks"]))
                raise ValueError(f"the rows of {names} are not those that were described: a task's code has changed")
        return cls(**(arguments | changes))

    def _arguments(self) -> dict[str, Any]:
        """What the dataset was made with, as JSON values."""
        names = ("length", "num_digits", "prefix_padding", "seed", "size")
        return {"split": self.split, "tasks": list(map(str, self.tasks))} | {k: getattr(self, k) for k in names}

    def __repr__(self) -> str:
        return f"CustomDataset({', '.join(f'{k}={v!r}' for k, v in self._arguments().items())})"


def _solve(task: Task, inputs: np.ndarray, promised: Interval) -> np.ndarray:
    """The solutions of rows (N, L), checked: a task of one's own may do anything.

    Raises:
        ValueError: if they are no integers of that shape, or not within what ``output_values`` has promised.
    """
    solutions = task.solve(inputs)
    if solutions.shape != inputs.shape or not np.issubdtype(solutions.dtype, np.integer):
        given = f"{solutions.dtype} of shape {solutions.shape}"
        raise ValueError(f"{task}.solve gave {given} for rows of shape {inputs.shape}; give integers of that shape")
    if solutions.size and (solutions.min() < promised.low or solutions.max() > promised.high):
        raise ValueError(
            f"{task} gives values from {solutions.min()} to {solutions.max()}, but its output_values says "
            f"{promised.low} to {promised.high}; make output_values say what solve gives"
        )
    return solutions


def check_split(split: str) -> None:
    """Check the name of a split; a ValueError gives the known ones."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def check_tasks(tasks: Any, family: type[AnyTask], expected: str) -> None:
    """Check that there are tasks, all of one family; a TypeError says what is expected."""
    if not isinstance(tasks, list | tuple) or not tasks or not all(isinstance(task, family) for task in tasks):
        raise TypeError(f"tasks must be a list of {expected}, at least one, got {tasks!r}")


def check_fits(n_tokens: int, n_positions: int, vocab_size: int, block_size: int) -> None:
    """Check that a model can read ``n_positions`` tokens below ``n_tokens``; a ValueError gives both numbers."""
    for what, needed, given in (("vocabulary", n_tokens, vocab_size), ("block size", n_positions, block_size)):
        if given < needed:
            raise ValueError(
                f"the model's {what} is {given}, and the data need {needed}; build the model larger: "
                "'mingpt reproduce TASK --run FOLDER' pretrains one with room for TASK"
            )


class _RowStream(NamedTuple):
    """An endless, random-access sequence of input rows of one split."""

    seed: int
    split: str
    values: Values
    has_repeats: bool
    length: int

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows of these indices, (N, L)."""
        rows = np.empty((len(indices), self.length), dtype=np.int64)
        blocks = indices // BLOCK_ROWS
        for number in np.unique(blocks):
            own = np.flatnonzero(blocks == number)
            rows[own] = _block(self, int(number))[indices[own] % BLOCK_ROWS]
        return rows

    def draw(self, bits: np.random.Philox, n: int) -> np.ndarray:
        """Draw n candidate rows of any split, (n, L)."""
        size = np.full(self.length, self.values.rest.size, dtype=np.uint64)
        low = np.full(self.length, self.values.rest.low, dtype=np.int64)
        size[0], low[0] = self.values.first.size, self.values.first.low
        rows = low + _scale(_random_words(bits, n * self.length).reshape(n, self.length), size)
        if self.has_repeats:
            # Every second row repeats the first few of its own elements, so it has few distinct values.
            few = max(1, self.length // 2)
            repeated = rows[1::2]
            choice = _scale(_random_words(bits, repeated.size), np.uint64(few)).reshape(repeated.shape)
            choice[:, 0] = 0  # the argument stays in the argument's range
            rows[1::2] = np.take_along_axis(repeated[:, :few], choice, axis=1)
        return rows


@functools.lru_cache(maxsize=256)
def _block(stream: _RowStream, number: int) -> np.ndarray:
    """Block ``number`` of a stream, (BLOCK_ROWS, L); the latest ones are kept, and equal streams share them."""
    name = json.dumps([1, *stream])  # the split version that the test rows come from
    key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype="<u8")
    bits = np.random.Philox(key=key, counter=[0, 0, 0, number])
    n_candidates = int(BLOCK_ROWS / SPLITS[stream.split] * 1.125)
    found: list[np.ndarray] = []
    while sum(map(len, found)) < BLOCK_ROWS:
        if len(found) > 100:
            raise ValueError(
                f"the {stream.split} split has too few rows of length {stream.length} with values {stream.values.all}; "
                "use a larger length or num_digits"
            )
        candidates = stream.draw(bits, n_candidates)
        found.append(candidates[split_of(candidates) == stream.split])
    return np.concatenate(found)[:BLOCK_ROWS]


def integer(name: str, value: int, least: float = -math.inf, most: float = math.inf) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return int(value)


def split_of(rows: np.ndarray) -> np.ndarray:
    """The split that each input row (N, L) belongs to, (N,) of str: a stable hash of the row says so.

    The hash is a polynomial of the row modulo 2^64, mixed by SplitMix64's finalizer (Steele et al. 2014).
    """
    weights = np.cumprod(np.full(rows.shape[-1], _HASH_MULTIPLIER))
    h = (rows.astype(np.uint64) * weights).sum(axis=-1, dtype=np.uint64)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    h = h ^ (h >> np.uint64(31))
    return np.select([h % np.uint64(4) == 0, h % np.uint64(16) == 1], ["test", "validation"], "train")


def _random_words(bits: np.random.Philox, n: int) -> np.ndarray:
    """n random 32-bit numbers as uint64: the two halves of each of the generator's words."""
    words = bits.random_raw((n + 1) // 2)
    return np.stack([words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)], axis=-1).reshape(-1)[:n]


def _scale(words: np.ndarray, size: np.ndarray | np.uint64) -> np.ndarray:
    """Turn random 32-bit words into integers below ``size``, uniform up to size / 2^32 (Lemire 2019)."""
    return ((words * size) >> np.uint64(32)).astype(np.int64)
