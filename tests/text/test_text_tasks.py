"""Tasks over text: what they do, which compositions are defined, and the properties that tasks on rows have too."""

from __future__ import annotations

import itertools

import pytest
from properties import check_text_task_properties

from mingpt.algebra import AnyTask
from mingpt.tasks import Add1, Task
from mingpt.text import SIMPLE_TEXT_TASKS, TEXT_PRETRAINING_TASKS, TEXT_TEST_TASKS, TextTask
from mingpt.text.tasks import CompositeTextTask, Copy, FirstLetters, Recall, Reverse, SortLetters, SortWords, Upper

ANSWERS = {
    "Copy": {"bead": "bead"},
    "Reverse": {"bead": "daeb", "z": "z"},
    "SortLetters": {"bead": "abde", "aba": "aab"},
    "NextLetter": {"azy": "baz"},
    "Upper": {"bead": "BEAD"},
    "RotateLetters": {"bead": "eadb", "z": "z"},
    "EveryOtherLetter": {"bead": "ba", "beads": "bas"},
    "SortWords": {"sun ant sea": "ant sea sun", "owl": "owl"},
    "CountWords": {"sun ant sea": "3", "owl": "1"},
    "FirstLetters": {"sun ant sea": "sas"},
    "Recall": {"a3 k7 c1 k": "7", "a3 a": "3"},
    "CloseBrackets": {"([]{": "})", "((": "))"},
    "AddNumbers": {"27+5": "32", "99+99": "198"},
    "SortLetters+Upper": {"bead": "ABDE"},
    "SortWords+FirstLetters": {"sun ant": "as"},
    "FirstLetters+Upper": {"sun ant": "SA"},
}


def test_every_simple_task_has_answers():
    assert {str(each) for each in SIMPLE_TEXT_TASKS} <= set(ANSWERS)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name):
    task = TextTask.parse(name)
    assert {text: task(text) for text in ANSWERS[name]} == ANSWERS[name]


@pytest.mark.parametrize("task", [*SIMPLE_TEXT_TASKS, *TEXT_PRETRAINING_TASKS, *TEXT_TEST_TASKS], ids=str)
def test_laws(task):
    check_text_task_properties(task, list(ANSWERS.get(str(task), {})))


def test_every_pair_that_is_defined_obeys_the_laws_and_others_are_refused():
    n_defined = 0
    for first, second in itertools.product(SIMPLE_TEXT_TASKS, repeat=2):
        is_read = second.reads in ("text", first.output_kind(first.reads)) or (
            second.reads == "words" and (first.output_kind(first.reads) == "letters")
        )
        if not is_read:
            with pytest.raises(ValueError, match=f"{second} cannot follow, it reads {second.reads}"):
                first + second
            continue
        task = first + second
        n_defined += 1
        check_text_task_properties(task)
    assert 40 < n_defined < 169


def test_a_law_can_fail():
    class SaysLetters(TextTask):
        def solve(self, text):
            return text.upper()

    with pytest.raises(AssertionError, match="says it writes letters"):
        check_text_task_properties(SaysLetters())


def test_composition_is_associative_and_flat():
    one, other = (Reverse() + SortLetters()) + Upper(), Reverse() + (SortLetters() + Upper())
    assert one == other
    assert str(one) == "Reverse+SortLetters+Upper"
    assert len(one.tasks) == 3
    assert isinstance(one, CompositeTextTask)
    assert TextTask.parse(str(one)) == one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Upper() + SortLetters(), r"after Upper, SortLetters cannot follow, it reads letters.*any capitals"),
        (lambda: SortWords() + SortLetters(), r"it reads letters, and its input can be any words"),
        (lambda: Copy() + Add1(), r"one is a TextTask, the other a Task"),
        (lambda: Add1() + Copy(), r"one is a Task, the other a TextTask"),
        (lambda: AnyTask.parse("Copy+Add1"), r"one is a TextTask, the other a Task"),
        (lambda: Task.parse("Copy"), r"unknown task 'Copy'"),
        (lambda: TextTask.parse("Revers"), r"unknown task 'Revers'.*Reverse"),
        (lambda: CompositeTextTask(), r"at least one task"),
        (lambda: SortLetters()("be ad"), r"SortLetters reads letters .*'be ad'"),
        (lambda: Recall()("a3"), r"Recall reads pairs"),
        (lambda: FirstLetters()(""), r"FirstLetters reads words"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_text_is_solved():
    with pytest.raises(TypeError, match="works on text, got int"):
        Copy()(3)  # pyright: ignore[reportArgumentType]


def test_both_families_are_parsed_by_any_task():
    assert AnyTask.parse("Add1") == Add1()
    assert AnyTask.parse("Copy") == Copy()
    assert "Copy" not in Task.classes()
    assert "Add1" not in TextTask.classes()


def test_a_name_may_be_one_of_each_family():
    class NextLetter(Task):  # as the text task
        def solve(self, x):
            return x

    try:
        assert isinstance(Task.parse("NextLetter"), Task)
        assert TextTask.parse("NextLetter")("az") == "ba"
        assert isinstance(AnyTask.parse("NextLetter"), NextLetter), "the newest"
    finally:
        del AnyTask._classes[Task, "NextLetter"]
