"""A small language model that learns in context, and how small the cache can be that tells it what to do.

Legend: T tokens, P cache positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mingpt.distributed import run_on_main
from mingpt.evaluation import evaluate
from mingpt.experiments.pipeline import new_model, train_model, write_config
from mingpt.model import GPT
from mingpt.storage.checkpoint import read_description
from mingpt.storage.files import parsing
from mingpt.text import (
    CHARACTERS,
    TEXT_PRETRAINING_TASKS,
    CorpusDataset,
    MixtureDataset,
    TextDataset,
    TextTask,
    python_documentation,
)
from mingpt.trainer import recipe
from mingpt.utils import CfgNode, set_seed

if TYPE_CHECKING:
    from pandas import DataFrame

WINDOW = 128
"""How many tokens the language model reads at a time."""

SHARES = (1, 3)
"""Of every four examples the model is pretrained on, one is Python's documentation and three are demonstrations."""


def pretraining_data(config: CfgNode) -> MixtureDataset:
    """What the language model is pretrained on: text, and demonstrations of the tasks."""
    length, seed = WINDOW, config.seed
    corpus = CorpusDataset("train", python_documentation, length, seed)
    tasks = TextDataset("train", TEXT_PRETRAINING_TASKS, length, n_demonstrations=None, seed=seed)
    return MixtureDataset([corpus, tasks], SHARES)


def pretrain_language_model(config: CfgNode, run: str | Path) -> tuple[GPT, float]:
    """Train the language model, or read it where that is done.

    Args:
        config: ``get_default_config("text")``, with ``trainer`` as the budget.
        run: the folder; a new one gets the configuration as its config.json.

    Returns:
        The model in evaluation mode, and how many seconds its training took.

    Raises:
        CheckpointError: if the model there is of other settings.
    """
    data, path = pretraining_data(config), Path(run) / "model.safetensors"
    corpus, tasks = data.datasets
    if run_on_main(path.exists):  # another Python has another documentation; what was read is not compared
        with parsing(path, "a language model"):
            text = read_description(path)["cache_key"]["data"]["mixture"][0]
    else:
        text = corpus.describe()
    mixture = {"mixture": [text, tasks.describe()], "shares": list(data.shares)}
    key = {"stage": "language model", "seed": config.seed, "data": mixture, "recipe": recipe(config.trainer)}

    def build() -> GPT:
        set_seed(config.seed)
        model = new_model(config, CHARACTERS.vocab_size, WINDOW)
        write_config(config, path.parent)
        return model

    return train_model(config, build, data, key | {"init": config.model.to_dict()}, path, "pretraining")


def in_context_scores(
    model: GPT, tasks: Sequence[TextTask], numbers: Sequence[int], n_rows: int = 400, seed: int = 0
) -> DataFrame:
    """How often the model is right after so many demonstrations of a task, on test rows.

    Args:
        model: the language model.
        tasks: any.
        numbers: of demonstrations; those with which a text does not fit into the model's block are left out.
        n_rows: for each task and number.
        seed: of the texts.

    Returns:
        A row for each task and number: task, n_demonstrations, cache_size (the demonstrations' tokens, their mean),
        accuracy (0 to 1).
    """
    import pandas as pd

    found = []
    for task, n in itertools.product(tasks, numbers):
        data = TextDataset("test", [task], model.config.block_size, n, seed=seed)
        shown = [sum(len(text) + len(answer) + 2 for text, answer in data.texts(row)) for row in range(n_rows)]
        if max(shown) <= model.config.block_size:
            posed = [sum(map(len, data.texts(row)[-1])) + 2 for row in range(n_rows)]
            score = evaluate(model, data.with_changes(length=max(shown)), n_rows=n_rows, precision="float32")
            size = (sum(shown) - sum(posed)) / n_rows
            found.append({"task": str(task), "n_demonstrations": n, "cache_size": size, "accuracy": score.accuracy})
    return pd.DataFrame(found)


def smallest_caches(in_context: DataFrame, results: DataFrame, points: float = 0.01) -> DataFrame:
    """The smallest trained cache of each method that is at most ``points`` below the best accuracy in context.

    Args:
        in_context: of ``in_context_scores``.
        results: of a study, with the columns method, task, size and accuracy; the mean over seeds counts.
        points: of accuracy, 0 to 1.

    Returns:
        A row for each task: cache_size and accuracy in context (the fewest demonstrations that are within ``points`` of
        the best), and for each method its smallest size; nan where none is as good.
    """
    import pandas as pd

    means: Any = results.groupby(["task", "method", "size"], sort=False)["accuracy"].mean()
    rows = []
    for task in dict.fromkeys(in_context["task"]):
        own: Any = in_context[in_context["task"] == task]
        least = own["accuracy"].max() - points
        best = own[own["accuracy"] >= least].iloc[0]
        row = {"task": task, "in context": best["cache_size"], "accuracy": best["accuracy"]}
        for method in dict.fromkeys(results["method"]):
            sizes = means[task][method]
            row[method] = sizes[sizes >= least].index.min()
        rows.append(row)
    return pd.DataFrame(rows).set_index("task")
