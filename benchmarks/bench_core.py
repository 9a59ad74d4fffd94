"""The package against the ancestor's loop (tests/reference.py), in turn in one process, as ratios.

The ancestor reads the whole sequence with the prefix spliced in, for every row, in float32, trains one prefix at a time
on batches of 64 and evaluates batches of 100 without a cache. Each measurement is of the same work: seconds a row.

    python benchmarks/bench_core.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference import ReferenceLoop, reference_generate, reference_rows

from mingpt import experiment
from mingpt.datasets import CustomDataset
from mingpt.evaluation import solve
from mingpt.precision import resolve_precision
from mingpt.prefix import initial_prefix
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS
from mingpt.trainer import PrefixTrainer, Trainer

Work = tuple[Callable[[], object], int]
"""What to time, and how many rows it works on."""


def main() -> None:
    """Print a row for each measurement: both times, and the ratio with its smallest and largest value."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7, help="times that each pair is measured in turn")
    arguments.add_argument("--json", type=Path, help="a file for the figures")
    options = arguments.parse_args()
    precision = resolve_precision("auto", "cpu")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {precision}; medians of {options.rounds} rounds"
    )
    print(f"{'':34}{'reference':>12}{'package':>12}{'times as fast':>26}")
    results = {}
    for name, reference, ours in measurements():
        pairs = [(seconds_per_row(reference), seconds_per_row(ours)) for _ in range(options.rounds + 1)][1:]
        ratios = sorted(slow / fast for slow, fast in pairs)
        slow, fast, ratio = (statistics.median(x) for x in (*zip(*pairs, strict=True), ratios))
        spread = f"{ratio:.1f}  ({ratios[0]:.1f} - {ratios[-1]:.1f})"
        print(f"{name:34}{_seconds(slow):>12}{_seconds(fast):>12}{spread:>26}", flush=True)
        results[name] = {"reference": slow, "package": fast, "ratio": ratio, "ratios": ratios}
    if options.json:
        options.json.write_text(json.dumps({"precision": precision, "seconds_per_row": results}, indent=1))


def measurements() -> Iterator[tuple[str, Work, Work]]:
    """Yield each measurement's name, the reference's work and the package's, for the laptop preset."""
    config = experiment.get_default_config("laptop")
    tasks = [*PRETRAINING_TASKS, *TEST_TASKS]
    mixed = experiment.dataset(config, "train", PRETRAINING_TASKS)

    fresh, fresh_reference = itertools.count(), itertools.count()
    yield (
        "a row of data",
        (lambda: reference_rows(mixed, [next(fresh_reference) for _ in range(256)]), 256),
        (lambda: mixed.batch(range(8192 * (n := next(fresh)), 8192 * (n + 1))), 8192),
    )

    model = experiment.build_model(config)
    old = ReferenceLoop(experiment.build_model(config), Trainer.get_default_config())
    x, y = mixed.batch(range(64))
    n_rows = config.trainer.batch_size
    yield (
        "a row of a pretraining step",
        (lambda: old.step(x, y), 64),
        (steps(Trainer(short(config.trainer), model, mixed)), 3 * n_rows),
    )

    sort = experiment.dataset(config, "train", tasks[:1])
    x1, y1 = sort.batch(range(64))
    prefix = initial_prefix(model, config.data.prefix_size)
    old_prefix = ReferenceLoop(experiment.build_model(config), Trainer.get_default_config(), prefix.detach().clone())
    single = PrefixTrainer(short(config.prefix, batch_size=64), model, sort, prefix)
    yield ("a row of a prefix step, 1 prefix", (lambda: old_prefix.step(x1, y1), 64), (steps(single), 3 * 64))

    values = prefix.detach().repeat(len(tasks), 1, 1, 1)
    datasets = [experiment.dataset(config, "train", [task]) for task in tasks]
    joint = PrefixTrainer(short(config.prefix), model, datasets, values)
    yield (
        f"a row of a prefix step, {len(tasks)} prefixes",
        (lambda: old_prefix.step(x1, y1), 64),
        (steps(joint), 3 * len(tasks) * config.prefix.batch_size),
    )

    inputs, _ = CustomDataset("test", tasks[:1]).rows(range(3200))
    padding, learned = config.data.prefix_size, prefix.detach()
    prompts = torch.cat([torch.zeros(100, padding, dtype=torch.int64), torch.from_numpy(inputs[:100])], dim=1)
    model.eval()
    yield (
        "a row of an evaluation",
        (lambda: reference_generate(model, prompts, config.data.length, learned), 100),
        (lambda: solve(model, inputs, padding, learned), 3200),
    )


def short(config, **changes):
    """A trainer's configuration for a few steps."""
    config = config.copy()
    config.merge_from_dict({"max_iters": 3, "lr_schedule": "constant", "checkpoint_every": None, **changes})
    return config


def steps(trainer: Trainer) -> Callable[[], object]:
    """Three iterations of the package's own loop, data included."""
    return trainer.run


def seconds_per_row(work: Work) -> float:
    """Time it once."""
    call, n_rows = work
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) / n_rows


def _seconds(value: float) -> str:
    return f"{value * 1e6:.1f} us" if value < 1e-3 else f"{value * 1e3:.2f} ms"


if __name__ == "__main__":
    main()
