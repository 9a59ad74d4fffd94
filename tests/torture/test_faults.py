"""The k-th file call of each command is faulted: the same command again gives what it gives without a fault."""

from __future__ import annotations

import shutil

import pytest

from torture.harness import ACTIONS, CASES, difference, sample, snapshot, tally

pytestmark = pytest.mark.torture


@pytest.mark.parametrize("fault", [name for name in ACTIONS if name != "stop"])
@pytest.mark.parametrize("name", CASES)
def test_every_file_call_may_fail(bench, name, fault):
    expected = snapshot(bench.done(name))
    folder = bench.fresh(name)
    n_calls = bench.run(name, folder)["count"]
    assert n_calls > 5
    assert difference(snapshot(folder), expected) == ""
    shutil.rmtree(folder)
    failures, numbers = [], sample(list(range(1, n_calls + 1)), 2, f"{name} {fault}")
    for k in numbers:
        folder = bench.fresh(name)
        first = bench.run(name, folder, k=k, action=ACTIONS[fault])
        problem = _problem(fault, first, name)
        again = bench.run(name, folder)
        # One that could not do its last calls, which clean up, is complete.
        is_complete = " exists; remove it" in again["err"]
        if again["rc"] and not is_complete:
            problem = problem or f"the rerun exits {again['rc']}: {again['err'][-2000:]}"
        problem = problem or difference(snapshot(folder), expected)
        if problem:
            failures.append(f"{name}, {fault} at {k}: {problem}")
        shutil.rmtree(folder, ignore_errors=True)
    tally(f"{fault} at a file call", len(numbers), failures)


def _problem(fault, result, name):
    """What is wrong with how a command took a fault."""
    if fault == "kill":
        return "" if result["rc"] in (-9, 0) else f"exit code {result['rc']}: {result['err'][-300:]}"
    if fault == "short write":
        return "" if result["rc"] == 0 else f"exit code {result['rc']}: {result['err'][-300:]}"
    if result["rc"] == 0 or name == "Trainer":  # it was a call that may fail, or an error that a script gets
        return ""
    lines = [line for line in result["err"].splitlines() if line.startswith("error: ")]
    if result["rc"] != 2 or "Traceback" in result["err"] or len(lines) != 1:
        return f"exit code {result['rc']}: {result['err'][-2000:]}"
    return "" if "/" in lines[0] or "'" in lines[0] else f"no file is named: {lines[0]}"
