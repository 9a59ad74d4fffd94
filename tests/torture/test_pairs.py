"""Two runs in one folder, the first paused at a file call: what is left is of one, or of one after the other."""

from __future__ import annotations

import shutil

import pytest

from torture.harness import ACTIONS, CASES, difference, sample, snapshot, tally

pytestmark = pytest.mark.torture

OTHER = {
    "pretrain": ["--seed", "1"],
    "reproduce": ["--seed", "1"],
    "prefix": ["--set", "prefix.max_iters=3"],
    "predict": ["--task", "SortAscending"],
    "chain": ["--constrained"],
    "export": ["--task", "Add1"],
    "sweep, a worker": [],
    "Trainer": [],
}
"""What the second run is asked beside or in the place of the first one's settings."""


PAIRS = [(name, is_other) for name, own in OTHER.items() for is_other in (False, True)[: 1 + bool(own)]]


@pytest.mark.parametrize(("name", "is_other"), PAIRS)
def test_two_runs_do_not_mix(bench, name, is_other):
    job = CASES[name].job
    other = job | {"argv": [*job["argv"], *OTHER[name]]} if is_other else job

    def run_all(*jobs):
        """What jobs leave, one after the other, and their exit codes."""
        folder = bench.fresh(name)
        codes = [bench.run(name, folder, **each)["rc"] for each in jobs]
        found = snapshot(folder)
        shutil.rmtree(folder)
        return found, codes

    allowed = [(found, codes) for found, codes in (run_all(job, other),)]
    found, codes = run_all(other, job)
    allowed.append((found, codes[::-1]))
    alone = run_all(job)[0], run_all(other)[0]
    folder = bench.fresh(name)
    n_calls = bench.run(name, folder)["count"]
    failures, numbers = [], sample(list(range(1, n_calls + 1)), 1, f"{name} {is_other}")
    for k in numbers:
        folder = bench.fresh(name)
        first = bench.run(name, folder, k=k, action=ACTIONS["stop"])
        second = bench.run(name, folder, **other)
        if "pid" in first:
            first = bench.server.run(**{"continue": first["pid"]})
        codes = [first["rc"], second["rc"]]
        found = snapshot(folder)
        expected = [content for content, own in allowed if own == codes]
        if codes[0] == 0 and codes[1] in (1, 2):
            expected.append(alone[0])
        if codes[0] in (1, 2) and codes[1] == 0:
            expected.append(alone[1])
        problems = [difference(found, each) for each in expected] or [f"exit codes {codes}: {first['err'][-500:]}"]
        if all(problems):
            failures.append(f"{name} at {k}, {codes}: {problems[0]}")
        text = first["err"] + second["err"]
        if "Traceback" in text and name != "Trainer":
            failures.append(f"{name} at {k}: {text[-1000:]}")
        shutil.rmtree(folder)
    tally("two runs in one folder", len(numbers), failures)
