"""Prefixes that train in one batch against the same ones one after the other: 16 tasks x 5 seeds x 4 rates.

All are key_value prefixes of 10 positions for the stored model, with its schedule of the learning rate, in float32 by
default. What each comes to is compared by its loss on validation rows.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from mingpt.adapters.prefixes import KeyValuePrefix
from mingpt.datasets import CustomDataset
from mingpt.experiments.pipeline import EVERY_TASK, dataset
from mingpt.experiments.presets import run_config
from mingpt.model import GPT
from mingpt.storage import load_model
from mingpt.trainer import AdapterTrainer
from mingpt.utils import set_seed

RUN, RATES, N_SEEDS, N_POSITIONS = "checkpoints/laptop", (0.03, 0.06, 0.1, 0.2), 5, 10


def train(
    model: GPT, data: list[CustomDataset], seeds: list[int], rates: list[float], options: dict
) -> tuple[float, list[float]]:
    """Train a prefix for each of the datasets in one batch: in how many seconds, and what the loss of each is then."""
    start = time.perf_counter()
    adapters = []
    for dataset_, seed in zip(data, seeds, strict=True):
        set_seed(seed)
        adapters.append(KeyValuePrefix(model, dataset_, N_POSITIONS))
    adapter = adapters[0].extend(adapters[1:])
    config = AdapterTrainer.get_default_config()
    config.merge_from_dict({"device": "cpu", "progress": False} | options)
    AdapterTrainer(config, model, data, adapter, rates).run()
    return time.perf_counter() - start, [loss(model, adapter, number, each) for number, each in enumerate(data)]


@torch.no_grad()
def loss(model: GPT, adapter: KeyValuePrefix, number: int, data: CustomDataset) -> float:
    with adapter.attached([number]) as prefix:
        return model(*data.with_split("validation").batch(range(16)), prefixes=prefix)[1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 16], help="of each prefix in an iteration")
    parser.add_argument("--packs", type=int, nargs="+", default=[320, 64], help="prefixes in one batch")
    options = parser.parse_args()
    model, config = load_model(f"{RUN}/model.safetensors")[0], run_config(RUN)
    grid = list(itertools.product(EVERY_TASK, range(N_SEEDS), RATES))
    data = {}
    for task, seed in itertools.product(EVERY_TASK, range(N_SEEDS)):
        own = config.copy()
        own.seed = seed
        data[task, seed] = dataset(own, "train", [task])
    print(
        f"{len(grid)} prefixes, {options.iters} iterations, {torch.get_num_threads()} threads; {options.rounds} rounds"
    )
    for n_rows in options.rows:
        settings = {name: getattr(config.prefix, name) for name in ("lr_schedule", "warmup_iters", "decay_fraction")}
        settings |= {"max_iters": options.iters, "batch_size": n_rows, "precision": options.precision}
        seconds: dict[int, list[float]] = {}
        losses: dict[int, list[float]] = {}
        for _, size in itertools.product(range(options.rounds), [*options.packs, 1]):
            total, losses[size] = 0.0, []
            for first in range(0, len(grid), size):
                tasks, seeds, rates = (list(each) for each in zip(*grid[first : first + size], strict=True))
                own = [data[key] for key in zip(tasks, seeds, strict=True)]
                took, found = train(model, own, seeds, rates, settings)
                total, losses[size] = total + took, losses[size] + found
            seconds.setdefault(size, []).append(total)
        alone = statistics.median(seconds[1])
        for size in options.packs:
            together = statistics.median(seconds[size])
            worst = max(abs(a - b) for a, b in zip(losses[size], losses[1], strict=True))
            print(
                f"{n_rows:3} rows each, {size:3} in a batch: {together:6.1f} s, one after the other {alone:6.1f} s, "
                f"{alone / together:.2f} times as fast; losses differ by {worst:.1e} at most"
            )


if __name__ == "__main__":
    main()
