"""Commands that answer rows, one or those of a file, in one step or in several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from mingpt import distributed
from mingpt.cli.group import cli
from mingpt.cli.options import file_options, find_prefix, json_option, load, load_options, sampling_of, sampling_options
from mingpt.cli.output import echo, echo_result, is_main
from mingpt.decoding.automata import DFA
from mingpt.decoding.constraints import MonotoneConstraint, MultisetConstraint, RegularConstraint
from mingpt.experiments import multistep, pipeline
from mingpt.experiments.predictor import json_lines
from mingpt.storage.files import scratch_folder, write_atomic
from mingpt.tasks import Task, Values

_CONSTRAINTS = {
    "sorted": MonotoneConstraint(),
    "descending": MonotoneConstraint(is_descending=True),
    "permutation": MultisetConstraint(),
}


@cli.command()
@click.argument("row")
@click.option("--task", metavar="TASK", help="Whose prefix to use; without it the model is alone.")
@load_options
@sampling_options
@click.option("--regex", metavar="EXPRESSION", help='What the answer must match, such as "1* (2|3)+ [4-9]*".')
@click.option("--constraint", "constraints", multiple=True, type=click.Choice(list(_CONSTRAINTS)))
def generate(
    row: str, task: str | None, seed: int, regex: str | None, constraints: tuple[str, ...], **options: Any
) -> None:
    """Answer one input ROW, such as "6 2 7 6 7 5 3 6 6 10".

    With --regex or --constraint only an answer that satisfies it can come out, whatever the model knows.
    """
    sampling = sampling_of(options)
    model, prefixes, data, run = load(**options)
    length, vocab_size = data["length"], model.config.vocab_size
    values = _read_row(row, "the row", length, vocab_size)
    processors: list[Any] = [_CONSTRAINTS[name] for name in constraints]
    if regex is not None:
        processors.append(RegularConstraint(DFA.from_regex(regex, vocab_size)))
    name, prefix = (None, None) if task is None else find_prefix(prefixes, task, run)
    tasks = [pipeline.find_task(each) for each in ([name] if name else data["tasks"])]
    if name and tasks[0]:
        _check_defined(tasks[0], values, "the row")
    _warn_of_new_rows([values], tasks, data["num_digits"])
    prompt = torch.tensor([[0] * data["prefix_padding"] + values], device=model.device)
    tokens = model.generate(prompt, length, prefixes=prefix, logits_processors=processors, seed=seed, **sampling)
    echo(" ".join(map(str, tokens[0, -length:].tolist())))


@cli.command()
@file_options
@click.option("--task", required=True, metavar="TASK", help="Whose prefix to use.")
@sampling_options
def predict(rows: Path, output: Path, task: str, batch_size: int, wait: bool, seed: int, **options: Any) -> None:
    """Answer the rows of a file with the prefix of TASK.

    A line of IN.jsonl is an input row, such as [6, 2, 7, 6, 7, 5, 3, 6, 6, 10], the same line of OUT.jsonl its answer.
    OUT.jsonl appears when it is complete; if the command is cut off, the same again goes on with what is missing.
    """
    sampling = sampling_of(options)
    model, prefixes, data, run = load(**options)
    name, prefix = find_prefix(prefixes, task, run)
    step = multistep.row_step(name, prefix, data["length"], data["prefix_padding"], options=sampling)
    plan = multistep.Plan(model, [step])
    _answer(plan, pipeline.task_of(name), data["num_digits"], rows, output, batch_size, wait, seed)


@cli.command()
@file_options
@click.option("--task", "name", required=True, metavar="TASK", help="The composition.")
@click.option("--constrained", is_flag=True, help="Force each answer into its range, or into a permutation.")
@json_option
def chain(name: str, constrained: bool, as_json: bool, run: Path | None, device: str | None, **files: Any) -> None:
    """Answer the rows of a file in steps: each task of the composition TASK in turn, with its own prefix.

    A line of OUT.jsonl has every step's answer to the same line of IN.jsonl, such as
    {"1-SortAscending": [...], "2-Add1": [...]}. Prints which share of rows is right after each step.
    """
    task = Task.parse(name)
    model, prefixes, data, _ = load(run, device)
    sizes = {name: data[name] for name in ("length", "num_digits", "prefix_padding")}
    plan = multistep.plan_from_composition(task, model, prefixes, **sizes, is_constrained=constrained)
    metrics = _answer(plan, task, data["num_digits"], **files, is_chain=True)
    accuracies = {name.removeprefix("test-").removesuffix("_accuracy"): value for name, value in metrics.items()}
    lines = [f"{name:24} {value:.2%} of rows are right" for name, value in accuracies.items()]
    echo_result(accuracies, "\n".join(lines), as_json)


def _answer(
    plan: multistep.Plan,
    task: Task,
    num_digits: int,
    rows: Path,
    output: Path,
    batch_size: int,
    wait: bool,
    seed: int = 0,
    is_chain: bool = False,
) -> dict[str, float]:
    """Run a plan on a file's rows, write the outputs, those of every step for a chain, and return the metrics.

    Until all is done, a folder beside the output keeps what is done.
    """
    length, vocab_size = plan.steps[0].max_new_tokens, plan.model.config.vocab_size
    examples = distributed.run_on_main(lambda: read_rows(rows, task, length, vocab_size))
    _warn_of_new_rows(examples, [task], num_digits, rows)
    folder = output.with_name(output.name + ".steps")
    with scratch_folder(folder, wait):
        if not distributed.run_on_main(output.exists):  # else what is in the folder is of a command that was cut off
            outputs = multistep.predict(plan, examples, batch_size, seed=seed, folder=folder)
            metrics = multistep.evaluate(plan, examples, outputs)
            columns = list(outputs.values())
            chains = [dict(zip(outputs, row, strict=True)) for row in zip(*columns, strict=True)]
            if is_main():
                write_atomic(output, json_lines(chains if is_chain else columns[0]))
            return metrics
    raise ValueError(f"{output} exists; remove it or choose another file")


def read_rows(path: Path, task: Task, length: int, vocab_size: int) -> list[list[int]]:
    """The rows of a file, each checked: the model can read it, and the task is defined on it."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from None
    for number, line in enumerate(lines, start=1):
        what = f"line {number} of {path}"
        rows.append(_read_row(line, what, length, vocab_size))
        _check_defined(task, rows[-1], what)
    return rows


def _check_defined(task: Task, row: list[int], what: str) -> None:
    if not task.is_defined(np.array(row)):
        raise ValueError(f"{what}: {task} is not defined on {row}: {task.requirement}")


def _warn_of_new_rows(
    rows: list[list[int]], tasks: Sequence[Task | None], num_digits: int, path: Path | None = None
) -> None:
    """Say which rows hold numbers that no row of the tasks has. None is a task that is not known here."""
    trained = dict.fromkeys(task.input_values(num_digits) for task in tasks if task)
    if None in tasks or not rows:
        return
    is_known = np.any([values.contain(np.array(rows)).all(axis=-1) for values in trained], axis=0)  # (N,)
    if not is_known.all():
        what = f"line {is_known.argmin() + 1} of {path}" if path else "the row"
        what += f" and {n_more} more" if (n_more := (~is_known).sum() - 1) else ""
        ranges = "; or of ".join(map(_range, trained))
        echo(f"warning: {what}: training had only rows of {ranges}, so the answer may be anything", err=True)


def _range(values: Values) -> str:
    """What a row may hold, such as "1 to 10"."""
    first, rest = (f"{each.low} to {each.high}" for each in values)
    return rest if first == rest else f"{first}, then {rest}"


def _read_row(text: str, what: str, length: int, vocab_size: int) -> list[int]:
    """The integers of a row such as "[1, 2, 3]" or "1 2 3"."""
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    if len(words) != length or not all(
        word.isdecimal() and len(word) < 20 and int(word) < vocab_size for word in words
    ):
        got = repr(text if len(text) < 100 else text[:100] + " ...")
        raise ValueError(f"{what} must be a list of {length} integers from 0 to {vocab_size - 1}, got {got}")
    return list(map(int, words))
