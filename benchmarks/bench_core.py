"""Every claim of speed, as a ratio: the package and its baselines, in turn in one process, on the same work.

    python benchmarks/bench_core.py [--rounds 5] [--precision float32] [--matrix] [--run runs/laptop] [--json FILE]

The baselines:
    reference     tests/reference.py, what minGPT and its prefix-tuning descendants do: the whole sequence with the
                  prefix spliced in, for every row, in float32, one prefix at a time on batches of 64, no cache
    transformers  Hugging Face's GPT-2 of the same size, in the package's precision; PEFT's prefix tuning of it
    encoder       a plain loop over nn.TransformerEncoderLayer, in the package's precision
(these two with the same GELU as the package, the reference with minGPT's)
and the limit, the rate at which torch multiplies the model's own matrices in that precision.

A time is of one row of the work; a ratio is a baseline's time by the package's, the median of the rounds with the
smallest and the largest. A baseline that is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import baselines
from reference import ReferenceLoop, reference_generate, reference_rows

from mingpt.datasets import CustomDataset
from mingpt.evaluation import accuracy_matrix, predict
from mingpt.experiments import pipeline, presets
from mingpt.prefix import initial_prefix
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS
from mingpt.trainer import PrefixTrainer, Trainer
from mingpt.training.precision import resolve_precision

Work = tuple[Callable[[], object], int]
"""What to time, and how many rows it works on."""

N_STEPS = 3
"""Iterations of the package's own loop that are timed together."""

PUBLISHED_ITERS = (100_000, 16 * 20_000)
"""Of 64 rows: the seed notebook's pretraining, and its prefixes."""


def main() -> None:
    """Print a table of the measurements, and write them to a JSON file when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that each work is measured in turn")
    parser.add_argument("--precision", default="auto", help="of the package: float32, bfloat16 or auto")
    parser.add_argument("--matrix", action="store_true", help="time the whole matrix too, once")
    parser.add_argument("--run", type=Path, help="a finished run of this machine, for the row of the whole experiment")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the baselines among themselves
    precision = resolve_precision(options.precision, "cpu")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {precision}; medians of {options.rounds} rounds"
    )
    print(f"{'':30}{'package':>10}  times as fast as")
    times: dict[str, dict[str, list[float]]] = {}
    for name, works in measurements(precision):
        rounds = [{who: seconds_per_row(work) for who, work in works.items()} for _ in range(options.rounds + 1)][1:]
        times[name] = {who: [each[who] for each in rounds] for who in works}
        print(format_row(name, times[name]), flush=True)
    if options.matrix:
        print(f"the full matrix, 17 x 16 cells of 3,200 rows: {full_matrix(precision):.0f} s")
    if options.run:
        print(whole_experiment(options.run, times))
    if options.json:
        options.json.write_text(json.dumps({"precision": precision, "seconds_per_row": times}, indent=1))


def measurements(precision: str) -> Iterator[tuple[str, dict[str, Work]]]:
    """Yield each measurement's name, and the work of the package and of each baseline, for the laptop preset."""
    config = presets.get_default_config("laptop")
    config.trainer.precision = config.prefix.precision = precision
    tasks = [*PRETRAINING_TASKS, *TEST_TASKS]
    mixed = pipeline.dataset(config, "train", PRETRAINING_TASKS)
    n_positions, length = config.data.prefix_size, config.data.length
    has_transformers, has_peft = (importlib.util.find_spec(name) is not None for name in ("transformers", "peft"))

    fresh, fresh_reference = itertools.count(), itertools.count()
    yield (
        "data",
        {
            "package": (lambda: mixed.batch(range(8192 * (n := next(fresh)), 8192 * (n + 1))), 8192),
            "reference": (lambda: reference_rows(mixed, [next(fresh_reference) for _ in range(256)]), 256),
        },
    )

    model = pipeline.build_model(config)
    ancestor = config.copy()
    ancestor.model.gelu_approximate = "tanh"
    old = ReferenceLoop(pipeline.build_model(ancestor), Trainer.get_default_config())
    x, y = mixed.batch(range(512))
    works = {
        "package": steps(Trainer(short(config.trainer, batch_size=512), model, mixed), 512),
        "reference": (lambda: old.step(x[:64], y[:64]), 64),
        "encoder": (baselines.encoder_step(model.config, precision, x, y), 512),
        "limit": (matrix_products(model, precision, 512 * (2 * length - 1), 3), 512),
    }
    if has_transformers:
        works["transformers"] = (baselines.huggingface_step(model.config, precision, x, y), 512)
    yield ("pretraining step, 512 rows", works)

    sort = pipeline.dataset(config, "train", tasks[:1])
    x1, y1 = sort.batch(range(512))
    prefix = initial_prefix(model, n_positions)
    old_prefix = ReferenceLoop(pipeline.build_model(ancestor), Trainer.get_default_config(), prefix.detach().clone())
    others = {
        "reference": (lambda: old_prefix.step(x1[:64], y1[:64]), 64),
        "limit": (matrix_products(model, precision, 512 * (2 * length - 1), 2), 512),
    }
    if has_peft and has_transformers:
        others["transformers"] = (baselines.peft_step(model.config, precision, n_positions, x1, y1), 512)
    single = PrefixTrainer(short(config.prefix, batch_size=512), model, sort, prefix)
    yield ("1 prefix, 512 rows", {"package": steps(single, 512)} | others)

    values = prefix.detach().repeat(len(tasks), 1, 1, 1)
    datasets = [pipeline.dataset(config, "train", [task]) for task in tasks]
    joint = PrefixTrainer(short(config.prefix, batch_size=512 // len(tasks)), model, datasets, values)
    yield (f"{len(tasks)} prefixes, 512 rows", {"package": steps(joint, 512)} | others)

    inputs, _ = CustomDataset("test", tasks[:1]).rows(range(3200))
    learned = prefix.detach()
    prompts = torch.cat([torch.zeros(3200, n_positions, dtype=torch.int64), torch.from_numpy(inputs)], dim=1)
    model.eval()
    reference = (lambda: reference_generate(old.model, prompts[:100], length, learned), 100)
    for n_rows in (100, 3200):
        works = {
            "package": (lambda n=n_rows: predict(model, inputs[:n], n_positions, learned, precision=precision), n_rows),
            "reference": reference,
        }
        if has_transformers:
            decode = baselines.huggingface_decode(model.config, precision, prompts[:n_rows], length)
            works["transformers"] = (decode, n_rows)
        yield (f"decode, {n_rows} rows", works)

    tests = [pipeline.dataset(config, "test", [task]) for task in tasks]
    matrix = (lambda: accuracy_matrix(model, {"one": learned}, tests, 400, precision=precision), len(tasks) * 400)
    yield ("a prefix on 16 tasks, 400 rows", {"package": matrix, "reference": reference})


def full_matrix(precision: str, n_rows: int = 3200) -> float:
    """Seconds of scoring the model without a prefix and with each of sixteen on all sixteen tasks, once."""
    config = presets.get_default_config("laptop")
    tasks = [*PRETRAINING_TASKS, *TEST_TASKS]
    model = pipeline.build_model(config)
    prefixes = {str(task): initial_prefix(model, config.data.prefix_size, "random").detach() for task in tasks}
    tests = [pipeline.dataset(config, "test", [task]) for task in tasks]
    start = time.perf_counter()  # torch's Timer would do it three times
    accuracy_matrix(model, {"none": None, **prefixes}, tests, n_rows, precision=precision)
    return time.perf_counter() - start


def matrix_products(model: Any, precision: str, n_tokens: int, n_times: int) -> Callable[[], object]:
    """The products of tokens with the blocks' matrices and nothing else: what no implementation can leave out.

    They are done three times for a step of the model: for the outputs, the inputs' gradient and the matrices'; and
    twice for a step of a prefix.
    """
    dtype = getattr(torch, precision)
    matrices = [m.weight.detach().to(dtype) for m in model.transformer.h.modules() if isinstance(m, nn.Linear)]
    inputs = {n: torch.randn(n_tokens, n).to(dtype) for n in {matrix.shape[1] for matrix in matrices}}
    return lambda: [F.linear(inputs[matrix.shape[1]], matrix) for _ in range(n_times) for matrix in matrices]


def short(config: Any, **changes: Any) -> Any:
    """A trainer's configuration for a few steps."""
    config = config.copy()
    config.merge_from_dict({"max_iters": N_STEPS, "lr_schedule": "constant", "validate_every": None})
    config.merge_from_dict({"checkpoint_every": None, "log_every": N_STEPS, **changes})
    return config


def steps(trainer: Trainer, n_rows: int) -> Work:
    """A few iterations of the package's own loop, data included."""
    return trainer.run, N_STEPS * n_rows


def seconds_per_row(work: Work) -> float:
    """Time it once."""
    call, n_rows = work
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.timeit(1).median / n_rows


def format_row(name: str, seconds: dict[str, list[float]]) -> str:
    """A line of the table: the package's time, and the ratio of each baseline's to it."""
    own = seconds["package"]
    ratios = {
        who: sorted(theirs / ours for theirs, ours in zip(values, own, strict=True))
        for who, values in seconds.items()
        if who != "package"
    }
    cells = (f"{who} {statistics.median(r):.3g} ({r[0]:.2g} - {r[-1]:.2g})" for who, r in ratios.items())
    return f"{name:30}{_seconds(statistics.median(own)):>10}  {', '.join(cells)}"


def whole_experiment(folder: Path, times: dict[str, dict[str, list[float]]]) -> str:
    """A run's seconds beside what the reference would take for the published iterations of the same model."""
    seconds = sum(json.loads((folder / "results.json").read_text())["value"]["seconds"].values())
    stages = ("pretraining step, 512 rows", "1 prefix, 512 rows")
    steps_of = [64 * statistics.median(times[stage]["reference"]) for stage in stages]
    reference = sum(n * each for n, each in zip(PUBLISHED_ITERS, steps_of, strict=True))
    return (
        f"the whole experiment: {seconds:.0f} s; the reference's steps of {steps_of[0] * 1e3:.0f} and "
        f"{steps_of[1] * 1e3:.0f} ms times the published iterations: {reference / 86400:.2f} days, "
        f"{reference / seconds:.0f} times as long"
    )


def _seconds(value: float) -> str:
    return f"{value * 1e6:.1f} us" if value < 1e-3 else f"{value * 1e3:.2f} ms"


if __name__ == "__main__":
    main()
