"""Plans of steps whose prompts need earlier outputs, and compositions as such plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed_script import random_model, random_rows, run_job

from mingpt.datasets import CustomDataset
from mingpt.decoding.automata import DFA
from mingpt.decoding.constraints import RegularConstraint
from mingpt.experiments import multistep
from mingpt.experiments.multistep import Plan, Step, plan_from_composition
from mingpt.storage.checkpoint import CheckpointError
from mingpt.tasks import SIMPLE_TASKS, TEST_TASKS, Add1, SortAscending, Task


def step(name, *depends_on, **fields):
    return Step(name, lambda examples, _: examples, depends_on, max_new_tokens=2, **fields)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("a"), step("b"), step("a")], "two steps are named 'a'"),
        ([step("read"), step("answer", "raed")], r"'answer' depends on 'raed'.*did you mean 'read'.*read, answer"),
        ([step("a", "c"), step("b", "a"), step("c", "b"), step("d")], r"in a circle: (a <- b <- c <- a|.*)$"),
        ([step("a", "a")], "in a circle: a <- a"),
        ([step("a/b")], "cannot be named 'a/b'"),
    ],
)
def test_a_plan_is_checked_when_it_is_built(steps, message):
    with pytest.raises(ValueError, match=message):
        Plan(random_model(), steps)


def test_the_steps_of_a_circle_are_shown():
    with pytest.raises(ValueError, match="circle") as error:
        Plan(random_model(), [step("a", "c"), step("b", "a"), step("c", "b"), step("d")])
    shown = str(error.value).split(": ")[1].split(" <- ")
    assert shown[0] == shown[-1]
    assert set(shown) == {"a", "b", "c"}


def test_steps_come_after_what_they_depend_on():
    plan = Plan(random_model(), [step("d", "b", "c"), step("b", "a"), step("c", "a"), step("a")])
    names = [each.name for each in plan.steps]
    assert sorted(names) == ["a", "b", "c", "d"]
    for each in plan.steps:
        assert all(names.index(before) < names.index(each.name) for before in each.depends_on)


def test_a_step_generates_as_the_model_does():
    model, rows = random_model(), random_rows(5)
    prefix = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    fields = {"prefix": prefix, "output_fn": tuple, "logits_processors": (lambda _, logits: logits.flip(-1),)}
    outputs = multistep.predict(Plan(model, [step("a", **fields)]), rows, 2)
    options = {"prefixes": prefix, "logits_processors": fields["logits_processors"]}
    expected = model.generate(torch.tensor(rows), 2, **options)[:, -2:]
    assert outputs == {"a": [tuple(row) for row in expected.tolist()]}


def test_steps_draw_independently_and_by_the_seed():
    def outputs(seed, batch_size=3):
        steps = [step(name, options={"do_sample": True, "temperature": 3.0}) for name in "ab"]
        return multistep.predict(Plan(random_model(), steps), random_rows(1) * 20, batch_size, seed=seed)

    first = outputs(0)
    assert first == outputs(0, 7)
    assert first["a"] != first["b"]
    assert first != outputs(1)


@pytest.mark.parametrize(
    ("prompt_fn", "message"),
    [
        (lambda examples, _: examples[1:], "made 2 prompts for 3 examples"),
        (lambda examples, _: [[1], [1, 2], [1]], "prompts of 1 to 2 tokens"),
    ],
)
def test_wrong_prompts_are_refused(prompt_fn, message):
    with pytest.raises(ValueError, match=message):
        multistep.predict(Plan(random_model(), [Step("a", prompt_fn, max_new_tokens=1)]), random_rows(3))


def test_no_examples_have_no_outputs():
    plan = plan_from_composition(
        SortAscending() + Add1(), random_model(), {"SortAscending": None, "Add1": None}, 6, 10, 0
    )
    assert multistep.predict(plan, []) == {"1-SortAscending": [], "2-Add1": []}
    assert multistep.evaluate(plan, []) == {}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_job("three_steps", 1, tmp_path_factory.mktemp("alone"))[0]


def test_the_third_task_reads_the_outputs_of_the_first_two(alone):
    """The chain of the forum's post, by hand."""
    model, rows = random_model(), random_rows(23, 4)
    first = model.generate(torch.tensor(rows), 3)[:, -3:]
    second = model.generate(torch.tensor(rows), 2, prefixes=torch.ones(2, 2, 16))[:, -2:]
    assert alone["outputs"]["first"] == first.tolist()
    assert alone["outputs"]["second"] == second.tolist()
    assert alone["calls"] == [["first", []], ["second", []], ["third", ["first", "second"]]]
    prompts = torch.cat([torch.tensor(rows), first, second], dim=1)
    plan = Plan(model, [Step("third", lambda *_: prompts, max_new_tokens=4, options={"do_sample": True})])
    assert alone["outputs"]["third"] == multistep.predict(plan, rows, seed=5)["third"]
    assert len(alone["outputs"]["third"]) == 23
    assert alone["metrics"] == {"test-first_mean": sum(map(sum, first.tolist())) / 69}


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [2, 3])
def test_prompts_are_made_once_whatever_the_number_of_processes(tmp_path, alone, n_processes):
    results = run_job("three_steps", n_processes, tmp_path)
    assert [name for name, _ in results[0]["calls"]] == [name for name, _ in alone["calls"]]
    assert sorted(name for name, _ in alone["calls"]) == ["first", "second", "third"]
    for result in results:
        assert result["calls"] == (alone["calls"] if result is results[0] else [])
        assert result["outputs"] == alone["outputs"]
        assert result["metrics"] == alone["metrics"]
    predicted = {name: sum(result["predicted"].get(name, 0) for result in results) for name in alone["predicted"]}
    assert predicted == alone["predicted"] == {"first": 23, "second": 23, "third": 23}


@pytest.mark.slow
def test_a_killed_plan_goes_on_with_what_is_missing(tmp_path, alone):
    with pytest.raises(AssertionError):
        run_job("three_steps", 2, tmp_path, dies_in="second")
    folder = tmp_path / "plan"
    assert (folder / "first.json").exists()
    assert not (folder / "second.json").exists()
    n_done = sum(part.read_text().count("\n") for part in (folder / "second.partial.jsonl.parts").glob("*.jsonl"))
    assert n_done >= 4
    results = run_job("three_steps", 2, tmp_path)
    assert [name for name, _ in results[0]["calls"]] == ["first", "second", "third"]
    predicted = {name: sum(result["predicted"].get(name, 0) for result in results) for name in alone["predicted"]}
    assert predicted == {"first": 0, "second": 23 - n_done, "third": 23}
    assert results[1]["outputs"] == alone["outputs"]
    run_job("three_steps", 1, tmp_path / "alone")
    assert sorted(path.name for path in folder.iterdir()) == ["first.json", "second.json", "third.json"]
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "alone" / "plan" / path.name).read_bytes()


def test_outputs_of_another_plan_are_refused(tmp_path):
    """Whatever a step's outputs depend on: its rows, the model, the prefix, an option, what a processor holds."""

    def within(expression):
        return step("a", logits_processors=(RegularConstraint(DFA.from_regex(expression, 13)),))

    def predict(step, rows=random_rows(3), model=random_model()):  # noqa: B008 (made once, never changed)
        return multistep.predict(Plan(model, [step]), rows, folder=tmp_path)

    first = predict(within("[1-5]*"))
    assert predict(within("[1-5]*")) == first
    with pytest.raises(CheckpointError, match=r"a\.json: it was made with prompts = "):
        predict(within("[1-5]*"), rows=random_rows(2))
    with pytest.raises(CheckpointError, match="it was made with model = "):
        predict(within("[1-5]*"), model=random_model(0.3))
    for other in (within("[2-6]*"), step("a"), step("a", prefix=torch.ones(2, 3, 16)), step("a", options={"seed": 1})):
        with pytest.raises(CheckpointError, match=r"it was made with step\."):
            predict(other)


# -------------------------------------------------------------------------------------------- compositions as plans


class Solver:
    """Stands for a trained model: its "prefixes" are tasks, and what it generates is their solution."""

    def __init__(self):
        self.config, self.device = random_model().config, torch.device("cpu")

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, prompts, n_new, prefixes, **_):
        assert not prompts[:, :-n_new].any()
        return torch.cat([prompts, prefixes(prompts[:, -n_new:])], dim=1)


@pytest.mark.parametrize("task", [task for task in TEST_TASKS if len(task.tasks) > 1], ids=str)
def test_a_chain_of_right_steps_solves_the_composition(task):
    data = CustomDataset("test", [task], prefix_padding=10)
    inputs, solutions = data.rows(range(50))
    plan = plan_from_composition(task, Solver(), {str(simple): simple for simple in SIMPLE_TASKS})
    assert [each.name for each in plan.steps] == [f"{i}-{simple}" for i, simple in enumerate(task.tasks, start=1)]
    outputs = multistep.predict(plan, inputs.tolist(), 20)
    assert outputs[plan.steps[-1].name] == solutions.tolist()
    assert multistep.evaluate(plan, inputs.tolist(), outputs) == {
        f"test-{each.name}_accuracy": 1.0 for each in plan.steps
    }


def test_the_accuracy_of_a_step_is_that_of_the_rows_right_so_far():
    prefixes = {"SortAscending": SortAscending(), "Add1": lambda rows: rows + (rows[:, :1] > 1).long()}
    rows = [[3, 1, 2, 2], [4, 2, 3, 3], [5, 5, 1, 1], [2, 2, 2, 2]]
    metrics = multistep.evaluate(plan_from_composition(SortAscending() + Add1(), Solver(), prefixes, 4, 10, 2), rows)
    assert metrics == {"test-1-SortAscending_accuracy": 1.0, "test-2-Add1_accuracy": 0.5}


def test_a_task_without_a_prefix_is_an_error():
    with pytest.raises(ValueError, match=r"no prefix for Add1, a step of SortAscending\+Add1; there is one for Modulo"):
        plan_from_composition(SortAscending() + Add1(), Solver(), {"Modulo": None, "SortAscending": None})


@pytest.mark.parametrize(
    "name", [*map(str, SIMPLE_TASKS), "SortAscending+Add1", "Add1+LessThan", "LessThan+SortAscending"]
)
def test_constraints_leave_every_solution_possible(name):
    """The probability that they leave to the right answer is one: whatever the input, it is in the language."""
    task = Task.parse(name)
    inputs, _ = CustomDataset("train", [task], length=6).rows(range(200))
    model = random_model()
    prefixes = dict.fromkeys(map(str, task.tasks))
    plan = plan_from_composition(task, model, prefixes, 6, 10, 0, is_constrained=True)
    for simple, each in zip(task.tasks, plan.steps, strict=True):
        assert each.logits_processors
        outputs = simple(inputs)

        def solution(tokens, logits, outputs=outputs):
            wanted = torch.from_numpy(outputs)[:, tokens.shape[1] - 6]
            return torch.nn.functional.one_hot(wanted, 13).float()

        generated = model.generate(torch.from_numpy(inputs), 6, logits_processors=[solution, *each.logits_processors])
        assert np.array_equal(generated[:, 6:].numpy(), outputs)
        inputs = outputs


def test_a_constrained_chain_keeps_to_what_is_known():
    prefixes = {"SortAscending": None, "Add1": None}
    plan = plan_from_composition(SortAscending() + Add1(), random_model(), prefixes, 6, 10, 0, is_constrained=True)
    rows = CustomDataset("test", [SortAscending()], length=6).rows(range(30))[0].tolist()
    outputs = multistep.predict(plan, rows)
    assert list(map(sorted, outputs["1-SortAscending"])) == list(map(sorted, rows))
    values = np.array(outputs["2-Add1"])
    assert values.min() >= 2
    assert values.max() <= 11
    free = plan_from_composition(SortAscending() + Add1(), random_model(), prefixes, 6, 10, 0)
    assert multistep.predict(free, rows) != outputs
