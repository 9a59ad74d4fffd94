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
import shlex
import shutil
import signal
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import torch
from safetensors import SafetensorError

from mingpt import distributed, lab
from mingpt.analysis.figures import save_figure
from mingpt.datasets import CustomDataset
from mingpt.decoding.automata import DFA
from mingpt.decoding.constraints import MonotoneConstraint, MultisetConstraint, RegularConstraint
from mingpt.evaluation import Score, evaluate
from mingpt.experiments import multistep, pipeline, reproduction
from mingpt.experiments.language_model import pretrain_language_model
from mingpt.experiments.predictor import json_lines
from mingpt.experiments.presets import run_config
from mingpt.experiments.sweep import Study, run_packs, run_study
from mingpt.huggingface.adapters import load_causal_lm, load_peft, without_progress_bar
from mingpt.huggingface.analysis import analyze as analyze_adapter
from mingpt.huggingface.analysis import read_rows
from mingpt.huggingface.comparison import MAX_EXAMPLES, compare
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.storage import huggingface
from mingpt.storage.checkpoint import load_checkpoint
from mingpt.storage.files import locked, naming, scratch_folder, write_atomic
from mingpt.storage.runs import OWN_RUN, STORED_RUN, default_run, list_runs, run_status, writable_run
from mingpt.tasks import PRETRAINING_TASKS, SIMPLE_TASKS, Task, Values
from mingpt.trainer import DivergedError
from mingpt.utils import CfgNode

_CONSTRAINTS = {
    "sorted": MonotoneConstraint(),
    "descending": MonotoneConstraint(is_descending=True),
    "permutation": MultisetConstraint(),
}


def main() -> None:
    """Run the command line.

    A mistake gives one line and exit code 2, a training that diverges 1, a signal to stop 128 and its number.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def stop(number: int, frame: object) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
        logging.basicConfig(format="%(message)s", level=logging.INFO if _is_main() else logging.WARNING)
        sys.exit(cli(standalone_mode=False, prog_name="mingpt"))
    except (click.Abort, KeyboardInterrupt):
        _stop(received[0] if received else signal.SIGINT)
    except DivergedError as error:
        _echo(f"error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (click.ClickException, ImportError, ValueError, OSError, distributed.OtherProcessError) as error:
        if received:  # native code that a signal's exception went through has made another one of it
            _stop(received[0])
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        text = re.sub(r"^\[Errno \d+\] ", "", text)
        if isinstance(error, ImportError) and error.name in ("transformers", "peft"):
            text += "; pip install 'mingpt-prefix-tuning[hf]'"
        if isinstance(error, click.UsageError) and error.ctx:
            text += f" (see {error.ctx.command_path} --help)"
        _echo(f"error: {' '.join(text.splitlines())}", err=True)  # on the main process, also for another one's error
        sys.exit(2)
    except RuntimeError as error:
        if not re.search("gloo|NCCL", str(error)):
            raise
        _echo(f"error: contact with another process is lost: {str(error).splitlines()[0]}", err=True)
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int) -> NoReturn:
    """Say that a signal has ended the command, and how to go on."""
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}.get(signal.Signals(number), "hung up")
    _echo(f"{word}; what was saved is kept, and the same command goes on from it", err=True)
    sys.exit(128 + number)


# ------------------------------------------------------------------------------------------------ shared options


def _all_of(*options: Callable) -> Callable:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def _import(context: click.Context, parameter: click.Parameter, names: Sequence[str]) -> None:
    """Import files under their stems, or modules that Python finds, also in the current folder."""
    for name in names:
        path, is_file = Path(name), name.endswith(".py")
        if path.is_file() != is_file:
            raise click.UsageError(
                f"cannot import {name}: " + ("there is no such file" if is_file else "it is no .py file")
            )
        sys.path.insert(0, str(path.parent.resolve()) if is_file else "")
        try:
            module = importlib.import_module(path.stem if is_file else name)
            context.meta.setdefault("imported", {})[name] = module.__name__
        except Exception as error:
            raise click.UsageError(f"cannot import {name}: {type(error).__name__}: {error}") from None
        if not is_file and module.__spec__ and not module.__spec__.has_location:
            raise click.UsageError(f"cannot import {name}: it is no module with a file")
        if is_file and Path(module.__file__ or "").resolve() != path.resolve():
            raise click.UsageError(f"cannot import {name}: another module is named {path.stem}; rename the file")


def _parse_tasks(context: click.Context, parameter: click.Parameter, names: Sequence[str]) -> list[Task]:
    return [Task.parse(name) for name in names]


class _Path(click.Path):
    """A path that may be there, or can be made."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Any = super().convert(value, param, ctx)
        for folder in path.parents:
            if folder.exists() and not folder.is_dir():
                self.fail(f"{path} cannot be: {folder} is a file, and no folder.", param, ctx)
        return path


_FILE = _Path(dir_okay=False, path_type=Path)
_FOLDER = _Path(file_okay=False, path_type=Path)
_RUN_HELP = "The run's folder. [of a new run runs/PRESET, else the newest of runs/ or checkpoints/laptop]"
_SET_HELP = "Change a setting, such as trainer.max_iters=2000; may be repeated. 'mingpt config' lists them."
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
_wait_option = click.option("--wait", is_flag=True, help="Wait for another process that writes there.")
_studies_option = click.option(
    "--study", "studies", multiple=True, metavar="FOLDER", type=_FOLDER, help="With results.csv. [all in studies/]"
)
_ANALYSIS_HELP = "With what 'mingpt analyze --json' printed, for the view Adapters; may be repeated."
_analyses_option = click.option(
    "--analysis", "analyses", multiple=True, metavar="FILE", type=_FILE, help=_ANALYSIS_HELP
)
_load_options = _all_of(
    click.option("--run", metavar="FOLDER", type=_FOLDER, help=_RUN_HELP),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. [auto]"),
)
_train_options = _all_of(
    _load_options,
    click.option("--preset", metavar="NAME", help="smoke, laptop, thorough, seed or text. [the run's, or laptop]"),
    click.option("--seed", type=int, help="For the data and the initial weights. [the run's, or 0]"),
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=_SET_HELP),
)
_sampling_options = _all_of(
    click.option("--sample", is_flag=True, help="Sample each token instead of taking the most likely."),
    click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Of sampling. [1.0]"),
    click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K most likely tokens only."),
    click.option("--seed", default=0, help="Of sampling."),
)
_file_options = _all_of(
    click.argument("rows", metavar="IN.jsonl", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    click.argument("output", metavar="OUT.jsonl", type=_FILE),
    _load_options,
    click.option("--batch-size", default=400, type=click.IntRange(min=1), help="Rows per process."),
    _wait_option,
)


def _configure(
    run: Path | None,
    preset: str | None,
    seed: int | None,
    overrides: Sequence[str],
    device: str | None,
    is_new: bool,
    is_written: bool = False,
) -> tuple[CfgNode, Path]:
    """The configuration and the folder that the options of a training command mean. Nothing is written yet."""
    if device is not None:
        distributed.resolve_device(device)
        overrides = [*overrides, f"trainer.device={device}", f"prefix.device={device}"]
    folder = _folder(run, preset or ("laptop" if is_new else None), is_written)
    return run_config(folder, preset, seed, overrides), folder


@contextlib.contextmanager
def _training(wait: bool, **options: Any) -> Iterator[tuple[CfgNode, Path]]:
    """``_configure``, with the lock of the run's folder held meanwhile. The stored run is copied unless it is named."""
    _, run = _configure(**options, is_written=True)  # a mistake in the options shows before anything is written
    if options["run"] is None:
        run = writable_run(run, wait)
    with locked(run / ".lock", wait):
        options["run"] = run
        yield _configure(**options)  # again: who held the lock may have written it


def _load(run: Path | None, device: str | None) -> tuple[GPT, dict[str, Prefix], dict[str, Any], Path]:
    """The model, the prefixes by name, the description of the model's data, and the run's folder."""
    folder = _folder(run)
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"no model in {folder}; 'mingpt reproduce' makes one, --run FOLDER names another run")
    model, prefixes, description = pipeline.load_run(folder, device or "auto")
    return model, prefixes, description["data"], folder


def _folder(run: Path | None, new: str | None = None, is_written: bool = False) -> Path:
    """The folder of the run that was asked for; else, and then it is said which, that of a new run or of the newest."""
    if run is None:
        run = Path("runs", new) if new else distributed.run_on_main(default_run) or OWN_RUN
        is_copied = is_written and run == STORED_RUN
        _echo(f"run: {OWN_RUN}, which starts as a copy of {run}" if is_copied else f"run: {run}", err=True)
    return run


def _find_prefix(prefixes: dict[str, Prefix], name: str, run: Path) -> tuple[str, Prefix]:
    """The prefix of a task, or one of several of it by its name, such as Add1-1a2b3c4d."""
    found = name if name in prefixes else str(Task.parse(name))
    if found not in prefixes:
        context = click.get_current_context()
        options = f" --run {run}" if context.params.get("run") else ""
        options += "".join(f" --import {each}" for each in context.meta.get("imported", {}))
        command, known = f"mingpt prefix '{found}'{options}", ", ".join(prefixes) or "none"
        raise ValueError(f"no prefix for {found} in {run}; there is one for {known}; {command} makes it")
    return found, prefixes[found]


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling options out of a command's, as ``generate`` has them."""
    sample, temperature, top_k = (options.pop(name) for name in ("sample", "temperature", "top_k"))
    if not sample and (temperature or top_k):
        raise click.UsageError("--temperature and --top-k are for sampling; give --sample too")
    return {"do_sample": sample, "temperature": temperature or 1.0, "top_k": top_k}


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
@click.argument("tasks", nargs=-1, callback=_parse_tasks, metavar="[TASK]...")
@_train_options
@_wait_option
@_json_option
def reproduce(tasks: list[Task], as_json: bool, **options: Any) -> None:
    """Pretrain a model, train a prefix for each TASK, and evaluate them all.

    Without a TASK it is the sixteen tasks. Prints the table beside the published figures; the folder gets the
    checkpoints, results.json and figures. The same command again goes on from what was saved, or says that it is done.
    """
    with _training(**options, is_new=True) as (config, run):
        results = reproduction.reproduce(config, run, tasks or None)
    _echo_result(results, reproduction.format_table(results), as_json)
    _echo(f"figures and checkpoints are in {run}", err=True)


@cli.command()
@click.argument("tasks", nargs=-1, callback=_parse_tasks, metavar="[TASK]...")
@_train_options
@_wait_option
def pretrain(tasks: list[Task], **options: Any) -> None:
    """Only pretrain the model, the first stage of 'reproduce', on each TASK. [seven tasks]

    With --preset text it is the small language model, on Python's documentation and demonstrations of text tasks.
    """
    with _training(**options, is_new=True) as (config, run):
        if config.preset == "text" and tasks:
            raise click.UsageError("the language model of preset text is for its own tasks; leave TASK out")
        if config.preset == "text":
            pretrain_language_model(config, run)
        else:
            pipeline.pretrain(config, run, tasks or PRETRAINING_TASKS, pipeline.EVERY_TASK)
    _echo(f"the model is {run / 'model.safetensors'}")


@cli.command()
@click.argument("tasks", nargs=-1, required=True, callback=_parse_tasks, metavar="TASK...")
@_train_options
@_wait_option
@click.option("--kind", type=click.Choice(["activation", "key_value", "prompt"]), default="key_value")
@_json_option
def prefix(tasks: list[Task], kind: str, as_json: bool, **options: Any) -> None:
    """Train a prefix for each TASK and evaluate it.

    A TASK is any expression of tasks, such as SortAscending+Add1. The model is the run's, pretrained first if need be.
    Without --run and without a run in runs/, the run is runs/laptop, which starts as a copy of checkpoints/laptop.
    """
    with _training(**options, is_new=False) as (config, run):
        model, _ = pipeline.pretrain(config, run)
        prefixes, seconds = pipeline.train_prefixes(config, model, tasks, run, kind=kind)
    scores, n_rows, precision = {}, config.evaluation.n_rows, config.evaluation.precision
    for name, data in ((str(task), pipeline.dataset(config, "test", [task])) for task in tasks):
        scores[name] = evaluate(model, data, prefixes[name], n_rows, precision=precision)
    _echo_scores(scores, as_json)
    _echo(f"the prefixes are in {run / 'prefixes'}, trained in {seconds:.0f} s", err=True)


@cli.command()
@click.argument("file", metavar="STUDY.toml|status")
@click.option("--processes", type=click.IntRange(min=1), help="On this machine, or of Slurm. [one for each core]")
@click.option("--slurm", metavar="KEY=VALUE,...", help="Submit to Slurm, such as timeout_min=240,slurm_partition=long.")
@click.option("--worker", is_flag=True, help="Compute what no other process computes, and write no table.")
@_json_option
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
        _echo_result(states, "\n".join(text) or "no studies/*.toml here", as_json)
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
    _echo_result(results.to_dict("records"), table.to_string(float_format="{:.2f}".format), as_json)
    _echo(f"all cells are in {study.folder / 'results.csv'}", err=True)


@cli.command("eval")
@click.argument("names", nargs=-1, metavar="[TASK]...")
@_load_options
@click.option("--without-prefix", is_flag=True, help="The model alone.")
@click.option("--rows", default=3200, type=click.IntRange(min=1), help="Test rows for each task.")
@_json_option
def evaluate_command(names: tuple[str, ...], without_prefix: bool, rows: int, as_json: bool, **options: Any) -> None:
    """Evaluate each TASK, or every prefix of the run."""
    model, prefixes, data, run = _load(**options)
    known = [name for name in prefixes if pipeline.find_task(name)]
    for name in [] if names else sorted(prefixes.keys() - set(known)):
        _echo(f"{name} is left out: no such task is known; --import its file", err=True)
    chosen = dict((name, None) if without_prefix else _find_prefix(prefixes, name, run) for name in names or known)
    if not chosen:
        raise ValueError(f"no prefixes in {run}; 'mingpt prefix TASK' makes one")
    sets = {name: CustomDataset.from_description(data, split="test", tasks=[pipeline.task_of(name)]) for name in chosen}
    _echo_scores({name: evaluate(model, sets[name], prefix, rows) for name, prefix in chosen.items()}, as_json)


@cli.command()
@click.argument("row")
@click.option("--task", metavar="TASK", help="Whose prefix to use; without it the model is alone.")
@_load_options
@_sampling_options
@click.option("--regex", metavar="EXPRESSION", help='What the answer must match, such as "1* (2|3)+ [4-9]*".')
@click.option("--constraint", "constraints", multiple=True, type=click.Choice(list(_CONSTRAINTS)))
def generate(
    row: str, task: str | None, seed: int, regex: str | None, constraints: tuple[str, ...], **options: Any
) -> None:
    """Answer one input ROW, such as "6 2 7 6 7 5 3 6 6 10".

    With --regex or --constraint only an answer that satisfies it can come out, whatever the model knows.
    """
    sampling = _sampling(options)
    model, prefixes, data, run = _load(**options)
    length, vocab_size = data["length"], model.config.vocab_size
    values = _read_row(row, "the row", length, vocab_size)
    processors: list[Any] = [_CONSTRAINTS[name] for name in constraints]
    if regex is not None:
        processors.append(RegularConstraint(DFA.from_regex(regex, vocab_size)))
    name, prefix = (None, None) if task is None else _find_prefix(prefixes, task, run)
    tasks = [pipeline.find_task(each) for each in ([name] if name else data["tasks"])]
    if name and tasks[0]:
        _check_defined(tasks[0], values, "the row")
    _warn_of_new_rows([values], tasks, data["num_digits"])
    prompt = torch.tensor([[0] * data["prefix_padding"] + values], device=model.device)
    tokens = model.generate(prompt, length, prefixes=prefix, logits_processors=processors, seed=seed, **sampling)
    _echo(" ".join(map(str, tokens[0, -length:].tolist())))


@cli.command()
@_file_options
@click.option("--task", required=True, metavar="TASK", help="Whose prefix to use.")
@_sampling_options
def predict(rows: Path, output: Path, task: str, batch_size: int, wait: bool, seed: int, **options: Any) -> None:
    """Answer the rows of a file with the prefix of TASK.

    A line of IN.jsonl is an input row, such as [6, 2, 7, 6, 7, 5, 3, 6, 6, 10], the same line of OUT.jsonl its answer.
    OUT.jsonl appears when it is complete; if the command is cut off, the same again goes on with what is missing.
    """
    sampling = _sampling(options)
    model, prefixes, data, run = _load(**options)
    name, prefix = _find_prefix(prefixes, task, run)
    step = multistep.row_step(name, prefix, data["length"], data["prefix_padding"], options=sampling)
    plan = multistep.Plan(model, [step])
    _answer(plan, pipeline.task_of(name), data["num_digits"], rows, output, batch_size, wait, seed)


@cli.command()
@_file_options
@click.option("--task", "name", required=True, metavar="TASK", help="The composition.")
@click.option("--constrained", is_flag=True, help="Force each answer into its range, or into a permutation.")
@_json_option
def chain(name: str, constrained: bool, as_json: bool, run: Path | None, device: str | None, **files: Any) -> None:
    """Answer the rows of a file in steps: each task of the composition TASK in turn, with its own prefix.

    A line of OUT.jsonl has every step's answer to the same line of IN.jsonl, such as
    {"1-SortAscending": [...], "2-Add1": [...]}. Prints which share of rows is right after each step.
    """
    task = Task.parse(name)
    model, prefixes, data, _ = _load(run, device)
    sizes = {name: data[name] for name in ("length", "num_digits", "prefix_padding")}
    plan = multistep.plan_from_composition(task, model, prefixes, **sizes, is_constrained=constrained)
    metrics = _answer(plan, task, data["num_digits"], **files, is_chain=True)
    accuracies = {name.removeprefix("test-").removesuffix("_accuracy"): value for name, value in metrics.items()}
    lines = [f"{name:24} {value:.2%} of rows are right" for name, value in accuracies.items()]
    _echo_result(accuracies, "\n".join(lines), as_json)


@cli.command()
@click.argument("out", metavar="OUT", type=_FOLDER)
@click.option("--task", "tasks", multiple=True, metavar="TASK", help="Whose prefix to export; may be repeated. [all]")
@_load_options
@_wait_option
def export(out: Path, tasks: tuple[str, ...], wait: bool, **options: Any) -> None:
    """Write the model for transformers into OUT/model, and each prefix for PEFT into OUT/TASK."""
    importlib.import_module("peft")  # it may be missing, and transformers with it: better now than half way
    folder = out.with_name(f".{out.name}.partial")
    with locked(folder / ".lock", wait):
        if distributed.run_on_main(out.exists):
            raise ValueError(f"{out} exists; remove it or choose another folder")
        model, prefixes, _, run = _load(**options)
        chosen = dict(_find_prefix(prefixes, name, run) for name in tasks or prefixes)
        if _is_main():
            shutil.rmtree(folder / "all", ignore_errors=True)  # of an export that was cut off
            try:
                with naming(folder), without_progress_bar():
                    huggingface.to_huggingface(model).save_pretrained(folder / "all" / "model")
                    for name, prefix in chosen.items():
                        huggingface.export_peft(model, prefix, folder / "all" / name)
                    (folder / "all").rename(out)
            except SafetensorError as error:
                raise OSError(str(error)) from None
            finally:
                shutil.rmtree(folder / "all", ignore_errors=True)
    _echo(f"GPT2LMHeadModel.from_pretrained({str(out / 'model')!r}) reads the model")
    _echo(f"PeftModel.from_pretrained(model, {str(out / next(iter(chosen), 'TASK'))!r}) adds a prefix")


@cli.command()
@click.argument("model", metavar="MODEL", type=_FOLDER)
@click.argument("adapter", metavar="ADAPTER", type=_FOLDER)
@click.option("--text", required=True, type=_FILE, help="What to read: text, or token ids as JSON in each line.")
@click.option("--rows", default=16, type=click.IntRange(min=1), help="The most rows of the text.")
@click.option("--length", default=128, type=click.IntRange(min=2), help="Tokens in a row.")
@click.option("--examples", type=_FILE, help=f"Other rows, to compare with; the first {MAX_EXAMPLES:,} are used.")
@click.option("--demonstrations", type=click.IntRange(min=0), help="Examples before a row. [those that fit, at most 8]")
@click.option("--lora-iters", type=click.IntRange(min=0), help="Iterations of the LoRA on the examples. [200]")
@click.option("--score-last", type=click.IntRange(min=1), help="Compare on a row's last tokens. [all but the first]")
@click.option("--figures", metavar="FOLDER", type=_FOLDER, help="Write heatmaps by layer and head there.")
@click.option("--page", metavar="FILE", type=_FILE, help="Write all of it as one HTML file, such as analysis.html.")
@click.option("--device", metavar="NAME", default="cpu", help="auto, cpu, cuda or cuda:N.")
@_json_option
def analyze(
    model: Path,
    adapter: Path,
    text: Path,
    rows: int,
    length: int,
    examples: Path | None,
    demonstrations: int | None,
    lora_iters: int | None,
    score_last: int | None,
    figures: Path | None,
    page: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure what ADAPTER does to MODEL on a text, in each layer and head.

    MODEL is a folder that transformers wrote, ADAPTER one that PEFT wrote: prefix tuning, a cartridge, prompt tuning,
    or LoRA and the like. Nothing is fetched. Text is read by the model's own tokenizer; where its folder has none, each
    line of the file is a row of token ids, such as [6, 2, 7].

    With --examples the adapter's gain is compared with that of examples in the context, and of a LoRA trained on them:
    an adapter that only elicits what the model knows can be replaced by demonstrations.
    """
    given = {"n_demonstrations": demonstrations, "lora_iters": lora_iters, "n_scored": score_last}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not examples:
        raise click.UsageError("--demonstrations, --lora-iters and --score-last are for --examples; give it too")
    for path in (model, adapter, text, examples or text):
        if not path.exists():
            raise click.UsageError(f"there is no {path}; expected MODEL and ADAPTER, which are folders, and a text")
    lm = load_causal_lm(model, distributed.resolve_device(device))
    found = load_peft(adapter, lm)
    room = lm.block_size - (found.prefix.n_positions if found.prefix else 0)
    x = read_rows(text, model, rows, min(length, room)).to(lm.device)
    result = analyze_adapter(lm, found, x)
    if examples:
        own = read_rows(examples, model, MAX_EXAMPLES, min(length, room)).to(lm.device)
        result = result._replace(comparison=compare(lm, found, x, own, **given))
    _echo_result(result.to_dict(), result.table(), as_json)
    if found.base and Path(found.base).name != model.resolve().name:
        _echo(f"the adapter names {found.base} as its base; that {model} is this model was not checked", err=True)
    if figures and _is_main():
        for name, figure in result.figures().items():
            save_figure(figure, figures / f"{name}.png")
        _echo(f"figures are in {figures}", err=True)
    if page and _is_main():
        lab.write_analysis(result, page, shlex.join(["mingpt", *sys.argv[1:]]))
        _echo(f"{page}, {page.stat().st_size / 1e3:.0f} kB; open it in a browser", err=True)


@cli.command("report")
@click.option("--run", metavar="FOLDER", type=_FOLDER, help=_RUN_HELP)
@click.option("--out", metavar="FILE", type=_FILE, default="lab.html", help="The page.")
@_studies_option
@_analyses_option
@click.option("--half", "use_half", is_flag=True, help="float16 weights: half the size, a few other answers.")
def write_lab_page(
    run: Path | None, out: Path, studies: tuple[Path, ...], analyses: tuple[Path, ...], use_half: bool
) -> None:
    """Write the lab page of a run: one HTML file in which its model answers, and its prefixes can be mixed."""
    lab.write_report(_folder(run), out, _studies(studies), use_half, analyses)
    _echo(f"{out}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


@cli.command("lab")
@click.option("--run", metavar="FOLDER", type=_FOLDER, help=_RUN_HELP)
@_studies_option
@_analyses_option
@click.option("--port", type=click.IntRange(0, 65535), help="Of 127.0.0.1. [any free one]")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def open_lab(
    run: Path | None, studies: tuple[Path, ...], analyses: tuple[Path, ...], port: int | None, no_browser: bool
) -> None:
    """Open the lab page of a run in the browser; its curves grow while the run is trained."""
    with lab.LabServer(_folder(run), _studies(studies), port or 0, analyses) as server:
        server.page()  # before a browser waits for it
        _echo(f"{server.url}\nCtrl-C ends it")
        if not no_browser:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _studies(folders: Sequence[Path]) -> list[Path]:
    """These folders of studies, or else those in the current folder that have results."""
    for folder in folders:
        if not (folder / "results.csv").is_file():
            raise click.UsageError(f"no results.csv in {folder}; 'mingpt sweep {folder}.toml' makes it")
    return list(folders) or [path.parent for path in sorted(Path("studies").glob("*/results.csv"))]


@cli.command("runs")
@click.option("--run", metavar="FOLDER", type=_FOLDER, help="Only this one. [all in runs/ and checkpoints/]")
@_json_option
def show_runs(run: Path | None, as_json: bool) -> None:
    """List the runs, those that changed last first."""
    if run is not None and not run.is_dir():
        raise click.UsageError(f"there is no folder {run}; without --run all runs are listed")
    runs = [each._asdict() for each in (list_runs() if run is None else [run_status(run)])]
    line = "{path!s:24} {state:32} {preset}, seed {seed}, changed {changed:%Y-%m-%d %H:%M}"
    lines = [line.format_map(each) for each in runs] or ["no runs; 'mingpt reproduce' makes one"]
    _echo_result(runs, "\n".join(lines), as_json)


@cli.command("tasks")
@_json_option
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
    _echo_result(found, "\n".join([*lines, *with_parameters, "", text]), as_json)


@cli.command("config")
@_train_options
def show_config(**options: Any) -> None:
    """Print a run's settings, as --set changes them."""
    _echo(str(_configure(**options, is_new=False)[0]).rstrip())


@cli.command()
@click.argument("file", type=_FILE)
def inspect(file: Path) -> None:
    """Print what a checkpoint FILE says of itself, and its tensors."""
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
    examples = distributed.run_on_main(lambda: _read_rows(rows, task, length, vocab_size))
    _warn_of_new_rows(examples, [task], num_digits, rows)
    folder = output.with_name(output.name + ".steps")
    with scratch_folder(folder, wait):
        if not distributed.run_on_main(output.exists):  # else what is in the folder is of a command that was cut off
            outputs = multistep.predict(plan, examples, batch_size, seed=seed, folder=folder)
            metrics = multistep.evaluate(plan, examples, outputs)
            columns = list(outputs.values())
            chains = [dict(zip(outputs, row, strict=True)) for row in zip(*columns, strict=True)]
            if _is_main():
                write_atomic(output, json_lines(chains if is_chain else columns[0]))
            return metrics
    raise ValueError(f"{output} exists; remove it or choose another file")


def _read_rows(path: Path, task: Task, length: int, vocab_size: int) -> list[list[int]]:
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
        _echo(f"warning: {what}: training had only rows of {ranges}, so the answer may be anything", err=True)


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


def _is_main() -> bool:
    """Whether this process prints. Unlike ``distributed.is_main`` it does not wait for the other processes."""
    return os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ


def _echo(text: str, err: bool = False) -> None:
    """Print on the main process."""
    if _is_main():
        click.echo(text, err=err)


def _echo_result(values: Any, text: str, as_json: bool) -> None:
    """Print a command's results, as JSON or as text."""
    _echo(json.dumps(values, indent=1, default=str) if as_json else text)


def _echo_scores(scores: dict[str, Score], as_json: bool) -> None:
    line = "{:24} {}/{} = {:.2%} (95% interval {:.2%} - {:.2%})"
    lines = [line.format(k, s.n_correct, s.n_rows, s.accuracy, *s.confidence_interval) for k, s in scores.items()]
    _echo_result({name: score.to_dict() for name, score in scores.items()}, "\n".join(lines), as_json)
