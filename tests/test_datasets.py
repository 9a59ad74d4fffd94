"""Datasets: the layout of an example, which rows there are, and that every process sees the same ones."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import compositions
from torch.utils.data import DataLoader

import mingpt
from mingpt.datasets import BLOCK_ROWS, SPLIT_VERSION, SPLITS, CustomDataset, split_of
from mingpt.tasks import (
    PRETRAINING_TASKS,
    SIMPLE_TASKS,
    TEST_TASKS,
    Add1,
    Divisible,
    DoubleHistogram,
    FilterAtLeastNTimes,
    Interval,
    InverseBinary,
    LessThan,
    Modulo,
    NotDivisible,
    SortAscending,
    SortDescending,
    Task,
    Values,
)

IGNORED = -1
each_split = pytest.mark.parametrize("split", SPLITS)


# ----------------------------------------------------------------------------------------------------- layout


@each_split
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_example_is_padding_input_solution(split, data):
    tasks = data.draw(st.lists(compositions(max_tasks=3), min_size=1, max_size=3))
    length, padding = data.draw(st.integers(5, 9)), data.draw(st.integers(0, 4))
    num_digits = data.draw(st.integers(4, 13))
    dataset = CustomDataset(split, tasks, length=length, num_digits=num_digits, prefix_padding=padding)
    indices = data.draw(st.lists(st.integers(0, 5000), min_size=1, max_size=6))
    x, y = dataset.batch(indices)
    n_tokens = padding + 2 * length - 1
    assert dataset.get_block_size() == n_tokens
    assert x.shape == y.shape == (len(indices), n_tokens)
    assert x.dtype == y.dtype == torch.int64
    for index, x_row, y_row in zip(indices, x.tolist(), y.tolist(), strict=True):
        row = x_row[padding : padding + length]
        sequence = [0] * padding + row + tasks[index % len(tasks)](row)
        assert x_row == sequence[:-1]
        n_silent = padding + length - 1
        assert y_row == [IGNORED] * n_silent + sequence[n_silent + 1 :]
        assert len(y_row) - n_silent == length  # all of the solution is to be predicted
    assert int(x.max()) < dataset.get_vocab_size()
    assert int(y.max()) < dataset.get_vocab_size()
    assert int(x.min()) >= 0


def test_notebook_call():
    dataset = CustomDataset("train", tasks=[Add1()], prefix_padding=10, num_digits=10)
    x, y = dataset[0]
    assert x.shape == y.shape == (29,)
    assert (dataset.length, dataset.prefix_padding, len(dataset)) == (10, 10, 10_000)
    assert (dataset.get_vocab_size(), dataset.get_block_size()) == (13, 29)
    assert x[:10].tolist() == [0] * 10
    assert y[-10:].tolist() == (x[10:20] + 1).tolist()


@pytest.mark.parametrize(
    ("tasks", "length", "num_digits", "vocab_size"),
    [
        (PRETRAINING_TASKS, 10, 10, 13),
        (PRETRAINING_TASKS + TEST_TASKS, 10, 10, 13),
        ([InverseBinary()], 10, 10, 13),
        ([SortAscending()], 7, 21, 24),
        ([Add1() + Add1()], 10, 10, 13),
        ([Add1() + Add1() + Add1()], 10, 10, 14),
        ([SortAscending(), Add1() + Add1() + Add1() + Add1()], 10, 10, 15),
        ([DoubleHistogram()], 12, 10, 13),
        ([DoubleHistogram()], 30, 10, 31),
        ([LessThan(), DoubleHistogram() + Add1()], 30, 10, 32),
    ],
    ids=str,
)
def test_vocabulary_holds_every_token(tasks, length, num_digits, vocab_size):
    dataset = CustomDataset("train", tasks, length=length, num_digits=num_digits)
    assert dataset.get_vocab_size() == vocab_size
    inputs, solutions = dataset.rows(range(2000))
    assert max(inputs.max(), solutions.max()) < vocab_size
    assert min(inputs.min(), solutions.min()) >= 0


class ReadsMore(Task):
    """Whether x is large, on rows of 1..30 (or what it is told)."""

    def __init__(self, low=1, high=30):
        self.low, self.high = low, high

    def solve(self, x):
        return (x > 15).astype(np.int64)

    def input_values(self, num_digits):
        return Values(Interval(self.low, self.high), Interval(self.low, self.high))

    def output_values(self, values, length):
        return values.map(lambda _: Interval(0, 1))


def test_vocabulary_holds_the_inputs_too():
    dataset = CustomDataset("train", [Add1(), ReadsMore()], prefix_padding=2)
    assert dataset.get_vocab_size() == 31
    assert dataset.batch(range(500))[0].max() == 30
    assert CustomDataset("train", [ReadsMore(high=9)]).get_vocab_size() == 13


def test_negative_inputs_are_refused():
    with pytest.raises(ValueError, match=r"ReadsMore\(-1, 30\) can read -1, and tokens are not negative"):
        CustomDataset("train", [Add1(), ReadsMore(-1)])


def test_negative_outputs_are_refused():
    class Minus(Task):
        def solve(self, x):
            return -x

        def output_values(self, values, length):
            return values.map(lambda part: Interval(-part.high, -part.low))

    with pytest.raises(ValueError, match="Minus can produce -10, and tokens are not negative"):
        CustomDataset("train", [Minus()])


@pytest.mark.parametrize("vocab_size, block_size", [(13, 29), (14, 22), (13, 22)])
def test_a_model_that_is_too_small_for_the_data_is_refused_with_both_numbers(vocab_size, block_size):
    dataset = CustomDataset("train", [Add1() + Add1() + Add1()], prefix_padding=4)
    assert (dataset.get_vocab_size(), dataset.get_block_size()) == (14, 23)
    needed = "vocabulary is 13, and the data need 14" if vocab_size == 13 else "block size is 22, and the data need 23"
    with pytest.raises(ValueError, match=needed):
        dataset.check_fits(vocab_size, block_size)
    dataset.check_fits(14, 23)
    dataset.check_fits(vocab_size=100, block_size=100)


# --------------------------------------------------------------------------- a pure function of its description


@each_split
@given(indices=st.lists(st.one_of(st.integers(0, 30_000), st.integers(0, 2**62)), min_size=1, max_size=20))
@settings(deadline=None, max_examples=25)
def test_an_example_does_not_depend_on_what_else_is_asked(split, indices):
    tasks = [LessThan(), InverseBinary(), Modulo() + Add1()]
    indices += indices[:3]  # some of them twice
    dataset = CustomDataset(split, tasks, length=6, prefix_padding=2)
    x, y = dataset.batch(indices)
    for i, index in enumerate(indices):
        alone_x, alone_y = CustomDataset(split, tasks, length=6, prefix_padding=2)[index]
        assert torch.equal(x[i], alone_x)
        assert torch.equal(y[i], alone_y)
    pairs = dataset.__getitems__(indices)
    assert all(torch.equal(pair_x, x[i]) and torch.equal(pair_y, y[i]) for i, (pair_x, pair_y) in enumerate(pairs))
    for same in (np.array(indices), torch.tensor(indices), tuple(indices)):
        assert torch.equal(dataset.batch(same)[0], x)


def test_random_order_over_many_blocks_equals_sequential():
    n = 20 * BLOCK_ROWS
    dataset = CustomDataset("train", [SortAscending(), InverseBinary()], length=5)
    order = np.random.default_rng(0).permutation(n)
    x, y = CustomDataset("train", [SortAscending(), InverseBinary()], length=5).batch(range(n))
    for part in np.array_split(order, 5):
        part_x, part_y = dataset.batch(part)
        assert torch.equal(part_x, x[part])
        assert torch.equal(part_y, y[part])


def test_changing_what_was_handed_out_changes_nothing():
    dataset = CustomDataset("test", [Add1()], length=6, prefix_padding=1)
    x, y = (tensor.clone() for tensor in dataset.batch(range(9)))
    for tensor in dataset.batch(range(9)):
        tensor.fill_(99)
    for array in dataset.rows(range(9)):
        array.fill(99)
    assert torch.equal(dataset.batch(range(9))[0], x)
    assert torch.equal(dataset.batch(range(9))[1], y)


def test_no_hidden_state():
    """Global seeds change nothing, and a dataset that was used gives a pickled copy with the same rows."""
    dataset = CustomDataset("train", [SortDescending()], length=7, num_digits=8, seed=3)
    np.random.seed(1)  # noqa: NPY002 (the global one is what must not matter)
    torch.manual_seed(1)
    x, _ = dataset.batch(range(100))
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(
        CustomDataset("train", [SortDescending()], length=7, num_digits=8, seed=3).batch(range(100))[0], x
    )
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).batch(range(100))[0], x)


@each_split
def test_mixture_takes_turns_on_each_tasks_own_rows(split):
    tasks = [SortAscending(), InverseBinary(), Modulo(), Add1() + LessThan(), NotDivisible()]
    n = 3 * BLOCK_ROWS + 17
    mixture = CustomDataset(split, tasks, length=8, num_digits=9, seed=5, prefix_padding=3)
    x, y = mixture.batch(range(n))
    for k, task in enumerate(tasks):
        alone_x, alone_y = CustomDataset(split, [task], length=8, num_digits=9, seed=5, prefix_padding=3).batch(
            range(n)
        )
        assert torch.equal(x[k::5], alone_x[k::5])
        assert torch.equal(y[k::5], alone_y[k::5])


def test_padding_and_order_do_not_change_the_rows():
    plain = CustomDataset("train", [Add1(), LessThan()], length=6).rows(range(100))[0]
    padded = CustomDataset("train", [LessThan(), Add1()], length=6, prefix_padding=7).rows(range(100))[0]
    assert np.array_equal(plain, padded)


def test_seeds_splits_and_lengths_give_other_rows():
    def rows(split="train", length=12, num_digits=50, seed=0):
        return CustomDataset(split, [SortAscending()], length=length, num_digits=num_digits, seed=seed).rows(
            range(500)
        )[0]

    everything = [rows(), rows(seed=1), rows(seed=-1), rows(seed=2**40), rows(split="test"), rows(num_digits=51)]
    everything.append(rows(split="validation"))
    for a, b in itertools.combinations(everything, 2):
        assert (a == b).all(axis=-1).sum() == 0
    assert (rows(length=13)[:, :12] == rows()).all(axis=-1).sum() == 0


def test_rows_do_not_come_back():
    rows = CustomDataset("train", [SortAscending()], length=12, num_digits=1000).rows(range(60_000))[0]
    assert len(np.unique(rows, axis=0)) == 60_000


# Digests of the first 1000 examples of each split. If one changes, the data of every checkpoint has changed: a row
# that a model was trained on may now be for testing. Then SPLIT_VERSION must change too, and only then these.
PINNED_VERSION = 2
PINNED = {
    "train": "b15d17d574505b967208d64cc3216b5c",
    "validation": "42a86591b0db46e8362161901934c8c9",
    "test": "e3abb583f07a9e9dd8d6340d602ca20c",  # as in version 1
}


def digest_dataset(split):
    return CustomDataset(split, list(PRETRAINING_TASKS + TEST_TASKS), length=10, num_digits=10, prefix_padding=3)


def digest(x, y):
    return hashlib.sha256(x.numpy().astype("<i8").tobytes() + y.numpy().astype("<i8").tobytes()).hexdigest()[:32]


@each_split
def test_the_data_have_not_changed(split):
    assert SPLIT_VERSION == PINNED_VERSION
    assert digest(*digest_dataset(split).batch(range(1000))) == PINNED[split]


DIGESTS_SCRIPT = """
import hashlib, sys
from torch.utils.data import DataLoader
from mingpt.datasets import CustomDataset
from mingpt.tasks import PRETRAINING_TASKS

N = 100_000

def digest(batches):
    total = hashlib.sha256()
    for x, y in batches:
        total.update(x.numpy().tobytes() + y.numpy().tobytes())
    return total.hexdigest()

if __name__ == "__main__":
    for split in ("train", "test"):
        dataset = CustomDataset(split, list(PRETRAINING_TASKS), prefix_padding=2)
        print(split, digest(dataset.batch(range(start, start + 1000)) for start in range(0, N, 1000)))
        print(split, digest(DataLoader(dataset, sampler=range(N), batch_size=1000, num_workers=4)))
"""


@pytest.mark.slow
def test_every_process_and_worker_and_hash_seed_sees_the_same_rows(tmp_path):
    script = tmp_path / "digests.py"
    script.write_text(DIGESTS_SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(mingpt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=environment | {"PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("0", "1", "2")
    ]
    outputs = []
    try:
        for run in runs:
            output, errors = run.communicate(timeout=240)
            assert run.returncode == 0, errors
            outputs += [tuple(line.split()) for line in output.splitlines()]
    finally:
        for run in runs:
            run.kill()  # does nothing to one that has ended
            run.communicate()
    assert len(outputs) == 12
    assert len({digest for split, digest in outputs if split == "train"}) == 1
    assert len({digest for split, digest in outputs if split == "test"}) == 1
    assert len(set(outputs)) == 2


# ------------------------------------------------------------------------------------------------- the split


def row_numbers(rows, base):
    """One number per row, different for different rows."""
    assert base ** rows.shape[-1] < 2**63
    return (rows * base ** np.arange(rows.shape[-1])).sum(axis=-1)


@pytest.mark.slow
def test_no_row_is_both_for_training_and_for_testing():
    """A million training rows and 200,000 test rows, of tasks with different rows, and of another seed."""
    tasks = [SortAscending(), Modulo(), InverseBinary(), LessThan() + Add1(), Divisible()]
    train = np.unique(row_numbers(CustomDataset("train", tasks).rows(range(1_000_000))[0], base=11))
    test = [CustomDataset("test", tasks, seed=seed).rows(range(100_000))[0] for seed in (0, 1)]
    test += [CustomDataset("test", tasks[::-1], num_digits=6, seed=2).rows(range(100_000))[0]]
    test = np.unique(row_numbers(np.concatenate(test), base=11))
    assert len(train) > 600_000
    assert len(test) > 180_000
    assert not np.isin(test, train).any()


def test_a_small_space_of_rows_is_divided_completely():
    """Where there are few rows, all of them turn up, each in one split only, in about the shares that SPLITS says."""
    for task, num_digits, length, n_rows in (
        (InverseBinary(), 4, 9, 2**9),
        (SortAscending(), 5, 4, 5**4),
        (Modulo(), 7, 4, 2 * 7**3),
    ):
        found = {
            split: set(
                map(tuple, CustomDataset(split, [task], length=length, num_digits=num_digits).rows(range(20_000))[0])
            )
            for split in SPLITS
        }
        assert sum(map(len, found.values())) == len(set.union(*found.values())) == n_rows
        for split, share in SPLITS.items():
            assert abs(len(found[split]) / n_rows - share) < 0.1


@pytest.mark.parametrize("task", SIMPLE_TASKS, ids=str)
def test_rows_are_of_their_split(task):
    for split in SPLITS:
        rows = CustomDataset(split, [task], length=9, num_digits=12, seed=4).rows(range(3000))[0]
        assert (split_of(rows) == split).all()


@pytest.mark.parametrize(
    ("low", "high", "length"), [(1, 10, 10), (1, 10, 7), (0, 1, 30), (1, 1000, 12), (1, 4, 20)], ids=str
)
def test_each_split_has_its_share_of_uniform_rows(low, high, length):
    n = 100_000
    rows = np.random.default_rng(7).integers(low, high + 1, (n, length))
    splits = split_of(rows)
    assert splits.shape == (n,)
    for split, share in SPLITS.items():
        assert abs((splits == split).mean() - share) < 5 * np.sqrt(share * (1 - share) / n)
    is_test = splits == "test"
    assert np.array_equal(split_of(rows[::-1]), splits[::-1])
    # Nothing simple about a row tells its split: not its sum, its first or last element, or a small change of it.
    for feature in (rows.sum(axis=-1) % 2, rows[:, 0] % 2, rows[:, -1] % 2, rows[:, length // 2] % 2):
        shares = [is_test[feature == value].mean() for value in (0, 1)]
        assert abs(shares[0] - shares[1]) < 5 * np.sqrt(0.25 * 0.75 * 4 / n)
    changed = rows.copy()
    changed[:, 0] = np.where(rows[:, 0] == low, low + 1, low)
    both = (is_test & (split_of(changed) == "test")).mean()
    assert abs(both - 1 / 16) < 5 * np.sqrt(1 / 16 / n)


# ------------------------------------------------------------------------------------- how rows are distributed


def chi_square(counts):
    """How far counts are from equal, in standard deviations of the statistic."""
    expected = counts.sum() / counts.size
    n_free = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - n_free) / np.sqrt(2 * n_free)


def n_distinct(rows):
    return 1 + (np.diff(np.sort(rows, axis=-1), axis=-1) != 0).sum(axis=-1)


@each_split
@pytest.mark.parametrize("length", [7, 10, 12])
def test_half_of_the_rows_have_few_values_and_the_rest_look_uniform(split, length):
    n, num_digits = 40_000, 1000  # so many digits that a uniform row hardly repeats any
    rows = CustomDataset(split, [SortAscending()], length=length, num_digits=num_digits).rows(range(n))[0]
    is_repeated = n_distinct(rows) <= length // 2
    assert abs(is_repeated.mean() - 0.5) < 5 * np.sqrt(0.25 / n)
    assert abs(is_repeated[::2].mean() - 0.5) < 5 * np.sqrt(0.25 / (n / 2))  # of an even task's rows too
    for kind in (rows[~is_repeated], rows[is_repeated]):
        for column in kind.T:
            assert chi_square(np.bincount(column, minlength=num_digits + 1)[1:]) < 6
            assert abs(column.mean() - 500.5) < 5 * num_digits / np.sqrt(12 * len(kind))
    uniform = rows[~is_repeated]
    for left, right in itertools.combinations([0, 1, length // 2, length - 1], 2):
        cells = (uniform[:, left] - 1) // 125 * 8 + (uniform[:, right] - 1) // 125
        assert chi_square(np.bincount(cells, minlength=64)) < 6, "two positions of a row depend on each other"
    following = (uniform[:-1, 0] - 1) // 125 * 8 + (uniform[1:, 0] - 1) // 125
    assert chi_square(np.bincount(following, minlength=64)) < 6, "a row depends on the one before"


def test_every_digit_is_as_frequent():
    for split, task in itertools.product(["train", "test"], [SortAscending(), LessThan() + Add1()]):
        rows = CustomDataset(split, [task], length=9, num_digits=10, seed=11).rows(range(30_000))[0]
        assert (rows.min(), rows.max()) == (1, 10)
        for column in rows.T:
            assert chi_square(np.bincount(column, minlength=11)[1:]) < 6


@pytest.mark.parametrize(
    "task", [Modulo(), Divisible(), NotDivisible(), FilterAtLeastNTimes(), Modulo() + Add1()], ids=str
)
@pytest.mark.parametrize("num_digits", [4, 5, 10, 13])
def test_a_small_argument_is_drawn_from_2_to_half(task, num_digits):
    rows = CustomDataset("train", [task], length=8, num_digits=num_digits).rows(range(20_000))[0]
    argument, rest = rows[:, 0], rows[:, 1:]
    assert set(argument.tolist()) == set(range(2, num_digits // 2 + 1))
    assert set(rest.reshape(-1).tolist()) == set(range(1, num_digits + 1))
    if num_digits >= 6:
        assert chi_square(np.bincount(argument)[2:]) < 6


def test_inverse_binary_rows_are_coin_tosses():
    rows = CustomDataset("test", [InverseBinary()], length=11).rows(range(20_000))[0]
    # The split takes whole rows out of the 2^11 there are, so frequencies are only nearly a half.
    assert set(rows.reshape(-1).tolist()) == {0, 1}
    assert np.abs(rows.mean(axis=0) - 0.5).max() < 0.08
    train = CustomDataset("train", [InverseBinary()], length=40).rows(range(20_000))[0]
    assert np.abs(train.mean(axis=0) - 0.5).max() < 5 * np.sqrt(0.25 / 20_000)
    assert abs(train.sum(axis=-1).var() - 10) < 5 * 10 * np.sqrt(2 / 20_000)


# ----------------------------------------------------------------------------------- how a dataset is passed on


def test_iteration_ends_after_len():
    dataset = CustomDataset("train", [Add1(), SortAscending()], length=5)
    assert len(dataset) == 10_000
    examples = list(dataset)
    assert len(examples) == 10_000
    x, y = dataset.batch(range(10_000))
    assert torch.equal(torch.stack([example[0] for example in examples]), x)
    assert torch.equal(torch.stack([example[1] for example in examples]), y)
    short = CustomDataset("train", [Add1()], length=5, size=3)
    assert (len(short), len(list(short))) == (3, 3)
    assert torch.equal(short[5000][0], CustomDataset("train", [Add1()], length=5)[5000][0])  # rows have no end


@pytest.mark.parametrize("num_workers", [0, 2])
def test_default_data_loader_collates(num_workers):
    dataset = CustomDataset("test", [Add1(), Modulo()], length=6, prefix_padding=2, size=23)
    batches = list(DataLoader(dataset, batch_size=7, num_workers=num_workers))
    assert [tuple(x.shape) for x, _ in batches] == [(7, 13), (7, 13), (7, 13), (2, 13)]
    x, y = dataset.batch(range(23))
    assert torch.equal(torch.cat([batch[0] for batch in batches]), x)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), y)
    assert batches[0][0].dtype == batches[0][1].dtype == torch.int64


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_description_gives_the_dataset_back(data):
    dataset = CustomDataset(
        data.draw(st.sampled_from(["train", "test"])),
        data.draw(st.lists(compositions(max_tasks=3), min_size=1, max_size=3)),
        length=data.draw(st.integers(6, 9)),
        num_digits=data.draw(st.integers(4, 13)),
        prefix_padding=data.draw(st.integers(0, 4)),
        seed=data.draw(st.integers(-5, 2**40)),
        size=data.draw(st.integers(1, 99)),
    )
    description = json.loads(json.dumps(dataset.describe()))
    again = CustomDataset.from_description(description)
    assert again.describe() == dataset.describe()
    assert again.tasks == dataset.tasks
    assert len(again) == len(dataset)
    for ours, theirs in zip(dataset.batch(range(7)), again.batch(range(7)), strict=True):
        assert torch.equal(ours, theirs)


def test_description_with_changes():
    dataset = CustomDataset("train", [Add1()], length=6, seed=3)
    description = dataset.describe()
    test = CustomDataset.from_description(description, split="test", prefix_padding=4)
    other_rows = {"rows_hash": test.rows_hash()}
    assert test.describe() == description | {"split": "test", "prefix_padding": 4} | other_rows
    assert test.rows_hash() != dataset.rows_hash()
    assert description == dataset.describe()  # reading it does not use it up


def test_description_of_another_split_is_refused():
    description = CustomDataset("train", [Add1()]).describe()
    assert description["split_version"] == SPLIT_VERSION
    with pytest.raises(ValueError, match=f"version {SPLIT_VERSION + 1}, this package has {SPLIT_VERSION}"):
        CustomDataset.from_description(description | {"split_version": SPLIT_VERSION + 1})


def make_edited(shift):
    """A task whose code says ``shift``, as a notebook's cell that is edited and run again makes it."""

    class Edited(Task):
        def solve(self, x):
            return np.where(x == 7, x + shift, x)

        def output_values(self, values, length):
            return values.map(lambda part: Interval(part.low, part.high + 3))

    return Edited()


def test_an_edited_solve_is_another_identity():
    dataset = CustomDataset("train", [Add1(), make_edited(1)], prefix_padding=3)
    description = json.loads(json.dumps(dataset.describe()))
    assert CustomDataset.from_description(description).describe() == description
    edited = CustomDataset("train", [Add1(), make_edited(2)], prefix_padding=3)
    assert edited.describe()["rows_hash"] != description["rows_hash"]
    assert edited.describe() | {"rows_hash": None} == description | {"rows_hash": None}
    for changes in ({}, {"prefix_padding": 0}, {"split": "test"}):
        with pytest.raises(ValueError, match="Add1, Edited are not those that were described"):
            CustomDataset.from_description(description, **changes)
    assert CustomDataset.from_description(description, tasks=[Add1()]).tasks == (Add1(),)
    del description["rows_hash"]  # of a version that did not write it
    assert CustomDataset.from_description(description).tasks == edited.tasks


def test_rows_hash_is_of_rows_and_nothing_else():
    tasks = [Add1(), Modulo(), InverseBinary()]
    base = CustomDataset("train", tasks, length=8)
    same = [CustomDataset("train", tasks, length=8, **change) for change in ({"prefix_padding": 5}, {"size": 3})]
    assert {each.rows_hash() for each in same} == {base.rows_hash()}
    changes = ({"seed": 1}, {"length": 9}, {"num_digits": 9}, {"tasks": tasks[::-1]}, {"split": "test"})
    others = [CustomDataset(**({"split": "train", "tasks": tasks, "length": 8} | change)) for change in changes]
    assert len({each.rows_hash() for each in [base, *others]}) == 6
    assert base.rows_hash() == "c3953a2669d357b7b591d1c14106bf48"  # the same on every machine and in every version


def test_a_description_of_tasks_that_are_not_known_can_be_used_for_others():
    description = CustomDataset("train", [Add1()]).describe() | {"tasks": ["NotImported"]}
    with pytest.raises(ValueError, match="unknown task 'NotImported'"):
        CustomDataset.from_description(description)
    assert CustomDataset.from_description(description, tasks=[Modulo()]).tasks == (Modulo(),)


def test_repr_builds_no_rows():
    """Also where there are too few of them."""
    dataset = CustomDataset("test", [InverseBinary()], length=1)
    assert repr(dataset).startswith("CustomDataset(split='test', tasks=['InverseBinary'], length=1")


def test_sizes_may_be_numpy_integers():
    """As they are in ``for length in np.arange(5, 8)``."""
    plain = CustomDataset("train", [Modulo()], length=6, num_digits=9, prefix_padding=2, seed=3, size=8)
    numpy = CustomDataset(
        "train",
        [Modulo()],
        length=np.int64(6),
        num_digits=np.int64(9),
        prefix_padding=np.int64(2),
        seed=np.int64(3),
        size=np.int64(8),
    )
    assert torch.equal(plain.batch(range(8))[0], numpy.batch(range(8))[0])
    assert json.loads(json.dumps(numpy.describe())) == plain.describe()


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "dev"}, ValueError, "train, validation, test, got 'dev'"),
        ({"tasks": Add1()}, TypeError, "list of tasks"),
        ({"tasks": "Add1"}, TypeError, "list of tasks"),
        ({"tasks": ["Add1"]}, TypeError, "list of tasks"),
        ({"tasks": [Add1]}, TypeError, "list of tasks"),
        ({"tasks": [Add1(), None]}, TypeError, "list of tasks"),
        ({"tasks": []}, TypeError, "list of tasks .* at least one"),
        ({"length": 0}, ValueError, "length must be at least 1, got 0"),
        ({"num_digits": 1}, ValueError, "num_digits must be at least 2, got 1"),
        ({"prefix_padding": -1}, ValueError, "prefix_padding must be at least 0, got -1"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"length": 10.7}, TypeError, "length must be an integer, got 10.7"),
        ({"length": 10.0}, TypeError, "length must be an integer, got 10.0"),
        ({"length": True}, TypeError, "length must be an integer, got True"),
        ({"num_digits": "10"}, TypeError, "num_digits must be an integer, got '10'"),
        ({"prefix_padding": None}, TypeError, "prefix_padding must be an integer, got None"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"size": np.float64(9)}, TypeError, "size must be an integer"),
        ({"tasks": [Add1(), Modulo()], "num_digits": 3}, ValueError, "num_digits = 3 leaves no rows for Modulo"),
        ({"tasks": [FilterAtLeastNTimes() + Add1()], "num_digits": 2}, ValueError, "num_digits = 2 leaves no rows"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        CustomDataset(**({"split": "train", "tasks": [Add1()]} | arguments))


@pytest.mark.parametrize(
    "tasks", [None, 3, iter([Add1()]), (task for task in [Add1()])], ids=["None", "3", "iter", "generator"]
)
def test_tasks_that_are_no_sequence_are_refused(tasks):
    with pytest.raises(TypeError):
        CustomDataset("train", tasks)


def test_fewest_digits():
    for task in SIMPLE_TASKS:
        assert CustomDataset("train", [task], num_digits=4).rows(range(5))[0].shape == (5, 10)
    assert CustomDataset("train", [SortAscending()], num_digits=2).rows(range(5))[0].max() <= 2


def test_negative_indices_are_refused():
    dataset = CustomDataset("train", [Add1(), Modulo()], length=5)
    for use in (lambda: dataset[-1], lambda: dataset.batch([3, -2]), lambda: dataset.rows(np.array([-7]))):
        with pytest.raises(IndexError, match="negative"):
            use()


def test_too_few_rows_for_a_split_is_an_error_and_not_a_loop():
    """Two digits in one place are two rows: a split that has none of them says so."""
    n_errors = 0
    for split, length in itertools.product(SPLITS, [1, 2]):
        for task in (InverseBinary(), SortAscending()):
            try:
                rows = CustomDataset(split, [task], length=length, num_digits=2).rows(range(3))[0]
            except ValueError as error:
                n_errors += 1
                assert "too few rows" in str(error)  # noqa: PT017 (either is right)
            else:
                assert (split_of(rows) == split).all()
    assert n_errors > 0


def test_no_examples():
    x, y = CustomDataset("train", [Add1(), InverseBinary()], length=4, prefix_padding=3).batch([])
    assert x.shape == y.shape == (0, 10)


def test_parse_and_datasets_agree_on_names():
    names = [str(task) for task in PRETRAINING_TASKS + TEST_TASKS]
    dataset = CustomDataset("train", [Task.parse(name) for name in names])
    assert dataset.describe()["tasks"] == names


@pytest.mark.parametrize(
    ("solve", "message"),
    [
        (lambda x: x / 2, "solve gave float64 of shape"),
        (lambda x: x[..., :3], r"int64 of shape \(5, 3\) for rows of shape \(5, 10\); give integers of that shape"),
        (lambda x: x + 2, "gives values from 3 to 12, but its output_values says 1 to 10"),
        (lambda x: -x, "gives values from -10 to -1, but its output_values says 1 to 10"),
    ],
)
def test_a_task_that_does_not_do_what_it_says_is_an_error_with_its_name(monkeypatch, solve, message):
    monkeypatch.setattr(SortAscending, "solve", lambda _, x: solve(np.sort(x)))
    with pytest.raises(ValueError, match=f"SortAscending.*{message}"):
        CustomDataset("train", [SortAscending()]).rows(range(5))
