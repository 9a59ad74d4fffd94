"""Predictions per second: the Predictor with one and with two processes, against a plain loop over ``generate``.

All three answer the same rows by the laptop preset's size of model, in batches of the same size, in float32. Each is
a process, or two, of its own that is timed after it has warmed up; they take turns. Two processes have a core each
where one process has both, so on two cores there is nothing to gain but what one process leaves idle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from mingpt import distributed
from mingpt.experiments.pipeline import build_model
from mingpt.experiments.predictor import Predictor
from mingpt.experiments.presets import get_default_config
from mingpt.prefix import initial_prefix

LENGTH, PADDING = 10, 10


def measure(kind: str, n_rows: int, batch_size: int) -> None:
    """Time one way and print rows per second."""
    torch.manual_seed(0)
    model = build_model(get_default_config()).eval()
    prefix = initial_prefix(model, PADDING, "random").detach()
    rows = torch.cat([torch.zeros(n_rows, PADDING, dtype=torch.int64), torch.randint(1, 11, (n_rows, LENGTH))], dim=1)

    def answer(batch: torch.Tensor, _=None) -> list[list[int]]:
        return model.generate(batch, LENGTH, prefixes=prefix)[:, -LENGTH:].tolist()

    def loop(examples: list[torch.Tensor]) -> list[list[int]]:
        starts = range(0, len(examples), batch_size)
        return [row for i in starts for row in answer(torch.stack(examples[i : i + batch_size]))]

    def predictor(examples: list[torch.Tensor]) -> list[list[int]]:
        return Predictor(torch.stack, answer).predict(examples, batch_size)

    way, examples = {"loop": loop, "predictor": predictor}[kind], list(rows)
    way(examples[: 2 * batch_size])
    distributed.all_gather(None)  # start together
    start = time.perf_counter()
    way(examples)
    seconds = time.perf_counter() - start
    if distributed.is_main():
        print(json.dumps(n_rows / seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=400)
    parser.add_argument("--kind", choices=["loop", "predictor"], help="time this one only, as a part of the whole")
    options = parser.parse_args()
    if options.kind:
        measure(options.kind, options.rows, options.batch_size)
        return
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ways = {
        "a plain loop": ([], "loop"),
        "Predictor, 1 process": ([], "predictor"),
        "Predictor, 2 processes": (torchrun, "predictor"),
    }
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    sizes = ["--rows", str(options.rows), "--batch-size", str(options.batch_size)]
    for _ in range(options.rounds):
        for name, (start, kind) in ways.items():
            command = [sys.executable, *start, __file__, "--kind", kind, *sizes]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rates[name].append(float(done.stdout))
    print(f"{options.rows} rows in batches of {options.batch_size}, {options.rounds} rounds, median (lowest - highest)")
    for name, own in rates.items():
        ratios = [rate / plain for rate, plain in zip(own, rates["a plain loop"], strict=True)]
        print(
            f"{name:24}{statistics.median(own):8.0f} rows/s{statistics.median(ratios):8.2f} times the loop "
            f"({min(ratios):.2f} - {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
