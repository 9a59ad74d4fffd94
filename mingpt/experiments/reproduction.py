"""The flagship experiment as one resumable run: pretrain a model, learn a prefix for each task, evaluate them all.

A run is a folder. Each stage leaves a file there when it is done and is skipped from then on; a stage that was cut off
goes on from its last checkpoint.

    config.json                               what the run is
    pretraining/, prefixes/                   each: metrics.jsonl, and state.safetensors to resume from
    model.safetensors, prefixes.safetensors   the checkpoints
    results.json, figures/*.png               the outcome
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mingpt import distributed
from mingpt.datasets import CustomDataset
from mingpt.evaluation import AccuracyMatrix, Score, accuracy_matrix, bayes_loss, evaluate
from mingpt.experiments import multistep
from mingpt.experiments.pipeline import dataset, pretrain, train_prefixes, verify
from mingpt.model import GPT, Record
from mingpt.storage import checkpoint
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS, Task
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, nearest

logger = logging.getLogger("mingpt")

GROUPS = {
    "pretrained": tuple(str(task) for task in PRETRAINING_TASKS),
    "new task": tuple(str(task) for task in TEST_TASKS if len(task.tasks) == 1),
    "composition": tuple(str(task) for task in TEST_TASKS if len(task.tasks) > 1),
}
"""The sixteen tasks by what the model knows of them before a prefix is learned."""

MIXED = "all seven mixed"

PUBLISHED = {
    "without": {
        MIXED: 37.56,
        "SortAscending": 10.69,
        "SortDescending": 20.81,
        "Add1": 24.97,
        "Modulo": 73.75,
        "LessThan": 4.59,
        "Divisible": 25.53,
        "InverseBinary": 100.0,
    },
    "with": {
        "SortAscending": 99.94,
        "SortDescending": 99.88,
        "Add1": 100.0,
        "Modulo": 100.0,
        "LessThan": 100.0,
        "Divisible": 100.0,
        "InverseBinary": 100.0,
    },
}
"""Percent of 3200 rows solved, as published with the seed notebook; its other nine prefixes were never obtained."""

PRESETS = {
    "smoke": {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32},
        "trainer": {"max_iters": 30, "batch_size": 56, "warmup_iters": 5},
        "prefix": {"max_iters": 10, "batch_size": 4},
        "evaluation": {"n_rows": 100, "n_matrix_rows": 50},
    },
    "laptop": {
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 256},
        "trainer": {"max_iters": 700, "batch_size": 224, "checkpoint_every": 100},
        "prefix": {"max_iters": 400, "batch_size": 16, "checkpoint_every": 100},
    },
    "seed": {
        "model": {"n_layer": 12, "n_head": 8, "n_embd": 512},
        "trainer": {"max_iters": 600, "batch_size": 224, "checkpoint_every": 50},
        "prefix": {"max_iters": 400, "batch_size": 16, "checkpoint_every": 50},
        "evaluation": {"n_matrix_rows": 100},
    },
}
"""``smoke`` runs in seconds and learns nothing; ``laptop`` is the default; ``seed`` is the seed notebook's model."""


def get_default_config(preset: str = "laptop") -> CfgNode:
    """The configuration of a run.

    Raises:
        ValueError: for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; choose one of {', '.join(PRESETS)}")
    trainer = Trainer.get_default_config()
    trainer.merge_from_dict({"lr_schedule": "linear", "warmup_iters": 20, "decay_fraction": 0.9})
    trainer.merge_from_dict({"optimizer": "muon", "muon_learning_rate": 1.5e-3, "muon_momentum": 0.9})
    trainer.learning_rate = 2e-3
    prefix = Trainer.get_default_config()
    prefix.merge_from_dict({"lr_schedule": "linear", "warmup_iters": 10, "decay_fraction": 1.0})
    prefix.merge_from_dict({"learning_rate": 0.02, "converged_loss": 5e-4})
    model = CfgNode(n_layer=4, n_head=4, n_embd=256, dropout=0.0, skip_layer_norm=False)
    model.merge_from_dict({"gelu_approximate": "none", "init": "zero_residual"})
    config = CfgNode(
        preset=preset,
        seed=0,
        data=CfgNode(length=10, num_digits=10, prefix_size=10).close(),
        model=model.close(),
        trainer=trainer,
        prefix=prefix,
        evaluation=CfgNode(n_rows=3200, n_matrix_rows=400, precision="auto").close(),
    ).close()
    for group, values in PRESETS[preset].items():
        for key, value in values.items():
            config.override(f"{group}.{key}", value)
    return config


# ----------------------------------------------------------------------------------------------------- the outcome


def evaluate_run(
    config: CfgNode, model: GPT, prefixes: Mapping[str, Tensor], tasks: Sequence[Task]
) -> tuple[dict[str, Score], dict[str, Score], AccuracyMatrix]:
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
    n_rows, options = config.evaluation.n_rows, {"precision": config.evaluation.precision}
    datasets = {str(task): dataset(config, "test", [task]) for task in tasks}

    def row(name: str, prefix: Tensor | None, n_rows: int) -> Callable[[], AccuracyMatrix]:
        return partial(accuracy_matrix, model, {name: prefix}, list(datasets.values()), n_rows, **options)

    mixed = dataset(config, "test", PRETRAINING_TASKS)
    jobs: dict[Any, Callable[[], Any]] = {
        "mixed": partial(evaluate, model, mixed, n_rows=n_rows, **options),
        "without": row("none", None, n_rows),
        **{("with", k): partial(evaluate, model, d, prefixes[k], n_rows, **options) for k, d in datasets.items()},
    }
    rows = {k: row(k, prefix, config.evaluation.n_matrix_rows) for k, prefix in {"none": None, **prefixes}.items()}
    done: dict[Any, Any] = distributed.map_over_ranks(jobs | rows)
    alone = done["without"]
    without = {MIXED: done["mixed"], **{name: alone["none", name] for name in alone.tasks}}
    with_prefix = {name: done["with", name] for name in datasets}
    return without, with_prefix, AccuracyMatrix(tuple(rows), alone.tasks, tuple(done[name].scores[0] for name in rows))


def evaluate_chains(
    config: CfgNode, model: GPT, prefixes: Mapping[str, Tensor], tasks: Sequence[Task]
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
            scores[str(task)] = Score.of(np.array(outputs[plan.steps[-1].name]), solutions)
    return scores


def reproduce(config: CfgNode, folder: str | Path, tasks: Sequence[Task] | None = None) -> dict[str, Any]:
    """Run the experiment in a folder, or what is left of it, and return its results.

    Args:
        config: see ``get_default_config``.
        folder: empty or new, or of the same run.

    Returns:
        What ``results.json`` holds: config, seconds, bayes_loss (see ``evaluation.bayes_loss``), mixed (the score without
        a prefix on the seven tasks mixed), tasks (for each of the sixteen its group, and its scores with and without
        its prefix, and as a chain, None where it is no composition), and the matrix.

    Raises:
        ValueError: if the folder holds a run of another configuration, or for prefix.parallel = "fsdp".
    """
    folder = Path(folder)
    if config.prefix.parallel == "fsdp":
        raise ValueError(
            "prefix.parallel = 'fsdp' leaves the model split, and its evaluation needs a whole one; use ddp"
        )
    verify(config, folder)
    path = folder / "results.json"
    if distributed.run_on_main(path.exists):
        logger.info("%s is done", folder)
        return json.loads(path.read_text())
    tasks = list(tasks or [*PRETRAINING_TASKS, *TEST_TASKS])
    model, pretraining_seconds = pretrain(config, folder)
    prefixes, prefix_seconds = train_prefixes(config, model, tasks, folder)
    logger.info("evaluating %d prefixes and none on %d tasks", len(prefixes), len(tasks))
    start = time.perf_counter()
    without, with_prefix, matrix = evaluate_run(config, model, prefixes, tasks)
    chains = evaluate_chains(config, model, prefixes, tasks)
    evaluation_seconds = time.perf_counter() - start
    results = {
        "config": config.to_dict(),
        "seconds": {
            "pretraining": pretraining_seconds,
            "prefixes": prefix_seconds,
            "evaluation": evaluation_seconds,
        },
        "bayes_loss": bayes_loss(dataset(config, "test", PRETRAINING_TASKS)),
        "mixed": without[MIXED].to_dict(),
        "tasks": {
            name: {
                "group": group,
                "without": without[name].to_dict(),
                "with": with_prefix[name].to_dict(),
                "chain": chains[name].to_dict() if name in chains else None,
            }
            for group, names in GROUPS.items()
            for name in names
            if name in with_prefix
        },
        "matrix": matrix.to_dict(),
    }

    def write() -> None:
        if len(tasks) == 16:
            draw_figures(folder, model, prefixes, results, matrix)
        checkpoint.write_atomic(path, json.dumps(results, indent=1).encode())

    distributed.run_on_main(write)
    return results


def results_table(results: Mapping[str, Any]) -> Any:
    """The scores as a DataFrame (stand-in until the merge)."""
    import pandas

    return pandas.DataFrame({name: {"with": row["with"]["accuracy"]} for name, row in results["tasks"].items()}).T


def scores_of(results: Mapping[str, Any]) -> tuple[dict[str, Score], dict[str, Score]]:
    """The scores in ``results``, by task: with its prefix, and without one."""
    with_prefix, without = (
        {name: Score.from_dict(row[kind]) for name, row in results["tasks"].items()} for kind in ("with", "without")
    )
    return with_prefix, without


def draw_figures(
    folder: str | Path, model: GPT, prefixes: Mapping[str, Tensor], results: Mapping[str, Any], matrix: AccuracyMatrix
) -> None:
    """Draw what a run found into ``figures/`` of its folder.

    Args:
        folder: of the run.
        model: for the attention maps.
        prefixes: by task name.
        results: see ``reproduce``.
        matrix: the score of every prefix on every task.
    """
    from mingpt.analysis import figures as draw

    folder = Path(folder)
    config = results["config"]
    n_rows = results["mixed"]["n_rows"]
    with_prefix, without = scores_of(results)
    figures = {
        "matrix": draw.accuracy_matrix_figure(matrix, title="Every prefix on every task"),
        "prefix_effect": draw.paired_bars(with_prefix, without, GROUPS, title="What a prefix adds"),
        "positions": draw.position_accuracy_figure(with_prefix, title=f"Where the outputs are right ({n_rows} rows)"),
        "pretraining": draw.learning_curves(
            {"pretraining": draw.read_metrics(folder / "pretraining" / "metrics.jsonl")},
            title="Pretraining on seven tasks mixed",
            floor=results["bayes_loss"],
        ),
    }
    # What the model looks at while it sorts, without a prefix and with one.
    length, prefix_size = config["data"]["length"], config["data"]["prefix_size"]
    inputs, _ = CustomDataset("test", [PRETRAINING_TASKS[0]], length, config["data"]["num_digits"]).rows([0])
    prompt = torch.cat([torch.zeros(1, prefix_size, dtype=torch.int64), torch.from_numpy(inputs)], dim=1)
    for name in (None, "SortAscending"):
        record: Record = []
        prefix = None if name is None else prefixes[name]
        sample = model.generate(prompt.to(model.device), length, prefixes=prefix, activations_record=record)
        figures[f"attention_{name or 'none'}"] = draw.attention_visualization(
            sample[0].cpu(), record, prefix_size, length, title=f"Attention, prefix: {name or 'none'}", annot=False
        )
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)


# ---------------------------------------------------------------------------------------------------- what is said


def format_table(results: Mapping[str, Any]) -> str:
    """The sixteen-row table of a run beside the published figures, in percent of the rows solved exactly."""
    n_rows = results["mixed"]["n_rows"]
    titles = (
        ("without prefix", 16),
        ("(published)", 13),
        ("with its prefix", 18),
        ("95% interval", 18),
        ("(published)", 13),
        ("as a chain", 13),
    )
    lines = [" " * 24 + "".join(f"{title:>{width}}" for title, width in titles)]

    def percent(score: Mapping[str, Any]) -> str:
        return f"{100 * score['accuracy']:.2f}"

    def published(kind: str, name: str) -> str:
        value = PUBLISHED[kind].get(name)
        return "-" if value is None else f"({value:.2f})"

    group = None
    for name, row in results["tasks"].items():
        if row["group"] != group:
            group = row["group"]
            lines.append(f"-- {group} ".ljust(len(lines[0]), "-"))
        low, high = row["with"]["confidence_interval"]
        lines.append(
            f"{name:24}{percent(row['without']):>16}{published('without', name):>13}"
            f"{percent(row['with']):>18}{f'{100 * low:.2f} - {100 * high:.2f}':>18}{published('with', name):>13}"
            f"{percent(row['chain']) if row.get('chain') else '-':>13}"
        )
    lines.append("-" * len(lines[0]))
    lines.append(f"{MIXED:24}{percent(results['mixed']):>16}{published('without', MIXED):>13}")
    seconds = results["seconds"]
    lines.append("")
    lines.append(f"percent of {n_rows} test rows whose every output token is right; '-' was never published")
    lines.append("as a chain: each of the composition's tasks in turn, with its own prefix")
    lines.append(
        ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        + f", {sum(seconds.values()):.0f} s in all"
    )
    return "\n".join(lines)
