"""What is left of prefixes that are taken apart, and how accurate prefixes made without gradients are.

    python studies/edits.py constants   # the best answer that does not look at the input, for each task
    python studies/edits.py keys        # values with other keys, layer by layer       (after studies/length.toml)
    python studies/edits.py biases      # biases in fewer directions, fewer positions  (after studies/length.toml)
    python studies/edits.py answers     # steering, examples, averages as answers  (after studies/sixteen.toml)
    python studies/edits.py inits       # the same as what training begins from

Each writes studies/edits/<name>.csv. Everything is scored on validation rows; where one of several prefixes is chosen,
it is chosen on others.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mingpt.adapters import PrefixAdapter
from mingpt.analysis.edits import cut_biases, match_attention, steering_prefix, swap_keys
from mingpt.datasets import CustomDataset
from mingpt.evaluation import evaluate
from mingpt.experiments.pipeline import EVERY_TASK, dataset, load_run
from mingpt.experiments.presets import run_config
from mingpt.experiments.sweep import Cell, Study
from mingpt.model import GPT
from mingpt.prefix import Prefix, as_key_value, average, concatenate, initial_prefix
from mingpt.tasks import PRETRAINING_TASKS, Task
from mingpt.trainer import AdapterTrainer
from mingpt.utils import set_seed

RUN, N_ROWS, N_POSITIONS, SEEDS = Path("checkpoints/laptop"), 400, 10, range(5)
Row = dict[str, Any]


def data_of(task: str | Task, split: str = "validation", seed: int = 0) -> CustomDataset:
    config = run_config(RUN)
    config.seed = seed
    return dataset(config, split, [Task.parse(str(task))])


def solved(task: str | Task, n_rows: int, seed: int = 0) -> torch.Tensor:
    """Inputs with their solutions as the model reads them, without the padding, (B, 2T)."""
    inputs, solutions = data_of(task, "train", seed).rows(range(n_rows))
    return torch.from_numpy(np.concatenate([inputs, solutions], axis=1))


def score(model: GPT, task: str | Task, prefix: Prefix, split: str = "validation", seed: int = 0) -> float:
    return evaluate(model, data_of(task, split, seed), prefix, N_ROWS, precision="float32").accuracy


def train_score(model: GPT, task: Task, seed: int, prefix: Prefix) -> float:
    return score(model, task, prefix, "train", seed)


def constants() -> Iterator[Row]:
    """For each task the most frequent token at each position of its solutions, as an answer to every input."""
    for task in EVERY_TASK:
        _, known = data_of(task, "train").rows(range(4000))
        _, asked = data_of(task).rows(range(N_ROWS))
        best = np.array([np.bincount(column).argmax() for column in known.T])
        right = asked == best
        yield {"task": str(task), "rows": right.all(axis=1).mean(), "tokens": right.mean()}


@torch.no_grad()
def kept_prefixes(study: str = "length") -> tuple[GPT, dict[Cell, Prefix]]:
    """The prefixes of ten positions that a study has trained."""
    study = Study.read(f"studies/{study}.toml")
    found = {cell: study.adapter(cell).prefix() for cell in study.cells if cell.size == N_POSITIONS}
    return load_run(RUN, "cpu")[0], found


def keys() -> Iterator[Row]:
    """Each prefix's values with the keys of another seed or task, the mean keys of the others, and random ones."""
    model, prefixes = kept_prefixes()
    n_layer = model.config.n_layer
    layers = {"all": None} | {f"{layer + 1}": [layer] for layer in range(n_layer)}
    for cell, prefix in prefixes.items():
        same = {other: each for other, each in prefixes.items() if other.seed == (cell.seed + 1) % len(SEEDS)}
        (twin,) = (each for other, each in same.items() if other.task == cell.task)
        others = [each for other, each in prefixes.items() if other.seed == cell.seed and other.task != cell.task]
        drawn = torch.Generator().manual_seed(cell.seed)
        choices = {
            "own": [prefix.values[0, :, 0]],
            "another seed's": [twin.values[0, :, 0]],
            "another task's": [each.values[0, :, 0] for each in others],
            "mean of other tasks'": [average(others).values[0, :, 0]],
            "random": [torch.randn(prefix.values[0, :, 0].shape, generator=drawn)],
        }
        for (name, own), (label, which) in itertools.product(choices.items(), layers.items()):
            if name != "own" or which is None:
                found = np.mean([score(model, cell.task, swap_keys(prefix, each, which)) for each in own])
                yield {"task": cell.task, "seed": cell.seed, "keys": name, "layers": label, "accuracy": found}


def biases() -> Iterator[Row]:
    """Each prefix with its biases in some directions only, and shortened by attention matching."""
    model, prefixes = kept_prefixes()
    for cell, prefix in prefixes.items():
        x = data_of(cell.task, "train", cell.seed).batch(range(200))[0]
        ways: dict[str, tuple[Callable[..., Prefix], list[int]]] = {
            "directions": (cut_biases, [0, 1, 2, 3, 4, 6, 8, 10]),
            "positions": (match_attention, [1, 2, 3, 5, 8, 10]),
        }
        for way, (edit, sizes) in ways.items():
            for size in sizes:
                found = score(model, cell.task, edit(model, prefix, x, size))
                yield {"task": cell.task, "seed": cell.seed, "kept": way, "number": size, "accuracy": found}


def made(model: GPT, known: dict[str, Prefix], task: Task, seed: int = 0) -> dict[str, list[Prefix]]:
    """By name, prefixes for a task without a gradient on it; where there are several, one is to be chosen."""
    own = solved(task, 200, seed)
    others = torch.cat([solved(other, 200, seed)[:, own.shape[1] // 2 :] for other in PRETRAINING_TASKS])
    wrong = torch.cat([own[:, : own.shape[1] // 2].repeat(len(PRETRAINING_TASKS), 1), others], dim=1)
    examples = [
        as_key_value(model, Prefix("prompt", model.transformer.wte(row)[None])).detach() for row in own[:8]
    ]  # (L, 2, 2T, C) each
    everything = Prefix("key_value", torch.cat(examples, dim=2)[None], n_placeholders=N_POSITIONS)
    x = data_of(task, "train", seed).batch(range(200))[0]
    first = [known[str(each)] for each in PRETRAINING_TASKS]
    found = {
        "padding": [Prefix("key_value", initial_prefix(model, N_POSITIONS, kind="key_value").detach()[None])],
        "steering": [steering_prefix(model, own, wrong, N_POSITIONS, each) for each in (0.5, 1.0, 2.0, 4.0, 8.0)],
        "examples, matched": [match_attention(model, everything, x, N_POSITIONS)],
        "best of seven": first,
        "average of seven": [average(first)],
    }
    if len(task.tasks) > 1:
        parts = [known[str(each)] for each in task.tasks]
        found["average of parts"] = [average(parts)]
        found["parts, one after the other"] = [concatenate(parts, n_placeholders=N_POSITIONS)]
    return found


def answers() -> Iterator[Row]:
    """What prefixes without gradients answer, with the rows and the trained prefixes of each seed."""
    model, trained = kept_prefixes("sixteen")
    for task, seed in itertools.product(EVERY_TASK, SEEDS):
        known = {cell.task: prefix for cell, prefix in trained.items() if cell.seed == seed}
        first = [known[str(each)] for each in PRETRAINING_TASKS if str(each) != str(task)]
        found = {"its own, trained": [known[str(task)]]} | made(model, known, task, seed)
        found |= {"best of seven": first, "average of seven": [average(first)]}
        for name, prefixes in found.items():
            chosen = max(prefixes, key=partial(train_score, model, task, seed)) if prefixes[1:] else prefixes[0]
            yield {"task": str(task), "prefix": name, "seed": seed, "accuracy": score(model, task, chosen)}


def inits(n_iters: int = 400, rate: float = 0.1) -> Iterator[Row]:
    """What they come to when they are trained for a while; of several, the one of the smallest loss is."""
    model, known, _ = load_run(RUN, "cpu")
    for task in map(Task.parse, ("FilterAtLeastNTimes", "SortAscending+Add1")):
        x, y = data_of(task).batch(range(N_ROWS))
        found, chosen = made(model, known, task), {}
        for name, prefixes in found.items():
            if prefixes[0].n_positions == N_POSITIONS:
                with torch.no_grad():
                    chosen[name] = min(prefixes, key=lambda prefix: model(x, y, prefixes=prefix)[1].item()).values[0]
        chosen["random"] = None
        values, names = [], list(itertools.product(chosen, SEEDS))
        for name, seed in names:
            set_seed(seed + 1)
            random = initial_prefix(model, N_POSITIONS, "random", "key_value").detach()
            values.append(random if chosen[name] is None else chosen[name])
        adapter = PrefixAdapter(model, Prefix("key_value", torch.stack(values)))
        config = AdapterTrainer.get_default_config()
        config.merge_from_dict({"max_iters": n_iters, "batch_size": 16, "warmup_iters": 10, "decay_fraction": 0.5})
        config.merge_from_dict({"lr_schedule": "linear", "device": "cpu", "progress": False, "learning_rate": rate})
        AdapterTrainer(config, model, [data_of(task, "train", seed) for _, seed in names], adapter).run()
        for number, (name, seed) in enumerate(names):
            with adapter.attached([number]) as prefix:
                found_ = score(model, str(task), prefix)
            yield {"task": str(task), "init": name, "seed": seed, "n_iters": n_iters, "accuracy": found_}


def main() -> None:
    for name in sys.argv[1:] or ["constants"]:
        path = Path("studies/edits") / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        rows = {"constants": constants, "keys": keys, "biases": biases, "answers": answers, "inits": inits}[name]
        pd.DataFrame(rows()).to_csv(path, index=False, float_format="%.4f")
        print(path)


if __name__ == "__main__":
    main()
