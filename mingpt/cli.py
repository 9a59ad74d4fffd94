"""The command line, ``mingpt ...``: each command is a few calls into the package.

Under torchrun all processes run the command; the main one prints.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import click

DEFAULT_FOLDER = "checkpoints/laptop"


def main() -> None:
    """Run the command line: a mistake gives one line and exit code 2, an interruption 130."""
    from mingpt import distributed

    level = logging.INFO if distributed.is_main() else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    try:
        sys.exit(cli(standalone_mode=False))
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        click.echo(f"error: {error.format_message()}{hint}", err=True)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command goes on where it was", err=True)
        sys.exit(130)
    except (ValueError, OSError) as error:
        click.echo(f"error: {error}", err=True)
    except distributed.OtherProcessError:
        pass  # it says so itself
    sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mingpt-prefix-tuning", prog_name="mingpt")
def cli() -> None:
    """What can a prefix teach a frozen transformer?

    \b
    mingpt reproduce                      the whole experiment, in minutes
    mingpt prefix SortAscending+Add1      learn one more prefix
    mingpt generate --task Add1 "1 2 3 4 5 6 7 8 9 10"
    """


def _run_options(command: Any) -> Any:
    """The options of the commands that work in a run's folder."""
    for option in (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a setting, such as trainer.max_iters=2000; may be repeated. 'mingpt config' lists them.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="For the data and the initial weights."),
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="The run's folder. [runs/PRESET]"),
        click.option("--preset", default="laptop", show_default=True, help="smoke, laptop or seed."),
    ):
        command = option(command)
    return command


def _config(preset: str, seed: int, overrides: tuple[str, ...]) -> Any:
    from mingpt.experiments.reproduction import get_default_config

    config = get_default_config(preset)
    config.merge_from_args([f"--seed={seed}", *(f"--{override}" for override in overrides)])
    return config


_from_option = click.option(
    "--from",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_FOLDER,
    show_default=True,
    help="A run's folder, with model.safetensors and prefixes.safetensors.",
)


@cli.command()
@_run_options
def reproduce(preset: str, out: Path | None, seed: int, overrides: tuple[str, ...]) -> None:
    """Pretrain a model, learn sixteen prefixes, evaluate them all.

    Prints the table beside the published figures; the folder gets the checkpoints, results.json and figures. The same
    command again goes on where it was, or says that it is done.
    """
    from mingpt.experiments import reproduction

    out = out or Path("runs") / preset
    results = reproduction.reproduce(_config(preset, seed, overrides), out)
    _echo(reproduction.format_table(results))
    _echo(f"figures and checkpoints are in {out}")


@cli.command()
@_run_options
def pretrain(preset: str, out: Path | None, seed: int, overrides: tuple[str, ...]) -> None:
    """Only pretrain the model, the first stage of 'reproduce'."""
    from mingpt.experiments import pipeline

    out = out or Path("runs") / preset
    config = _config(preset, seed, overrides)
    pipeline.verify(config, out)
    pipeline.pretrain(config, out)
    _echo(f"the model is {out / 'model.safetensors'}")


@cli.command()
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@_run_options
@click.option("--name", default=None, help="The file's name in the run's folder. [the tasks' names]")
def prefix(
    tasks: tuple[str, ...], preset: str, out: Path | None, seed: int, overrides: tuple[str, ...], name: str | None
) -> None:
    """Learn a prefix for each TASK and evaluate it.

    A TASK is any expression of tasks, such as SortAscending+Add1. The model is the run's, pretrained first if need be.
    """
    from mingpt.evaluation import evaluate
    from mingpt.experiments import pipeline
    from mingpt.tasks import Task

    parsed = [Task.parse(task) for task in tasks]
    out = out or Path("runs") / preset
    config = _config(preset, seed, overrides)
    pipeline.verify(config, out)
    model, _ = pipeline.pretrain(config, out)
    file = name or "prefix_" + "_".join(map(str, parsed))
    prefixes, seconds = pipeline.train_prefixes(config, model, parsed, out, file)
    for task in parsed:
        score = evaluate(model, pipeline.dataset(config, "test", [task]), prefixes[str(task)], config.evaluation.n_rows)
        _echo(f"{task!s:24} {_percent(score)}")
    _echo(f"the prefixes are {out / file}.safetensors, trained in {seconds:.0f} s")


@cli.command()
@_run_options
@click.option("--task", "tasks", multiple=True, metavar="TASK", help="May be repeated. [the nine test tasks]")
@click.option("--methods", default=None, metavar="NAME,...", help="Separated by commas. [all]")
@click.option("--n-parameters", default=None, type=click.IntRange(min=1), help="Learned numbers a task. [a prefix's]")
def compare(
    preset: str,
    out: Path | None,
    seed: int,
    overrides: tuple[str, ...],
    tasks: tuple[str, ...],
    methods: str | None,
    n_parameters: int | None,
) -> None:
    """Teach a run's model each task by several methods, side by side.

    With as many learned numbers and as much training each: fine-tuning, LoRA, prefixes of every kind and from every
    start, soft prompts. Prints a table; the run's folder gets comparison/results.json and figures/comparison.png.
    """
    from mingpt.analysis.figures import accuracy_matrix_figure
    from mingpt.experiments import comparison, pipeline
    from mingpt.tasks import TEST_TASKS, Task

    out = out or Path("runs") / preset
    config = _config(preset, seed, overrides)
    parsed = [Task.parse(task) for task in tasks] or TEST_TASKS
    names = methods.split(",") if methods else list(comparison.METHODS)
    pipeline.verify(config, out)
    results = comparison.compare(config, out, parsed, names, n_parameters)
    _echo(comparison.format_table(results))
    _echo(f"{config.prefix.max_iters} iterations of {config.prefix.batch_size} rows a task")
    figure = accuracy_matrix_figure(comparison.as_matrix(results), "Methods side by side", rows="method")
    path = out / "figures" / "comparison.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    _echo(f"the figure is {path}")


@cli.command("eval")
@click.argument("tasks", nargs=-1, metavar="[TASK]...")
@_from_option
@click.option("--without-prefix", is_flag=True, help="The model alone.")
@click.option("--rows", default=3200, show_default=True, type=click.IntRange(min=1), help="Test rows for each task.")
def evaluate_command(tasks: tuple[str, ...], folder: Path, without_prefix: bool, rows: int) -> None:
    """Evaluate each TASK, or every one that has a prefix."""
    from mingpt.datasets import CustomDataset
    from mingpt.evaluation import evaluate
    from mingpt.tasks import Task

    model, prefixes, description = _load(folder)
    for task in [Task.parse(task) for task in tasks or prefixes]:
        chosen = None if without_prefix else _prefix_of(prefixes, str(task), folder)
        data = CustomDataset.from_description(description["data"], split="test", tasks=[task])
        _echo(f"{task!s:24} {_percent(evaluate(model, data, chosen, rows))}")


@cli.command()
@click.argument("row")
@click.option("--task", default=None, metavar="TASK", help="Whose prefix to use; without it the model is alone.")
@_from_option
@click.option("--sample", is_flag=True, help="Draw each token instead of taking the likeliest.")
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--top-k", default=None, type=click.IntRange(min=1), help="Draw from the K likeliest tokens only.")
@click.option("--seed", default=0, show_default=True, help="For drawing.")
@click.option(
    "--regex", default=None, metavar="EXPRESSION", help='What the answer must match, such as "1* (2|3)+ [4-9]*".'
)
@click.option(
    "--constraint",
    "constraints",
    multiple=True,
    type=click.Choice(["sorted", "descending", "permutation"]),
    help="What the answer must be; may be repeated.",
)
def generate(
    row: str,
    task: str | None,
    folder: Path,
    sample: bool,
    temperature: float,
    top_k: int | None,
    seed: int,
    regex: str | None,
    constraints: tuple[str, ...],
) -> None:
    """Answer one input ROW, such as "6 2 7 6 7 5 3 6 6 10".

    With --regex or --constraint only an answer that satisfies it can come out, whatever the model knows.
    """
    import torch

    from mingpt.decoding import constraints as known
    from mingpt.decoding.automata import DFA
    from mingpt.tasks import Task

    model, prefixes, description = _load(folder)
    length, padding = description["data"]["length"], description["data"]["prefix_padding"]
    try:
        values = [int(word) for word in row.replace(",", " ").split()]
    except ValueError:
        raise click.UsageError(f"the row must be integers with spaces between them, got {row!r}") from None
    vocabulary = model.config.vocab_size
    if len(values) != length or not all(0 <= value < vocabulary for value in values):
        raise click.UsageError(f"the model reads rows of {length} integers from 0 to {vocabulary - 1}, got {row!r}")
    chosen = None if task is None else _prefix_of(prefixes, str(Task.parse(task)), folder)
    made = {
        "sorted": known.MonotoneConstraint(),
        "descending": known.MonotoneConstraint(is_descending=True),
        "permutation": known.MultisetConstraint(),
    }
    processors = [made[name] for name in constraints]
    if regex is not None:
        processors.append(known.RegularConstraint(DFA.from_regex(regex, vocabulary)))
    tokens = model.generate(
        torch.tensor([[0] * padding + values]),
        length,
        temperature=temperature,
        do_sample=sample,
        top_k=top_k,
        prefixes=chosen,
        logits_processors=processors,
        seed=seed,
    )
    click.echo(" ".join(map(str, tokens[0, -length:].tolist())))


def _file_options(command: Any) -> Any:
    """The options of the commands that answer the rows of a file."""
    for decorate in (
        click.option(
            "--batch-size",
            default=400,
            show_default=True,
            type=click.IntRange(min=1),
            help="Rows at a time, a process.",
        ),
        _from_option,
        click.option("--task", required=True, metavar="TASK"),
        click.argument("output", metavar="OUT.jsonl", type=click.Path(dir_okay=False, path_type=Path)),
        click.argument("rows", metavar="IN.jsonl", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    ):
        command = decorate(command)
    return command


@cli.command()
@_file_options
@click.option("--sample", is_flag=True, help="Draw each token instead of taking the likeliest.")
@click.option("--seed", default=0, show_default=True, help="For drawing.")
def predict(rows: Path, output: Path, task: str, folder: Path, batch_size: int, sample: bool, seed: int) -> None:
    """Answer the rows of a file with the prefix of TASK.

    A line of IN.jsonl is an input row, such as [6, 2, 7, 6, 7, 5, 3, 6, 6, 10], the same line of OUT.jsonl its answer.
    OUT.jsonl appears when it is complete; if the command is cut off, the same again goes on with what is missing.
    """
    from mingpt.experiments import multistep
    from mingpt.tasks import Task

    model, prefixes, description = _load(folder)
    name, data = str(Task.parse(task)), description["data"]
    prefix = _prefix_of(prefixes, name, folder)
    step = multistep.row_step(name, prefix, data["length"], data["prefix_padding"], options={"do_sample": sample})
    plan = multistep.Plan(model, [step])
    _answer(plan, rows, output, data, batch_size, seed, lambda outputs: outputs[name])


@cli.command()
@_file_options
@click.option(
    "--constrained", is_flag=True, help="Force each answer into what is known of it: values in range, a permutation."
)
def chain(rows: Path, output: Path, task: str, folder: Path, batch_size: int, constrained: bool) -> None:
    """Answer the rows of a file in steps: each task of the composition TASK in turn, with its own prefix.

    A line of OUT.jsonl has every step's answer to the same line of IN.jsonl, such as
    {"1-SortAscending": [...], "2-Add1": [...]}. Prints which share of rows is right after each step.
    """
    from mingpt.experiments import multistep
    from mingpt.tasks import Task

    model, prefixes, description = _load(folder)
    data = description["data"]
    sizes = {name: data[name] for name in ("length", "num_digits", "prefix_padding")}
    plan = multistep.plan_from_composition(Task.parse(task), model, prefixes, **sizes, is_constrained=constrained)
    names = [step.name for step in plan.steps]

    def lines(outputs: dict[str, list[Any]]) -> list[Any]:
        return [dict(zip(names, row, strict=True)) for row in zip(*outputs.values(), strict=True)]

    examples, outputs = _answer(plan, rows, output, data, batch_size, 0, lines)
    for metric, value in multistep.measure(plan, examples, outputs).items():
        _echo(f"{metric:40} {100 * value:.2f}%")


@cli.command()
@click.argument("out", metavar="FOLDER", type=click.Path(file_okay=False, path_type=Path))
@click.option("--task", "tasks", multiple=True, metavar="TASK", help="Whose prefix to export; may be repeated. [all]")
@_from_option
def export(out: Path, tasks: tuple[str, ...], folder: Path) -> None:
    """Write the model for transformers into FOLDER/model, and each prefix for PEFT into FOLDER/TASK."""
    from mingpt.storage.huggingface import export_peft, to_huggingface
    from mingpt.tasks import Task

    model, prefixes, _ = _load(folder)
    chosen = {
        name: _prefix_of(prefixes, name, folder) for name in [str(Task.parse(task)) for task in tasks or prefixes]
    }
    if out.exists():
        raise click.UsageError(f"{out} exists; remove it or choose another folder")
    to_huggingface(model).save_pretrained(out / "model")
    for name, prefix in chosen.items():
        export_peft(model, prefix, out / name)
    click.echo(f"GPT2LMHeadModel.from_pretrained({str(out / 'model')!r}) reads the model")
    click.echo(f"PeftModel.from_pretrained(model, {str(out / next(iter(chosen), 'TASK'))!r}) adds a prefix")


@cli.command("tasks")
def list_tasks() -> None:
    """List the tasks, each with a sample row."""
    from mingpt.datasets import CustomDataset
    from mingpt.tasks import SIMPLE_TASKS

    for task in SIMPLE_TASKS:
        inputs, solutions = CustomDataset("train", [task]).rows([0])
        meaning = (type(task).__doc__ or "").splitlines()[0]
        click.echo(f"{task!s:20} {meaning}")
        click.echo(f"{'':20} {_row(inputs[0])}  ->  {_row(solutions[0])}")
    click.echo('\nTasks compose: "SortAscending+Add1" sorts, then adds.')


@cli.command("config")
@_run_options
def show_config(preset: str, out: Path | None, seed: int, overrides: tuple[str, ...]) -> None:
    """Print a run's settings, as --set changes them."""
    click.echo(str(_config(preset, seed, overrides)), nl=False)


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def inspect(file: Path) -> None:
    """Print what a checkpoint FILE says of itself, and its tensors."""
    from mingpt.storage.checkpoint import load_checkpoint

    tensors, description = load_checkpoint(file)
    description.pop("state", None)  # a trainer's bookkeeping
    click.echo(json.dumps(description, indent=2))
    for name, tensor in tensors.items():
        click.echo(f"{name:48} {str(tensor.dtype).removeprefix('torch.'):10} {tuple(tensor.shape)}")


def _answer(
    plan: Any, rows: Path, output: Path, data: dict[str, Any], batch_size: int, seed: int, lines: Any
) -> tuple[list[list[int]], dict[str, list[Any]]]:
    """Lead a file's rows through a plan and write ``lines(outputs)``; a folder beside it has what is done before."""
    from mingpt import distributed
    from mingpt.experiments import multistep
    from mingpt.storage.checkpoint import json_lines, write_atomic

    if distributed.run_on_main(output.exists):
        raise click.UsageError(f"{output} exists; remove it or choose another file")
    examples = distributed.run_on_main(lambda: _read_rows(rows, data["length"], plan.model.config.vocab_size))
    folder = output.with_name(output.name + ".steps")
    outputs = multistep.predict(plan, examples, batch_size, seed=seed, folder=folder)

    def write() -> None:
        write_atomic(output, json_lines(lines(outputs)))
        shutil.rmtree(folder)

    distributed.run_on_main(write)
    return examples, outputs


def _read_rows(path: Path, length: int, vocab_size: int) -> list[list[int]]:
    """The rows of a file, checked."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        is_row = isinstance(row, list) and len(row) == length
        if not (is_row and all(type(value) is int and 0 <= value < vocab_size for value in row or ())):
            raise click.UsageError(
                f"line {number} of {path} must be a JSON list of {length} integers from 0 to {vocab_size - 1}, "
                f"got {line!r}"
            )
        rows.append(row)
    return rows


def _echo(text: str) -> None:
    """Print on the main process."""
    from mingpt import distributed

    if distributed.is_main():
        click.echo(text)


def _load(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from mingpt.storage import weights

    path = folder / "model.safetensors"
    if not path.exists():
        raise click.UsageError(f"no model in {folder}; run 'mingpt reproduce' and give --from runs/laptop")
    model, description = weights.load_model(path)
    file = folder / "prefixes.safetensors"
    prefixes = weights.load_prefixes(file, model)[0] if file.exists() else {}
    return model, prefixes, description


def _prefix_of(prefixes: dict[str, Any], task: str, folder: Path) -> Any:
    if task not in prefixes:
        raise click.UsageError(f"no prefix for {task} in {folder}; there is one for {', '.join(prefixes) or 'none'}")
    return prefixes[task]


def _percent(score: Any) -> str:
    low, high = score.confidence_interval
    return (
        f"{score.n_correct}/{score.n_rows} = {100 * score.accuracy:.2f}% "
        f"(95% interval {100 * low:.2f} - {100 * high:.2f})"
    )


def _row(values: Any) -> str:
    return " ".join(f"{value:>2}" for value in values)
