"""The compiled shim, the server, and the table at the end."""

from __future__ import annotations

import subprocess

import pytest

from torture import harness


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    shim = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, harness.HERE / "shim.c", "-ldl"], check=True)
    server = harness.Server(shim)
    yield server
    server.close()


@pytest.fixture(scope="session")
def bench(server, tmp_path_factory):
    return harness.Bench(server, tmp_path_factory.mktemp("bench"))


def pytest_terminal_summary(terminalreporter):
    if harness.TALLY:
        terminalreporter.section(f"torture, TORTURE_SEED={harness.SEED}")
        for kind in dict.fromkeys(kind for kind, _ in harness.TALLY):
            n_tried, n_failed = harness.TALLY[kind, "tried"], harness.TALLY[kind, "failed"]
            terminalreporter.line(f"{kind:40} {n_tried:6} tried {n_tried - n_failed:6} survived {n_failed:3} failed")
