"""Scores: counted as by hand, with intervals from the literature, for models whose mistakes are known.

Legend: N rows, L row length, P prefix positions.
"""

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import Forbid
from reference import (
    ReferenceLoop,
    random_model,
    reference_example,
    reference_forward,
    reference_generate,
    reference_is_test_row,
    reference_rows,
)

from mingpt.datasets import CustomDataset
from mingpt.decoding.constraints import MonotoneConstraint
from mingpt.evaluation import (
    Score,
    accuracy_matrix,
    bayes_loss,
    constraint_effect,
    eval,  # noqa: A004
    evaluate,
    label_batch,
    predict,
    score_table,
)
from mingpt.experiments.pipeline import load_run
from mingpt.prefix import Prefix
from mingpt.tasks import (
    PRETRAINING_TASKS,
    SIMPLE_TASKS,
    Add1,
    Divisible,
    Interval,
    InverseBinary,
    LessThan,
    Modulo,
    SortAscending,
    SortDescending,
    Task,
    Values,
)
from mingpt.trainer import PrefixTrainer, Trainer
from mingpt.utils import CfgNode

P, L = 3, 4


def make_dataset(task, **arguments):
    return CustomDataset("test", tasks=[task], **{"length": L, "num_digits": 6, "prefix_padding": P} | arguments)


class FakeModel:
    """Answers a task exactly, but for the answer's tokens at the positions in ``wrong`` in rows that begin with 1 or 2.

    With ``tasks`` a prefix chooses which of them it answers: the task whose number the prefix is full of.
    """

    device = torch.device("cpu")
    config = CfgNode(n_layer=1, n_embd=4, vocab_size=100, block_size=100)

    def __init__(self, task, wrong=(), tasks=(), error=None, length=L, padding=P):
        self.task, self.wrong, self.tasks, self.error = task, wrong, tasks, error
        self.length, self.padding, self.training, self.calls = length, padding, True, []
        self.prefix_widths = {"activation": 4}

    def train(self, mode=True):
        self.training = mode
        return self

    def generate(self, tokens, max_new_tokens, prefixes=None, logits_processors=(), forbidden_mass_record=None, **_):
        assert forbidden_mass_record is None
        assert not self.training
        assert not torch.is_grad_enabled()
        assert (tokens[:, : self.padding] == 0).all()
        self.calls.append(len(tokens))
        if self.error is not None:
            raise self.error
        task = self.task
        if prefixes is not None:
            task = self.tasks[int((prefixes.values if isinstance(prefixes, Prefix) else prefixes).mean())]
        rows = tokens[:, self.padding : self.padding + self.length]
        answers = task(rows)
        for position in self.wrong:
            answers[rows[:, 0] <= 2, position] += 1
        assert tokens.shape[1] - self.padding == max_new_tokens == self.length
        return torch.cat([tokens, answers], dim=1)

    def __call__(self, tokens, prefixes=None, n_shared=0, n_last=None):
        """One pass: something like logits, whose argmax is the answer whatever the solution in ``tokens``."""
        assert n_last == self.length
        assert tokens.shape[1] == self.padding + 2 * self.length - 1
        answers = self.generate(tokens[:, : self.padding + self.length], self.length, prefixes)[:, -self.length :]
        return SimpleNamespace(argmax=lambda dim: answers), None


# ------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "n_correct, n_rows, low, high",
    [
        (0, 10, 0.0, 0.2775),  # the values that Wilson's interval has in the literature
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (9, 10, 0.5958, 0.9821),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_confidence_interval_is_wilsons(n_correct, n_rows, low, high):
    assert Score(n_correct, n_rows).confidence_interval == pytest.approx((low, high), abs=5e-5)


@st.composite
def scores(draw):
    n_rows = draw(st.integers(1, 10_000))
    return Score(draw(st.integers(0, n_rows)), n_rows)


@given(scores())
def test_confidence_interval_contains_the_accuracy(score):
    low, high = score.confidence_interval
    assert 0 <= low <= score.accuracy <= high <= 1
    assert low < high


@given(scores(), st.integers(2, 20))
def test_confidence_interval_shrinks_with_more_rows_of_the_same_accuracy(score, times):
    low, high = score.confidence_interval
    more_low, more_high = Score(score.n_correct * times, score.n_rows * times).confidence_interval
    assert more_high - more_low < high - low


@given(scores())
def test_confidence_interval_of_the_mistakes_is_the_mirror_image(score):
    low, high = score.confidence_interval
    mirror_low, mirror_high = Score(score.n_rows - score.n_correct, score.n_rows).confidence_interval
    assert (1 - mirror_high, 1 - mirror_low) == pytest.approx((low, high), abs=1e-12)


def test_score_of_counts_rows_and_positions():
    solutions = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]])
    outputs = np.array([[1, 2, 3], [4, 0, 6], [7, 8, 9], [0, 0, 1]])
    score = Score.of(outputs, solutions)
    assert (score.n_correct, score.n_rows, score.accuracy) == (2, 4, 0.5)
    assert score.by_position == (0.75, 0.5, 0.5)  # up to there


def test_a_score_goes_to_json():
    import json

    solutions = np.array([[1, 2], [3, 5]])
    values = json.loads(json.dumps(Score.of(np.array([[1, 2], [3, 4]]), solutions, solutions).to_dict()))
    low, high = values.pop("confidence_interval")
    assert values == {"n_correct": 1, "n_rows": 2, "n_distinct": 2, "accuracy": 0.5, "by_position": [1.0, 0.5]}
    assert 0 < low < 0.5 < high < 1


def test_rows_that_come_twice_count_once_in_the_confidence_interval():
    inputs = np.array([[0, 1], [0, 1], [1, 1], [0, 1]])
    solutions = 1 - inputs
    outputs = np.where(inputs[:, :1] == 1, 5, solutions)
    score = Score.of(outputs, solutions, inputs)
    assert (score.n_correct, score.n_rows, score.n_distinct) == (3, 4, 2)
    assert Score.of(outputs, solutions).n_distinct is None
    assert Score.of(outputs, np.array([[3, 3], [4, 4], [0, 0], [3, 3]]), inputs).n_distinct == 3  # of several tasks
    repeated = Score(120, 160, n_distinct=40)
    assert repeated.accuracy == 0.75
    assert repeated.confidence_interval == pytest.approx(Score(30, 40).confidence_interval)
    assert Score(120, 160).confidence_interval == Score(120, 160, n_distinct=160).confidence_interval


def test_inverse_binary_has_256_distinct_test_rows():
    dataset = CustomDataset("test", [InverseBinary()], prefix_padding=P)
    score = evaluate(FakeModel(InverseBinary(), length=10), dataset, n_rows=3200)
    assert (score.accuracy, score.n_distinct) == (1.0, 256)
    assert score.confidence_interval == Score(256, 256).confidence_interval


def test_scores_without_a_count_of_distinct_rows_are_read():
    """Of an earlier version."""
    values = Score(3, 7, (0.5, 0.25)).to_dict()
    del values["n_distinct"]
    assert Score.from_dict(values) == Score(3, 7, (0.5, 0.25))
    assert Score.from_dict(Score(3, 7, (), 2).to_dict()) == Score(3, 7, (), 2)


# ----------------------------------------------------------------------------------- evaluate, with a known model


@pytest.mark.parametrize("task", [SortAscending(), Modulo(), InverseBinary(), Add1() + LessThan()])
@pytest.mark.parametrize("batch_size", [7, 1600])
def test_a_perfect_model_scores_everything(task, batch_size):
    model = FakeModel(task)
    score = evaluate(model, make_dataset(task), n_rows=50, batch_size=batch_size)
    assert (score.n_correct, score.n_rows, score.accuracy) == (50, 50, 1.0)
    assert score.by_position == (1.0,) * L
    assert model.calls == ([7] * 7 + [1] if batch_size == 7 else [50])


@pytest.mark.parametrize("wrong", [(0,), (2,), (3,), (1, 3)])
def test_by_position_tells_where_the_mistakes_are(wrong):
    dataset = make_dataset(Add1())
    inputs, _ = dataset.rows(range(60))
    share_right = (inputs[:, 0] > 2).mean()
    assert 0 < share_right < 1
    score = evaluate(FakeModel(Add1(), wrong), dataset, n_rows=60, batch_size=11)
    assert score.accuracy == share_right
    assert score.by_position == tuple(share_right if position >= wrong[0] else 1.0 for position in range(L))


def test_the_rows_are_the_datasets_first_ones():
    """Counted from 0, and as many as are asked for, even beyond the dataset's size."""
    for seed in (0, 1):
        dataset = make_dataset(Add1(), seed=seed, size=20)
        for n_rows in (1, 20, 77):
            score = evaluate(FakeModel(Add1(), wrong=(1,)), dataset, n_rows=n_rows)
            assert score.n_correct == (dataset.rows(range(n_rows))[0][:, 0] > 2).sum()
            assert score.n_rows == n_rows


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("out of memory")])
def test_the_models_mode_is_restored(mode, error):
    model = FakeModel(Add1(), error=error).train(mode)
    if error is None:
        evaluate(model, make_dataset(Add1()), n_rows=5)
    else:
        with pytest.raises(type(error)):
            evaluate(model, make_dataset(Add1()), n_rows=5)
    assert model.training is mode
    assert model.calls
    assert torch.is_grad_enabled()


def test_a_model_that_is_too_small_is_refused_by_every_evaluation():
    """With both numbers, before it answers anything."""
    model = random_model(vocab_size=12, block_size=50)
    dataset = make_dataset(Add1() + Add1() + Add1() + Add1(), num_digits=9)  # up to 13
    for use in (
        lambda: evaluate(model, dataset, n_rows=5),
        lambda: accuracy_matrix(model, {"none": None}, [dataset], n_rows=5),
        lambda: constraint_effect(model, dataset, [MonotoneConstraint()], n_rows=5),
        lambda: eval(model, dataset, max_batches=1),
    ):
        with pytest.raises(ValueError, match="vocabulary is 12, and the data need 14"):
            use()
    with pytest.raises(ValueError, match="vocabulary is 12, and the data need 14"):
        predict(model, np.array([[1, 13]]), 0)
    with pytest.raises(ValueError, match="block size is 50, and the data need 51"):
        predict(model, np.ones((1, 20), dtype=np.int64), 12)
    assert predict(model, np.array([[1, 11]]), 47).shape == (1, 2)


@pytest.mark.parametrize("n_rows", [0, -3])
def test_no_rows_are_refused(n_rows):
    with pytest.raises(ValueError, match=f"n_rows must be at least 1, got {n_rows}"):
        evaluate(FakeModel(Add1()), make_dataset(Add1()), n_rows=n_rows)


# ----------------------------------------------------------------------------- evaluate, with a model that is trained


@pytest.fixture(scope="module")
def half_trained():
    """A model that sorts some rows upwards, some downwards and some not at all; the dataset asks for upwards."""
    torch.manual_seed(0)
    arguments = {"length": 3, "prefix_padding": 4, "num_digits": 6}
    mixture = CustomDataset("train", tasks=[SortAscending(), SortDescending()], **arguments)
    model = random_model(std=0.3, vocab_size=mixture.get_vocab_size(), block_size=mixture.get_block_size())
    config = Trainer.get_default_config()
    config.learning_rate = 1e-2
    loop = ReferenceLoop(model, config)
    losses = [loop.step(*mixture.batch(range(16 * step, 16 * (step + 1)))).item() for step in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    return model.eval(), make_dataset(SortAscending(), **arguments)


def count_by_hand(model, dataset, n_rows, prefix_of_row=lambda row: None):
    """One row at a time, one token at a time, each with a full pass."""
    n_correct, n_right = 0, [0] * dataset.length
    inputs, solutions = dataset.rows(range(n_rows))
    for row in range(n_rows):
        prompt = [0] * dataset.prefix_padding + inputs[row].tolist()
        tokens = reference_generate(model, torch.tensor([prompt]), dataset.length, prefix_of_row(row))[0]
        is_right = [
            int(token) == solution for token, solution in zip(tokens[len(prompt) :], solutions[row], strict=True)
        ]
        n_correct += all(is_right)
        is_right = itertools.accumulate(is_right, min)
        n_right = [count + right for count, right in zip(n_right, is_right, strict=True)]
    return n_correct, tuple(count / n_rows for count in n_right)


@pytest.mark.parametrize("batch_size", [1, 7, 30, 1600])
def test_evaluate_is_the_count_by_hand(half_trained, batch_size):
    model, dataset = half_trained
    n_correct, by_position = count_by_hand(model, dataset, 30)
    assert 3 < n_correct < 27  # neither all nor none
    score = evaluate(model, dataset, n_rows=30, batch_size=batch_size, precision="float32")
    assert (score.n_correct, score.n_rows, score.by_position) == (n_correct, 30, pytest.approx(by_position))


def test_bfloat16_is_an_option(half_trained):
    model, dataset = half_trained
    exact = evaluate(model, dataset, n_rows=200, precision="float32")
    score = evaluate(model, dataset, n_rows=200, precision="bfloat16")
    assert score.accuracy == pytest.approx(exact.accuracy, abs=0.1)
    with pytest.raises(ValueError, match="unknown precision 'float8'"):
        evaluate(model, dataset, n_rows=2, precision="float8")


@pytest.mark.parametrize("batch_size", [1, 7, 1600])
def test_evaluate_with_a_prefix_per_row_is_the_count_by_hand(half_trained, batch_size):
    """Which rows share a batch changes nothing: each keeps its own prefix."""
    model, dataset = half_trained
    n_rows = 17
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5, 2, 4, 24, generator=generator)
    rows = torch.randint(5, (n_rows,), generator=generator)
    expected = count_by_hand(model, dataset, n_rows, lambda row: values[rows[row]])
    in_order = evaluate(model, dataset, Prefix("activation", values, rows.sort().values), n_rows, precision="float32")
    for prefixes in (
        values[rows],
        Prefix("activation", values[rows]),
        Prefix("activation", values, rows),
    ):
        score = evaluate(model, dataset, prefixes, n_rows, batch_size=batch_size, precision="float32")
        assert (score.n_correct, score.by_position) == (expected[0], pytest.approx(expected[1]))
        assert score != in_order  # whose prefix it is matters
    first = count_by_hand(model, dataset, n_rows, lambda row: values[0])
    no_choice = Prefix("activation", values[:1], torch.zeros(n_rows, dtype=torch.int64))  # one prefix, explicit rows
    for prefixes in (values[0], Prefix("activation", values[:1]), no_choice):
        score = evaluate(model, dataset, prefixes, n_rows, batch_size=batch_size, precision="float32")
        assert (score.n_correct, score.by_position) == (first[0], pytest.approx(first[1]))


@pytest.mark.parametrize("n_rows", [2, 3, 9])
@pytest.mark.parametrize("batch_size", [1, 2, 1600])
def test_a_key_value_prefix_is_one_prefix_for_any_number_of_rows(n_rows, batch_size):
    """(3, 2, P, C) is key_value for three layers, also where there happen to be three rows."""
    dataset = make_dataset(Add1())
    model = random_model(n_layer=3, block_size=dataset.get_block_size())
    values = torch.randn(3, 2, P, 24, generator=torch.Generator().manual_seed(0))
    expected = evaluate(model, dataset, Prefix("key_value", values[None]), n_rows, precision="float32")
    score = evaluate(model, dataset, values, n_rows, batch_size=batch_size, precision="float32")
    assert (score, score.by_position) == (expected, expected.by_position)


@pytest.mark.parametrize(
    "form, n_prefixes", [("tensor", 4), ("tensor", 10), ("prefix", 3), ("prefix", 10), ("rows", 4), ("rows", 10)]
)
def test_as_many_prefixes_as_rows_are_required(half_trained, n_prefixes, form):
    """Also where a batch, of 4 rows here, would take as many as there are."""
    model, dataset = half_trained
    values = torch.randn(n_prefixes, 2, 4, 24)
    prefixes = {
        "tensor": values,
        "prefix": Prefix("activation", values),
        "rows": Prefix("activation", values, torch.arange(n_prefixes)),
    }[form]
    with pytest.raises(ValueError):
        evaluate(model, dataset, prefixes, n_rows=8, batch_size=4)


def test_prefixes_of_consecutive_rows_keep_their_rows_in_any_batches(half_trained):
    model, dataset = half_trained
    values = torch.randn(4, 2, 4, 24, generator=torch.Generator().manual_seed(5))
    expected = evaluate(model, dataset, values.repeat_interleave(3, dim=0), n_rows=12, precision="float32")
    for batch_size in (1, 5, 12):
        grouped = Prefix("activation", values)
        score = evaluate(model, dataset, grouped, n_rows=12, batch_size=batch_size, precision="float32")
        assert (score, score.by_position) == (expected, expected.by_position)


def test_a_prefix_that_is_longer_than_the_padding_is_refused():
    """It would take the place of the row's first elements."""
    dataset = make_dataset(Add1())
    model = random_model(block_size=dataset.get_block_size())
    evaluate(model, dataset, torch.randn(2, P, 24), n_rows=2)
    with pytest.raises(ValueError, match="prefix_padding"):
        evaluate(model, dataset, torch.randn(2, P + 1, 24), n_rows=2)


def test_one_prefix_with_explicit_rows_serves_more_rows_than_a_batch():
    model, inputs = random_model(block_size=13), np.arange(28).reshape(7, 4) % 11
    values, rows = (
        torch.randn(1, 2, 3, 24, generator=torch.Generator().manual_seed(0)),
        torch.zeros(7, dtype=torch.int64),
    )
    options = {"prefix_padding": 3, "batch_size": 3, "precision": "float32"}
    explicit = predict(model, inputs, prefixes=Prefix("activation", values, rows), **options)
    assert np.array_equal(explicit, predict(model, inputs, prefixes=values[0], **options))


def test_logits_processors_reach_the_model(half_trained):
    model, dataset = half_trained

    def only_zero(_, logits):
        return logits.index_fill(1, torch.arange(1, logits.shape[1]), float("-inf"))

    inputs, solutions = dataset.rows(range(9))
    answers = predict(model, inputs, dataset.prefix_padding, logits_processors=[only_zero])
    assert answers.shape == solutions.shape
    assert (answers == 0).all()


# -------------------------------------------------------------------------------------------- the accuracy matrix


MATRIX_TASKS = (SortAscending(), SortDescending(), Modulo(), InverseBinary(), Divisible(), Add1())  # 3 kinds of rows


def make_prefixes():
    """Prefix k is full of k, and makes FakeModel solve task k; None makes it solve the first."""
    named = {str(task): torch.full((1, P, 4), float(k)) for k, task in enumerate(MATRIX_TASKS)}
    return {"none": None} | named


def is_posed_alike(one, other):
    groups = [{"Modulo", "Divisible"}, {"InverseBinary"}, {"SortAscending", "SortDescending", "Add1"}]
    return any({one, other} <= group for group in groups)


def make_matrix(datasets, n_rows=20, **options):
    # The fake is asked tasks on rows that they are not defined on, so it may not check.
    model = FakeModel(Unchecked(SortAscending()), tasks=[Unchecked(task) for task in MATRIX_TASKS])
    return accuracy_matrix(model, make_prefixes(), datasets, n_rows, **options), model


class Unchecked:
    """A task that answers on every row."""

    def __init__(self, task):
        self.task = task

    def __call__(self, rows):
        return torch.from_numpy(self.task.solve(rows.numpy()))


def test_each_cell_of_the_matrix_is_what_evaluate_gives():
    datasets = [make_dataset(task) for task in MATRIX_TASKS]
    matrix, model = make_matrix(datasets, batch_size=9)
    assert list(matrix.index) == ["none", *map(str, MATRIX_TASKS)]
    assert list(matrix.columns) == list(map(str, MATRIX_TASKS))
    for i, (name, prefix) in enumerate(make_prefixes().items()):
        for j, dataset in enumerate(datasets):
            score = evaluate(model, dataset, prefix, n_rows=20)
            cell = matrix.iloc[i, j]
            assert (cell, cell.by_position, cell.n_distinct) == (score, score.by_position, score.n_distinct)
            if name == str(MATRIX_TASKS[j]):
                assert score.accuracy == 1
    assert len(set(matrix.map(lambda score: score.accuracy).to_numpy().flat)) > 2
    assert list(matrix.iloc[0]) == list(matrix.iloc[1])  # "none" answers the first task


def test_the_model_answers_once_for_each_prefix_and_different_rows():
    """Three kinds of rows for six tasks, seven prefixes, and three batches of at most 9 rows."""
    _, model = make_matrix([make_dataset(task) for task in MATRIX_TASKS], batch_size=9)
    assert Counter(model.calls) == {9: 2 * 3 * 7, 2: 3 * 7}


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_digits": 8}])
def test_other_rows_are_answered_apart(change):
    """Rows are shared only where all of them are the same."""
    datasets = [make_dataset(Add1()), make_dataset(SortAscending()), make_dataset(Add1(), **change)]
    matrix, model = make_matrix(datasets)
    assert len(model.calls) == 2 * 7
    for score, dataset in zip(matrix.iloc[0], datasets, strict=True):
        expected = evaluate(model, dataset, n_rows=20)
        assert (score, score.by_position) == (expected, expected.by_position)


def test_rows_after_another_padding_are_answered_apart(half_trained):
    model, dataset = half_trained
    datasets = [dataset, make_dataset(SortAscending(), length=3, num_digits=6, prefix_padding=1)]
    assert np.array_equal(datasets[0].rows(range(40))[0], datasets[1].rows(range(40))[0])
    matrix = accuracy_matrix(model, {"none": None}, datasets, n_rows=40, precision="float32")
    for score, own in zip(matrix.iloc[0], datasets, strict=True):
        assert score == evaluate(model, own, n_rows=40, precision="float32")
    assert matrix.iloc[0, 0] != matrix.iloc[0, 1]


def test_the_matrix_needs_datasets_of_one_task():
    mixture = CustomDataset("test", tasks=[Add1(), SortAscending()], length=L, num_digits=6, prefix_padding=P)
    for datasets in ([], [make_dataset(Add1()), mixture]):
        with pytest.raises(ValueError, match="one task each"):
            accuracy_matrix(FakeModel(Add1()), {"none": None}, datasets)


# ---------------------------------------------------------------------------------------------------- label_batch


def label_by_hand(row, outputs, tasks):
    """The numbers of the tasks that fit."""
    numbers = []
    for number, task in enumerate(tasks, start=1):
        try:
            solution = task(row)
        except ValueError:
            continue  # the task is not defined on this row
        if solution.tolist() == outputs.tolist():
            numbers.append(number)
    return numbers


@pytest.mark.parametrize("prefix_padding", [0, 7])
@pytest.mark.parametrize("task", SIMPLE_TASKS, ids=str)
def test_label_batch_names_each_of_the_eleven(task, prefix_padding):
    dataset = CustomDataset("test", tasks=[task], length=9, num_digits=8, prefix_padding=prefix_padding)
    x, y = dataset.batch(range(60))
    names = label_batch(x, y, prefix_padding, 9)
    numbers = label_batch(x, y, prefix_padding, 9, as_ints=True)
    inputs, solutions = (torch.from_numpy(part) for part in dataset.rows(range(60)))
    expected = [label_by_hand(*row, SIMPLE_TASKS) for row in zip(inputs, solutions, strict=True)]
    assert names == [" or ".join(str(SIMPLE_TASKS[number - 1]) for number in row) for row in expected]
    assert numbers == [row[0] if len(row) == 1 else -1 for row in expected]
    assert all(str(task) in name.split(" or ") for name in names)
    assert Counter(names)[str(task)] > 30  # on some rows another task does the same


def test_there_are_eleven_tasks_to_name():
    assert len(SIMPLE_TASKS) == len(set(map(str, SIMPLE_TASKS))) == 11


def as_batch(inputs, outputs, prefix_size):
    """Sequences of rows and outputs, as a dataset gives them."""
    tokens = torch.cat([torch.zeros(len(inputs), prefix_size, dtype=torch.int64), inputs, outputs], dim=1)
    y = tokens[:, 1:].clone()
    y[:, : prefix_size + inputs.shape[1] - 1] = -1
    return tokens[:, :-1], y


def test_label_batch_of_what_no_task_does():
    inputs = torch.tensor([[3, 1, 2], [0, 0, 0], [-4, 0, 9], [2, 3, 4]])
    outputs = torch.tensor([[9, 9, 9], [7, 7, 7], [5, 5, 5], [3, 4, 6]])
    x, y = as_batch(inputs, outputs, 2)
    assert label_batch(x, y, 2, 3) == ["None"] * 4
    assert label_batch(x, y, 2, 3, as_ints=True) == [0] * 4


def test_label_batch_names_every_task_that_fits():
    """Sorting a sorted row changes nothing, and a row of one value is sorted both ways."""
    inputs = torch.tensor([[1, 2, 3], [3, 2, 1], [1, 1, 1], [2, 1, 3]])
    outputs = torch.tensor([[1, 2, 3], [3, 2, 1], [1, 1, 1], [9, 9, 9]])
    x, y = as_batch(inputs, outputs, 1)
    ascending, descending = SortAscending(), SortDescending()
    both = "SortAscending or SortDescending"
    assert label_batch(x, y, 1, 3, tasks=[ascending, descending]) == ["SortAscending", "SortDescending", both, "None"]
    assert label_batch(x, y, 1, 3, as_ints=True, tasks=[descending, ascending]) == [2, 1, -1, 0]
    # A task that is asked for twice is one task.
    assert label_batch(x, y, 1, 3, tasks=[descending, ascending, descending])[:2] == ["SortAscending", "SortDescending"]
    assert label_batch(x, y, 1, 3, as_ints=True, tasks=[descending, ascending, descending])[:2] == [2, 1]


def test_label_batch_passes_over_rows_that_a_task_is_not_defined_on():
    """Division by 0, and ones minus something else, neither raise nor fit."""
    inputs = torch.tensor([[0, 5, 6], [0, 1, 1], [2, 5, 1]])
    outputs = torch.tensor([[0, 0, 0], [1, 0, 0], [-1, -4, 0]])
    x, y = as_batch(inputs, outputs, 0)
    assert label_batch(x, y, 0, 3, tasks=[Modulo(), Divisible(), InverseBinary()]) == ["None", "InverseBinary", "None"]


def test_label_batch_names_compositions_that_are_asked_for():
    tasks = [Add1(), SortAscending() + Add1(), LessThan() + Add1()]
    dataset = CustomDataset("train", tasks=tasks[1:], length=8)
    x, y = dataset.batch(range(40))
    assert label_batch(x, y, 0, 8, tasks=tasks) == ["SortAscending+Add1", "LessThan+Add1"] * 20


def test_label_batch_leaves_its_arguments_alone():
    x, y = CustomDataset("train", tasks=[Add1()], prefix_padding=2).batch(range(5))
    before = x.clone(), y.clone()
    label_batch(x, y, 2, 10)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


# ------------------------------------------------------------------------------------------------------- eval


@pytest.mark.parametrize(
    "arguments, n_rows",
    [({}, 250), ({"max_batches": 1}, 100), ({"max_batches": 2}, 200), ({"max_batches": 3}, 250)],
)
def test_eval_prints_the_score_and_returns_the_count(capsys, arguments, n_rows):
    dataset = make_dataset(Add1(), size=250)
    result = eval(FakeModel(Add1(), wrong=(1,)), dataset=dataset, **arguments)
    n_correct = (dataset.rows(range(n_rows))[0][:, 0] > 2).sum()
    assert 0 < n_correct < n_rows
    assert capsys.readouterr().out == f"Final score: {n_correct}/{n_rows} = {100 * n_correct / n_rows:.2f}% correct\n"
    assert isinstance(result, torch.Tensor)
    assert result.shape == ()
    assert result.dtype == torch.float32
    assert result.item() == n_correct


@pytest.mark.parametrize("max_batches", [0, -1])
def test_eval_of_no_batches_is_refused(max_batches):
    with pytest.raises(ValueError, match=f"n_rows must be at least 1, got {100 * max_batches}"):
        eval(FakeModel(Add1()), make_dataset(Add1()), max_batches=max_batches)


def test_eval_of_a_perfect_model(capsys):
    assert eval(FakeModel(Add1()), make_dataset(Add1(), size=3200), max_batches=32) == 3200
    assert capsys.readouterr().out == "Final score: 3200/3200 = 100.00% correct\n"


def test_eval_is_what_evaluate_counts(half_trained, capsys):
    model, dataset = half_trained
    prefix = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(1))
    for prefixes in (None, prefix):
        result = eval(model.train(), dataset=dataset, device=torch.device("cpu"), max_batches=1, prefixes=prefixes)
        assert model.training
        assert result == evaluate(model, dataset, prefixes, n_rows=100).n_correct
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_eval_moves_the_model_to_the_device():
    class Movable(FakeModel):
        def to(self, device):
            self.device = torch.device(device)

    model = Movable(Add1())
    model.device = torch.device("meta")
    assert eval(model, make_dataset(Add1()), "cpu", max_batches=1) == 100


# ------------------------------------------------------------------------------------ the reference's own work


def test_the_references_examples_are_the_datasets():
    """One row at a time, solved, joined and shifted: what the dataset builds at once."""
    dataset = CustomDataset("train", tasks=[SortAscending(), Modulo()], length=5, num_digits=7, prefix_padding=3)
    inputs, _ = dataset.rows(range(30))
    x, y = dataset.batch(range(30))
    for index, row in enumerate(inputs):
        own_x, own_y = reference_example(dataset.tasks[index % 2], torch.from_numpy(row), 3)
        assert torch.equal(x[index], own_x)
        assert torch.equal(y[index], own_y)
        assert not reference_is_test_row(row.tolist())


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_references_rows_are_of_the_datasets_kind(split):
    tasks = [SortAscending(), InverseBinary(), Modulo()]
    dataset = CustomDataset(split, tasks=tasks, length=8, num_digits=9, prefix_padding=2)
    indices = range(5, 305)
    x, y = reference_rows(dataset, indices)
    own_x, own_y = dataset.batch(indices)
    assert (x.shape, x.dtype, y.shape, y.dtype) == (own_x.shape, own_x.dtype, own_y.shape, own_y.dtype)
    assert torch.equal(y == -1, own_y == -1)
    assert torch.equal(reference_rows(dataset, [7])[0][0], x[2])  # a function of the index
    for k in range(3):
        rows = x[:, 2:10][torch.tensor([index % 3 == k for index in indices])]
        own = own_x[:, 2:10][torch.tensor([index % 3 == k for index in indices])]
        assert all(reference_is_test_row(row.tolist()) == (split == "test") for row in rows)
        assert (rows[:, 0].min(), rows[:, 0].max()) == (own[:, 0].min(), own[:, 0].max())
        assert (rows[:, 1:].min(), rows[:, 1:].max()) == (own[:, 1:].min(), own[:, 1:].max())
        n_distinct, own_distinct = (sum(len(set(row.tolist())) for row in part) / len(part) for part in (rows, own))
        assert math.isclose(n_distinct, own_distinct, rel_tol=0.1)


@pytest.mark.parametrize("is_prefix", [False, True])
def test_the_references_steps_are_the_trainers(is_prefix):
    """The loop that benchmarks compare with learns the same from the same batches."""
    dataset = CustomDataset("train", tasks=[SortAscending(), Add1()], length=4, num_digits=6, prefix_padding=3)
    sizes = {"vocab_size": dataset.get_vocab_size(), "block_size": dataset.get_block_size()}
    model, own_model = random_model(**sizes), random_model(**sizes)
    prefix, own_prefix = (torch.ones(2, 3, 24, requires_grad=True) for _ in range(2))
    config = Trainer.get_default_config()
    config.merge_from_dict({"max_iters": 15, "precision": "float32", "batch_size": 16, "learning_rate": 3e-3})
    config.progress = False
    trainer = PrefixTrainer(config, model, dataset, prefix) if is_prefix else Trainer(config, model, dataset)
    losses = []
    trainer.set_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    trainer.run()
    loop = ReferenceLoop(own_model, config, own_prefix if is_prefix else None)
    own_losses = [loop.step(*dataset.batch(range(start, start + 16))).item() for start in range(0, 15 * 16, 16)]
    assert losses == pytest.approx(own_losses, rel=1e-4)
    assert losses[-1] < losses[0] - 0.1
    x, _ = dataset.batch(range(5))
    with torch.no_grad():  # not the weights: where a gradient is zero but for rounding, AdamW's steps are noise
        logits = model.eval()(x, prefixes=prefix if is_prefix else None)[0][:, 3:]
        own_logits = reference_forward(own_model.eval(), x, own_prefix if is_prefix else None)[:, 3:]
    torch.testing.assert_close(logits, own_logits, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------- under constraints


def test_the_effect_of_a_constraint_is_both_scores_and_what_it_forbade(half_trained):
    model, dataset = half_trained
    constraint = MonotoneConstraint()
    effect = constraint_effect(model, dataset, [constraint], n_rows=30, batch_size=7, precision="float32")
    assert effect.free == evaluate(model, dataset, n_rows=30, precision="float32")
    assert effect.constrained == evaluate(
        model, dataset, n_rows=30, precision="float32", logits_processors=[constraint]
    )
    inputs, _ = dataset.rows(range(30))
    prompts = torch.cat([torch.zeros(30, dataset.prefix_padding, dtype=torch.int64), torch.from_numpy(inputs)], dim=1)
    record = []
    model.eval().generate(prompts, dataset.length, logits_processors=[constraint], forbidden_mass_record=record)
    expected = torch.stack(record)[..., 0].mean(dim=1)
    assert effect.forbidden_mass == pytest.approx(expected.tolist(), abs=1e-5)
    assert effect.forbidden_mass[0] == pytest.approx(0, abs=1e-6)  # the first output may be any
    assert max(effect.forbidden_mass) > 0.01


def test_the_forbidden_mass_of_two_constraints_is_what_is_not_left(half_trained):
    """The first forbids a share of all, the second one of the rest."""
    model, dataset = half_trained
    first, second = Forbid([0, 1]), Forbid([1, 2, 3])
    together = constraint_effect(model, dataset, [first, second], n_rows=20, precision="float32")
    union = constraint_effect(model, dataset, [Forbid([0, 1, 2, 3])], n_rows=20, precision="float32")
    assert together.forbidden_mass == pytest.approx(union.forbidden_mass, abs=1e-5)


def test_a_score_table_has_the_published_value_beside_ours():
    scores = {"Add1": Score(3198, 3200), "SortAscending": Score(0, 3200)}
    table = score_table(scores, {"Add1": 99.5, "Modulo": 3.0})
    assert list(table.index) == ["Add1", "SortAscending"]
    assert list(table.columns) == ["accuracy", "low", "high", "published", "n_rows"]
    assert table.dtypes.astype(str).tolist() == ["float64"] * 4 + ["int64"]
    low, high = Score(3198, 3200).confidence_interval
    assert table.loc["Add1"].tolist() == [99.9375, 100 * low, 100 * high, 99.5, 3200]
    assert math.isnan(table.loc["SortAscending", "published"])
    assert score_table(scores)["published"].isna().all()


# ------------------------------------------------------------------------------------------------ the Bayes loss


class Uniform(Task):
    """A task on rows of 1..high without repeats, whose solution is ``answer`` everywhere."""

    has_repeats = False

    def __init__(self, high, answer):
        self.high, self.answer = high, answer

    def solve(self, x):
        return np.full_like(x, self.answer)

    def input_values(self, num_digits):
        return Values(Interval(1, self.high), Interval(1, self.high))

    def output_values(self, values, length):
        return values.map(lambda _: Interval(self.answer, self.answer))


def test_bayes_loss_weighs_tasks_by_the_likelihood_of_the_row():
    """A row of 1..5 is 2^L times as likely under the task on 1..5 as under the one on 1..10."""
    length, n_rows = 6, 4000
    dataset = CustomDataset("train", [Uniform(5, 1), Uniform(10, 2)], length=length)
    small = (dataset.rows(range(n_rows))[0] <= 5).all(axis=1)
    is_small_task = np.arange(n_rows) % 2 == 0
    probability = 2**length / (2**length + 1)
    expected = -(is_small_task * math.log(probability) + (small & ~is_small_task) * math.log(1 - probability)).sum()
    assert bayes_loss(dataset, n_rows) == pytest.approx(expected / n_rows / length, rel=1e-9)
    assert bayes_loss(CustomDataset("train", [Uniform(5, 1), Uniform(10, 1)], length=length), 100) == 0


def test_bayes_loss_of_long_rows_does_not_underflow():
    dataset = CustomDataset("train", [Uniform(1000, 1), Uniform(1000, 2)], length=200, num_digits=1000)
    assert bayes_loss(dataset, 20) == pytest.approx(math.log(2) / 200)


def test_bayes_loss_of_the_first_elements_range():
    """Modulo's rows begin with one of 2..5, sorting's with one of 1..10."""
    dataset = CustomDataset("train", [Modulo(), SortAscending()], length=8)
    inputs = dataset.rows(range(500))[0]
    first = inputs[:, 0]
    p_modulo = np.where((first >= 2) & (first <= 5), (1 / 4) / (1 / 4 + 1 / 10), 0)
    p = np.where(np.arange(500) % 2 == 0, p_modulo, 1 - p_modulo)
    differ = (Modulo().solve(inputs) != SortAscending().solve(inputs)).any(axis=1)
    assert bayes_loss(dataset, 500) == pytest.approx(-np.log(p[differ]).sum() / 500 / 8)


def test_bayes_loss_of_the_seven_is_what_it_was():
    dataset = CustomDataset("test", PRETRAINING_TASKS, prefix_padding=10)
    assert bayes_loss(dataset) == pytest.approx(0.133616793895218, abs=1e-15)


# ------------------------------------------------------------------------------- one pass instead of decoding


def right_by_both_ways(model, inputs, targets, padding, prefix):
    """Which outputs are right so far, row by row: the same by one pass over inputs and targets as by generating."""
    answers = predict(model, inputs, padding, prefix, precision="float32")
    own = predict(model, inputs, padding, prefix, precision="float32", solutions=targets)
    found, expected = (np.logical_and.accumulate(each == targets, axis=1) for each in (own, answers))
    assert np.array_equal(found, expected)
    return expected


@pytest.mark.parametrize("n_layer", [1, 3])
def test_one_pass_agrees_with_decoding_on_models_that_were_not_trained(n_layer):
    """The targets are the model's own answers, with a wrong token somewhere in half of the rows."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        model = random_model(seed, n_layer=n_layer)
        inputs = rng.integers(11, size=(400, 5))
        for prefix in (None, torch.randn(n_layer, 2, 24), torch.randn(n_layer, 2, 2, 24), torch.randn(2, 24)):
            targets = predict(model, inputs, 2, prefix, precision="float32")
            targets[np.arange(200), rng.integers(5, size=200)] = rng.integers(11, size=200)
            is_right = right_by_both_ways(model, inputs, targets, 2, prefix)[:, -1]
            assert is_right[200:].all()
            assert is_right[:200].mean() < 0.7


@pytest.mark.slow
def test_one_pass_agrees_with_decoding_on_100_000_rows_of_a_trained_model():
    """With the prefix of each task, without one, and with another task's."""
    model, prefixes, description = load_run(Path(__file__).parents[1] / "checkpoints" / "laptop", "cpu")
    names, n_rows = list(prefixes), 2100
    shares = []
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        data = CustomDataset.from_description(description["data"], split="test", tasks=[Task.parse(name)])
        inputs, solutions = data.rows(range(n_rows))
        for prefix in (None, prefixes[name], prefixes[other]):
            is_right = right_by_both_ways(model, inputs, solutions, data.prefix_padding, prefix)
            shares += [is_right[:, -1].mean()]
    assert len(shares) * n_rows > 100_000
    assert min(shares) == 0
    assert max(shares) == 1


def test_a_record_of_what_is_forbidden_is_filled_without_processors_too():
    record = []
    evaluate(random_model(), make_dataset(Add1(), num_digits=8), n_rows=6, forbidden_mass_record=record)
    assert [tuple(each.shape) for each in record] == [(6, 0)] * L
