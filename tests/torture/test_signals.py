"""A command that gets a signal at a random moment stops in order, and the same command again ends as if nothing was."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from torture.harness import CASES, IS_ALL, SEED, difference, snapshot, tally

pytestmark = pytest.mark.torture


@pytest.mark.parametrize("name", CASES)
def test_a_signal_stops_in_order(bench, name):
    expected = snapshot(bench.done(name))
    folder, start = bench.fresh(name), time.monotonic()
    bench.run(name, folder)
    seconds, moments = time.monotonic() - start, random.Random(f"{SEED} {name}")
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGSTOP]
    failures, numbers = [], numbers * 10 if IS_ALL else moments.sample(numbers, 2)
    for number in numbers:
        folder, after = bench.fresh(name), moments.uniform(0, seconds)
        first = bench.run(name, folder, signal=[number, after])
        if "pid" in first:
            first = bench.server.run(**{"continue": first["pid"]})
        stopped = {0} if name == "Trainer" else {0, 128 + number}
        # A script, and a command that has not begun, do with a signal what any process does.
        problem = "" if first["rc"] in stopped | {-number} else f"exit code {first['rc']}: {first['err'][-1000:]}"
        if first["rc"] > 128 and "the same command goes on" not in first["err"]:
            problem = f"it does not say how to go on: {first['err'][-300:]}"
        again = bench.run(name, folder)
        if again["rc"] and " exists; remove it" not in again["err"]:
            problem = problem or f"the rerun exits {again['rc']}: {again['err'][-1000:]}"
        problem = problem or difference(snapshot(folder), expected)
        if problem:
            failures.append(f"{name}, signal {number} after {after:.3f} s: {problem}")
        shutil.rmtree(folder)
    tally("a signal", len(numbers), failures)


def test_two_processes_stop_together(bench, tmp_path):
    """Under torchrun, which passes the signal on; then they go on from where both were."""
    folder = bench.fresh("pretrain")
    argv = [*CASES["pretrain"].job["argv"], "--set", "trainer.max_iters=400"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mingpt", "--", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(folder, after=None):
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if after is not None:
            metrics = folder / "run" / "pretraining" / "metrics.jsonl"
            while not (metrics.exists() and metrics.read_text().count("\n") >= after):
                assert process.poll() is None
                time.sleep(0.05)
            process.terminate()
        text, _ = process.communicate(timeout=600)
        return process.returncode, text

    assert run(folder)[0] == 0
    expected = snapshot(folder)
    failures, moments = [], [5, 100, 200, 300][: 4 if IS_ALL else 1]
    for after in moments:
        cut = bench.fresh("pretrain")
        code, text = run(cut, after)
        if code == 0 or "stopped by SIGTERM after" not in text:
            failures.append(f"after {after}: exit code {code}: {text[-1000:]}")
        code, text = run(cut)
        if code or difference(snapshot(cut), expected):
            failures.append(f"after {after}: rerun {code}: {difference(snapshot(cut), expected)} {text[-500:]}")
    tally("a signal to two processes", len(moments), failures)
