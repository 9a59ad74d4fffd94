"""Commands that compute: the experiment, its stages, studies, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mingpt.cli.group import cli
from mingpt.cli.options import (
    find_prefix,
    json_option,
    load,
    load_options,
    parse_tasks,
    train_options,
    training,
    wait_option,
)
from mingpt.cli.output import echo, echo_result, echo_scores
from mingpt.datasets import CustomDataset
from mingpt.evaluation import evaluate
from mingpt.experiments import pipeline, reproduction
from mingpt.experiments.language_model import pretrain_language_model
from mingpt.experiments.sweep import Study, run_packs, run_study
from mingpt.tasks import PRETRAINING_TASKS, Task


@cli.command()
@click.argument("tasks", nargs=-1, callback=parse_tasks, metavar="[TASK]...")
@train_options
@wait_option
@json_option
def reproduce(tasks: list[Task], as_json: bool, **options: Any) -> None:
    """Pretrain a model, train a prefix for each TASK, and evaluate them all.

    Without a TASK it is the sixteen tasks. Prints the table beside the published figures; the folder gets the
    checkpoints, results.json and figures. The same command again goes on from what was saved, or says that it is done.
    """
    with training(**options, is_new=True) as (config, run):
        results = reproduction.reproduce(config, run, tasks or None)
    echo_result(results, reproduction.format_table(results), as_json)
    echo(f"figures and checkpoints are in {run}", err=True)


@cli.command()
@click.argument("tasks", nargs=-1, callback=parse_tasks, metavar="[TASK]...")
@train_options
@wait_option
def pretrain(tasks: list[Task], **options: Any) -> None:
    """Only pretrain the model, the first stage of 'reproduce', on each TASK. [seven tasks]

    With --preset text it is the small language model, on Python's documentation and demonstrations of text tasks.
    """
    with training(**options, is_new=True) as (config, run):
        if config.preset == "text" and tasks:
            raise click.UsageError("the language model of preset text is for its own tasks; leave TASK out")
        if config.preset == "text":
            pretrain_language_model(config, run)
        else:
            pipeline.pretrain(config, run, tasks or PRETRAINING_TASKS, pipeline.EVERY_TASK)
    echo(f"the model is {run / 'model.safetensors'}")


@cli.command()
@click.argument("tasks", nargs=-1, required=True, callback=parse_tasks, metavar="TASK...")
@train_options
@wait_option
@click.option("--kind", type=click.Choice(["activation", "key_value", "prompt"]), default="key_value")
@json_option
def prefix(tasks: list[Task], kind: str, as_json: bool, **options: Any) -> None:
    """Train a prefix for each TASK and evaluate it.

    A TASK is any expression of tasks, such as SortAscending+Add1. The model is the run's, pretrained first if need be.
    Without --run and without a run in runs/, the run is runs/laptop, which starts as a copy of checkpoints/laptop.
    """
    with training(**options, is_new=False) as (config, run):
        model, _ = pipeline.pretrain(config, run)
        prefixes, seconds = pipeline.train_prefixes(config, model, tasks, run, kind=kind)
    scores, n_rows, precision = {}, config.evaluation.n_rows, config.evaluation.precision
    for name, data in ((str(task), pipeline.dataset(config, "test", [task])) for task in tasks):
        scores[name] = evaluate(model, data, prefixes[name], n_rows, precision=precision)
    echo_scores(scores, as_json)
    echo(f"the prefixes are in {run / 'prefixes'}, trained in {seconds:.0f} s", err=True)


@cli.command()
@click.argument("file", metavar="STUDY.toml|status")
@click.option("--processes", type=click.IntRange(min=1), help="On this machine, or of Slurm. [one for each core]")
@click.option("--slurm", metavar="KEY=VALUE,...", help="Submit to Slurm, such as timeout_min=240,slurm_partition=long.")
@click.option("--worker", is_flag=True, help="Compute what no other process computes, and write no table.")
@json_option
def sweep(file: str, processes: int | None, slurm: str | None, worker: bool, as_json: bool) -> None:
    """Compute a study, a grid of methods, tasks, seeds and settings; or with 'status', say how far each is.

    What is there is not computed again. The folder with the study's name gets results.csv.
    """
    if file == "status":
        states: dict[str, dict[str, Any]] = {}
        for path in sorted(Path("studies").glob("*.toml")):
            try:
                states[str(path)] = Study.read(path).progress()
            except FileNotFoundError as error:
                states[str(path)] = {"needs": error.filename or str(error)}
        text = [
            f"{name:36} " + " ".join(f"{key} {value}" for key, value in own.items()) for name, own in states.items()
        ]
        echo_result(states, "\n".join(text) or "no studies/*.toml here", as_json)
        return
    if not Path(file).is_file():
        raise click.UsageError(f"there is no file {file}; expected a study's TOML file, or the word status")
    study = Study.read(file)
    if worker:
        run_packs(study)
        return
    pairs = [item.partition("=") for item in (slurm or "").split(",") if item]
    parameters = {key: int(value) if value.isdigit() else value for key, _, value in pairs}
    results = run_study(study, processes, None if slurm is None else parameters)
    table = 100 * results.pivot_table("accuracy", "task", "method", sort=False)
    echo_result(results.to_dict("records"), table.to_string(float_format="{:.2f}".format), as_json)
    echo(f"all cells are in {study.folder / 'results.csv'}", err=True)


@cli.command("eval")
@click.argument("names", nargs=-1, metavar="[TASK]...")
@load_options
@click.option("--without-prefix", is_flag=True, help="The model alone.")
@click.option("--rows", default=3200, type=click.IntRange(min=1), help="Test rows for each task.")
@json_option
def evaluate_command(names: tuple[str, ...], without_prefix: bool, rows: int, as_json: bool, **options: Any) -> None:
    """Evaluate each TASK, or every prefix of the run."""
    model, prefixes, data, run = load(**options)
    known = [name for name in prefixes if pipeline.find_task(name)]
    for name in [] if names else sorted(prefixes.keys() - set(known)):
        echo(f"{name} is left out: no such task is known; --import its file", err=True)
    chosen = dict((name, None) if without_prefix else find_prefix(prefixes, name, run) for name in names or known)
    if not chosen:
        raise ValueError(f"no prefixes in {run}; 'mingpt prefix TASK' makes one")
    sets = {name: CustomDataset.from_description(data, split="test", tasks=[pipeline.task_of(name)]) for name in chosen}
    echo_scores({name: evaluate(model, sets[name], prefix, rows) for name, prefix in chosen.items()}, as_json)
