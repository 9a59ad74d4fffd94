"""Methods side by side: what each fits one pretrained model to, with as many trainable parameters and as much training.

Legend: P prefix positions, C channels, L layers, K tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mingpt.adapters import LoRA, Reparametrization
from mingpt.distributed import run_on_main
from mingpt.evaluation import evaluate
from mingpt.experiments import pipeline
from mingpt.experiments.pipeline import Init, dataset
from mingpt.model import GPT
from mingpt.prefix import Prefix, average, initial_prefix
from mingpt.storage.cache import beside, cached_json
from mingpt.storage.checkpoint import checksum, weights_hash
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS, Task
from mingpt.trainer import recipe
from mingpt.utils import CfgNode, nearest

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger("mingpt")


@dataclass(frozen=True)
class Method:
    """One way to fit a pretrained model to a task.

    Attributes:
        kind: "full" trains all weights of a copy of the model, "lora" low-rank updates, and the others are the kinds of
            prefix of ``mingpt.prefix.Prefix``.
        learning_rate: of AdamW, decayed linearly to zero; see docs/methods.md for what was tried.
        init: of an activation prefix: "padding" and "random", see ``mingpt.prefix.initial_prefix``; "tokens", what the
            model sees at the tokens 1 to P; "prefix", of the run's prefixes for the pretraining tasks the one with the
            lowest loss on the new task (Vu et al. 2022 transfer prompts so); "mean", the average of these.
        is_reparametrized: trains a key_value prefix through ``mingpt.adapters.Reparametrization``.
        targets: the layers of a LoRA.
    """

    kind: str
    learning_rate: float
    init: str = "padding"
    is_reparametrized: bool = False
    targets: str = ""


METHODS = {
    "full": Method("full", 1e-3),
    "lora-mlp": Method("lora", 0.01, targets=r"mlp\.c_"),
    "lora-attention": Method("lora", 0.01, targets=r"attn\.c_attn"),
    "activation": Method("activation", 0.25),
    "activation-random": Method("activation", 0.25, init="random"),
    "activation-tokens": Method("activation", 0.25, init="tokens"),
    "activation-prefix": Method("activation", 0.25, init="prefix"),
    "activation-mean": Method("activation", 0.25, init="mean"),
    "key_value": Method("key_value", 0.25),
    "key_value-mlp": Method("key_value", 3e-3, is_reparametrized=True),
    "prompt": Method("prompt", 0.3),
}
"""All methods, by the names that ``mingpt compare --methods`` takes."""


def compare(
    config: CfgNode,
    run: str | Path,
    tasks: Sequence[Task] = TEST_TASKS,
    methods: Sequence[str] = tuple(METHODS),
    n_parameters: int | None = None,
) -> DataFrame:
    """Fit a run's model to each task by each method, and score them.

    All methods have the same iterations and rows a task, and as many trainable parameters as fit into ``n_parameters``:
    full fine-tuning has all weights, a soft prompt no more positions than the run has placeholders for a prefix.

    Args:
        config: of the run; ``prefix`` is the budget of every method, but for its learning rates.
        run: the folder, whose model and prefixes are read, or made first. Each result is kept in its folder
            ``comparison/<method>``, and is not computed again.
        tasks: K of them.
        methods: names in ``METHODS``.
        n_parameters: trainable parameters a task, those of an activation prefix in all placeholders by default.

    Returns:
        A row for each method and task, in their order. Columns: method, task, n_parameters (what the task costs),
        n_trained (more where a reparametrization leaves some behind), seconds (of training; prefixes that are trained
        together share the time evenly), n_correct, n_rows and accuracy (the share of test rows solved).

    Raises:
        ValueError: for an unknown method, or one that cannot do with so few parameters.
    """
    import pandas as pd

    for name in methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}; choose from {', '.join(METHODS)}")
    tasks = list(dict.fromkeys(tasks))
    model, _ = pipeline.pretrain(config, run, later_tasks=tasks)
    sizes = {name: _size(config, model, METHODS[name], n_parameters) for name in methods}
    rows = [row for name in methods for row in _results(config, model, tasks, Path(run), name, sizes[name])]
    return pd.DataFrame(rows)


def _results(config: CfgNode, model: GPT, tasks: Sequence[Task], run: Path, name: str, size: int) -> list[dict]:
    """What one method comes to on each task, a row each: read where it is there, and fitted where it is not."""
    method, budget = METHODS[name], config.copy()
    budget.prefix.merge_from_dict(
        {"validate_every": None, "decay_fraction": 1.0, "learning_rate": method.learning_rate}
    )
    budget.trainer = budget.prefix
    known: dict[str, Prefix] = {}
    if method.init in ("prefix", "mean"):
        own_folder = pipeline.KINDS[method.kind]
        found, _ = pipeline.train_prefixes(config, model, pipeline.EVERY_TASK, run, own_folder, method.kind)
        known = {str(task): found[str(task)] for task in PRETRAINING_TASKS}
    shared = {
        "stage": "compare",
        "seed": config.seed,
        "method": asdict(method),
        "size": size,
        "model": weights_hash(model),
        "known": {task: checksum({"values": prefix.values}) for task, prefix in known.items()},
        "recipe": recipe(budget.prefix),
        "evaluation": {"n_rows": config.evaluation.n_rows, "precision": config.evaluation.precision},
    }
    folder = run / "comparison" / name
    keys = {task: shared | {"data": dataset(config, "test", [task]).describe()} for task in tasks}
    paths = {task: beside(folder / f"{task}.json", key) for task, key in keys.items()}
    missing = run_on_main(lambda: [task for task in tasks if not paths[task].exists()])

    def fit() -> Iterator[dict[str, Any]]:
        """Fit the method to each missing task in turn, prefixes to all at the first."""
        prefixes: dict[str, Prefix] = {}
        total = 0.0
        if method.kind not in ("full", "lora"):
            init = _init(config, model, missing, method.init, size, known)
            options = {"kind": method.kind, "n_positions": size, "is_reparametrized": method.is_reparametrized}
            prefixes, total = pipeline.train_prefixes(budget, model, missing, folder, init=init, **options)
        for task in missing:
            tuned, lora, prefix, seconds = model, None, prefixes.get(str(task)), total / len(missing)
            if method.kind == "full":
                tuned, seconds = pipeline.fine_tune(budget, model, [task], folder, str(task))
            elif method.kind == "lora":
                lora, seconds = pipeline.train_lora(budget, model, task, folder, str(task), size, method.targets)
                lora.attach()
            try:
                score = evaluate(tuned, dataset(config, "test", [task]), prefix, **shared["evaluation"])
            finally:
                if lora:
                    lora.detach()
            n_parameters = n_trained = prefix.values.numel() if prefix else (lora or tuned).n_parameters
            if prefix and method.is_reparametrized:
                n_trained = sum(each.numel() for each in Reparametrization(model, prefix.values).parameters())
            costs = {"n_parameters": n_parameters, "n_trained": n_trained, "seconds": seconds}
            yield costs | {"n_correct": score.n_correct, "n_rows": score.n_rows, "accuracy": score.accuracy}

    fits = fit()
    values = {task: cached_json(paths[task], keys[task], partial(next, fits)) for task in tasks}
    return [{"method": name, "task": str(task)} | value for task, value in values.items()]


def _size(config: CfgNode, model: GPT, method: Method, n_parameters: int | None) -> int:
    """How many positions, or ranks, of a method have at most ``n_parameters`` trainable parameters, see ``compare``."""
    n_placeholders = config.data.prefix_size
    n_asked: int = n_parameters or model.config.n_layer * n_placeholders * model.config.n_embd
    if method.kind == "full":
        return 1
    if method.kind == "lora":
        lora = LoRA(model, 1, method.targets)
        lora.detach()
        size = n_asked // lora.n_parameters
    else:
        size = min(n_asked // initial_prefix(model, 1, kind=method.kind).numel(), n_placeholders)
    if size < 1:
        raise ValueError(f"{n_asked} trainable parameters are too few for {method}; give more")
    return size


@torch.no_grad()
def _init(
    config: CfgNode, model: GPT, tasks: Sequence[Task], init: str, size: int, known: Mapping[str, Prefix]
) -> Init:
    """What a method's prefixes are initialised from, as ``pipeline.train_prefixes`` takes it."""
    if init == "tokens":
        return [1 + position % config.data.num_digits for position in range(size)]
    if init not in ("prefix", "mean"):
        return init
    values = {name: prefix.values[0, :, :size] for name, prefix in known.items()}
    if init == "mean":
        return average(list(values.values())).values[0]
    chosen = []
    for task in tasks:
        x, y = (each.to(model.device) for each in dataset(config, "train", [task]).batch(range(200)))
        losses = {name: model(x, y, prefixes=each)[1].item() for name, each in values.items()}
        best = min(losses, key=losses.__getitem__)
        logger.info("%s: init from the prefix for %s, a loss of %.3f", task, best, losses[best])
        chosen.append(values[best])
    return torch.stack(chosen)


# --------------------------------------------------------------------------------------------------------- tables


def results_table(results: DataFrame) -> DataFrame:
    """What ``compare`` found, side by side: a row for each task in percent, and for each cost; a column a method."""
    import pandas as pd

    scores = 100 * results.pivot_table("accuracy", "task", "method", sort=False)
    costs = pd.DataFrame(results.groupby("method", sort=False)[["n_parameters", "n_trained", "seconds"]].mean()).T
    costs.index = ["parameters a task", "trained parameters a task", "seconds a task"]
    return pd.concat([scores, costs])


def format_table(results: DataFrame) -> str:
    """``results_table`` as text for a terminal, with what the figures are of."""
    import pandas as pd

    table = results_table(results)
    table.columns = pd.MultiIndex.from_tuples([name.partition("-")[::2] for name in table.columns])  # in two lines
    text = table.to_string(float_format=lambda value: f"{value:.0f}" if value >= 1000 else f"{value:.2f}")
    return f"{text}\n\npercent of {results['n_rows'].iloc[0]} test rows whose every output token is right"
