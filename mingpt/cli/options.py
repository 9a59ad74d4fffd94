"""The options that several commands share, and what they come to: a run, its configuration, its model and prefixes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from mingpt import distributed
from mingpt.cli.output import echo
from mingpt.experiments import pipeline
from mingpt.experiments.presets import run_config
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.storage.files import locked
from mingpt.storage.runs import OWN_RUN, STORED_RUN, default_run, writable_run
from mingpt.tasks import Task
from mingpt.utils import CfgNode


def all_of(*options: Callable) -> Callable:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def import_tasks(context: click.Context, parameter: click.Parameter, names: Sequence[str]) -> None:
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


def parse_tasks(context: click.Context, parameter: click.Parameter, names: Sequence[str]) -> list[Task]:
    return [Task.parse(name) for name in names]


class NewPath(click.Path):
    """A path that may be there, or can be made."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Any = super().convert(value, param, ctx)
        for folder in path.parents:
            if folder.exists() and not folder.is_dir():
                self.fail(f"{path} cannot be: {folder} is a file, and no folder.", param, ctx)
        return path


FILE = NewPath(dir_okay=False, path_type=Path)
FOLDER = NewPath(file_okay=False, path_type=Path)
RUN_HELP = "The run's folder. [of a new run runs/PRESET, else the newest of runs/ or checkpoints/laptop]"
_SET_HELP = "Change a setting, such as trainer.max_iters=2000; may be repeated. 'mingpt config' lists them."
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
wait_option = click.option("--wait", is_flag=True, help="Wait for another process that writes there.")
studies_option = click.option(
    "--study", "studies", multiple=True, metavar="FOLDER", type=FOLDER, help="With results.csv. [all in studies/]"
)
_ANALYSIS_HELP = "With what 'mingpt analyze --json' printed, for the view Adapters; may be repeated."
analyses_option = click.option("--analysis", "analyses", multiple=True, metavar="FILE", type=FILE, help=_ANALYSIS_HELP)
load_options = all_of(
    click.option("--run", metavar="FOLDER", type=FOLDER, help=RUN_HELP),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. [auto]"),
)
train_options = all_of(
    load_options,
    click.option("--preset", metavar="NAME", help="smoke, laptop, thorough, seed or text. [the run's, or laptop]"),
    click.option("--seed", type=int, help="For the data and the initial weights. [the run's, or 0]"),
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=_SET_HELP),
)
sampling_options = all_of(
    click.option("--sample", is_flag=True, help="Sample each token instead of taking the most likely."),
    click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Of sampling. [1.0]"),
    click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K most likely tokens only."),
    click.option("--seed", default=0, help="Of sampling."),
)
file_options = all_of(
    click.argument("rows", metavar="IN.jsonl", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    click.argument("output", metavar="OUT.jsonl", type=FILE),
    load_options,
    click.option("--batch-size", default=400, type=click.IntRange(min=1), help="Rows per process."),
    wait_option,
)


def configure(
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
    folder = folder_of(run, preset or ("laptop" if is_new else None), is_written)
    return run_config(folder, preset, seed, overrides), folder


@contextlib.contextmanager
def training(wait: bool, **options: Any) -> Iterator[tuple[CfgNode, Path]]:
    """``configure``, with the lock of the run's folder held meanwhile. The stored run is copied unless it is named."""
    _, run = configure(**options, is_written=True)  # a mistake in the options shows before anything is written
    if options["run"] is None:
        run = writable_run(run, wait)
    with locked(run / ".lock", wait):
        options["run"] = run
        yield configure(**options)  # again: who held the lock may have written it


def load(run: Path | None, device: str | None) -> tuple[GPT, dict[str, Prefix], dict[str, Any], Path]:
    """The model, the prefixes by name, the description of the model's data, and the run's folder."""
    folder = folder_of(run)
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"no model in {folder}; 'mingpt reproduce' makes one, --run FOLDER names another run")
    model, prefixes, description = pipeline.load_run(folder, device or "auto")
    return model, prefixes, description["data"], folder


def folder_of(run: Path | None, new: str | None = None, is_written: bool = False) -> Path:
    """The folder of the run that was asked for; else, and then it is said which, that of a new run or of the newest."""
    if run is None:
        run = Path("runs", new) if new else distributed.run_on_main(default_run) or OWN_RUN
        is_copied = is_written and run == STORED_RUN
        echo(f"run: {OWN_RUN}, which starts as a copy of {run}" if is_copied else f"run: {run}", err=True)
    return run


def find_prefix(prefixes: dict[str, Prefix], name: str, run: Path) -> tuple[str, Prefix]:
    """The prefix of a task, or one of several of it by its name, such as Add1-1a2b3c4d."""
    found = name if name in prefixes else str(Task.parse(name))
    if found not in prefixes:
        context = click.get_current_context()
        options = f" --run {run}" if context.params.get("run") else ""
        options += "".join(f" --import {each}" for each in context.meta.get("imported", {}))
        command, known = f"mingpt prefix '{found}'{options}", ", ".join(prefixes) or "none"
        raise ValueError(f"no prefix for {found} in {run}; there is one for {known}; {command} makes it")
    return found, prefixes[found]


def sampling_of(options: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling options out of a command's, as ``generate`` has them."""
    sample, temperature, top_k = (options.pop(name) for name in ("sample", "temperature", "top_k"))
    if not sample and (temperature or top_k):
        raise click.UsageError("--temperature and --top-k are for sampling; give --sample too")
    return {"do_sample": sample, "temperature": temperature or 1.0, "top_k": top_k}
