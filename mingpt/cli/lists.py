"""Commands that say what there is: runs, tasks, settings, and what a file holds."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import click

from mingpt.cli.group import cli
from mingpt.cli.options import FILE, FOLDER, configure, json_option, train_options
from mingpt.cli.output import echo, echo_result
from mingpt.datasets import CustomDataset
from mingpt.storage.checkpoint import load_checkpoint
from mingpt.storage.runs import list_runs, run_status
from mingpt.tasks import SIMPLE_TASKS, Task


@cli.command("runs")
@click.option("--run", metavar="FOLDER", type=FOLDER, help="Only this one. [all in runs/ and checkpoints/]")
@json_option
def show_runs(run: Path | None, as_json: bool) -> None:
    """List the runs, those that changed last first."""
    if run is not None and not run.is_dir():
        raise click.UsageError(f"there is no folder {run}; without --run all runs are listed")
    runs = [each._asdict() for each in (list_runs() if run is None else [run_status(run)])]
    line = "{path!s:24} {state:32} {preset}, seed {seed}, changed {changed:%Y-%m-%d %H:%M}"
    lines = [line.format_map(each) for each in runs] or ["no runs; 'mingpt reproduce' makes one"]
    echo_result(runs, "\n".join(lines), as_json)


@cli.command("tasks")
@json_option
def list_tasks(as_json: bool) -> None:
    """List the tasks, each with a sample row."""
    found, text = [], 'a is the first element of the row. Tasks compose: "SortAscending+Add1" sorts, then adds.'
    imported = click.get_current_context().meta.get("imported", {}).values()
    own = [cls for cls in Task.__subclasses__() if cls.__module__ in imported]
    with_parameters = [f"{each.__name__}{signature(each)}" for each in own if each.__init__ is not object.__init__]
    for task in [*SIMPLE_TASKS, *(cls() for cls in own if cls.__init__ is object.__init__)]:
        meaning = (type(task).__doc__ or "").partition("\n")[0]
        row, solution = (each[0].tolist() for each in CustomDataset("train", [task]).rows([0]))
        found.append({"task": str(task), "meaning": meaning, "input": row, "solution": solution})
    lines = [f"{each['task']:20} {each['meaning']}\n{'':20} {each['input']} -> {each['solution']}" for each in found]
    echo_result(found, "\n".join([*lines, *with_parameters, "", text]), as_json)


@cli.command("config")
@train_options
def show_config(**options: Any) -> None:
    """Print a run's settings, as --set changes them."""
    echo(str(configure(**options, is_new=False)[0]).rstrip())


@cli.command()
@click.argument("file", type=FILE)
def inspect(file: Path) -> None:
    """Print what a checkpoint FILE says of itself, and its tensors."""
    tensors, description = load_checkpoint(file)
    description.pop("state", None)  # a trainer's bookkeeping
    echo(json.dumps(description, indent=2))
    for name, tensor in tensors.items():
        echo(f"{name:48} {str(tensor.dtype).removeprefix('torch.'):10} {tuple(tensor.shape)}")
