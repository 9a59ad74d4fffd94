"""Pages that are one HTML file each: the lab page of a run, and that of an analysis.

A lab page has the model, its prefixes and everything that was measured of them. It computes by itself, see
``static/model.js``: the weights are in it as float32, so its answers are the run's.
"""

from __future__ import annotations

import base64
import csv
import html
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mingpt
from mingpt.datasets import CustomDataset
from mingpt.evaluation import accuracy_matrix, evaluate
from mingpt.experiments.pipeline import EVERY_TASK, KINDS, find_task, load_run
from mingpt.experiments.presets import run_config
from mingpt.experiments.reproduction import check_results
from mingpt.huggingface.analysis import Analysis
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.storage.cache import read_cached_json
from mingpt.storage.checkpoint import weights_hash
from mingpt.storage.files import parsing, read_json, write_atomic
from mingpt.storage.weights import load_prefix, load_prefixes
from mingpt.tasks import Task
from mingpt.training.metrics import read_metrics, validation_curves

logger = logging.getLogger("mingpt")

STATIC = Path(__file__).with_name("static")

_VIEWS = ["ask", "mix", "look", "matrix", "curves", "about"]
MODULES = ["model", "prefix", "tasks", "data", "dom", "charts", *_VIEWS, "app"]
"""The lab page's ES modules, each after those that it imports."""

ANALYSIS_MODULES = ["dom", "charts", "analysis"]
"""The same of the page of an analysis."""

ADAPTERS_MODULES = ["analysis", "adapters"]
"""What a lab page with analyses has beside ``MODULES``."""

N_ROWS = 200
"""Test rows of each task in the page."""

STUDY_COLUMNS = ("run", "method", "task", "seed", "size", "max_iters", "n_parameters", "accuracy")


def write_report(
    run: str | Path,
    out: str | Path,
    studies: Iterable[str | Path] = (),
    use_half: bool = False,
    analyses: Iterable[str | Path] = (),
) -> None:
    """Write the lab page of a run.

    Args:
        run: the folder; what is not there yet, the page lacks.
        out: the file, such as lab.html; one that is there is replaced.
        studies: folders with a results.csv each, see ``mingpt.experiments.sweep``.
        use_half: store float16, half as large, in which some answers become others.
        analyses: files with what ``mingpt analyze --json`` printed, for the view "Adapters".

    Raises:
        CheckpointError: if a file of the run, or one with an analysis, is damaged.
        FileNotFoundError: if there is no such run.
    """
    write_atomic(Path(out), page(run_data(run, studies, analyses), use_half).encode())


def write_analysis(analysis: Analysis, out: str | Path, command: str) -> None:
    """Write the page of an analysis.

    Args:
        analysis: of ``mingpt.huggingface.analyze``.
        out: the file, such as analysis.html; one that is there is replaced.
        command: that makes the page, to be shown.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    header = _analysis_data(analysis) | {"command": command, "versions": _versions("transformers", "peft")}
    script = _join(ANALYSIS_MODULES) + "\nstartAnalysis();\n"
    write_atomic(Path(out), _html(f"mingpt analyze: {analysis.title}", header, script).encode())


def _analysis_data(analysis: Analysis) -> dict[str, Any]:
    """What ``analysis.js`` shows, as JSON values; JavaScript's JSON has no NaN, so None stands for it."""
    data: dict[str, Any] = {"title": analysis.title, "logits": analysis.logits._asdict()}
    data |= {"columns": analysis.columns(), "checks": analysis.checks()}
    if own := analysis.comparison:
        data["comparison"] = {"n_scored": own.n_scored, "cells": own.cells(), "sentences": own.sentences()}
    return json.loads(json.dumps(data), parse_constant=lambda name: None)


def _analyses(files: Iterable[str | Path]) -> list[dict[str, Any]]:
    """What the view "Adapters" shows, and the name of each file."""
    found = []
    for path in map(Path, files):
        with parsing(path, "what 'mingpt analyze --json' prints"):
            found.append({"name": path.stem} | _analysis_data(Analysis.from_dict(json.loads(path.read_bytes()))))
    return found


def run_data(
    run: str | Path, studies: Iterable[str | Path] = (), analyses: Iterable[str | Path] = ()
) -> dict[str, Any]:
    """What the page of a run shows: JSON values, and under "tensors" arrays by name."""
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"there is no run {run}; 'mingpt reproduce' makes one")
    found: dict[str, Any] = {"about": _about(run), "curves": run_curves(run), "studies": _studies(studies)}
    if own := _analyses(analyses):
        found["analyses"] = own
    if (run / "model.safetensors").exists():
        model, _, description = load_run(run, "cpu")
        prefixes: dict[str, dict[str, Prefix]] = {}
        for name, prefix in (pair for folder in KINDS.values() for pair in load_prefixes(run / folder, model).items()):
            prefixes.setdefault(prefix.kind, {})[name] = prefix
        found |= model_data(model, prefixes, description["data"])
        found["about"]["own_results"] = _own_results(run, model, description["data"], found["about"])
    return found


def model_data(
    model: GPT, prefixes: Mapping[str, Mapping[str, Prefix]], data: Mapping[str, Any], n_rows: int = N_ROWS
) -> dict[str, Any]:
    """What the page needs to compute: the model, its prefixes, and rows to try them on.

    Args:
        model: on any device; its weights are copied as float32.
        prefixes: by kind and name, one prefix each; a name that is no task is shown without a right answer.
        data: the model's, see ``CustomDataset.describe``; the rows are its test rows.
        n_rows: of each task.

    Returns:
        config, data (length, num_digits, prefix_padding), tensors (by name), prefixes (for each its name, its task or
        None, kind and n_placeholders; its values are the tensor "prefix/KIND/NAME"), own_tasks (the user's, which
        come first), rows (by task: inputs, solutions, and first and rest, the lowest and the highest value that a row's
        first element and each of the others may have) and matrix (n_rows, and by kind, prefix and task how many rows
        are right, computed in float32).
    """
    tensors = {name: value.detach().float().cpu().numpy() for name, value in model.state_dict().items()}
    listed = []
    tasks = {name: find_task(name) for own in prefixes.values() for name in own}
    given = _given_tasks(data)
    own_tasks = list(dict.fromkeys(str(task) for task in tasks.values() if task and str(task) not in given))
    order = {name: number for number, name in enumerate([*own_tasks, *given])}
    prefixes = {
        kind: dict(sorted(own.items(), key=lambda item: order.get(str(tasks[item[0]]), len(order))))
        for kind, own in prefixes.items()
    }
    for kind, own in prefixes.items():
        for name, prefix in own.items():
            tensors[f"prefix/{kind}/{name}"] = prefix.values[0].detach().float().cpu().numpy()
            task = tasks[name]
            listed.append(
                {"name": name, "task": task and str(task), "kind": kind, "n_placeholders": prefix.n_placeholders}
            )
    if unknown := dict.fromkeys(each["name"] for each in listed if not each["task"]):
        logger.warning(
            "no task of this name is known, so nothing is right for it: %s; --import its file", ", ".join(unknown)
        )
    every = dict.fromkeys([*own_tasks, *data["tasks"], *(each["task"] for each in listed if each["task"])])
    logger.info("answering %d rows of %d tasks with each of %d prefixes", n_rows, len(every), len(listed))
    sets = {name: CustomDataset.from_description(data, split="test", tasks=[Task.parse(name)]) for name in every}
    rows = {}
    for name, own in sets.items():
        inputs, solutions = own.rows(range(n_rows))
        values = own.tasks[0].input_values(own.num_digits)
        rows[name] = {"inputs": inputs.tolist(), "solutions": solutions.tolist()} | values._asdict()
    score = partial(accuracy_matrix, model, datasets=list(sets.values()), n_rows=n_rows, precision="float32")
    matrix = {
        kind: score({"none": None, **own}).map(lambda each: each.n_correct).to_dict("index")
        for kind, own in prefixes.items()
    }
    return {
        "config": model.config.to_dict(),
        "data": {name: data[name] for name in ("length", "num_digits", "prefix_padding")},
        "tensors": tensors,
        "prefixes": listed,
        "own_tasks": own_tasks,
        "rows": rows,
        "matrix": {"n_rows": n_rows, "n_right": matrix},
    }


def _given_tasks(data: Mapping[str, Any]) -> list[str]:
    """The tasks that are not the user's own: those of the model and the sixteen of the experiment."""
    return list(dict.fromkeys([*data["tasks"], *map(str, EVERY_TASK)]))


def _own_results(run: Path, model: GPT, data: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``mingpt prefix`` found for the user's own tasks, which results.json has not.

    Returns:
        n_rows, of how many test rows it is; and tasks, as in results.json, with the n_iters of each prefix.
    """
    evaluation, model_hash = run_config(run).evaluation, weights_hash(model)
    options = {"n_rows": evaluation.n_rows, "precision": evaluation.precision}
    known = [*_given_tasks(data), *(about["results"]["tasks"] if about["results"] else [])]
    found: dict[str, dict[str, Any]] = {}
    for path in (path for folder in KINDS.values() for path in sorted((run / folder).glob("*.safetensors"))):
        task = find_task(path.stem)
        if task is None or str(task) in known:
            continue
        prefix, description = load_prefix(path, model, model_hash)
        rows = CustomDataset.from_description(data, split="test", tasks=[task])
        if path.stem not in found:
            found[path.stem] = {"without": {"accuracy": evaluate(model, rows, **options).accuracy}}
        accuracy = evaluate(model, rows, prefix, **options).accuracy
        n_iters = description.get("metrics", {}).get("n_iters")
        found[path.stem][prefix.kind] = {"accuracy": accuracy, "n_iters": n_iters}
    return {"n_rows": options["n_rows"], "tasks": found}


def run_curves(run: Path) -> dict[str, Any]:
    """The curves of a run as far as they go: pretraining, pairs of iteration and loss; and by kind and task, pairs of
    iteration and validation accuracy of each prefix."""
    log = run / "pretraining" / "metrics.jsonl"
    loss = [(line["iter"], line["loss"]) for line in read_metrics(log) if "loss" in line] if log.exists() else []
    prefixes: dict[str, dict[str, list[tuple[int, float]]]] = {kind: {} for kind in KINDS}
    for kind, name in KINDS.items():
        logs = (run / name).glob("training-*/metrics.jsonl")
        for path in sorted(logs, key=lambda path: path.stat().st_mtime):  # of several trainings of a task, the last
            prefixes[kind] |= validation_curves(path)
    return {"pretraining": loss, "prefixes": {kind: own for kind, own in prefixes.items() if own}}


def _studies(folders: Iterable[str | Path]) -> dict[str, list[dict[str, Any]]]:
    """The cells of every study, by the name of its folder."""
    found = {}
    for folder in map(Path, folders):
        path = folder / "results.csv"
        with parsing(path, "a study's results"), path.open(newline="", encoding="utf-8") as file:
            numbers = dict.fromkeys(("seed", "size", "max_iters", "n_parameters"), int) | {"accuracy": float}
            found[folder.name] = [
                {name: numbers.get(name, str)(line[name]) for name in STUDY_COLUMNS} for line in csv.DictReader(file)
            ]
    return found


def _about(run: Path) -> dict[str, Any]:
    """Where the run comes from: its name, settings, the command that makes it, versions, and what it found."""
    config = read_json(run / "config.json") if (run / "config.json").exists() else {}
    path, results = run / "results.json", None
    if path.exists():
        found = check_results(read_cached_json(path)["value"], path)
        results = {name: found[name] for name in ("seconds", "bayes_loss", "mixed", "tasks", "n_iters")}
    with parsing(run / "config.json", "the settings of a run"):
        options = [f"--{name} {config[name]}" for name in ("preset", "seed") if name in config]
    return {
        "run": run.name,
        "command": " ".join(["mingpt reproduce", *options]),
        "versions": _versions(),
        "config": config,
        "results": results,
    }


def _versions(*others: str) -> dict[str, str]:
    """The versions of Python, of this package, of torch and of others, by their names."""
    found = {"python": platform.python_version(), "mingpt": mingpt.__version__, "torch": torch.__version__}
    return found | {name: importlib.metadata.version(name) for name in others}


# ------------------------------------------------------------------------------------------------- one HTML file


def page(data: Mapping[str, Any], use_half: bool = False) -> str:
    """The HTML of a page that shows ``data``, see ``run_data``."""
    header, blob = pack(data, use_half)
    return _html(f"mingpt lab: {data['about']['run']}", header, script("analyses" in data) + "\nstart();\n", blob)


def _html(title: str, header: Mapping[str, Any], script: str, blob: bytes = b"") -> str:
    """The HTML of a page that a script makes of a header and of a blob."""
    parts = {
        "TITLE": html.escape(title),
        "STYLE": (STATIC / "style.css").read_text(encoding="utf-8"),
        "HEADER": json.dumps(header, separators=(",", ":")).replace("<", "\\u003c"),  # no tag can end the script
        "BLOB": base64.b64encode(blob).decode(),
        "SCRIPT": script,
    }
    text = (STATIC / "page.html").read_text(encoding="utf-8")
    before, *rest = text.split("{{")
    return before + "".join(parts[name] + after for name, _, after in (part.partition("}}") for part in rest))


def pack(data: Mapping[str, Any], use_half: bool = False) -> tuple[dict[str, Any], bytes]:
    """Split the page's data into JSON values and the tensors' bytes.

    Returns:
        The data, with each tensor's shape and offset in the place of the tensor and the dtype of all; and the bytes,
        little-endian and row by row, the tensors one after the other.
    """
    dtype = np.dtype("<f2" if use_half else "<f4")
    layout, pieces, offset = {}, [], 0
    for name, tensor in data.get("tensors", {}).items():
        layout[name] = {"shape": list(tensor.shape), "offset": offset}
        pieces.append(np.ascontiguousarray(tensor, dtype).tobytes())
        offset += len(pieces[-1])
    return {**data, "tensors": layout, "dtype": "float16" if use_half else "float32"}, b"".join(pieces)


def script(has_analyses: bool = False) -> str:
    """The lab page's modules as one, with the kernel in it, and with the view "Adapters" where there are analyses."""
    kernels = base64.b64encode((STATIC / "kernels.wasm").read_bytes()).decode()
    return f'const KERNELS = "{kernels}";\n{_join([*MODULES, *ADAPTERS_MODULES * has_analyses])}'


def _join(modules: Iterable[str]) -> str:
    """Some modules as one.

    Their names are one another's: what a module exports is seen by those after it, so imports between them go.
    """
    found = []
    for name in modules:
        lines = (STATIC / f"{name}.js").read_text(encoding="utf-8").splitlines()
        found += [line.removeprefix("export ") for line in lines if not line.startswith("import ")]
    return "\n".join(found)
