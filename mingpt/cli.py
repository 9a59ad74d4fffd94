"""The command line, ``mingpt ...``: each command is a few calls into the package.

A command's results go to standard output, everything else to standard error. Under torchrun all processes run the
command; the main one prints.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mingpt.evaluation import Score
    from mingpt.experiments.multistep import Plan
    from mingpt.model import GPT
    from mingpt.prefix import Prefix
    from mingpt.tasks import Task
    from mingpt.utils import CfgNode

_SET_HELP = "Change a setting, such as trainer.max_iters=2000; may be repeated. 'mingpt config' lists them."


def main() -> None:
    """Run the command line: a mistake gives one line and exit code 2, an interruption 130."""
    from mingpt import distributed

    level = logging.INFO if _is_main() else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    try:
        sys.exit(cli(standalone_mode=False, prog_name="mingpt"))
    except (click.Abort, KeyboardInterrupt):
        _echo("interrupted; what was saved is kept, and the same command goes on from it", err=True)
        sys.exit(130)
    except (click.ClickException, ImportError, ValueError, OSError, distributed.OtherProcessError) as error:
        _echo(f"error: {_message(error)}", err=True)  # on the main process, also for what failed on another
    sys.exit(2)


def _message(error: Exception) -> str:
    """What an error says, in one line, and which --help says more."""
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    if isinstance(error, click.NoSuchOption) and error.option_name in ("--out", "--from"):
        text = f"No such option '{error.option_name}'; --run FOLDER names the run"
    if isinstance(error, ImportError) and error.name in ("transformers", "peft"):
        text += "; pip install 'mingpt-prefix-tuning[hf]'"
    context = error.ctx if isinstance(error, click.UsageError) else None
    return " ".join(text.splitlines()) + (f" (see {context.command_path} --help)" if context else "")


# ------------------------------------------------------------------------------------------------ shared options


class _TaskType(click.ParamType):
    """An expression of tasks, such as SortAscending+Add1."""

    name = "task"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Task:
        from mingpt.tasks import Task

        return value if isinstance(value, Task) else Task.parse(value)


def _all_of(*options: Callable) -> Callable:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def _run_option(default: str) -> Callable:
    folder = click.Path(file_okay=False, path_type=Path)
    return click.option("--run", metavar="FOLDER", type=folder, help=f"The run's folder. [{default}]")


_PATH = click.Path(dir_okay=False, path_type=Path)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
_device_option = click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. [auto]")
_config_options = _all_of(
    click.option("--preset", metavar="NAME", help="smoke, laptop or seed. [the run's, or laptop]"),
    click.option("--seed", type=int, help="For the data and the initial weights. [the run's, or 0]"),
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=_SET_HELP),
    _device_option,
)
_new_run_options = _all_of(_run_option("runs/PRESET"), _config_options)
_train_options = _all_of(_run_option("with --preset runs/PRESET, else the newest of runs/"), _config_options)
_load_options = _all_of(_run_option("the newest of runs/, else checkpoints/laptop"), _device_option)
_sampling_options = _all_of(
    click.option("--sample", is_flag=True, help="Sample each token instead of taking the most likely."),
    click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Of sampling. [1.0]"),
    click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K most likely tokens only."),
    click.option("--seed", default=0, help="Of sampling."),
)
_file_options = _all_of(
    click.argument("rows", metavar="IN.jsonl", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    click.argument("output", metavar="OUT.jsonl", type=_PATH),
    _load_options,
    click.option("--batch-size", default=400, type=click.IntRange(min=1), help="Rows per process."),
)


def _import(context: click.Context, parameter: click.Parameter, names: Sequence[str]) -> None:
    """Import files under their stems, or modules that Python finds, also in the current folder."""
    for name in names:
        path, is_file = Path(name), name.endswith(".py")
        sys.path.insert(0, str(path.parent.resolve()) if is_file else "")
        try:
            module = importlib.import_module(path.stem if is_file else name)
        except Exception as error:
            raise click.UsageError(f"cannot import {name}: {type(error).__name__}: {error}") from None
        if is_file and Path(module.__file__ or "").resolve() != path.resolve():
            raise click.UsageError(f"cannot import {name}: another module is named {path.stem}; rename the file")


def _configure(
    run: Path | None, preset: str | None, seed: int | None, overrides: Sequence[str], device: str | None, is_new: bool
) -> tuple[CfgNode, Path]:
    """The configuration and the folder that the options of a training command mean. Nothing is written."""
    from mingpt.distributed import resolve_device
    from mingpt.experiments.presets import run_config

    if device is not None:
        resolve_device(device)
        overrides = [*overrides, f"trainer.device={device}", f"prefix.device={device}"]
    is_named = is_new or preset is not None
    folder = run or (Path("runs") / (preset or "laptop") if is_named else _default_run())
    config = run_config(folder, preset, seed, overrides)
    if run is None:
        _echo(f"run: {folder}", err=True)
    return config, folder


def _load(run: Path | None, device: str | None) -> tuple[GPT, dict[str, Prefix], dict[str, Any], Path]:
    """The model, the prefixes by name, the description of the model's data, and the run's folder."""
    from mingpt.experiments.pipeline import load_run

    folder = run or _default_run()
    if run is None:
        _echo(f"run: {folder}", err=True)
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"no model in {folder}; 'mingpt reproduce' makes one, --run FOLDER names another run")
    model, prefixes, description = load_run(folder, device or "auto")
    if "data" not in description:
        raise ValueError(f"the model in {folder} was saved without a description of its data, which this command needs")
    return model, prefixes, description["data"], folder


def _default_run() -> Path:
    from mingpt import distributed
    from mingpt.storage.runs import default_run

    return distributed.run_on_main(default_run) or Path("runs/laptop")


def _find_prefix(prefixes: dict[str, Prefix], name: str, run: Path) -> tuple[str, Prefix]:
    """The prefix of a task, or one of several of it by its name, such as Add1-1a2b3c4d."""
    found = name if name in prefixes else str(_TaskType().convert(name, None, None))
    if found not in prefixes:
        command, known = f"mingpt prefix '{found}' --run {run}", ", ".join(prefixes) or "none"
        raise ValueError(f"no prefix for {found} in {run}; there is one for {known}; {command} makes it")
    return found, prefixes[found]


def _task_of(name: str) -> Task:
    """The task of a prefix, by the prefix's name."""
    return _TaskType().convert(re.sub(r"-[0-9a-f]+$", "", name), None, None)


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling options out of a command's, as ``generate`` has them."""
    sample, temperature, top_k = (options.pop(name) for name in ("sample", "temperature", "top_k"))
    if not sample and (temperature, top_k) != (None, None):
        raise click.UsageError("--temperature and --top-k are for sampling; give --sample too")
    return {"do_sample": sample, "temperature": 1.0 if temperature is None else temperature, "top_k": top_k}


# ------------------------------------------------------------------------------------------------------- commands


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(no_args_is_help=False, context_settings=_SETTINGS)
@click.version_option(package_name="mingpt-prefix-tuning", prog_name="mingpt")
def cli() -> None:
    """Prefix-tuning of a small transformer on synthetic tasks.

    \b
    mingpt reproduce                      the whole experiment, in minutes
    mingpt prefix SortAscending+Add1      train one more prefix
    mingpt generate --task Add1 "1 2 3 4 5 6 7 8 9 10"

    On several processes, with two dashes so that torchrun leaves the options alone:

    \b
    torchrun --nproc-per-node 2 -m mingpt -- reproduce --run FOLDER
    """


@cli.command()
@click.argument("tasks", nargs=-1, type=_TaskType(), metavar="[TASK]...")
@_new_run_options
@_json_option
def reproduce(tasks: tuple[Task, ...], as_json: bool, **options: Any) -> None:
    """Pretrain a model, train a prefix for each TASK, and evaluate them all.

    Without a TASK it is the sixteen tasks. Prints the table beside the published figures; the folder gets the
    checkpoints, results.json and figures. The same command again goes on from what was saved, or says that it is done.
    """
    from mingpt.experiments import reproduction

    config, run = _configure(**options, is_new=True)
    results = reproduction.reproduce(config, run, list(tasks) or None)
    _echo_result(results, reproduction.format_table(results), as_json)
    _echo(f"figures and checkpoints are in {run}", err=True)


@cli.command()
@_new_run_options
def pretrain(**options: Any) -> None:
    """Only pretrain the model, the first stage of 'reproduce'."""
    from mingpt.experiments import pipeline

    config, run = _configure(**options, is_new=True)
    pipeline.pretrain(config, run)
    _echo(f"the model is {run / 'model.safetensors'}")


@cli.command()
@click.argument("tasks", nargs=-1, required=True, type=_TaskType(), metavar="TASK...")
@_train_options
@click.option("--kind", type=click.Choice(["activation", "key_value", "prompt"]), default="activation")
@_json_option
def prefix(tasks: tuple[Task, ...], kind: str, as_json: bool, **options: Any) -> None:
    """Train a prefix for each TASK and evaluate it.

    A TASK is any expression of tasks, such as SortAscending+Add1. The model is the run's, pretrained first if need be.
    """
    from mingpt.evaluation import evaluate
    from mingpt.experiments import pipeline

    config, run = _configure(**options, is_new=False)
    model, _ = pipeline.pretrain(config, run)
    prefixes, seconds = pipeline.train_prefixes(config, model, tasks, run, kind=kind)
    scores, evaluation = {}, config.evaluation
    for task in tasks:
        data, trained = pipeline.dataset(config, "test", [task]), prefixes[str(task)]
        scores[str(task)] = evaluate(model, data, trained, evaluation.n_rows, precision=evaluation.precision)
    _echo_scores(scores, as_json)
    _echo(f"the prefixes are in {run / 'prefixes'}, trained in {seconds:.0f} s", err=True)


@cli.command()
@_train_options
@click.option("--task", "tasks", multiple=True, type=_TaskType(), help="May be repeated. [the nine test tasks]")
@click.option("--methods", metavar="NAME,...", help="Separated by commas. [all]")
@click.option("--n-parameters", type=click.IntRange(min=1), help="Trainable parameters per task. [a prefix's]")
@_json_option
def compare(
    tasks: tuple[Task, ...], methods: str | None, n_parameters: int | None, as_json: bool, **options: Any
) -> None:
    """Fit each task by several methods, side by side.

    Each has as many trainable parameters and as much training: fine-tuning, LoRA, prefixes of every kind and
    initialization, soft prompts. Prints a table; the run's folder gets a file for each result in comparison/, and
    figures/comparison.png.
    """
    from mingpt.analysis.figures import accuracy_matrix_figure
    from mingpt.experiments import comparison
    from mingpt.tasks import TEST_TASKS

    config, run = _configure(**options, is_new=False)
    names = methods.split(",") if methods else list(comparison.METHODS)
    results = comparison.compare(config, run, list(tasks) or TEST_TASKS, names, n_parameters)
    _echo_result(results.to_dict("records"), comparison.format_table(results), as_json)
    _echo(f"{config.prefix.max_iters} iterations of {config.prefix.batch_size} rows a task", err=True)
    path = run / "figures" / "comparison.png"
    if _is_main():
        path.parent.mkdir(exist_ok=True)
        matrix = results.pivot_table("accuracy", "method", "task", sort=False)
        accuracy_matrix_figure(matrix, "Methods side by side", rows="method").savefig(path, dpi=150)
    _echo(f"the figure is {path}", err=True)


@cli.command("eval")
@click.argument("names", nargs=-1, metavar="[TASK]...")
@_load_options
@click.option("--without-prefix", is_flag=True, help="The model alone.")
@click.option("--rows", default=3200, type=click.IntRange(min=1), help="Test rows for each task.")
@_json_option
def evaluate_command(names: tuple[str, ...], without_prefix: bool, rows: int, as_json: bool, **options: Any) -> None:
    """Evaluate each TASK, or every prefix of the run."""
    from mingpt.datasets import CustomDataset
    from mingpt.evaluation import evaluate

    model, prefixes, data, run = _load(**options)
    if not (names or prefixes):
        raise ValueError(f"no prefixes in {run}; 'mingpt prefix TASK' makes one")
    chosen: dict[str, Any] = dict.fromkeys(names or prefixes)
    if not without_prefix:
        chosen = dict(_find_prefix(prefixes, name, run) for name in chosen)
    sets = {name: CustomDataset.from_description(data, split="test", tasks=[_task_of(name)]) for name in chosen}
    _echo_scores({name: evaluate(model, sets[name], prefix, rows) for name, prefix in chosen.items()}, as_json)


@cli.command()
@click.argument("row")
@click.option("--task", metavar="TASK", help="Whose prefix to use; without it the model is alone.")
@_load_options
@_sampling_options
@click.option("--regex", metavar="EXPRESSION", help='What the answer must match, such as "1* (2|3)+ [4-9]*".')
@click.option("--constraint", "constraints", multiple=True, type=click.Choice(["sorted", "descending", "permutation"]))
def generate(
    row: str, task: str | None, seed: int, regex: str | None, constraints: tuple[str, ...], **options: Any
) -> None:
    """Answer one input ROW, such as "6 2 7 6 7 5 3 6 6 10".

    With --regex or --constraint only an answer that satisfies it can come out, whatever the model knows.
    """
    import torch

    from mingpt.decoding import constraints as known
    from mingpt.decoding.automata import DFA

    sampling = _sampling(options)
    model, prefixes, data, run = _load(**options)
    length, vocab_size = data["length"], model.config.vocab_size
    values = _read_row(f"[{', '.join(row.replace(',', ' ').split())}]", "the row", length, vocab_size)
    made = {
        "sorted": known.MonotoneConstraint(),
        "descending": known.MonotoneConstraint(is_descending=True),
        "permutation": known.MultisetConstraint(),
    }
    processors: list[Any] = [made[name] for name in constraints]
    if regex is not None:
        processors.append(known.RegularConstraint(DFA.from_regex(regex, vocab_size)))
    prompt = torch.tensor([[0] * data["prefix_padding"] + values], device=model.device)
    prefix = None if task is None else _find_prefix(prefixes, task, run)[1]
    tokens = model.generate(prompt, length, prefixes=prefix, logits_processors=processors, seed=seed, **sampling)
    _echo(" ".join(map(str, tokens[0, -length:].tolist())))


@cli.command()
@_file_options
@click.option("--task", required=True, metavar="TASK", help="Whose prefix to use.")
@_sampling_options
def predict(rows: Path, output: Path, task: str, batch_size: int, seed: int, **options: Any) -> None:
    """Answer the rows of a file with the prefix of TASK.

    A line of IN.jsonl is an input row, such as [6, 2, 7, 6, 7, 5, 3, 6, 6, 10], the same line of OUT.jsonl its answer.
    OUT.jsonl appears when it is complete; if the command is cut off, the same again goes on with what is missing.
    """
    from mingpt.experiments import multistep

    sampling = _sampling(options)
    model, prefixes, data, run = _load(**options)
    name, prefix = _find_prefix(prefixes, task, run)
    step = multistep.row_step(name, prefix, data["length"], data["prefix_padding"], options=sampling)
    _answer(multistep.Plan(model, [step]), _task_of(name), rows, output, batch_size, seed)


@cli.command()
@_file_options
@click.option("--task", required=True, type=_TaskType(), help="The composition.")
@click.option("--constrained", is_flag=True, help="Force each answer into its range, or into a permutation.")
@_json_option
def chain(
    rows: Path, output: Path, task: Task, batch_size: int, constrained: bool, as_json: bool, **options: Any
) -> None:
    """Answer the rows of a file in steps: each task of the composition TASK in turn, with its own prefix.

    A line of OUT.jsonl has every step's answer to the same line of IN.jsonl, such as
    {"1-SortAscending": [...], "2-Add1": [...]}. Prints which share of rows is right after each step.
    """
    from mingpt.experiments import multistep

    model, prefixes, data, run = _load(**options)
    prefixes = dict(_find_prefix(prefixes, str(each), run) for each in task.tasks)
    sizes = {name: data[name] for name in ("length", "num_digits", "prefix_padding")}
    plan = multistep.plan_from_composition(task, model, prefixes, **sizes, is_constrained=constrained)
    metrics = _answer(plan, task, rows, output, batch_size, is_chain=True)
    accuracies = {name.removeprefix("test-").removesuffix("_accuracy"): value for name, value in metrics.items()}
    lines = [f"{name:24} {value:.2%} of rows are right" for name, value in accuracies.items()]
    _echo_result(accuracies, "\n".join(lines), as_json)


@cli.command()
@click.argument("out", metavar="OUT", type=click.Path(file_okay=False, path_type=Path))
@click.option("--task", "tasks", multiple=True, metavar="TASK", help="Whose prefix to export; may be repeated. [all]")
@_load_options
def export(out: Path, tasks: tuple[str, ...], **options: Any) -> None:
    """Write the model for transformers into OUT/model, and each prefix for PEFT into OUT/TASK."""
    from mingpt import distributed
    from mingpt.storage.huggingface import export_peft, to_huggingface

    importlib.import_module("peft")  # it may be missing, and transformers with it: better now than half way
    if distributed.run_on_main(out.exists):
        raise ValueError(f"{out} exists; remove it or choose another folder")
    model, prefixes, _, run = _load(**options)
    chosen = dict(_find_prefix(prefixes, name, run) for name in tasks or prefixes)

    if _is_main():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            to_huggingface(model).save_pretrained(Path(temporary) / "all" / "model")
            for name, prefix in chosen.items():
                export_peft(model, prefix, Path(temporary) / "all" / name)
            (Path(temporary) / "all").rename(out)
    _echo(f"GPT2LMHeadModel.from_pretrained({str(out / 'model')!r}) reads the model")
    _echo(f"PeftModel.from_pretrained(model, {str(out / next(iter(chosen), 'TASK'))!r}) adds a prefix")


@cli.command("runs")
@_run_option("those in runs/ and checkpoints/; with --run those beside FOLDER")
@_json_option
def show_runs(run: Path | None, as_json: bool) -> None:
    """List the runs, those that changed last first."""
    from mingpt.storage.runs import FOLDERS, list_runs

    found = list_runs(FOLDERS if run is None else [run.parent])
    lines = []
    for each in found:
        changed, size = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed)), f"{each.n_bytes / 1e6:.1f} MB"
        settings = f"{each.preset}, seed {each.seed}" if each.preset else ""
        lines.append(f"{each.path!s:24} {each.state:32} {settings:16} {size:>10}  {changed}")
    _echo_result([vars(each) for each in found], "\n".join(lines) or "no runs; 'mingpt reproduce' makes one", as_json)


@cli.command("tasks")
@_json_option
def list_tasks(as_json: bool) -> None:
    """List the tasks, each with a sample row."""
    from mingpt.datasets import CustomDataset
    from mingpt.tasks import SIMPLE_TASKS, Task

    found, lines = [], []
    own = [cls for cls in Task.__subclasses__() if cls.__module__ != Task.__module__]
    for task in [*SIMPLE_TASKS, *(cls() for cls in own if cls.__init__ is object.__init__)]:
        rows = [each[0].tolist() for each in CustomDataset("train", [task]).rows([0])]
        meaning = (type(task).__doc__ or "").splitlines()[0]
        found.append({"task": str(task), "meaning": meaning, "input": rows[0], "solution": rows[1]})
        sample = "  ->  ".join(" ".join(f"{value:>2}" for value in row) for row in rows)
        lines += [f"{task!s:20} {meaning}", f"{'':20} {sample}"]
    lines.append('\nTasks compose: "SortAscending+Add1" sorts, then adds.')
    _echo_result(found, "\n".join(lines), as_json)


@cli.command("config")
@_train_options
def show_config(**options: Any) -> None:
    """Print a run's settings, as --set changes them."""
    _echo(str(_configure(**options, is_new=False)[0]).rstrip())


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def inspect(file: Path) -> None:
    """Print what a checkpoint FILE says of itself, and its tensors."""
    from mingpt.storage.checkpoint import load_checkpoint

    tensors, description = load_checkpoint(file)
    description.pop("state", None)  # a trainer's bookkeeping
    _echo(json.dumps(description, indent=2))
    for name, tensor in tensors.items():
        _echo(f"{name:48} {str(tensor.dtype).removeprefix('torch.'):10} {tuple(tensor.shape)}")


_IMPORT = click.Option(  # eager, so that the other options know the tasks
    ["--import"], multiple=True, is_eager=True, expose_value=False, callback=_import, help="A file with further tasks."
)
for _command in cli.commands.values():
    _command.params.append(_IMPORT)


# ---------------------------------------------------------------------------------------------- files and printing


def _answer(
    plan: Plan, task: Task, rows: Path, output: Path, batch_size: int, seed: int = 0, is_chain: bool = False
) -> dict[str, float]:
    """Run a plan on a file's rows, write the outputs, those of every step for a chain, and return the metrics.

    Until all is done, a folder beside the output keeps what is done.
    """
    from mingpt import distributed
    from mingpt.experiments import multistep
    from mingpt.storage.checkpoint import json_lines, write_atomic

    if distributed.run_on_main(output.exists):
        raise ValueError(f"{output} exists; remove it or choose another file")
    length, vocab_size = plan.steps[0].max_new_tokens, plan.model.config.vocab_size
    examples = distributed.run_on_main(lambda: _read_rows(rows, task, length, vocab_size))
    folder = output.with_name(output.name + ".steps")
    outputs = multistep.predict(plan, examples, batch_size, seed=seed, folder=folder)
    metrics = multistep.measure(plan, examples, outputs)

    columns = list(outputs.values())
    lines = [dict(zip(outputs, row, strict=True)) for row in zip(*columns, strict=True)] if is_chain else columns[0]
    if _is_main():
        write_atomic(output, json_lines(lines))
        shutil.rmtree(folder)
    return metrics


def _read_rows(path: Path, task: Task, length: int, vocab_size: int) -> list[list[int]]:
    """The rows of a file, each checked: the model can read it, and the task is defined on it."""
    import numpy as np

    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        row = _read_row(line, f"line {number} of {path}", length, vocab_size)
        if not task.is_defined(np.array(row)):
            raise ValueError(f"line {number} of {path}: {task} is not defined on {row}: {task.requirement}")
        rows.append(row)
    return rows


def _read_row(text: str, what: str, length: int, vocab_size: int) -> list[int]:
    row: Any = None
    with contextlib.suppress(json.JSONDecodeError):
        row = json.loads(text)
    is_row = isinstance(row, list) and len(row) == length
    if not (is_row and all(type(value) is int and 0 <= value < vocab_size for value in row)):
        raise ValueError(f"{what} must be a list of {length} integers from 0 to {vocab_size - 1}, got {text!r}")
    return row


def _is_main() -> bool:
    """Whether this process prints. Unlike ``distributed.is_main`` it does not wait for the other processes."""
    return os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ


def _echo(text: str, err: bool = False) -> None:
    """Print on the main process."""
    if _is_main():
        click.echo(text, err=err)


def _echo_result(values: Any, text: str, as_json: bool) -> None:
    """Print a command's results, as JSON or as text."""

    def jsonable(value: Any) -> Any:
        return value.to_dict() if hasattr(value, "to_dict") else str(value)

    _echo(json.dumps(values, indent=1, default=jsonable) if as_json else text)


def _echo_scores(scores: dict[str, Score], as_json: bool) -> None:
    lines = []
    for name, score in scores.items():
        share, (low, high) = f"{score.n_correct}/{score.n_rows} = {score.accuracy:.2%}", score.confidence_interval
        lines.append(f"{name:24} {share} (95% interval {100 * low:.2f} - {100 * high:.2f})")
    _echo_result(scores, "\n".join(lines), as_json)
