"""Methods side by side: what each teaches one pretrained model, given as many learned numbers and as much training.

Legend: P prefix positions, C channels, L layers, K tasks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mingpt import distributed
from mingpt.evaluation import AccuracyMatrix, Score, evaluate
from mingpt.experiments import pipeline
from mingpt.lora import LoRA
from mingpt.model import GPT
from mingpt.prefix import Reparametrization, average
from mingpt.storage import checkpoint
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS, Task
from mingpt.training.metrics import RUNTIME_KEYS
from mingpt.utils import CfgNode, nearest

logger = logging.getLogger("mingpt")

Start = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class Method:
    """One way to teach a pretrained model a task.

    Attributes:
        kind: "full" trains all weights of a copy of the model, "lora" low-rank updates, and the others are the kinds of
            prefix of ``mingpt.prefix.Prefix``.
        learning_rate: of AdamW, decayed linearly to zero; see docs/methods.md for what was tried.
        start: of an activation prefix: "padding" and "random", see ``mingpt.prefix.initial_prefix``; "tokens", what the
            model sees at the tokens 1 to P; "prefix", of the run's prefixes for the pretraining tasks the one with the
            lowest loss on the new task (Vu et al. 2022 transfer prompts so); "mean", the average of these.
        is_reparametrized: trains a key_value prefix through ``mingpt.prefix.Reparametrization``.
        targets: the layers of a LoRA.
    """

    kind: str
    learning_rate: float
    start: str = "padding"
    is_reparametrized: bool = False
    targets: str = ""


METHODS = {
    "full": Method("full", 1e-3),
    "lora-mlp": Method("lora", 0.01, targets=r"mlp\.c_"),
    "lora-attention": Method("lora", 0.01, targets=r"attn\.c_attn"),
    "activation": Method("activation", 0.25),
    "activation-random": Method("activation", 0.25, start="random"),
    "activation-tokens": Method("activation", 0.25, start="tokens"),
    "activation-prefix": Method("activation", 0.25, start="prefix"),
    "activation-mean": Method("activation", 0.25, start="mean"),
    "key_value": Method("key_value", 0.25),
    "key_value-mlp": Method("key_value", 3e-3, is_reparametrized=True),
    "prompt": Method("prompt", 0.3),
}
"""All methods, by the names that ``mingpt compare --methods`` takes."""


@dataclass(frozen=True)
class Result:
    """What one method came to on one task.

    Attributes:
        method: a name in ``METHODS``.
        task: its name.
        n_parameters: how many learned numbers the task costs.
        n_trained: how many were trained, which a reparametrization leaves behind but for the former.
        seconds: of training; prefixes of several tasks are trained at once, and share the time evenly.
        score: on test rows.
    """

    method: str
    task: str
    n_parameters: int
    n_trained: int
    seconds: float
    score: Score


def compare(
    config: CfgNode,
    folder: str | Path,
    tasks: Sequence[Task] = TEST_TASKS,
    methods: Sequence[str] = tuple(METHODS),
    n_parameters: int | None = None,
) -> list[Result]:
    """Teach a run's model each task by each method, and score them.

    All methods have the same iterations and rows a task, and as many learned numbers as fit into ``n_parameters``: full
    fine-tuning has all weights, a soft prompt no more positions than the run has places for a prefix.

    Args:
        config: of the run; ``prefix`` is the budget of every method, but for its learning rate and ``converged_loss``.
        folder: of the run, whose model and prefixes are read, or made first. What is found is kept in its folder
            ``comparison``; results that are there are not computed again.
        tasks: K of them.
        methods: names in ``METHODS``.
        n_parameters: learned numbers a task, those of an activation prefix in all places by default.

    Returns:
        The results, by methods and then by tasks as they are given.

    Raises:
        ValueError: for an unknown method, one that cannot do with so few numbers, or a folder whose comparison has
            another budget.
    """
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}; choose from {', '.join(METHODS)}")
    folder = Path(folder)
    model, _ = pipeline.pretrain(config, folder)
    n_placeholders = config.data.prefix_size
    n_numbers = n_parameters or model.config.n_layer * n_placeholders * model.config.n_embd
    sizes = {name: _size(model, METHODS[name], n_numbers, n_placeholders) for name in methods}
    budget = config.copy()
    budget.prefix.merge_from_dict({"converged_loss": None})
    settings = budget.to_dict() | {"n_parameters": n_numbers}
    folder /= "comparison"
    distributed.run_on_main(lambda: checkpoint.verify(folder / "config.json", settings, RUNTIME_KEYS))
    path = folder / "results.json"
    done = {(each.method, each.task): each for each in distributed.run_on_main(lambda: read_results(path))}
    for name in methods:
        missing = [task for task in tasks if (name, str(task)) not in done]
        if missing:
            start = _start(config, model, missing, folder.parent, METHODS[name].start, sizes[name])
            for outcome in _teach(budget, model, missing, folder, name, sizes[name], start):
                done[outcome.method, outcome.task] = outcome
            content = json.dumps([asdict(each) | {"score": each.score.to_dict()} for each in done.values()], indent=1)
            distributed.run_on_main(lambda content=content: checkpoint.write_atomic(path, content.encode()))
    return [done[name, str(task)] for name in methods for task in tasks]


def read_results(path: str | Path) -> list[Result]:
    """The results that ``compare`` has written to a file, none if there is no file yet."""
    if not Path(path).exists():
        return []
    found = json.loads(Path(path).read_text())
    return [Result(**(each | {"score": Score.from_dict(each["score"])})) for each in found]


def as_matrix(results: Sequence[Result]) -> AccuracyMatrix:
    """The scores of results as a matrix of methods by tasks, for its figure."""
    scores = {(each.method, each.task): each.score for each in results}
    methods, tasks = (tuple(dict.fromkeys(names)) for names in zip(*scores, strict=True))
    return AccuracyMatrix(methods, tasks, tuple(tuple(scores[name, task] for task in tasks) for name in methods))


def results_table(results: Sequence[Result]) -> Any:
    """The accuracies in percent as a DataFrame, tasks by methods (stand-in until the merge)."""
    return _frame(as_matrix(results))


def _frame(matrix: AccuracyMatrix) -> Any:
    import pandas

    return (
        100
        * pandas.DataFrame(
            [[score.accuracy for score in row] for row in matrix.scores], list(matrix.prefixes), list(matrix.tasks)
        ).T
    )


def format_table(results: Sequence[Result]) -> str:
    """Outcomes as a table for a terminal, a row for each task and a column for each method."""
    matrix = as_matrix(results)
    width = 12
    heads = [name.split("-") for name in matrix.prefixes]
    lines = [" " * 24 + "".join(f"{(head[n : n + 1] or [''])[0]:>{width}}" for head in heads) for n in range(2)]
    for column, task in enumerate(matrix.tasks):
        lines.append(f"{task:24}" + "".join(f"{100 * row[column].accuracy:>{width}.2f}" for row in matrix.scores))
    lines.append("-" * len(lines[0]))
    own = [[each for each in results if each.method == name] for name in matrix.prefixes]
    for title, numbers in (
        ("numbers learned a task", [str(each[0].n_parameters) for each in own]),
        ("numbers trained a task", [str(each[0].n_trained) for each in own]),
        ("seconds a task", [f"{sum(o.seconds for o in each) / len(each):.1f}" for each in own]),
    ):
        lines.append(f"{title:24}" + "".join(f"{number:>{width}}" for number in numbers))
    n_rows = results[0].score.n_rows
    lines += ["", f"percent of {n_rows} test rows whose every output token is right"]
    return "\n".join(lines)


def _size(model: GPT, method: Method, n_parameters: int, n_placeholders: int) -> int:
    """How many positions, or ranks, of a method have at most ``n_parameters`` numbers."""
    n_layer, n_embd = model.config.n_layer, model.config.n_embd
    if method.kind == "full":
        return 1
    if method.kind == "lora":
        lora = LoRA(model, 1, method.targets)
        lora.detach()
        size = n_parameters // lora.n_parameters
    else:
        of_position = {"activation": n_layer * n_embd, "key_value": 2 * n_layer * n_embd, "prompt": n_embd}[method.kind]
        size = min(n_parameters // of_position, n_placeholders)
    if size < 1:
        raise ValueError(f"{n_parameters} numbers are too few for {method}; give more")
    return size


def _teach(
    config: CfgNode, model: GPT, tasks: Sequence[Task], folder: Path, name: str, size: int, start: Start
) -> Iterator[Result]:
    """Teach the model some tasks by one method."""
    method, config = METHODS[name], config.copy()
    config.prefix.learning_rate = method.learning_rate
    logger.info("%s on %d tasks", name, len(tasks))

    def outcome(
        task: Task, n_parameters: int, seconds: float, taught: GPT = model, prefix: Tensor | None = None
    ) -> Result:
        evaluation, data = config.evaluation, pipeline.dataset(config, "test", [task])
        score = evaluate(taught, data, prefix, evaluation.n_rows, precision=evaluation.precision)
        n_trained = n_parameters
        if method.is_reparametrized and prefix is not None:
            n_trained = sum(each.numel() for each in Reparametrization(prefix[None]).parameters())
        return Result(name, str(task), n_parameters, n_trained, seconds, score)

    if method.kind == "full":
        config.trainer = config.prefix
        for task in tasks:
            taught, seconds = pipeline.fine_tune(config, model, [task], folder / name, str(task))
            yield outcome(task, model.n_parameters, seconds, taught)
    elif method.kind == "lora":
        for task in tasks:
            lora, seconds = pipeline.train_lora(config, model, task, folder / name, str(task), size, method.targets)
            lora.attach()
            try:
                yield outcome(task, lora.n_parameters, seconds)
            finally:
                lora.detach()
    else:
        file = f"{name}_{checkpoint.json_checksum([str(task) for task in tasks])[:8]}"
        prefixes, seconds = pipeline._train_prefixes(
            config, model, tasks, folder, file, method.kind, size, start, method.is_reparametrized
        )
        for task in tasks:
            prefix = prefixes[str(task)]
            yield outcome(task, prefix.numel(), seconds / len(tasks), prefix=prefix)


@torch.no_grad()
def _start(config: CfgNode, model: GPT, tasks: Sequence[Task], folder: Path, how: str, size: int) -> Start:
    """Where a method's prefixes start, as ``pipeline.train_prefixes`` takes it; ``folder`` is the run's."""
    if how == "tokens":
        return [1 + position % config.data.num_digits for position in range(size)]
    if how not in ("prefix", "mean"):
        return how
    learned, _ = pipeline._train_prefixes(config, model, [*PRETRAINING_TASKS, *TEST_TASKS], folder)
    known = {str(task): learned[str(task)][:, :size] for task in PRETRAINING_TASKS}
    if how == "mean":
        return average(list(known.values())).values[0]
    chosen = []
    for task in tasks:
        x, y = (each.to(model.device) for each in pipeline.dataset(config, "train", [task]).batch(range(200)))
        losses = {name: model(x, y, prefixes=prefix)[1].item() for name, prefix in known.items()}
        best = min(losses, key=losses.__getitem__)
        logger.info("%s starts from %s's prefix, a loss of %.3f", task, best, losses[best])
        chosen.append(known[best])
    return torch.stack(chosen)
