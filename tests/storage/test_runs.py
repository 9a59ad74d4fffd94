"""Run folders: their state, and which one is meant when none is named."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pytest
import torch

from mingpt.storage import checkpoint
from mingpt.storage.runs import RunStatus, default_run, list_runs, run_status

CONFIG = {"preset": "smoke", "seed": 3, "trainer": {"max_iters": 30}}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(path, **description):
    checkpoint.save_checkpoint(path, {"x": torch.zeros(3)}, description)


def touch(path, seconds):
    """Make a file that changed at a time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (seconds, seconds))


def test_the_state_follows_what_a_run_leaves():
    run = Path("runs/x")
    run.mkdir(parents=True)
    assert run_status(run) == RunStatus(run, "empty", None, None, datetime.fromtimestamp(0))
    (run / "config.json").write_text(json.dumps(CONFIG))
    assert run_status(run).state == "pretraining 0/30 iterations"
    assert (run_status(run).preset, run_status(run).seed) == ("smoke", 3)
    save(run / "pretraining" / "state.safetensors", state={"iter_num": 20, "optimizer": {}})
    assert run_status(run).state == "pretraining 20/30 iterations"
    save(run / "model.safetensors", kind="model")
    assert run_status(run).state == "pretrained"
    save(run / "prefixes" / "training-1a2b" / "state.safetensors", state={"iter_num": 1})
    assert run_status(run).state == "pretrained"
    save(run / "prefixes" / "Add1.safetensors", kind="prefix")
    assert run_status(run).state == "1 prefix"
    save(run / "prefixes" / "Add1-1a2b.safetensors", kind="prefix")
    assert run_status(run).state == "2 prefixes"
    (run / "results.json").write_text("{}")
    assert run_status(run).state == "done"


def test_the_time_is_that_of_the_files_that_are_complete():
    touch("runs/x/config.json", 100)
    touch("runs/x/deep/er/metrics.jsonl", 300)
    touch("runs/x/.model.safetensors.tmp", 900)
    assert run_status("runs/x").changed == datetime.fromtimestamp(300)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 100,
        b"\x02" + bytes(7) + b"[]",
        b"\x02" + bytes(7) + b"{}",
        b"\x08" + bytes(7) + b"{}",
    ],
)
def test_a_damaged_state_is_no_error(content):
    touch("runs/x/pretraining/state.safetensors", 1)
    Path("runs/x/pretraining/state.safetensors").write_bytes(content)
    assert run_status("runs/x").state == "empty"
    Path("runs/x/config.json").write_text("{")
    assert run_status("runs/x").state == "empty"


def test_runs_are_listed_by_their_last_change():
    for name, seconds in (("runs/a", 200), ("runs/b", 300), ("checkpoints/c", 250)):
        touch(f"{name}/config.json", seconds)
    touch("runs/notes.txt", 900)
    assert [str(run.path) for run in list_runs()] == ["runs/b", "checkpoints/c", "runs/a"]
    assert [run.path.name for run in list_runs(["checkpoints"])] == ["c"]
    assert list_runs(["nowhere"]) == []


def test_the_default_is_the_newest_of_runs_then_the_stored_one():
    assert default_run() is None
    touch("checkpoints/laptop/model.safetensors", 900)
    touch("checkpoints/other/model.safetensors", 950)
    assert default_run() == Path("checkpoints/laptop")
    Path("runs/empty").mkdir(parents=True)
    assert default_run() == Path("checkpoints/laptop")
    touch("runs/a/results.json", 200)
    touch("runs/b/model.safetensors", 100)
    assert default_run() == Path("runs/a")
    touch("runs/b/prefixes/Add1.safetensors", 300)
    assert default_run() == Path("runs/b")
