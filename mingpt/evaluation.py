"""How well a model answers, with or without a prefix.

Legend: N rows, L row length, P prefix positions, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mingpt.datasets import IGNORED, CustomDataset, check_fits
from mingpt.decoding.generation import CausalModel
from mingpt.decoding.logits_processors import Constraint
from mingpt.model import GPT
from mingpt.prefix import Prefix, as_prefix, evaluation_mode
from mingpt.tasks import SIMPLE_TASKS, Task
from mingpt.text import TextDataset
from mingpt.training.precision import autocast

if TYPE_CHECKING:
    from pandas import DataFrame

AnyPrefix = Tensor | Prefix | None
"""What a model answers with: see ``mingpt.prefix.as_prefix``; None is no prefix."""

N_ROWS = 3200
"""Rows of a published figure."""

_Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


@dataclass(frozen=True)
class Score:
    """How many rows were answered exactly.

    Attributes:
        n_correct: rows whose every output token is right.
        n_rows: rows in all.
        by_position: the share of rows that is right up to and including each output position, L numbers.
        n_distinct: different rows, input and solution; None where they were not counted.
    """

    n_correct: int
    n_rows: int
    by_position: tuple[float, ...] = field(default=(), repr=False)
    n_distinct: int | None = field(default=None, repr=False)

    @property
    def accuracy(self) -> float:
        """The share of rows answered exactly, 0 to 1."""
        return self.n_correct / self.n_rows

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the accuracy over test rows (Wilson 1927), which is sound at 0 and 1 too.

        It says how far the accuracy on all rows of this kind may be from the accuracy on these, for this one model. It
        says nothing of other seeds. A row that comes twice counts once: p is n_correct / n_rows and n is n_distinct.
        """
        n, z2 = self.n_distinct or self.n_rows, _Z95**2
        n_correct = self.n_correct * (n / self.n_rows)
        center = (n_correct + z2 / 2) / (n + z2)
        half = _Z95 / (n + z2) * math.sqrt(n_correct * (n - n_correct) / n + z2 / 4)
        # Rounding must not leave the accuracy outside, as it may by 1e-17 at 0 and 1.
        return max(0.0, min(center - half, self.accuracy)), min(1.0, max(center + half, self.accuracy))

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON values."""
        derived = {"accuracy": self.accuracy, "confidence_interval": list(self.confidence_interval)}
        return asdict(self) | {"by_position": list(self.by_position)} | derived

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """Undo ``to_dict``."""
        return cls(values["n_correct"], values["n_rows"], tuple(values["by_position"]), values.get("n_distinct"))

    @classmethod
    def of(cls, outputs: np.ndarray, solutions: np.ndarray, inputs: np.ndarray | None = None) -> Score:
        """Compare outputs with solutions, (N, L) each; ``inputs`` (N, L) tell how many rows are distinct.

        An output counts up to its first mistake, so it does not matter whether a token followed the row's own output or
        the solution.
        """
        is_right = np.logical_and.accumulate(outputs == solutions, axis=1)
        n_distinct = None if inputs is None else len(np.unique(np.concatenate([inputs, solutions], axis=1), axis=0))
        return cls(int(is_right[:, -1].sum()), len(outputs), tuple(is_right.mean(axis=0).tolist()), n_distinct)


def evaluate(
    model: CausalModel,
    dataset: CustomDataset | TextDataset,
    prefixes: AnyPrefix = None,
    n_rows: int = N_ROWS,
    **options: Any,
) -> Score:
    """Count the rows, of the dataset's first ``n_rows``, whose every output token is right in a greedy answer.

    That is so where each token of the solution is the likeliest after those before it. One pass over inputs and
    solutions tells, without decoding; only with logits processors, or a record of what they
    forbid, the answers are generated. Text is always told by one pass.

    Args:
        model: a GPT or another ``CausalModel``.
        dataset: usually of the "test" split; its prefix_padding is where the prefix goes.
        prefixes: one prefix for all rows, or one per row for ``n_rows`` rows.
        n_rows: how many rows.
        options: batch_size, precision, logits_processors, forbidden_mass_record; see ``predict``. Text takes the
            first two.

    Raises:
        ValueError: if ``n_rows`` is not positive, the model is too small for the dataset, or the prefix is longer than
            the dataset's prefix_padding.
    """
    if isinstance(dataset, TextDataset):
        return _evaluate_text(model, dataset, prefixes, n_rows, **options)
    inputs, solutions = _rows(model, dataset, n_rows)
    is_generated = options.get("logits_processors") or options.get("forbidden_mass_record") is not None
    known = None if is_generated else solutions
    outputs = predict(model, inputs, dataset.prefix_padding, prefixes, **options, solutions=known)
    return Score.of(outputs, solutions, inputs)


@torch.no_grad()
def _evaluate_text(
    model: CausalModel,
    dataset: TextDataset,
    prefixes: AnyPrefix,
    n_rows: int,
    batch_size: int = 400,
    precision: str = "auto",
) -> Score:
    """``evaluate`` on text, whose answers are of any length: an answer is right where each target is the likeliest."""
    _check_n_rows(n_rows)
    dataset.check_fits(model.config.vocab_size, model.config.block_size)
    prefix = _fitting_prefix(model, prefixes, n_rows, dataset.prefix_padding)
    x, y = dataset.batch(range(n_rows))
    predicted = []
    with evaluation_mode(model), autocast(precision, model.device):
        for start in range(0, n_rows, batch_size):
            rows = slice(start, start + batch_size)
            own = None if prefix is None else prefix.for_rows(rows, n_rows)
            logits, _ = model(x[rows].to(model.device), prefixes=own, n_last=dataset.length)
            predicted.append(logits.argmax(dim=-1).cpu())
    y = y[:, -dataset.length :]
    is_scored, is_right = y != IGNORED, torch.cat(predicted) == y
    first_mistake = (is_scored.cumsum(dim=1) - 1).where(is_scored & ~is_right, dataset.length).amin(dim=1)
    n_most = int(is_scored.sum(dim=1).max())
    by_position = tuple((first_mistake > k).double().mean().item() for k in range(n_most))
    n_distinct = len({row.tobytes() for row in x.numpy()})
    return Score(int((first_mistake == dataset.length).sum()), n_rows, by_position, n_distinct)


def _fitting_prefix(model: CausalModel, prefixes: AnyPrefix, n_rows: int, prefix_padding: int) -> Prefix | None:
    """What the model answers so many rows with, checked to fit into their padding."""
    if prefixes is None:
        return None
    prefix = as_prefix(prefixes, model, n_rows)
    if prefix.n_placeholders > prefix_padding:
        raise ValueError(f"the prefix has {prefix.n_placeholders} positions, prefix_padding has {prefix_padding}")
    return prefix


def _check_n_rows(n_rows: int) -> None:
    if n_rows < 1:
        raise ValueError(f"n_rows must be at least 1, got {n_rows}")


def _rows(model: CausalModel, dataset: CustomDataset, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The dataset's first inputs and solutions, (N, L) each, checked to fit the model."""
    _check_n_rows(n_rows)
    dataset.check_fits(model.config.vocab_size, model.config.block_size)
    return dataset.rows(range(n_rows))


@torch.no_grad()
def predict(
    model: CausalModel,
    inputs: np.ndarray,
    prefix_padding: int,
    prefixes: AnyPrefix = None,
    batch_size: int = 1600,
    precision: str = "auto",
    logits_processors: Iterable[Callable] = (),
    forbidden_mass_record: list[Tensor] | None = None,
    solutions: np.ndarray | None = None,
) -> np.ndarray:
    """The model's greedy answers to input rows.

    Args:
        model: a GPT or another ``CausalModel``; it is in evaluation mode meanwhile.
        inputs: (N, L) input rows.
        prefix_padding: P, how many zeros come before them.
        prefixes: see ``mingpt.prefix.as_prefix``; one per row means one per row of ``inputs``.
        batch_size: rows generated at a time.
        precision: see ``mingpt.training.precision``.
        logits_processors: see ``mingpt.decoding.generation.generate``.
        forbidden_mass_record: a list that receives, for each batch and of it for each of the L steps, the probability
            that each constraint forbade, (rows, number of constraints); see ``mingpt.decoding.generation.generate``.
        solutions: (N, L); with them an answer's token is the likeliest after the solution's tokens before it, not after
            the answer's own. Nothing is generated then, and no processor is asked.

    Returns:
        (N, L) answers.

    Raises:
        ValueError: if the prefix is longer than ``prefix_padding``, or the model is too small for the rows.
    """
    n_rows, length = inputs.shape
    sizes = (model.config.vocab_size, model.config.block_size)
    check_fits(int(inputs.max(initial=0)) + 1, prefix_padding + 2 * length - 1, *sizes)
    prefix = _fitting_prefix(model, prefixes, n_rows, prefix_padding)
    prompts = [np.zeros((n_rows, prefix_padding), dtype=np.int64), inputs]
    if solutions is not None:
        prompts.append(solutions[:, :-1])
    tokens, outputs = torch.from_numpy(np.concatenate(prompts, axis=1)).to(model.device), []
    options = {"logits_processors": tuple(logits_processors), "forbidden_mass_record": forbidden_mass_record}
    options |= {"stop_token": None}  # every answer has L tokens, whatever ends a text in the model's own vocabulary
    with evaluation_mode(model), autocast(precision, model.device):
        for start in range(0, n_rows, batch_size):
            rows = slice(start, start + batch_size)
            own = None if prefix is None else prefix.for_rows(rows, n_rows)
            if solutions is None:
                outputs.append(model.generate(tokens[rows], length, prefixes=own, **options)[:, -length:])
            else:
                n_shared = prefix_padding if own is None else 0
                logits, _ = model(tokens[rows], prefixes=own, n_shared=n_shared, n_last=length)
                outputs.append(logits.argmax(dim=-1))
    return torch.cat(outputs).cpu().numpy()


@dataclass(frozen=True)
class ConstraintEffect:
    """What a constraint added to what the model and its prefix know.

    Attributes:
        free: the score without the constraint.
        constrained: the score with it.
        forbidden_mass: at each output position, the mean probability that it took away from the model, L numbers from
            0 to 1. Where it is near 0, the model would have kept to the language by itself.
    """

    free: Score
    constrained: Score
    forbidden_mass: tuple[float, ...]


def constraint_effect(
    model: CausalModel,
    dataset: CustomDataset,
    constraints: Iterable[Constraint],
    prefixes: AnyPrefix = None,
    n_rows: int = N_ROWS,
    **options: Any,
) -> ConstraintEffect:
    """Answer the same rows freely and under constraints, and measure how much the constraints had to forbid.

    Args:
        model: a GPT or another ``CausalModel``.
        dataset: see ``evaluate``.
        constraints: of ``mingpt.decoding.constraints``, together.
        prefixes: see ``evaluate``.
        n_rows: how many rows.
        options: batch_size, precision; see ``predict``.
    """
    inputs, solutions = _rows(model, dataset, n_rows)  # generated too, so that rounding is the same in both
    record: list[Tensor] = []
    processors = {"logits_processors": tuple(constraints), "forbidden_mass_record": record}
    answers = (predict(model, inputs, dataset.prefix_padding, prefixes, **options, **own) for own in ({}, processors))
    free, constrained = (Score.of(each, solutions, inputs) for each in answers)
    steps = [torch.cat(record[step :: dataset.length]) for step in range(dataset.length)]
    kept = 1 - torch.stack(steps)  # (L, N, constraints), of what the ones before had left
    forbidden_mass = 1 - kept.prod(dim=2).mean(dim=1)
    return ConstraintEffect(free, constrained, tuple(forbidden_mass.clamp(min=0).tolist()))


def accuracy_matrix(
    model: CausalModel,
    prefixes: Mapping[str, AnyPrefix],
    datasets: Sequence[CustomDataset],
    n_rows: int = N_ROWS,
    **options: Any,
) -> DataFrame:
    """Score every prefix on the one task of every dataset.

    The model answers once for each prefix and each different set of input rows. All tasks that are posed on these rows
    grade the same answers. A cell is what ``evaluate`` gives for that prefix and dataset, up to near-ties
    in bfloat16, since answers are generated here.

    Args:
        model: a GPT or another ``CausalModel``.
        prefixes: by name; None is the model without a prefix.
        datasets: of one task each.
        n_rows: rows for each cell.
        options: see ``predict``.

    Returns:
        A ``Score`` in each cell, a row for each prefix, a column for each task.
        ``matrix.map(lambda score: 100 * score.accuracy)`` has them in percent.

    Raises:
        ValueError: if a dataset has several tasks, none are given, or as ``evaluate`` does.
    """
    import pandas as pd

    if not datasets or any(len(dataset.tasks) != 1 for dataset in datasets):
        raise ValueError("accuracy_matrix needs at least one dataset, of one task each")
    posed = [(dataset.prefix_padding, *_rows(model, dataset, n_rows)) for dataset in datasets]
    table: list[list[Score]] = []
    for prefix in prefixes.values():
        table.append([])
        answers: dict[tuple[int, bytes], np.ndarray] = {}  # by the padding and the input rows
        for padding, inputs, solutions in posed:
            key = padding, inputs.tobytes()
            if key not in answers:
                answers[key] = predict(model, inputs, padding, prefix, **options)
            table[-1].append(Score.of(answers[key], solutions, inputs))
    return pd.DataFrame(table, list(prefixes), [str(dataset.tasks[0]) for dataset in datasets])


def score_table(scores: Mapping[str, Score], published: Mapping[str, float] | None = None) -> DataFrame:
    """Scores by name as a table, in percent.

    Args:
        scores: by name.
        published: accuracies in percent to compare with, of some of the names.

    Returns:
        A row for each name; the columns are accuracy, low and high (the ends of its 95% confidence interval over test
        rows), published (nan where there is none) and n_rows.
    """
    import pandas as pd

    columns = {
        name: [100 * score.accuracy, *(100 * end for end in score.confidence_interval), (published or {}).get(name)]
        for name, score in scores.items()
    }
    table = pd.DataFrame.from_dict(columns, "index", float, ["accuracy", "low", "high", "published"])
    return table.assign(n_rows=[score.n_rows for score in scores.values()])


def format_table(table: DataFrame) -> str:
    """A table as text, with two decimals and nothing where a value is missing."""
    return table.to_string(float_format="{:.2f}".format, na_rep="")


def bayes_loss(dataset: CustomDataset, n_rows: int = 7000) -> float:
    """The cross-entropy in nats per output token that no predictor can beat on a mixture of tasks.

    A predictor that knows every task, but not which of them was drawn, weighs the tasks by Bayes' rule: by how likely
    each poses this input, then by whether it agrees with the outputs so far. The uncertainty that remains is the loss.

    The likelihood of an input row is that of independent, uniform elements. Between tasks whose rows are drawn alike
    it is exact. Elsewhere two things are left out: that half of the rows have many repeats, where the task has them,
    and that the split may have another share of one task's rows than of another's.

    Args:
        dataset: a mixture.
        n_rows: rows to average over.
    """
    inputs, solutions = dataset.rows(range(n_rows))
    log_likelihood = np.full((len(dataset.tasks), n_rows), -np.inf)  # (K, N)
    agrees = np.zeros((len(dataset.tasks), *inputs.shape), dtype=bool)  # (K, N, L)
    for k, task in enumerate(dataset.tasks):
        first, rest = task.input_values(dataset.num_digits)
        low, high = np.array([first, *[rest] * (dataset.length - 1)]).T  # (L,) each
        is_possible = ((inputs >= low) & (inputs <= high)).all(axis=1)
        log_likelihood[k, is_possible] = -math.log(first.size) - (dataset.length - 1) * math.log(rest.size)
        agrees[k] = task.solve(inputs) == solutions
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=0))  # up to a factor for each row
    after = (likelihood[:, :, None] * np.cumprod(agrees, axis=2)).sum(axis=0)  # (N, L) of what agrees up to each output
    before = np.concatenate([likelihood.sum(axis=0)[:, None], after[:, :-1]], axis=1)
    return float(np.mean(np.log(before / after)))


def label_batch(
    x: Tensor, y: Tensor, prefix_size: int, length: int, as_ints: bool = False, tasks: Sequence[Task] = SIMPLE_TASKS
) -> list[str] | list[int]:
    """Name every task that maps each x to its y.

    Args:
        x: (N, T) sequences as a dataset gives them, the input at ``prefix_size``.
        y: (N, T) their targets, or outputs, with the solution at ``prefix_size + length - 1``.
        prefix_size: P, the tokens before the input.
        length: L.
        as_ints: give the task's number, from 1 on; 0 where no task fits, and -1 where several do.
        tasks: those to try.

    Returns:
        N names, "Add1 or SortAscending" where several tasks fit and "None" where none does, or N numbers.
    """
    inputs = x[:, prefix_size : prefix_size + length].cpu().numpy()
    outputs = y[:, prefix_size + length - 1 :].cpu().numpy()
    different = list(dict.fromkeys(tasks))
    fits = [task.is_defined(inputs) & (task.solve(inputs) == outputs).all(axis=-1) for task in different]
    found = [[different[k] for k in np.flatnonzero(row)] for row in np.stack(fits, axis=1)]
    if as_ints:
        return [-1 if len(row) > 1 else 1 + tasks.index(row[0]) if row else 0 for row in found]
    return [" or ".join(map(str, row)) or "None" for row in found]


def eval(  # noqa: A001 (the seed notebook's name)
    model: GPT,
    dataset: CustomDataset,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    prefixes: AnyPrefix = None,
    logits_processors: Iterable[Callable] = (),
) -> Tensor:
    """Print and return how many rows the model answers exactly, as the seed notebook's ``eval`` does.

    Args:
        model: a GPT.
        dataset: whose first ``100 * max_batches`` rows are answered, all of ``len(dataset)`` without ``max_batches``.
        device: where to run; the model is moved there.
        max_batches: batches of 100 rows, at least 1.
        prefixes: see ``mingpt.prefix.as_prefix``.
        logits_processors: see ``mingpt.decoding.generation.generate``.

    Returns:
        The number of rows answered exactly, a scalar tensor of float32.

    Raises:
        ValueError: as ``evaluate`` does, also for ``max_batches`` below 1.
    """
    if device is not None:
        model.to(device)
    n_rows = len(dataset) if max_batches is None else min(100 * max_batches, len(dataset))
    score = evaluate(model, dataset, prefixes, n_rows, logits_processors=logits_processors)
    print(f"Final score: {score.n_correct}/{score.n_rows} = {100 * score.accuracy:.2f}% correct")
    return torch.tensor(float(score.n_correct))
