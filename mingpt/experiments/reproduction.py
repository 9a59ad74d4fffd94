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

from mingpt import distributed
from mingpt.datasets import CustomDataset
from mingpt.evaluation import Score, accuracy_matrix, bayes_loss, evaluate
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
        raise ValueError(
            "prefix.parallel = 'fsdp' leaves the model split, and its evaluation needs a full one; use ddp"
        )
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
        without, with_prefix, matrix = evaluate_run(config, model, prefixes, tasks)
        chains = evaluate_chains(config, model, prefixes, tasks)
        return {
            "config": config.to_dict(),
            "seconds": {
                "pretraining": pretraining_seconds,
                "prefixes": prefix_seconds,
                "evaluation": time.perf_counter() - start,
            },
            "bayes_loss": bayes_loss(dataset(config, "test", PRETRAINING_TASKS)),
            "mixed": without[MIXED].to_dict(),
            "tasks": {
                str(task): {
                    "group": group_of(task),
                    "without": without[str(task)].to_dict(),
                    "with": with_prefix[str(task)].to_dict(),
                    "chain": chains[str(task)].to_dict() if str(task) in chains else None,
                }
                for task in tasks
            },
            "matrix": matrix.map(lambda score: score.accuracy).to_dict("index"),
        }

    results = cached_json(path, key, compute)
    if not is_done:
        distributed.run_on_main(lambda: draw_figures(run, model, prefixes, results))
    return results


def evaluate_run(
    config: CfgNode, model: GPT, prefixes: Mapping[str, Prefix], tasks: Sequence[Task]
) -> tuple[dict[str, Score], dict[str, Score], DataFrame]:
    """Score the model with and without prefixes.

    Args:
        config: ``evaluation.n_rows`` rows for a score, ``evaluation.n_matrix_rows`` for a cell of the matrix.
        model: of the run.
        prefixes: by task name.
        tasks: each with a prefix.

    Returns:
        The scores without a prefix, by task and of the seven pretraining tasks mixed; the scores of each task with its
        prefix; and those of every prefix, and none, on every task.
    """
    import pandas as pd

    n_rows, options = config.evaluation.n_rows, {"precision": config.evaluation.precision}
    datasets = {str(task): dataset(config, "test", [task]) for task in tasks}

    def row(name: str, prefix: Prefix | None, n_rows: int) -> Callable[[], DataFrame]:
        return partial(accuracy_matrix, model, {name: prefix}, list(datasets.values()), n_rows, **options)

    mixed = dataset(config, "test", PRETRAINING_TASKS)
    jobs: dict[Any, Callable[[], Any]] = {
        "mixed": partial(evaluate, model, mixed, n_rows=n_rows, **options),
        "without": row("none", None, n_rows),
        **{("with", k): partial(evaluate, model, d, prefixes[k], n_rows, **options) for k, d in datasets.items()},
    }
    rows = {k: row(k, prefix, config.evaluation.n_matrix_rows) for k, prefix in {"none": None, **prefixes}.items()}
    done: dict[Any, Any] = distributed.map_over_ranks(jobs | rows)
    without = {MIXED: done["mixed"], **done["without"].loc["none"]}
    with_prefix = {name: done["with", name] for name in datasets}
    return without, with_prefix, pd.concat([done[name] for name in rows])


def evaluate_chains(
    config: CfgNode, model: GPT, prefixes: Mapping[str, Prefix], tasks: Sequence[Task]
) -> dict[str, Score]:
    """Score each composition as a chain of its tasks, each with its own prefix, over the rows of ``evaluate_run``.

    Args:
        config: ``evaluation.n_rows`` rows for a score.
        model: of the run.
        prefixes: by task name; a composition of tasks that have none is left out.
        tasks: any; those that are no compositions are left out.

    Returns:
        The scores by task name.
    """
    scores = {}
    for task in tasks:
        if len(task.tasks) > 1 and all(str(simple) in prefixes for simple in task.tasks):
            data = dataset(config, "test", [task])
            inputs, solutions = data.rows(range(config.evaluation.n_rows))
            plan = multistep.plan_from_composition(
                task, model, prefixes, data.length, data.num_digits, data.prefix_padding
            )
            outputs = multistep.predict(plan, inputs.tolist(), precision=config.evaluation.precision)
            scores[str(task)] = Score.of(np.array(outputs[plan.steps[-1].name]), solutions, inputs)
    return scores


# ------------------------------------------------------------------------------------------------ tables, figures


def scores_of(results: Mapping[str, Any]) -> tuple[dict[str, Score], dict[str, Score]]:
    """The scores in ``results``, by task: with its prefix, and without one."""
    with_prefix, without = (
        {name: Score.from_dict(row[kind]) for name, row in results["tasks"].items()} for kind in ("with", "without")
    )
    return with_prefix, without


def results_table(results: Mapping[str, Any]) -> DataFrame:
    """The results beside the published figures, in percent of the rows solved exactly: a row for each task.

    Columns: group; without and with a prefix, each with what was published; the 95% interval of the latter, over test
    rows; and the chain's. What does not exist is not a number.
    """
    import pandas as pd

    rows = pd.DataFrame.from_dict({**results["tasks"], MIXED: {"without": results["mixed"]}}, "index")

    def percent(kind: str, of: Callable[[Mapping[str, Any]], float] = lambda score: score["accuracy"]) -> Any:
        return rows[kind].map(lambda score: 100 * of(score) if isinstance(score, Mapping) else float("nan"))

    columns = {
        "group": rows["group"],
        "without prefix": percent("without"),
        "published, without": pd.Series(PUBLISHED["without"]),
        "with its prefix": percent("with"),
        "low": percent("with", lambda score: score["confidence_interval"][0]),
        "high": percent("with", lambda score: score["confidence_interval"][1]),
        "published, with": pd.Series(PUBLISHED["with"]),
        "as a chain": percent("chain"),
    }
    return pd.DataFrame(columns, index=rows.index)


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


def draw_figures(run: Path, model: GPT, prefixes: Mapping[str, Prefix], results: Mapping[str, Any]) -> None:
    """Draw what a run found into ``figures/`` of its folder.

    Args:
        run: the folder.
        model: for the attention maps.
        prefixes: by task name.
        results: see ``reproduce``.
    """
    from pandas import DataFrame

    from mingpt.analysis import figures as draw

    config, n_rows = results["config"], results["mixed"]["n_rows"]
    n_matrix_rows = config["evaluation"]["n_matrix_rows"]
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
    name, length, prefix_size = next(iter(prefixes)), config["data"]["length"], config["data"]["prefix_size"]
    data = {key: value for key, value in config["data"].items() if key != "prefix_size"}
    task = Task.parse(name)
    inputs, _ = CustomDataset("test", [task], prefix_padding=prefix_size, **data).rows([0])
    prompt = torch.cat([torch.zeros(1, prefix_size, dtype=torch.int64), torch.from_numpy(inputs)], dim=1)
    for label, prefix in (("none", None), (name, prefixes[name])):
        record: Record = []
        sample = model.generate(prompt.to(model.device), length, prefixes=prefix, activations_record=record)
        title = "Attention without a prefix" if prefix is None else f"Attention with the prefix for {label}"
        found[f"attention_{label}"] = draw.attention_visualization(
            sample[0].cpu(), record, prefix_size, length, title=title, annot=False
        )
    (run / "figures").mkdir(exist_ok=True)
    for label, figure in found.items():
        figure.savefig(run / "figures" / f"{label}.png", dpi=150)
