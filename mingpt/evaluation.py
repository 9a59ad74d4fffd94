"""How well a model, with or without a prefix, solves tasks.

Legend: N rows, L row length, P prefix positions, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mingpt.datasets import CustomDataset
from mingpt.decoding.logits_processors import Constraint
from mingpt.prefix import Prefix, as_prefix
from mingpt.tasks import SIMPLE_TASKS, Task
from mingpt.training.precision import autocast

N_ROWS = 3200
"""Rows of a published figure."""

_Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


@dataclass(frozen=True)
class Score:
    """How many rows were solved exactly.

    Attributes:
        n_correct: rows whose every output token is right.
        n_rows: rows in all.
        by_position: the share of rows that is right at each output position, L numbers.
    """

    n_correct: int
    n_rows: int
    by_position: tuple[float, ...] = field(default=(), repr=False)

    @property
    def accuracy(self) -> float:
        """The share of rows solved, 0 to 1."""
        return self.n_correct / self.n_rows

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the accuracy (Wilson 1927), which is sound at 0 and 1 too."""
        n, z2 = self.n_rows, _Z95**2
        center = (self.n_correct + z2 / 2) / (n + z2)
        half = _Z95 / (n + z2) * math.sqrt(self.n_correct * (n - self.n_correct) / n + z2 / 4)
        # Rounding must not leave the accuracy outside, as it may by 1e-17 at 0 and 1.
        return max(0.0, min(center - half, self.accuracy)), min(1.0, max(center + half, self.accuracy))

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON values."""
        low, high = self.confidence_interval
        return {
            "n_correct": self.n_correct,
            "n_rows": self.n_rows,
            "accuracy": self.accuracy,
            "confidence_interval": [low, high],
            "by_position": list(self.by_position),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """Undo ``to_dict``."""
        return cls(values["n_correct"], values["n_rows"], tuple(values["by_position"]))

    @classmethod
    def of(cls, outputs: np.ndarray, solutions: np.ndarray) -> Score:
        """Compare outputs with solutions, (N, L) each."""
        is_right = outputs == solutions
        return cls(int(is_right.all(axis=1).sum()), len(outputs), tuple(is_right.mean(axis=0).tolist()))


def evaluate(
    model: Any,
    dataset: CustomDataset,
    prefixes: Tensor | Prefix | None = None,
    n_rows: int = N_ROWS,
    **options: Any,
) -> Score:
    """Solve the dataset's first ``n_rows`` rows greedily and count those whose every output token is right.

    Args:
        model: a GPT.
        dataset: usually of the "test" split; its prefix_padding is where the prefix goes.
        prefixes: one prefix for all rows, or one per row for ``n_rows`` rows.
        n_rows: how many rows.
        options: batch_size, precision, logits_processors, forbidden_mass_record; see ``predict``.

    Raises:
        ValueError: if ``n_rows`` is not positive, or the prefix is longer than the dataset's prefix_padding.
    """
    if n_rows < 1:
        raise ValueError(f"n_rows must be at least 1, got {n_rows}")
    inputs, solutions = dataset.rows(range(n_rows))
    return Score.of(predict(model, inputs, dataset.prefix_padding, prefixes, **options), solutions)


@torch.no_grad()
def predict(
    model: Any,
    inputs: np.ndarray,
    prefix_padding: int,
    prefixes: Tensor | Prefix | None = None,
    batch_size: int = 1600,
    precision: str = "auto",
    logits_processors: Iterable[Callable] = (),
    n_given: int = 0,
    given: np.ndarray | None = None,
    forbidden_mass_record: list[Tensor] | None = None,
) -> np.ndarray:
    """The model's greedy answers to input rows.

    Args:
        model: a GPT; it is in evaluation mode meanwhile.
        inputs: (N, L) input rows.
        prefix_padding: P, how many zeros come before them.
        prefixes: see ``mingpt.prefix.as_prefix``; one per row means one per row of ``inputs``.
        batch_size: rows generated at a time.
        precision: see ``mingpt.training.precision``.
        logits_processors: see ``mingpt.decoding.generation.generate``.
        n_given: how many tokens of each answer are given with the prompt.
        given: (N, L) answers to take them from.
        forbidden_mass_record: a list that receives, for each batch, the probability that each constraint forbade, (steps,
            rows, number of constraints); see ``mingpt.decoding.generation.generate``.

    Returns:
        (N, L) answers.
    """
    n_rows, length = inputs.shape
    prefix = None
    if prefixes is not None:
        prefix = as_prefix(prefixes, model.config.n_layer, model.config.n_embd, n_rows)
        if prefix.n_placeholders > prefix_padding:
            raise ValueError(f"the prefix has {prefix.n_placeholders} positions, prefix_padding has {prefix_padding}")
    prompts = np.concatenate([np.zeros((n_rows, prefix_padding), dtype=np.int64), inputs], axis=1)
    if given is not None:
        prompts = np.concatenate([prompts, given[:, :n_given]], axis=1)
    processors = tuple(logits_processors)
    tokens = torch.from_numpy(prompts).to(model.device)
    was_training = model.training
    model.eval()
    outputs = []
    try:
        with autocast(precision, model.device):
            for start in range(0, n_rows, batch_size):
                rows = slice(start, start + batch_size)
                record: list[Tensor] | None = None if forbidden_mass_record is None else []
                outputs.append(
                    model.generate(
                        tokens[rows],
                        length - n_given,
                        prefixes=None if prefix is None else prefix.for_rows(rows, n_rows),
                        logits_processors=processors,
                        forbidden_mass_record=record,
                    )[:, prefix_padding + length :]
                )
                if forbidden_mass_record is not None and record is not None:
                    forbidden_mass_record.append(torch.stack(record))
    finally:
        model.train(was_training)
    return torch.cat(outputs).cpu().numpy()


@dataclass(frozen=True)
class ConstraintEffect:
    """What a constraint added to what the model and its prefix know.

    Attributes:
        free: the score without the constraint.
        constrained: the score with it.
        forbidden_mass: at each output position, the mean probability that it took away from the model, L numbers from 0 to 1.
            Where it is near 0, the model would have kept to the language by itself.
    """

    free: Score
    constrained: Score
    forbidden_mass: tuple[float, ...]

    @property
    def gap(self) -> float:
        """The accuracy that the constraint added, -1 to 1."""
        return self.constrained.accuracy - self.free.accuracy


def constraint_effect(
    model: Any,
    dataset: CustomDataset,
    constraints: Iterable[Constraint],
    prefixes: Tensor | Prefix | None = None,
    n_rows: int = N_ROWS,
    **options: Any,
) -> ConstraintEffect:
    """Solve the same rows freely and under constraints, and see how much the constraints had to forbid.

    Args:
        model: a GPT.
        dataset: see ``evaluate``.
        constraints: of ``mingpt.decoding.constraints``, together.
        prefixes: see ``evaluate``.
        n_rows: how many rows.
        options: batch_size, precision; see ``predict``.
    """
    free = evaluate(model, dataset, prefixes, n_rows, **options)
    record: list[Tensor] = []
    options |= {"logits_processors": tuple(constraints), "forbidden_mass_record": record}
    constrained = evaluate(model, dataset, prefixes, n_rows, **options)
    kept = 1 - torch.cat(record, dim=1)  # (L, N, constraints), of what the ones before had left
    forbidden_mass = 1 - kept.prod(dim=2).mean(dim=1)
    return ConstraintEffect(free, constrained, tuple(forbidden_mass.clamp(min=0).tolist()))


@dataclass(frozen=True)
class AccuracyMatrix:
    """The score of every prefix on every task.

    Attributes:
        prefixes: the row names; "none" is the model without a prefix.
        tasks: the column names.
        scores: ``scores[i][j]`` of prefix i on task j.
    """

    prefixes: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: tuple[tuple[Score, ...], ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AccuracyMatrix:
        """Undo ``to_dict``; what the scores were at each position is not kept."""
        counts = zip(values["n_correct"], values["n_rows"], strict=True)
        scores = tuple(tuple(map(Score, n_correct, n_rows)) for n_correct, n_rows in counts)
        return cls(tuple(values["prefixes"]), tuple(values["tasks"]), scores)

    @property
    def accuracies(self) -> np.ndarray:
        """The accuracies, (n_prefixes, n_tasks), 0 to 1."""
        return np.array([[score.accuracy for score in row] for row in self.scores])

    def __getitem__(self, names: tuple[str, str]) -> Score:
        """``matrix[prefix, task]``, by name."""
        prefix, task = names
        return self.scores[self.prefixes.index(prefix)][self.tasks.index(task)]

    def to_dict(self) -> dict[str, Any]:
        """The matrix as JSON values."""
        return {
            "prefixes": list(self.prefixes),
            "tasks": list(self.tasks),
            "n_correct": [[score.n_correct for score in row] for row in self.scores],
            "n_rows": [[score.n_rows for score in row] for row in self.scores],
        }


def accuracy_matrix(
    model: Any,
    prefixes: Mapping[str, Tensor | Prefix | None],
    datasets: Sequence[CustomDataset],
    n_rows: int = N_ROWS,
    **options: Any,
) -> AccuracyMatrix:
    """Score every prefix on the one task of every dataset.

    The model answers once for each prefix and each different set of input rows; all tasks that are posed on these rows
    grade the same answers. A cell is what ``evaluate`` gives for that prefix and dataset.

    Args:
        model: a GPT.
        prefixes: by name; None is the model without a prefix.
        datasets: of one task each.
        n_rows: rows for each cell.
        options: see ``predict``.

    Raises:
        ValueError: if a dataset has several tasks, or none are given.
    """
    if not datasets or any(len(dataset.tasks) != 1 for dataset in datasets):
        raise ValueError("accuracy_matrix needs at least one dataset, of one task each")
    rows = [dataset.rows(range(n_rows)) for dataset in datasets]
    distinct: list[tuple[np.ndarray, int, list[int]]] = []  # input rows, padding, columns that are posed on them
    for column, (inputs, _) in enumerate(rows):
        padding = datasets[column].prefix_padding
        for other, other_padding, columns in distinct:
            if other_padding == padding and np.array_equal(other, inputs):
                columns.append(column)
                break
        else:
            distinct.append((inputs, padding, [column]))
    table = []
    for prefix in prefixes.values():
        scores: dict[int, Score] = {}
        for inputs, padding, columns in distinct:
            outputs = predict(model, inputs, padding, prefix, **options)
            scores.update((column, Score.of(outputs, rows[column][1])) for column in columns)
        table.append(tuple(scores[column] for column in range(len(datasets))))
    return AccuracyMatrix(tuple(prefixes), tuple(str(dataset.tasks[0]) for dataset in datasets), tuple(table))


def score_table(scores: Mapping[str, Score], published: Mapping[str, float] | None = None) -> str:
    """Scores by name as lines of text: percent, the 95% interval, and what was published, in percent, where it was."""
    width = max(map(len, scores)) + 2
    lines = [f"{'':{width}}{'accuracy':>10}{'95% interval':>18}{'published':>12}"]
    for name, score in scores.items():
        low, high = (100 * end for end in score.confidence_interval)
        theirs = (published or {}).get(name)
        line = f"{name:{width}}{100 * score.accuracy:>9.2f}%{f'{low:.2f} - {high:.2f}':>18}"
        lines.append(line + (f"{theirs:>11.2f}%" if theirs is not None else ""))
    n_rows = sorted({score.n_rows for score in scores.values()})
    return "\n".join([*lines, f"of {' or '.join(f'{n:,}' for n in n_rows)} test rows"])


def bayes_loss(dataset: CustomDataset, n_rows: int = 7000) -> float:
    """The cross-entropy in nats per output token that no predictor can beat on a mixture of tasks.

    A predictor that knows every task, but not which of them was drawn, weighs the tasks by Bayes' rule: by how likely
    each poses this input, then by whether it agrees with the outputs seen so far. What it is unsure of is left.

    Args:
        dataset: a mixture; rows drawn with and without repeats are taken as equally likely for all tasks.
        n_rows: rows to average over.
    """
    inputs, solutions = dataset.rows(range(n_rows))
    likely = np.zeros((len(dataset.tasks), n_rows))  # (K, N), up to a factor for each row
    agrees = np.zeros((len(dataset.tasks), *inputs.shape), dtype=bool)  # (K, N, L)
    for k, task in enumerate(dataset.tasks):
        first, rest = task.input_values(dataset.num_digits)
        is_possible = (inputs >= rest.low).all(axis=1) & (inputs <= rest.high).all(axis=1)
        is_possible &= (inputs[:, 0] >= first.low) & (inputs[:, 0] <= first.high)
        # Every row but its argument is as likely under one task as under another with the same values.
        likely[k] = is_possible / (first.high - first.low + 1.0)
        agrees[k] = task.solve(inputs) == solutions
    agreed = np.cumprod(agrees, axis=2)
    after = (likely[:, :, None] * agreed).sum(axis=0)  # (N, L) the weight of the tasks that agree up to each output
    before = np.concatenate([likely.sum(axis=0)[:, None], after[:, :-1]], axis=1)
    return float(np.mean(np.log(before / after)))


def label_batch(
    x: Tensor, y: Tensor, prefix_size: int, length: int, as_ints: bool = False, tasks: Sequence[Task] = SIMPLE_TASKS
) -> list[str] | list[int]:
    """Name the task that maps each x to its y.

    Args:
        x: (N, T) sequences as a dataset gives them, the input at ``prefix_size``.
        y: (N, T) their targets, or outputs, with the solution at ``prefix_size + length - 1``.
        prefix_size: P, the tokens before the input.
        length: L.
        as_ints: give each task's number, from 1 on, and 0 for none of them.
        tasks: those to try; the first that fits is the answer.

    Returns:
        N names, "None" where no task fits, or N numbers.
    """
    inputs = x[:, prefix_size : prefix_size + length].cpu().numpy()
    outputs = y[:, prefix_size + length - 1 :].cpu().numpy()
    labels = np.zeros(len(inputs), dtype=np.int64)
    for number, task in reversed(list(enumerate(tasks, start=1))):
        fits = task.is_defined(inputs) & (task.solve(inputs) == outputs).all(axis=-1)
        labels[fits] = number
    if as_ints:
        return labels.tolist()
    names = ["None", *map(str, tasks)]
    return [names[label] for label in labels]


def eval(  # noqa: A001 (the seed notebook's name)
    model: Any,
    dataset: CustomDataset,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    provide_first: bool = False,
    prefixes: Tensor | Prefix | None = None,
    show_wrong_examples: bool = False,
    logits_processors: Iterable[Callable] = (),
) -> Tensor:
    """Print and return how many rows the model solves, as the seed notebook's ``eval`` does.

    Args:
        model: a GPT.
        dataset: whose first ``100 * max_batches`` rows are solved, all of ``len(dataset)`` without ``max_batches``.
        device: where to run; the model is moved there.
        max_batches: batches of 100 rows.
        provide_first: give the first token of the solution with the prompt.
        prefixes: see ``mingpt.prefix.as_prefix``.
        show_wrong_examples: print the first three mistakes.
        logits_processors: see ``mingpt.decoding.generation.generate``.

    Returns:
        The number of rows solved, a scalar tensor of float32.
    """
    if device is not None:
        model.to(device)
    n_rows = len(dataset) if max_batches is None else min(100 * max_batches, len(dataset))
    inputs, solutions = dataset.rows(range(n_rows))
    outputs = predict(
        model,
        inputs,
        dataset.prefix_padding,
        prefixes,
        logits_processors=logits_processors,
        n_given=int(provide_first),
        given=solutions,
    )
    score = Score.of(outputs, solutions)
    if show_wrong_examples:
        for row in np.flatnonzero((outputs != solutions).any(axis=1))[:3]:
            print(f"{inputs[row].tolist()} became {outputs[row].tolist()}, the solution is {solutions[row].tolist()}")
    print(f"Final score: {score.n_correct}/{score.n_rows} = {100 * score.accuracy:.2f}% correct")
    return torch.tensor(float(score.n_correct))
