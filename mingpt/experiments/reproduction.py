"""The flagship experiment: pretrain one model, train a prefix for each task, and score them all.

A run is a folder; ``mingpt.experiments.pipeline`` says what its stages leave there. This module adds

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
from mingpt.evaluation import Score, accuracy_matrix, bayes_loss, evaluate, score_table
from mingpt.experiments import multistep
from mingpt.experiments.pipeline import dataset, pretrain, train_prefixes
from mingpt.model import GPT, Record
from mingpt.prefix import Prefix
from mingpt.storage.cache import beside, cached_json
from mingpt.storage.checkpoint import checksum, weights_hash
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS, Task
from mingpt.utils import CfgNode

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger("mingpt")

EVERY_TASK = (*PRETRAINING_TASKS, *TEST_TASKS)
"""The sixteen tasks of the experiment."""

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
        mixed), tasks (for each its group, and its scores with and without its prefix, and as a chain of prefixes, None
        where it is no composition or a part of it has no prefix), and matrix (accuracies by prefix and task).

    Raises:
        CheckpointError: if the folder's model is of another configuration.
        ValueError: for prefix.parallel = "fsdp".
    """
    run, tasks = Path(run), list(EVERY_TASK if tasks is None else tasks)
    if config.prefix.parallel == "fsdp":
        raise ValueError("prefix.parallel = 'fsdp' leaves the model split, and it is evaluated as one; use ddp")
    model, pretraining_seconds = pretrain(config, run, later_tasks=tasks)
    prefixes, prefix_seconds = train_prefixes(config, model, tasks, run)
    key = {
        "stage": "reproduce",
        "model": weights_hash(model),
        "prefixes": {name: checksum({"values": prefix.values}) for name, prefix in prefixes.items()},
        "data": dataset(config, "test", tasks).describe(),
        "evaluation": config.evaluation.to_dict(),
    }
    path = beside(run / "results.json", key)
    is_done = distributed.run_on_main(path.exists)

    def compute() -> dict[str, Any]:
        logger.info("evaluating %d prefixes and none on %d tasks", len(prefixes), len(tasks))
        start = time.perf_counter()
        scores = evaluate_run(config, model, prefixes, tasks)
        seconds = {"pretraining": pretraining_seconds, "prefixes": prefix_seconds}
        seconds["evaluation"] = time.perf_counter() - start
        floor = bayes_loss(dataset(config, "test", PRETRAINING_TASKS))
        return {"config": config.to_dict(), "seconds": seconds, "bayes_loss": floor} | scores

    results = cached_json(path, key, compute)
    if not is_done:
        distributed.run_on_main(lambda: draw_figures(config, run, model, prefixes, results))
    return results


def evaluate_run(config: CfgNode, model: GPT, prefixes: Mapping[str, Prefix], tasks: Sequence[Task]) -> dict[str, Any]:
    """Score the model with and without prefixes, and with chains of them.

    Args:
        config: ``evaluation.n_rows`` rows for a score, ``evaluation.n_matrix_rows`` for a cell of the matrix.
        model: of the run.
        prefixes: by task name.
        tasks: each with a prefix.

    Returns:
        mixed, tasks and matrix, see ``reproduce``, as JSON values.
    """
    n_rows, n_matrix_rows = config.evaluation.n_rows, config.evaluation.n_matrix_rows
    datasets = {str(task): dataset(config, "test", [task]) for task in tasks}
    mixed = dataset(config, "test", PRETRAINING_TASKS)
    score = partial(evaluate, model, n_rows=n_rows, precision=config.evaluation.precision)
    row = partial(accuracy_matrix, model, datasets=list(datasets.values()), precision=config.evaluation.precision)
    jobs: dict[Any, Callable[[], Any]] = {
        "mixed": partial(score, mixed),
        "without": partial(row, {"none": None}, n_rows=n_rows),
        **{("with", name): partial(score, data, prefixes[name]) for name, data in datasets.items()},
        **{("row", k): partial(row, {k: v}, n_rows=n_matrix_rows) for k, v in {"none": None, **prefixes}.items()},
    }
    done: dict[Any, Any] = distributed.map_over_ranks(jobs)
    found = {}
    for task in tasks:
        has_chain = len(task.tasks) > 1 and all(str(simple) in prefixes for simple in task.tasks)
        found[str(task)] = {
            "group": group_of(task),
            "without": done["without"].loc["none", str(task)].to_dict(),
            "with": done["with", str(task)].to_dict(),
            "chain": evaluate_chain(config, model, prefixes, task).to_dict() if has_chain else None,
        }
    cells = [done["row", name].map(lambda score: score.accuracy) for name in ("none", *prefixes)]
    matrix = {name: values for each in cells for name, values in each.to_dict("index").items()}
    return {"mixed": done["mixed"].to_dict(), "tasks": found, "matrix": matrix}


def evaluate_chain(config: CfgNode, model: GPT, prefixes: Mapping[str, Prefix], task: Task) -> Score:
    """Score a composition as a chain of its tasks, each with its own prefix, over the rows of ``evaluate_run``."""
    data = dataset(config, "test", [task])
    inputs, solutions = data.rows(range(config.evaluation.n_rows))
    plan = multistep.plan_from_composition(task, model, prefixes, data.length, data.num_digits, data.prefix_padding)
    outputs = multistep.predict(plan, inputs.tolist(), precision=config.evaluation.precision)
    return Score.of(np.array(outputs[plan.steps[-1].name]), solutions, inputs)


# ------------------------------------------------------------------------------------------------ tables, figures


def scores_of(results: Mapping[str, Any], kinds: Sequence[str] = ("with", "without")) -> list[dict[str, Score]]:
    """The scores in ``results`` by task, of each kind: by default with its prefix, and without one."""
    rows = results["tasks"].items()
    return [{name: Score.from_dict(row[kind]) for name, row in rows if row[kind]} for kind in kinds]


def results_table(results: Mapping[str, Any]) -> DataFrame:
    """The results beside the published figures, in percent of the rows solved exactly: a row for each task.

    Columns: group; without and with a prefix, each with what was published; the 95% interval of the latter, over test
    rows; and the chain's. What does not exist is not a number.
    """
    import pandas as pd

    with_prefix, without, chain = scores_of(results, ("with", "without", "chain"))
    without[MIXED] = Score.from_dict(results["mixed"])
    table = score_table(with_prefix, PUBLISHED["with"])
    columns = {
        "group": pd.Series({name: row["group"] for name, row in results["tasks"].items()}),
        "without prefix": score_table(without)["accuracy"],
        "published, without": pd.Series(PUBLISHED["without"]),
        "with its prefix": table["accuracy"],
        "low": table["low"],
        "high": table["high"],
        "published, with": table["published"],
        "as a chain": score_table(chain)["accuracy"],
    }
    return pd.DataFrame(columns, index=list(without))


def format_table(results: Mapping[str, Any]) -> str:
    """``results_table`` as text for a terminal, with what the figures are of."""
    text = results_table(results).fillna({"group": ""}).to_string(float_format="{:.2f}".format, na_rep="-")
    seconds = results["seconds"]
    return (
        f"{text}\n\npercent of {results['mixed']['n_rows']} test rows whose every output token is right\n"
        "low, high: the 95% interval over distinct test rows; as a chain: each task in turn, with its own prefix\n"
        + ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        + f", {sum(seconds.values()):.0f} s in all"
    )


def draw_figures(
    config: CfgNode, run: Path, model: GPT, prefixes: Mapping[str, Prefix], results: Mapping[str, Any]
) -> None:
    """Draw what a run found into ``figures/`` of its folder.

    Args:
        config: of the run.
        run: the folder.
        model: for the attention maps.
        prefixes: by task name.
        results: see ``reproduce``.
    """
    from pandas import DataFrame

    from mingpt.analysis import figures as draw

    n_rows, n_matrix_rows = config.evaluation.n_rows, config.evaluation.n_matrix_rows
    with_prefix, without = scores_of(results)
    groups: dict[str, list[str]] = {}
    for name, row in results["tasks"].items():
        groups.setdefault(row["group"], []).append(name)
    found = {
        "matrix": draw.accuracy_matrix_figure(
            DataFrame.from_dict(results["matrix"], "index"), f"Every prefix on every task ({n_matrix_rows} rows)"
        ),
        "prefix_effect": draw.paired_bars(with_prefix, without, groups, title="What a prefix adds"),
        "positions": draw.position_accuracy_figure(with_prefix, title=f"Where the outputs are right ({n_rows} rows)"),
        "pretraining": draw.learning_curves(
            {"pretraining": draw.read_metrics(run / "pretraining" / "metrics.jsonl")},
            title="Pretraining on seven tasks mixed",
            floor=results["bayes_loss"],
        ),
    }
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
    (run / "figures").mkdir(exist_ok=True)
    for label, figure in found.items():
        figure.savefig(run / "figures" / f"{label}.png", dpi=150)
