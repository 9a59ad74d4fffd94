"""The synthetic tasks: values that map rows of integers to rows of integers, and compose with ``+``.

Legend: ... any batch axes, L the row's length. A row's "argument" is its first element.

A task says three things about itself: what it does to a row (``solve``), which rows it is posed on
(``input_values``), and what it makes of a set of possible values (``output_values``). The last is an abstract
interpretation over intervals: it gives a composition its vocabulary, and refuses a composition in which a later task
would meet a row on which it has no meaning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

UNBOUNDED = 2**31
"""Stands for "however many digits, however long a row" where a composition is judged."""


class Interval(NamedTuple):
    """The integers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def with_zero(self) -> Interval:
        """The smallest interval that has these values and 0."""
        return Interval(min(self.low, 0), max(self.high, 0))


class Values(NamedTuple):
    """What a row may hold: its first element (the argument) and each of the others."""

    first: Interval
    rest: Interval

    @property
    def all(self) -> Interval:
        """The smallest interval that has every element's values."""
        return Interval(min(self.first.low, self.rest.low), max(self.first.high, self.rest.high))

    def map(self, function) -> Values:
        """Apply an interval function to both parts."""
        return Values(function(self.first), function(self.rest))


class Task:
    """A function on rows of integers; subclass it and write ``solve`` to add one.

    Tasks are values: two of the same class are equal, hashable, and ``Task.parse(str(task)) == task``.
    """

    has_repeats = True
    """Whether half of the rows are drawn with many repeated values."""

    def solve(self, x: np.ndarray) -> np.ndarray:
        """Map rows ``x`` (..., L) of int64 to rows of the same shape, without changing ``x``.

        It is called on any integers; on rows where the task has no meaning it may return anything but must not raise.
        """
        raise TypeError(f"{type(self).__name__} must define solve(self, x)")

    def input_values(self, num_digits: int) -> Values:
        """The values of the rows that the task is posed on."""
        return Values(Interval(1, num_digits), Interval(1, num_digits))

    def output_values(self, values: Values, length: int) -> Values:
        """The values that ``solve`` can give on rows of these values and this length.

        Raises:
            ValueError: if the task has no meaning on some such row; the message is the reason.
        """
        return values

    def is_defined(self, x: np.ndarray) -> np.ndarray:
        """Which rows of ``x`` (..., L) the task has a meaning on, (...) of bool."""
        return np.ones(x.shape[:-1], dtype=bool)

    def __call__(self, x: Any) -> Any:
        """Solve rows ``x`` (..., L), an integer numpy array, torch tensor or nested list.

        Returns:
            The solutions, in ``x``'s shape, kind, dtype and device; ``x`` is unchanged.

        Raises:
            TypeError: if ``x`` does not hold integers.
            ValueError: if ``x`` has no elements along its last axis, or holds a row the task has no meaning on.
        """
        is_array = isinstance(x, np.ndarray)
        rows = x if is_array else x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)
        if rows.size == 0 and not hasattr(x, "dtype"):
            rows = rows.astype(np.int64)  # an empty list has no type of its own
        if not np.issubdtype(rows.dtype, np.integer):
            raise TypeError(f"{self} works on integers, not on {rows.dtype}")
        if rows.ndim == 0 or rows.shape[-1] == 0:
            raise ValueError(f"{self} works on rows of at least one element, got shape {tuple(rows.shape)}")
        rows = rows.astype(np.int64, copy=False)
        is_defined = self.is_defined(rows)
        if not is_defined.all():
            first_bad = rows.reshape(-1, rows.shape[-1])[np.argmin(is_defined.reshape(-1))]
            raise ValueError(f"{self} is not defined on the row {first_bad.tolist()}: {self.requirement}")
        solution = self.solve(rows)
        if is_array:
            return solution.astype(x.dtype)
        return x.new_tensor(solution) if hasattr(x, "new_tensor") else solution

    @property
    def requirement(self) -> str:
        """What a row must satisfy for the task to have a meaning, for error messages."""
        return "its rows do not meet the task's requirement"

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The simple tasks that this one consists of, in order."""
        return (self,)

    def __add__(self, other: Task) -> CompositeTask:
        """First this task, then the other: ``(f + g)(x) == g(f(x))``."""
        if not isinstance(other, Task):
            return NotImplemented
        return CompositeTask(*self.tasks, *other.tasks)

    @staticmethod
    def parse(text: str) -> Task:
        """Read a task from its name, ``"SortAscending"`` or ``"SortAscending+Add1"``.

        Raises:
            ValueError: for a name that is no task, with the known ones, or a composition that is not defined.
        """
        known = {cls.__name__: cls for cls in _simple_task_classes(Task)}
        tasks = []
        for name in (part.strip() for part in text.split("+")):
            if name not in known:
                raise ValueError(f"unknown task {name!r} in {text!r}; the tasks are {', '.join(known)}")
            tasks.append(known[name]())
        return tasks[0] if len(tasks) == 1 else CompositeTask(*tasks)

    def __str__(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self}()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and [(type(t), vars(t)) for t in self.tasks] == [
            (type(t), vars(t)) for t in other.tasks
        ]

    def __hash__(self) -> int:
        return hash(tuple(type(t) for t in self.tasks))


def _simple_task_classes(cls: type[Task]) -> list[type[Task]]:
    """Every task class a user can name, in the order of definition."""
    classes = []
    for sub in cls.__subclasses__():
        if sub is not CompositeTask and not sub.__name__.startswith("_"):
            classes.append(sub)
        classes += _simple_task_classes(sub)
    return classes


class CompositeTask(Task):
    """Several tasks in a row; made with ``+``, flat, and checked when it is built."""

    def __init__(self, *tasks: Task):
        """Compose ``tasks``, the first one first.

        Raises:
            ValueError: if some row of the first task leads a later one to a row on which it has no meaning.
        """
        if not tasks:
            raise ValueError("a composition needs at least one task")
        self._tasks = tuple(simple for task in tasks for simple in task.tasks)
        # Judged for every number of digits and every length at once, so a task means the same wherever it is used.
        values = self.input_values(num_digits=UNBOUNDED)
        for position, task in enumerate(self._tasks):
            try:
                values = task.output_values(values, length=UNBOUNDED)
            except ValueError as reason:
                before = self._tasks[position - 1] if position else "the input"
                raise ValueError(f"{self} is not defined: after {before}, {task} cannot follow, {reason}") from None

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self._tasks

    @property
    def has_repeats(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._tasks[0].has_repeats

    def solve(self, x: np.ndarray) -> np.ndarray:
        for task in self._tasks:
            x = task.solve(x)
        return x

    def input_values(self, num_digits: int) -> Values:
        return self._tasks[0].input_values(num_digits)

    def output_values(self, values: Values, length: int) -> Values:
        for task in self._tasks:
            values = task.output_values(values, length)
        return values

    def is_defined(self, x: np.ndarray) -> np.ndarray:
        is_defined = np.ones(x.shape[:-1], dtype=bool)
        for task in self._tasks:
            is_defined &= task.is_defined(x)
            x = task.solve(x)
        return is_defined

    @property
    def requirement(self) -> str:
        return "one of its tasks would meet a row on which it has no meaning"

    def __str__(self) -> str:
        return "+".join(map(str, self._tasks))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._tasks))


# ------------------------------------------------------------------------------------------------- sorting


class SortAscending(Task):
    """The row sorted, smallest first."""

    def solve(self, x):
        return np.sort(x, axis=-1)

    def output_values(self, values, length):
        first, rest = values
        if length == 1:
            return values
        return Values(Interval(min(first.low, rest.low), min(first.high, rest.high)), values.all)


class SortDescending(Task):
    """The row sorted, largest first."""

    def solve(self, x):
        return -np.sort(-x, axis=-1)

    def output_values(self, values, length):
        first, rest = values
        if length == 1:
            return values
        return Values(Interval(max(first.low, rest.low), max(first.high, rest.high)), values.all)


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

    def solve(self, x):
        return 1 - x

    def input_values(self, num_digits):
        return Values(Interval(0, 1), Interval(0, 1))

    def output_values(self, values, length):
        if values.all.low < 0 or values.all.high > 1:
            raise ValueError("it works on zeros and ones only, and its input can be something else")
        return values.map(lambda part: Interval(1 - part.high, 1 - part.low))

    def is_defined(self, x):
        return ((x == 0) | (x == 1)).all(axis=-1)

    @property
    def requirement(self):
        return "it works on zeros and ones only"


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

    def input_values(self, num_digits):
        return _small_argument(num_digits)

    def output_values(self, values, length):
        if values.first.low <= 0:
            raise ValueError(f"it divides by its argument, the row's first element, and that can be {values.first.low}")
        return values

    def is_defined(self, x):
        return x[..., 0] > 0

    @property
    def requirement(self):
        return "it divides by the row's first element, which must be positive"

    @staticmethod
    def _remainder(x):
        argument = x[..., :1]
        return x % np.where(argument > 0, argument, 1)


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
        argument, rest = super().output_values(values, length)
        return Values(argument, rest.with_zero())


class NotDivisible(_DividesByArgument):
    """x where x mod a != 0, else 0."""

    def solve(self, x):
        return np.where(self._remainder(x) != 0, x, 0)

    def output_values(self, values, length):
        _, rest = super().output_values(values, length)
        return Values(Interval(0, 0), rest.with_zero())


def _counts(x: np.ndarray) -> np.ndarray:
    """How often each element occurs in its row: (..., L) to (..., L)."""
    return (x[..., :, None] == x[..., None, :]).sum(axis=-1)


def _small_argument(num_digits: int) -> Values:
    """Rows whose argument is in 2..num_digits//2, so that it divides or recurs now and then."""
    return Values(Interval(2, num_digits // 2), Interval(1, num_digits))


PRETRAINING_TASKS = (
    SortAscending(),
    SortDescending(),
    Add1(),
    Modulo(),
    LessThan(),
    Divisible(),
    InverseBinary(),
)
"""The seven tasks that the flagship experiment pretrains on."""

TEST_TASKS = (
    MoreThanEqual(),
    NotDivisible(),
    DoubleHistogram(),
    FilterAtLeastNTimes(),
    SortAscending() + Add1(),
    Add1() + LessThan(),
    LessThan() + Add1(),
    LessThan() + SortAscending(),
    Divisible() + Add1(),
)
"""The nine that the model never sees before a prefix is learned: four new ones and five compositions."""

SIMPLE_TASKS = tuple(cls() for cls in _simple_task_classes(Task))
"""The eleven tasks that compositions are made of."""
