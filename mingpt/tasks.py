"""The synthetic tasks: values that map rows of integers to rows of integers, and compose with ``+``.

Legend: ... any batch axes, L the row's length. A row's "argument" is its first element.

A task says three things about itself: what it does to a row (``solve``), which rows it is posed on
(``input_values``), and what it makes of a set of possible values (``output_values``). The last is an abstract
interpretation over intervals: it gives a composition its vocabulary, and refuses a composition in which a later task
would meet a row on which it is not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mingpt.algebra import AnyTask

UNBOUNDED = 2**31
"""Stands for "however many digits, however long a row" where a composition is judged."""


class Interval(NamedTuple):
    """The integers from ``low`` to ``high``, both included."""

    low: int
    high: int

    @property
    def size(self) -> int:
        """How many integers there are, 0 or less for none."""
        return self.high - self.low + 1

    def with_zero(self) -> Interval:
        """The smallest interval of these values and 0."""
        return Interval(min(self.low, 0), max(self.high, 0))


class Values(NamedTuple):
    """What a row may hold: its first element (the argument) and each of the others."""

    first: Interval
    rest: Interval

    @property
    def all(self) -> Interval:
        """The smallest interval that has every element's values."""
        return Interval(min(self.first.low, self.rest.low), max(self.first.high, self.rest.high))

    def map(self, function: Callable[[Interval], Interval]) -> Values:
        """Apply an interval function to both parts."""
        return Values(function(self.first), function(self.rest))

    def contain(self, rows: np.ndarray) -> np.ndarray:
        """Whether each element of rows (..., T) is one that they may hold."""
        is_rest = (rows >= self.rest.low) & (rows <= self.rest.high)
        is_rest[..., 0] = (rows[..., 0] >= self.first.low) & (rows[..., 0] <= self.first.high)
        return is_rest


class Task(AnyTask):
    """A function on rows of integers; subclass it and write ``solve`` to add one.

    Tasks are values with names, and compose with ``+``: see ``mingpt.algebra``.
    """

    has_repeats: bool = True
    """Whether half of the rows are drawn with many repeated values."""

    requirement: str = "its rows do not meet the task's requirement"
    """What a row must satisfy for the task to be defined on it, for error messages."""

    def solve(self, x: np.ndarray) -> np.ndarray:
        """Map rows ``x`` (..., L) of int64 to rows of the same shape, without changing ``x``.

        It is called on any integers. On rows where the task is not defined it may return anything but must not raise.
        """
        raise TypeError(f"{type(self).__name__} must define solve(self, x)")

    def input_values(self, num_digits: int) -> Values:
        """The values of the rows that the task is posed on."""
        return Values(Interval(1, num_digits), Interval(1, num_digits))

    def output_values(self, values: Values, length: int) -> Values:
        """The values that ``solve`` can give on rows of these values and this length.

        Raises:
            ValueError: if the task is not defined on some such row; the message is the reason.
        """
        return values

    def is_defined(self, x: np.ndarray) -> np.ndarray:
        """Which rows of ``x`` (..., L) the task is defined on, (...) of bool."""
        return np.ones(x.shape[:-1], dtype=bool)

    def __call__(self, x: Any) -> Any:
        """Solve rows ``x`` (..., L), an integer numpy array, torch tensor or nested list.

        Returns:
            The solutions, in ``x``'s shape, kind, dtype and device; ``x`` is unchanged.

        Raises:
            TypeError: if ``x`` does not hold integers.
            ValueError: if ``x`` has no elements along its last axis, holds a row the task is not defined on, or its
                dtype cannot hold the solution.
        """
        given = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        if given.ndim == 0 or given.shape[-1] == 0:
            raise ValueError(f"{self} works on rows of at least one element, got shape {given.shape}")
        if not np.issubdtype(given.dtype, np.integer):
            raise TypeError(f"{self} works on integers, not on {given.dtype}")
        rows = self._cast(given, np.int64)
        is_defined = self.is_defined(rows)
        if not is_defined.all():
            first_bad = rows.reshape(-1, rows.shape[-1])[np.argmin(is_defined.reshape(-1))]
            raise ValueError(f"{self} is not defined on the row {first_bad.tolist()}: {self.requirement}")
        solution = self._cast(self.solve(rows), given.dtype)
        if isinstance(x, np.ndarray):
            return solution
        return x.new_tensor(solution) if hasattr(x, "new_tensor") else solution.tolist()

    def _cast(self, values: np.ndarray, dtype: Any) -> np.ndarray:
        """A copy of integers in another dtype that can hold them."""
        cast = values.astype(dtype)
        if (cast != values).any():
            lost = values[cast != values].flat[0]
            raise ValueError(f"{self} meets the value {lost}, which {cast.dtype} cannot hold; use a wider dtype")
        return cast


class CompositeTask(Task):
    """Several tasks in a row; made with ``+``, flat, and checked when it is built."""

    _composite = Task

    requirement = "one of its tasks would meet a row on which it is not defined"

    def __init__(self, *tasks: Task):
        """Compose ``tasks``, the first one first.

        Raises:
            ValueError: if some row of the first task leads a later one to a row on which it is not defined.
        """
        if not tasks:
            raise ValueError("a composition needs at least one task")
        self.tasks = tuple(simple for task in tasks for simple in task.tasks)
        self.has_repeats = self.tasks[0].has_repeats
        # Judged for every number of digits and every length at once, so a task means the same wherever it is used.
        self.output_values(self.input_values(num_digits=UNBOUNDED), length=UNBOUNDED)

    def solve(self, x: np.ndarray) -> np.ndarray:
        for task in self.tasks:
            x = task.solve(x)
        return x

    def input_values(self, num_digits: int) -> Values:
        return self.tasks[0].input_values(num_digits)

    def output_values(self, values: Values, length: int) -> Values:
        for before, task in zip(("the input", *self.tasks), self.tasks, strict=False):
            try:
                values = task.output_values(values, length)
            except ValueError as reason:
                raise ValueError(f"{self} is not defined: after {before}, {task} cannot follow, {reason}") from None
        return values

    def is_defined(self, x: np.ndarray) -> np.ndarray:
        is_defined = np.ones(x.shape[:-1], dtype=bool)
        for task in self.tasks:
            is_defined &= task.is_defined(x)
            x = task.solve(x)
        return is_defined


# ------------------------------------------------------------------------------------------------- sorting


class SortAscending(Task):
    """The row sorted, smallest first."""

    def solve(self, x):
        return np.sort(x, axis=-1)

    def output_values(self, values, length):
        return values if length == 1 else Values(first=Interval(*map(min, *values)), rest=values.all)


class SortDescending(Task):
    """The row sorted, largest first."""

    def solve(self, x):
        return -np.sort(-x, axis=-1)

    def output_values(self, values, length):
        return values if length == 1 else Values(first=Interval(*map(max, *values)), rest=values.all)


# ------------------------------------------------------------------------------------- elementwise functions


class Add1(Task):
    """x + 1."""

    def solve(self, x):
        return x + 1

    def output_values(self, values, length):
        return values.map(lambda part: Interval(part.low + 1, part.high + 1))


class InverseBinary(Task):
    """1 - x, on rows of zeros and ones."""

    has_repeats = False
    requirement = "it works on zeros and ones only"

    def solve(self, x):
        return 1 - x

    def input_values(self, num_digits):
        return Values(Interval(0, 1), Interval(0, 1))

    def output_values(self, values, length):
        if values.all.low < 0 or values.all.high > 1:
            raise ValueError(f"{self.requirement}, and its input can be something else")
        return values.map(lambda part: Interval(1 - part.high, 1 - part.low))

    def is_defined(self, x):
        return ((x == 0) | (x == 1)).all(axis=-1)


class DoubleHistogram(Task):
    """How often x occurs in the row."""

    def solve(self, x):
        return _counts(x)

    def output_values(self, values, length):
        return values.map(lambda _: Interval(1, length))


# ------------------------------------------------------------------ functions of x and of the argument, a = row[0]


class LessThan(Task):
    """x where x < a, else 0."""

    def solve(self, x):
        return np.where(x < x[..., :1], x, 0)

    def output_values(self, values, length):
        return Values(Interval(0, 0), values.rest.with_zero())


class MoreThanEqual(Task):
    """x where x >= a, else 0."""

    def solve(self, x):
        return np.where(x >= x[..., :1], x, 0)

    def output_values(self, values, length):
        return Values(values.first, values.rest.with_zero())


class FilterAtLeastNTimes(Task):
    """x where it occurs at least a times in the row, else 0."""

    def solve(self, x):
        return np.where(_counts(x) >= x[..., :1], x, 0)

    def input_values(self, num_digits):
        return _small_argument(num_digits)

    def output_values(self, values, length):
        return values.map(Interval.with_zero)


class _DividesByArgument(Task):
    """What Modulo, Divisible and NotDivisible share: the argument is a divisor."""

    requirement = "it divides by the row's first element, which must be positive"

    def input_values(self, num_digits):
        return _small_argument(num_digits)

    def output_values(self, values, length):
        if values.first.low <= 0:
            raise ValueError(f"it divides by its argument, the row's first element, and that can be {values.first.low}")
        return values

    def is_defined(self, x):
        return x[..., 0] > 0

    def _remainder(self, x):
        return x % np.maximum(x[..., :1], 1)


class Modulo(_DividesByArgument):
    """x mod a."""

    def solve(self, x):
        return self._remainder(x)

    def output_values(self, values, length):
        argument, rest = super().output_values(values, length)
        largest = argument.high - 1
        return Values(Interval(0, 0), Interval(0, largest if rest.low < 0 else min(largest, rest.high)))


class Divisible(_DividesByArgument):
    """x where x mod a = 0, else 0."""

    def solve(self, x):
        return np.where(self._remainder(x) == 0, x, 0)

    def output_values(self, values, length):
        return super().output_values(values, length)._replace(rest=values.rest.with_zero())


class NotDivisible(_DividesByArgument):
    """x where x mod a != 0, else 0."""

    def solve(self, x):
        return np.where(self._remainder(x) != 0, x, 0)

    def output_values(self, values, length):
        return super().output_values(values, length)._replace(first=Interval(0, 0), rest=values.rest.with_zero())


def _counts(x: np.ndarray) -> np.ndarray:
    """How often each element occurs in its row: (..., L) to (..., L)."""
    return (x[..., :, None] == x[..., None, :]).sum(axis=-1)


def _small_argument(num_digits: int) -> Values:
    """Rows whose argument is in 2..num_digits//2, so that it divides or recurs now and then."""
    return Values(Interval(2, num_digits // 2), Interval(1, num_digits))


PRETRAINING_TASKS = (SortAscending(), SortDescending(), Add1(), Modulo(), LessThan(), Divisible(), InverseBinary())
"""The seven tasks that the flagship experiment pretrains on."""

TEST_TASKS = (
    *(MoreThanEqual(), NotDivisible(), DoubleHistogram(), FilterAtLeastNTimes()),
    *(SortAscending() + Add1(), Add1() + LessThan(), LessThan() + Add1()),
    *(LessThan() + SortAscending(), Divisible() + Add1()),
)
"""The nine that the model meets only when a prefix is trained: four new ones and five compositions."""

SIMPLE_TASKS = tuple(cls() for cls in Task.classes().values())
"""The eleven tasks that compositions are made of."""
