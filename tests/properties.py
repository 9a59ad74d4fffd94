"""Properties: what every task must satisfy, whoever wrote it.

A new task is checked in one line, ``check_task_properties(MyTask())``, or on generated rows::

    @given(st.data())
    def test_my_task(data):
        check_task_properties(MyTask(), **data.draw(posed_rows(MyTask())))

``check_text_task_properties(MyTask())`` checks a task on text, ``check_processor_laws(MyProcessor())`` a new logits
processor.

Each property is a function that raises ``AssertionError`` with what was broken; ``check_task_properties`` and
``check_processor_laws`` run them all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mingpt.algebra import AnyTask
from mingpt.decoding.logits_processors import Constraint, Context, LogitsProcessor, State
from mingpt.tasks import SIMPLE_TASKS, CompositeTask, Task
from mingpt.text import TextTask
from mingpt.text.tasks import KINDS, RandomText

# --------------------------------------------------------------------------------------------------- tasks


def check_task_properties(
    task: Task, rows: np.ndarray | None = None, num_digits: int = 10, length: int = 7, seed: int = 0
) -> None:
    """Check everything that a task, simple or composed, promises.

    Args:
        task: the task to check.
        rows: (N, L) input rows that the task is posed on; by default some random ones are drawn.
        num_digits: the largest digit of the rows, which ``task.input_values`` is asked with.
        length: L of the rows that are drawn.
        seed: of the rows that are drawn.

    Raises:
        AssertionError: if a property is broken, with which one.
    """
    if rows is None:
        rows = draw_rows(task, num_digits, length, n_rows=24, seed=seed)
    check_is_value(task)
    check_leaves_input_alone(task, rows)
    check_is_function_of_row(task, rows)
    check_kinds_agree(task, rows)
    check_is_defined_and_in_range(task, rows, num_digits)
    check_is_its_steps(task, rows)
    check_is_associative(task, rows)


def check_is_value(task: Task) -> None:
    """Equality, hash, name and repr say the same of a task."""
    twin = copy.deepcopy(task)
    assert task == twin, f"{task} does not equal its copy"
    assert hash(task) == hash(twin), f"{task}: equal tasks have different hashes"
    assert task != task + Add1Stub(), f"{task} equals something longer than itself"
    assert task != str(task), f"{task} equals its own name"
    assert Task.parse(str(task)) == task, f"Task.parse({str(task)!r}) is another task"
    namespace = {type(simple).__name__: type(simple) for simple in task.tasks}
    assert eval(repr(task), namespace) == task, f"repr {task!r} does not evaluate to the task"
    assert all(len(simple.tasks) == 1 for simple in task.tasks), f"{task}.tasks is not flat"


def check_is_function_of_row(task: Task, rows: np.ndarray) -> None:
    """The solution has the input's shape, is the same every time, and each row's depends on that row only."""
    solution = task(rows)
    assert isinstance(solution, np.ndarray)
    assert solution.shape == rows.shape, f"{task} turned shape {rows.shape} into {solution.shape}"
    assert np.array_equal(task(rows), solution), f"{task} gave two answers to the same rows"
    for i, row in enumerate(rows):
        assert np.array_equal(task(row), solution[i]), f"{task} solves row {row} differently alone and in a batch"
    assert np.array_equal(task(rows[::-1]), solution[::-1]), f"{task}: the order of the rows matters"
    n, length = rows.shape
    deep = np.stack([rows, rows[::-1], rows]).reshape(3, 1, n, length)
    expected = np.stack([solution, solution[::-1], solution]).reshape(3, 1, n, length)
    assert np.array_equal(task(deep), expected), f"{task}: the number of batch axes matters"
    assert task(rows[:0]).shape == (0, length), f"{task} cannot solve no rows at all"


def check_leaves_input_alone(task: Task, rows: np.ndarray) -> None:
    """The input is not changed, also where ``solve`` is called itself, and the solution shares no memory with it."""
    given, as_tensor, as_list = rows.copy(), torch.from_numpy(rows.copy()), rows.tolist()
    solution, tensor_solution = task(given), task(as_tensor)
    task(as_list)
    task.solve(given)
    assert np.array_equal(given, rows), f"{task} changed its input"
    assert np.array_equal(as_tensor.numpy(), rows), f"{task} changed the tensor it was given"
    assert as_list == rows.tolist(), f"{task} changed the list it was given"
    assert not np.shares_memory(solution, given), f"{task}'s solution is a view of its input"
    assert tensor_solution.data_ptr() != as_tensor.data_ptr(), f"{task}'s solution is a view of its input"


def check_kinds_agree(task: Task, rows: np.ndarray) -> None:
    """Arrays, tensors and lists of any integer type give the same values and keep their type."""
    expected = task(rows)
    assert task(rows.tolist()) == expected.tolist(), f"{task} solves a list differently"
    strided = np.repeat(rows, 2, axis=-1)[..., ::2]
    assert np.array_equal(task(strided), expected), f"{task} solves a strided array differently"
    for dtype in (np.int16, np.int32, np.int64):
        solution = task(rows.astype(dtype))
        assert isinstance(solution, np.ndarray)
        assert solution.dtype == dtype, f"{task} turned {np.dtype(dtype)} into {solution.dtype}"
        assert np.array_equal(solution, expected), f"{task} solves {np.dtype(dtype)} differently"
    for dtype in (torch.int16, torch.int32, torch.int64):
        tensor = torch.from_numpy(rows).to(dtype)
        solution = task(tensor)
        assert isinstance(solution, torch.Tensor), f"{task} turned a tensor into {type(solution)}"
        assert solution.dtype == dtype, f"{task} turned {dtype} into {solution.dtype}"
        assert solution.device == tensor.device
        assert np.array_equal(solution.numpy(), expected), f"{task} solves {dtype} differently"


def check_is_defined_and_in_range(task: Task, rows: np.ndarray, num_digits: int) -> None:
    """The task is defined on every row it is posed on, and its solutions hold only the values it declared."""
    values = task.input_values(num_digits)
    assert contains(values, rows), f"{rows} are not rows that {task} is posed on, {values}"
    is_defined = task.is_defined(rows)
    assert is_defined.shape == rows.shape[:-1], f"{task}.is_defined has shape {is_defined.shape}"
    assert is_defined.dtype == np.bool_, f"{task}.is_defined gives {is_defined.dtype}"
    assert is_defined.all(), f"{task} is not defined on {rows[~is_defined]}, which it is posed on"
    output = task.output_values(values, rows.shape[-1])
    solution = task(rows)
    assert contains(output, solution), f"{task} made {solution} of {rows}, and declared {output}"


def check_is_its_steps(task: Task, rows: np.ndarray) -> None:
    """``(f + g)(x) == g(f(x))``, for the task's steps one by one and for every place to cut it in two."""
    x = rows
    for simple in task.tasks:
        x = simple(x)
    assert np.array_equal(task(rows), x), f"{task} differs from its tasks one after the other"
    for cut in range(1, len(task.tasks)):
        f, g = compose(task.tasks[:cut]), compose_or_none(task.tasks[cut:])
        assert f is not None
        if g is not None:
            assert np.array_equal((f + g)(rows), g(f(rows))), f"({f}) + ({g}) is not the one after the other"


def check_is_associative(task: Task, rows: np.ndarray) -> None:
    """However brackets are put, it is the same task: equal, with the same name, repr, hash and solutions.

    A part in brackets must be defined on its own rows, so some bracketings do not exist.
    """
    expected = task(rows)
    for other in bracketings(task.tasks):
        assert other == task, f"{other} and {task} are not equal"
        assert (str(other), repr(other), hash(other)) == (str(task), repr(task), hash(task))
        assert other.tasks == task.tasks
        assert np.array_equal(other(rows), expected), f"brackets change what {task} does"


class Add1Stub(Task):
    """Something to add to any task; never solved."""


def contains(values: Any, rows: np.ndarray) -> bool:
    """Whether the rows (..., L) hold only these values: the first element's and the others' apart."""
    (first_low, first_high), (low, high) = values
    first, rest = rows[..., 0], rows[..., 1:]
    return bool(((first_low <= first) & (first <= first_high)).all() and ((low <= rest) & (rest <= high)).all())


def compose(tasks: Sequence[Task]) -> Task:
    """Add the tasks up from the left."""
    total, *others = tasks
    for task in others:
        total = total + task
    return total


def compose_or_none(tasks: Sequence[Task]) -> Task | None:
    """The composition, or None where it is not defined."""
    try:
        return compose(tasks)
    except ValueError:
        return None


def bracketings(tasks: Sequence[Task]) -> Iterator[Task]:
    """The composition of the tasks with the brackets put in every way that is defined."""
    if len(tasks) == 1:
        yield tasks[0]
    for cut in range(1, len(tasks)):
        for f in bracketings(tasks[:cut]):
            for g in bracketings(tasks[cut:]):
                if compose_or_none([f, g]) is not None:
                    yield f + g


def draw_rows(task: Task, num_digits: int, length: int, n_rows: int, seed: int = 0) -> np.ndarray:
    """Rows (n_rows, length) that the task is posed on, uniform over the values it declares."""
    rng = np.random.default_rng(seed)
    first, rest = task.input_values(num_digits)
    return np.concatenate(
        [
            rng.integers(first.low, first.high + 1, (n_rows, 1)),
            rng.integers(rest.low, rest.high + 1, (n_rows, length - 1)),
        ],
        axis=1,
    )


@st.composite
def posed_rows(draw: st.DrawFn, task: Task, max_rows: int = 5, max_length: int = 9) -> dict[str, Any]:
    """``rows`` (N, L) that the task is posed on and the ``num_digits`` they were drawn with, repeats likely."""
    num_digits = draw(st.integers(4, 13))
    n_rows, length = draw(st.integers(1, max_rows)), draw(st.integers(1, max_length))
    first, rest = task.input_values(num_digits)
    parts = [
        draw(hnp.arrays(np.int64, (n_rows, 1), elements=st.integers(*first))),
        draw(hnp.arrays(np.int64, (n_rows, length - 1), elements=st.integers(*rest))),
    ]
    return {"rows": np.concatenate(parts, axis=1), "num_digits": num_digits}


def simple_tasks() -> st.SearchStrategy[Task]:
    """One of the eleven."""
    return st.sampled_from(SIMPLE_TASKS)


@st.composite
def compositions(draw: st.DrawFn, min_tasks: int = 1, max_tasks: int = 4) -> Task:
    """A composition of the eleven tasks that is defined; each task is drawn from those that may follow."""
    task = draw(simple_tasks())
    for _ in range(draw(st.integers(min_tasks, max_tasks)) - 1):
        followers = [t for t in SIMPLE_TASKS if compose_or_none([task, t]) is not None]
        task = task + draw(st.sampled_from(followers))
    assert len(task.tasks) == 1 or isinstance(task, CompositeTask)
    return task


# ---------------------------------------------------------------------------------------------------- tasks on text


def check_text_task_properties(task: TextTask, texts: Sequence[str] = ()) -> None:
    """Check everything that a text task promises, on texts that it draws and on those given."""
    assert AnyTask.parse(str(task)) == TextTask.parse(str(task)) == task
    assert hash(AnyTask.parse(str(task))) == hash(task)
    assert eval(repr(task), {type(each).__name__: type(each) for each in task.tasks}) == task
    rng = RandomText(np.random.Philox(7))
    drawn = [task.draw(rng) for _ in range(100)]
    assert len(set(drawn)) > 20, f"{task} draws {len(set(drawn))} different texts in 100"
    assert drawn == [task.draw(again) for again in [RandomText(np.random.Philox(7))] for _ in range(100)]
    kind = KINDS[task.output_kind(task.reads)]
    for text in [*drawn, *texts]:
        answer, by_steps = task(text), text
        assert re.fullmatch(kind, answer), f"{task} says it writes {task.output_kind(task.reads)}, and gives {answer!r}"
        for step in task.tasks:
            by_steps = step(by_steps)  # each step meets only what it reads
        assert answer == by_steps == task(text)


# --------------------------------------------------------------------------------------------- logits processors


class Forbid(Constraint):
    """A constraint for tests: it forbids some tokens at every step."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = list(tokens)

    def allowed(self, state: State, context: Context) -> tuple[State, torch.Tensor]:
        allowed = torch.ones(len(context.tokens), context.vocab_size, dtype=torch.bool)
        allowed[:, self.tokens] = False
        return state, allowed


def check_processor_laws(
    processor: LogitsProcessor, prompts: torch.Tensor | None = None, n_new: int = 6, vocab_size: int = 13, seed: int = 0
) -> None:
    """Check everything that a logits processor promises.

    Args:
        processor: the processor to check.
        prompts: (B, T) tokens, different in every row; by default some random ones.
        n_new: how many tokens are generated.
        vocab_size: V.
        seed: of the random prompts and logits.

    Raises:
        AssertionError: if a law is broken, with which one.
    """
    random = torch.Generator().manual_seed(seed)
    if prompts is None:
        prompts = torch.randint(vocab_size, (5, 8), generator=random)
    assert len(prompts.unique(dim=0)) == len(prompts) > 1, "the properties need different rows"
    logits = 3 * torch.randn(n_new, len(prompts), vocab_size, generator=random)
    tokens, processed, _ = whole = drive(processor, prompts, logits)
    check_rows_are_independent(processor, prompts, logits, whole)
    check_reorder_follows_rows(processor, prompts, logits)
    check_is_configuration_only(processor, prompts, logits, whole)
    for step, each in enumerate(processed):
        assert (each.shape, each.dtype) == (logits[step].shape, torch.float32), f"step {step}: {each.shape}"
        assert not each.isnan().any(), f"step {step}: a logit is not a number"
        assert (each.amax(dim=-1) > -torch.inf).all(), f"step {step}: a row has no token left"
    assert tokens.shape == (len(prompts), prompts.shape[1] + n_new)


Driven = tuple[torch.Tensor, list[torch.Tensor], list[State]]


def drive(processor: LogitsProcessor, prompts: torch.Tensor, logits: torch.Tensor) -> Driven:
    """Generate greedily from given logits (N, B, V): the tokens, and the processed logits and states of each step."""
    n_new, _, vocab_size = logits.shape
    tokens, before = prompts, logits.clone()
    context = Context(tokens, prompts.shape[1], n_new, vocab_size)
    state, processed, states = processor.init(context), [], []
    first = {name: _form(value) for name, value in state.items()}
    for step in range(n_new):
        kept = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
        new_state, each, tokens = advance(processor, state, logits[step], tokens, prompts.shape[1], n_new)
        shapes = {name: _form(value) for name, value in new_state.items()}
        assert shapes == first, f"step {step}: the state changed from {first} to {shapes}"
        assert all(torch.equal(state[name], value) for name, value in kept.items()), "the old state was written to"
        assert torch.equal(logits, before), "the logits were written to"
        state = new_state
        processed.append(each)
        states.append(state)
    return tokens, processed, states


def advance(
    processor: LogitsProcessor, state: State, logits: torch.Tensor, tokens: torch.Tensor, n_prompt: int, n_new: int
) -> tuple[State, torch.Tensor, torch.Tensor]:
    """One greedy step: the next state, the processed logits and the tokens with the likeliest one."""
    state, processed = processor.process(state, logits, Context(tokens, n_prompt, n_new, logits.shape[1]))
    return state, processed, torch.cat([tokens, processed.argmax(dim=-1, keepdim=True)], dim=1)


def _form(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else (type(value), len(value))


def check_rows_are_independent(
    processor: LogitsProcessor, prompts: torch.Tensor, logits: torch.Tensor, whole: Driven
) -> None:
    """Each row alone, and with the rows in another order, has the result that it has in the batch."""
    for row in range(len(prompts)):
        alone = drive(processor, prompts[row : row + 1], logits[:, row : row + 1])
        _assert_same_rows(alone, whole, torch.tensor([row]), "alone")
    order = torch.arange(len(prompts)).flip(0)
    _assert_same_rows(drive(processor, prompts[order], logits[:, order]), whole, order, "in another order")


def check_reorder_follows_rows(processor: LogitsProcessor, prompts: torch.Tensor, logits: torch.Tensor) -> None:
    """Rows that are repeated, dropped and moved in the middle go on as if they had been so from the beginning."""
    rows = torch.tensor([len(prompts) - 1, 0, 0])
    expected, _, _ = drive(processor, prompts[rows], logits[:, rows])
    n_new, _, vocab_size = logits.shape
    for moment in range(1, n_new):
        tokens, n_prompt = prompts, prompts.shape[1]
        state = processor.init(Context(tokens, n_prompt, n_new, vocab_size))
        for step in range(n_new):
            if step == moment:
                tokens, state = tokens[rows], processor.reorder(state, rows)
            own = logits[step] if step < moment else logits[step][rows]
            state, _, tokens = advance(processor, state, own, tokens, n_prompt, n_new)
        assert torch.equal(tokens, expected), f"reordered before step {moment}, rows go on otherwise"


def check_is_configuration_only(
    processor: LogitsProcessor, prompts: torch.Tensor, logits: torch.Tensor, whole: Driven
) -> None:
    """One object serves several generations: again, interleaved, and from two threads."""
    rows = torch.arange(len(prompts))
    _assert_same_rows(drive(processor, prompts, logits), whole, rows, "used again")
    n_new, _, vocab_size = logits.shape
    runs = [(prompts, logits), (prompts.flip(0), logits.flip(1))]
    tokens = [own for own, _ in runs]
    states = [processor.init(Context(own, own.shape[1], n_new, vocab_size)) for own in tokens]
    for step in range(n_new):
        for run, (own, own_logits) in enumerate(runs):
            states[run], _, tokens[run] = advance(
                processor, states[run], own_logits[step], tokens[run], own.shape[1], n_new
            )
    assert torch.equal(tokens[0], whole[0]), "two generations in turn disturb each other"
    assert torch.equal(tokens[1], whole[0].flip(0)), "two generations in turn disturb each other"
    with ThreadPoolExecutor(2) as pool:
        for driven in pool.map(lambda _: drive(processor, prompts, logits), range(4)):
            _assert_same_rows(driven, whole, rows, "in two threads")


def _assert_same_rows(driven: Driven, whole: Driven, rows: torch.Tensor, where: str) -> None:
    assert torch.equal(driven[0], whole[0][rows]), f"a row's tokens are others {where}"
    for step, (own, expected) in enumerate(zip(driven[1], whole[1], strict=True)):
        torch.testing.assert_close(
            own, expected[rows], atol=1e-6, rtol=1e-6, msg=lambda m, s=step: f"step {s}, {where}: {m}"
        )
