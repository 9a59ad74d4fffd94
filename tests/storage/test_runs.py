"""Run folders: their state, and which one is meant when none is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from mingpt.storage import checkpoint, runs
from mingpt.storage.files import LockedError, write_atomic
from mingpt.storage.runs import OWN_RUN, STORED_RUN, RunStatus, default_run, list_runs, run_status, writable_run

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


# ------------------------------------------------------------------------------------------- the stored run's copy


def contents(folder):
    """Each file of a folder, also of those with a dot, by its name in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def stored():
    """The files of a run in checkpoints/laptop."""
    for number, name in enumerate(("config.json", "model.safetensors", "prefixes/Add1.safetensors")):
        touch(f"checkpoints/laptop/{name}", 100 + number)
    return contents("checkpoints/laptop")


def test_the_copy_has_all_files_but_those_that_are_being_written(stored):
    Path("checkpoints/laptop/.lock").touch()
    assert writable_run(STORED_RUN) == OWN_RUN
    assert contents("runs") == {f"laptop/{name}": content for name, content in stored.items()}
    assert [path.name for path in Path("runs").iterdir()] == ["laptop"]
    assert default_run() == Path("runs/laptop")
    touch("runs/laptop/prefixes/Add1.safetensors", 500)
    Path("runs/laptop/config.json").write_text("changed")
    writable_run(STORED_RUN)  # once is enough
    assert Path("runs/laptop/config.json").read_text() == "changed"


def test_another_run_is_written_itself(stored):
    for run in (Path("runs/other"), OWN_RUN):
        assert writable_run(run) == run
        assert not Path("runs").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_copy_that_is_cut_off_leaves_no_file(stored, monkeypatch, error):
    written = []

    def write(path, data):
        if len(written) == 2:
            raise error
        write_atomic(path, data)
        written.append(path)

    monkeypatch.setattr(runs, "write_atomic", write)
    with pytest.raises(error):
        writable_run(STORED_RUN)
    assert contents("runs") == {}
    assert not Path("runs/laptop").exists()
    assert default_run() == Path("checkpoints/laptop")


def test_what_a_killed_process_has_left_of_a_copy_is_no_run_and_goes(stored):
    touch("runs/.laptop.partial/all/config.json", 900)
    touch("runs/.laptop.partial/all/stray.json", 900)
    touch("runs/.laptop.partial/.lock", 900)
    assert [str(run.path) for run in list_runs()] == ["checkpoints/laptop"]
    writable_run(STORED_RUN)
    assert contents("runs") == {f"laptop/{name}": content for name, content in stored.items()}
    assert [path.name for path in Path("runs").iterdir()] == ["laptop"]


@pytest.mark.parametrize("left", ["", ".lock"])
def test_what_a_process_that_was_killed_after_the_copy_has_left_goes_too(stored, left):
    writable_run(STORED_RUN)
    Path("runs/.laptop.partial").mkdir()
    if left:
        Path("runs/.laptop.partial", left).touch()
    assert writable_run(OWN_RUN) == OWN_RUN
    assert [path.name for path in Path("runs").iterdir()] == ["laptop"]
    assert contents("runs/laptop") == stored


def test_a_new_run_does_not_become_a_copy_since_one_was_cut_off(stored):
    touch("runs/.laptop.partial/all/config.json", 900)
    assert writable_run(OWN_RUN) == OWN_RUN
    assert list(Path("runs").iterdir()) == []


def test_two_processes_do_not_copy_at_once(stored):
    lock = "with locked('runs/.laptop.partial/.lock'): print('held', flush=True); input()"
    script = f"from mingpt.storage.files import locked\n{lock}"
    environment = os.environ | {"PYTHONPATH": str(Path(runs.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"is in use by process {holder.pid} "):
            writable_run(STORED_RUN)
        assert not Path("runs/laptop").exists()
        holder.communicate("\n")
    writable_run(STORED_RUN, wait=True)
    assert default_run() == Path("runs/laptop")


def test_other_files_are_not_taken_for_the_copy(stored):
    touch("runs/laptop/notes.txt", 100)
    with pytest.raises(
        ValueError, match=r"runs/laptop is to be a copy of checkpoints/laptop, and other files are there"
    ):
        writable_run(STORED_RUN)
    assert contents("runs/laptop") == {"notes.txt": b"{}"}
    Path("runs/laptop/notes.txt").unlink()
    writable_run(STORED_RUN)
    assert contents("runs/laptop") == stored
