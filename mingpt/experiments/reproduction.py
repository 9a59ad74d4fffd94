"""The flagship experiment: pretrain one model, train a prefix for each task, and score them all.

A run is a folder; ``mingpt.experiments.pipeline`` says what its stages leave there. This module adds::

    results.json                       the scores, a function of the model, the prefixes and the evaluation's settings
    figures/*.png                      drawn from it
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from mingpt import distributed
from mingpt.evaluation import Score, accuracy_matrix, bayes_loss, evaluate, predict
from mingpt.experiments.pipeline import EVERY_TASK, KINDS, dataset, pretrain, train_prefixes
from mingpt.model import GPT, Record
from mingpt.prefix import Prefix
from mingpt.storage.cache import beside, cached_json
from mingpt.storage.checkpoint import checksum, weights_hash
from mingpt.storage.files import parsing
from mingpt.tasks import PRETRAINING_TASKS, Task
from mingpt.training.metrics import read_metrics, validation_curves
from mingpt.utils import CfgNode

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

logger = logging.getLogger("mingpt")

MIXED = "all seven mixed"

_PRETRAINED = [MIXED, *map(str, PRETRAINING_TASKS)]
PUBLISHED = {
    "without": dict(zip(_PRETRAINED, (37.56, 10.69, 20.81, 24.97, 73.75, 4.59, 25.53, 100.0), strict=True)),
    "with": dict(zip(_PRETRAINED[1:], (99.94, 99.88, 100.0, 100.0, 100.0, 100.0, 100.0), strict=True)),
}
"""Percent of 3200 rows solved, as published with the seed notebook; its other nine prefixes were never obtained."""


def group_of(task: Task) -> str:
    """What the model knows of a task before a prefix is trained."""
    if task in PRETRAINING_TASKS:
        return "pretrained"
    return "new task" if len(task.tasks) == 1 else "composition"


def reproduce(config: CfgNode, run: str | Path, tasks: Sequence[Task] | None = None) -> dict[str, Any]:
    """Run the experiment in a folder, or what is left of it, and return its results.

    Args:
        config: see ``mingpt.experiments.presets``.
        run: the folder, empty or new, or of the same model.
        tasks: to train prefixes for, the sixteen of the experiment by default. The model is pretrained on the seven.

    Returns:
        config, seconds, bayes_loss (see ``mingpt.evaluation``), mixed (the score without a prefix on the seven tasks
        mixed), tasks (for each its group, its scores without a prefix, with its prefix of each kind, and as a chain of
        key_value prefixes, None where it is no composition or a part of it has no prefix), matrix (accuracies by
        key_value prefix and task), n_iters (by kind and task, after how many iterations a prefix ended: below
        prefix.max_iters at its plateau) and curves (by kind and task, pairs of iteration and validation accuracy).

    Raises:
        CheckpointError: if the folder's model is of another configuration.
        ValueError: for prefix.parallel = "fsdp".
    """
    run, tasks = Path(run), list(EVERY_TASK if tasks is None else tasks)
    if config.prefix.parallel == "fsdp":
        raise ValueError("prefix.parallel = 'fsdp' leaves the model split, and it is evaluated as one; use ddp")
    model, pretraining_seconds = pretrain(config, run, later_tasks=tasks)
    seconds: dict[str, float] = {"pretraining": pretraining_seconds}
    prefixes: dict[str, dict[str, Prefix]] = {}
    metrics: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for kind, name in KINDS.items():
        prefixes[kind], seconds[f"{kind} prefixes"] = train_prefixes(
            config, model, tasks, run, name, kind, metrics=metrics[kind]
        )
    key = {
        "stage": "reproduce",
        "model": weights_hash(model),
        "prefixes": {
            kind: {name: checksum({"values": prefix.values}) for name, prefix in own.items()}
            for kind, own in prefixes.items()
        },
        "data": dataset(config, "test", tasks).describe(),
        "evaluation": config.evaluation.to_dict(),
    }
    path = beside(run / "results.json", key)
    is_done = distributed.run_on_main(path.exists)

    def compute() -> dict[str, Any]:
        logger.info("evaluating %d prefixes of each kind and none on %d tasks", len(tasks), len(tasks))
        curves = {kind: _validation_curves(run / name, metrics[kind]) for kind, name in KINDS.items()}
        start = time.perf_counter()
        scores = evaluate_run(config, model, prefixes, tasks)
        seconds["evaluation"] = time.perf_counter() - start
        floor = bayes_loss(dataset(config, "test", PRETRAINING_TASKS))
        found = {"config": config.to_dict(), "seconds": seconds, "bayes_loss": floor} | scores
        n_iters = {kind: {task: each["n_iters"] for task, each in own.items()} for kind, own in metrics.items()}
        return found | {"n_iters": n_iters, "curves": curves}

    def draw() -> None:
        last = run / "figures" / f"attention_{tasks[0]}.png"  # there when all are
        if not (is_done and last.exists()):
            draw_figures(config, run, model, prefixes["key_value"], results)

    results = check_results(cached_json(path, key, compute), path)
    distributed.run_on_main(draw)
    return results


def check_results(results: Any, path: Path) -> dict[str, Any]:
    """The results that were read from a file, if they can be shown; a CheckpointError names it otherwise."""
    with parsing(path, "results of 'reproduce'"):
        format_table(results)
        for kind in KINDS:
            if not results["curves"][kind].keys() >= results["tasks"].keys():
                raise ValueError(f"no curves of some {kind} prefixes")
    return results


def _validation_curves(folder: Path, metrics: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The validation accuracies of each task's prefix, by task, from the metrics of its training."""
    trainings = {each["training"] for each in metrics.values()}
    curves = {each: validation_curves(folder / each / "metrics.jsonl") for each in trainings}
    return {task: curves[each["training"]].get(task, []) for task, each in metrics.items()}


def evaluate_run(
    config: CfgNode, model: GPT, prefixes: Mapping[str, Mapping[str, Prefix]], tasks: Sequence[Task]
) -> dict[str, Any]:
    """Score the model with and without prefixes, and with chains of them.

    Args:
        config: ``evaluation.n_rows`` rows for a score, ``evaluation.n_matrix_rows`` for a cell of the matrix.
        model: of the run.
        prefixes: by kind and task name.
        tasks: each with a prefix of each kind.

    Returns:
        mixed, tasks and matrix, see ``reproduce``, as JSON values.
    """
    n_rows, n_matrix_rows = config.evaluation.n_rows, config.evaluation.n_matrix_rows
    datasets = {str(task): dataset(config, "test", [task]) for task in tasks}
    mixed, best = dataset(config, "test", PRETRAINING_TASKS), prefixes["key_value"]
    score = partial(evaluate, model, n_rows=n_rows, precision=config.evaluation.precision)
    row = partial(accuracy_matrix, model, datasets=list(datasets.values()), precision=config.evaluation.precision)
    jobs: dict[Any, Callable[[], Any]] = {
        "mixed": partial(score, mixed),
        "without": partial(row, {"none": None}, n_rows=n_rows),
        "chains": partial(evaluate_chains, config, model, best, tasks),
        **{
            (kind, name): partial(score, data, prefixes[kind][name])
            for kind in KINDS
            for name, data in datasets.items()
        },
        **{("row", k): partial(row, {k: v}, n_rows=n_matrix_rows) for k, v in {"none": None, **best}.items()},
    }
    done: dict[Any, Any] = distributed.map_over_ranks(jobs)
    found = {
        name: {"group": group_of(task), "without": done["without"].loc["none", name].to_dict()}
        | {kind: done[kind, name].to_dict() for kind in KINDS}
        | {"chain": done["chains"][name].to_dict() if name in done["chains"] else None}
        for name, task in zip(datasets, tasks, strict=True)
    }
    cells = [done["row", name].map(lambda score: score.accuracy) for name in ("none", *best)]
    matrix = {name: values for each in cells for name, values in each.to_dict("index").items()}
    return {"mixed": done["mixed"].to_dict(), "tasks": found, "matrix": matrix}


def evaluate_chains(
    config: CfgNode, model: GPT, prefixes: Mapping[str, Prefix], tasks: Sequence[Task]
) -> dict[str, Score]:
    """Score compositions as chains of their tasks, each with its own prefix, over the rows of ``evaluate_run``.

    Args:
        config: ``evaluation`` says over how many rows.
        model: of the run.
        prefixes: by task name.
        tasks: of these, the compositions whose tasks all have a prefix are scored.

    Returns:
        The scores by task name. Steps that several chains begin with are done once.
    """
    scores: dict[str, Score] = {}
    outputs: dict[tuple[Any, ...], np.ndarray] = {}  # by the steps so far and the input rows
    for task in tasks:
        *steps, last = map(str, task.tasks)
        if not steps or not prefixes.keys() >= {*steps, last}:
            continue
        data = dataset(config, "test", [task])
        inputs, solutions = data.rows(range(config.evaluation.n_rows))
        answer = partial(predict, model, prefix_padding=data.prefix_padding, precision=config.evaluation.precision)
        rows = inputs
        for n, step in enumerate(steps, start=1):
            key = (*steps[:n], inputs.tobytes())
            if key not in outputs:
                outputs[key] = answer(rows, prefixes=prefixes[step])
            rows = outputs[key]
        scores[str(task)] = Score.of(answer(rows, prefixes=prefixes[last], solutions=solutions), solutions, inputs)
    return scores


# ------------------------------------------------------------------------------------------------ tables, figures


def scores_of(results: Mapping[str, Any], *names: str) -> list[dict[str, Score]]:
    """The scores in ``results`` by task, for each of "without", "activation", "key_value" and "chain"."""
    rows = results["tasks"].items()
    return [{task: Score.from_dict(row[name]) for task, row in rows if row[name]} for name in names]


def results_table(results: Mapping[str, Any]) -> DataFrame:
    """The results beside the published figures, in percent of the rows solved exactly: a row for each task.

    Columns: group; without a prefix and what was published; with its prefix of each kind, and what was published, of an
    activation prefix; as a chain of key_value prefixes. What does not exist is not a number.
    """
    import pandas as pd

    names = ("without", *KINDS, "chain")
    found = dict(zip(names, scores_of(results, *names), strict=True))
    found["without"][MIXED] = Score.from_dict(results["mixed"])
    percent = {name: {task: 100 * score.accuracy for task, score in own.items()} for name, own in found.items()}
    columns = {
        "group": {name: row["group"] for name, row in results["tasks"].items()},
        "without prefix": percent["without"],
        "published": PUBLISHED["without"],
        "activation prefix": percent["activation"],
        "published, with": PUBLISHED["with"],
        "key_value prefix": percent["key_value"],
        "as a chain": percent["chain"],
    }
    return pd.DataFrame({name: pd.Series(own) for name, own in columns.items()}, index=list(found["without"]))


def format_table(results: Mapping[str, Any]) -> str:
    """``results_table`` as text for a terminal, with what the figures are of."""
    table, n_iters = results_table(results), results["config"]["prefix"]["max_iters"]
    for kind, ends in results["n_iters"].items():
        column = table[f"{kind} prefix"]
        marks = ["*" if ends.get(task) == n_iters else " " for task in column.index]
        cells = [f"{value:.2f}{mark}" for value, mark in zip(column, marks, strict=True)]
        table[f"{kind} prefix"] = [cell.replace("nan", "-") for cell in cells]
    text = table.fillna({"group": ""}).to_string(float_format="{:.2f}".format, na_rep="-")
    seconds = results["seconds"]
    return (
        f"{text}\n\npercent of {results['mixed']['n_rows']} test rows whose every output token is right; one seed\n"
        f"*: not at its plateau after {n_iters} iterations; as a chain: each task in turn, with its own prefix\n"
        + ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        + f", {sum(seconds.values()):.0f} s in all"
    )


def result_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """What ``reproduce`` found: the matrix, what a prefix adds, accuracy by position, curves of the hardest tasks."""
    from pandas import DataFrame

    from mingpt.analysis import figures as draw

    evaluation = results["config"]["evaluation"]
    with_prefix, without = scores_of(results, "key_value", "without")
    groups: dict[str, list[str]] = {}
    for name, row in results["tasks"].items():
        groups.setdefault(row["group"], []).append(name)
    hard = sorted(with_prefix, key=lambda task: with_prefix[task].accuracy)[:4]
    return {
        "matrix": draw.accuracy_matrix_figure(
            DataFrame.from_dict(results["matrix"], "index"),
            f"Every prefix on every task ({evaluation['n_matrix_rows']} rows)",
        ),
        "prefix_effect": draw.paired_bars(with_prefix, without, groups, title="What a prefix adds"),
        "positions": draw.position_accuracy_figure(
            with_prefix, title=f"Rows that are right so far ({evaluation['n_rows']} rows)"
        ),
        "curves": draw.validation_curves(
            {task: {kind: results["curves"][kind][task] for kind in KINDS} for task in hard},
            "Accuracy on validation rows while prefixes are trained",
        ),
    }


def draw_figures(
    config: CfgNode, run: Path, model: GPT, prefixes: Mapping[str, Prefix], results: Mapping[str, Any]
) -> None:
    """Draw what a run found into ``figures/`` of its folder, the attention with the first prefix last.

    Args:
        config: of the run.
        run: the folder.
        model: for the attention maps.
        prefixes: key_value ones by task name.
        results: see ``reproduce``.
    """
    from mingpt.analysis import figures as draw

    found = result_figures(results)
    found["pretraining"] = draw.learning_curves(
        {"pretraining": read_metrics(run / "pretraining" / "metrics.jsonl")},
        title="Pretraining on seven tasks mixed",
        floor=results["bayes_loss"],
    )
    # What the model looks at while it solves a row, without a prefix and with one.
    name = next(iter(prefixes))
    data = dataset(config, "test", [Task.parse(name)])
    n_zeros, inputs = data.prefix_padding, torch.from_numpy(data.rows([0])[0])
    prompt = F.pad(inputs, (n_zeros, 0)).to(model.device)
    for label, prefix in (("none", None), (name, prefixes[name])):
        record: Record = []
        sample = model.generate(prompt, data.length, prefixes=prefix, activations_record=record)[0].cpu()
        title = "Attention without a prefix" if prefix is None else f"Attention with the prefix for {label}"
        found[f"attention_{label}"] = draw.attention_visualization(
            sample, record, n_zeros, data.length, title=title, annot=False
        )
    for label, figure in found.items():
        draw.save_figure(figure, run / "figures" / f"{label}.png")
