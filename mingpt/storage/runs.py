"""Run folders: which there are, what state each is in, and which one a command means when none is named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from mingpt.storage.checkpoint import read_description
from mingpt.storage.files import read_json

FOLDERS = (Path("runs"), Path("checkpoints"))
"""Where runs are, relative to the current folder."""


class RunStatus(NamedTuple):
    """What a run's folder holds.

    Attributes:
        path: the folder.
        state: "empty", "pretraining 100/700 iterations", "pretrained", "3 prefixes" or "done".
        preset: that its config.json names, None where there is no such file.
        seed: likewise.
        changed: when a file of it last changed; 1970 for a folder without files.
    """

    path: Path
    state: str
    preset: str | None
    seed: int | None
    changed: datetime


def run_status(run: str | Path) -> RunStatus:
    """Look at a run's folder. Of a checkpoint only the header is read."""
    run, config, training = Path(run), {}, {}
    with contextlib.suppress(OSError, ValueError):
        config = read_json(run / "config.json")
    with contextlib.suppress(OSError, ValueError):
        training = read_description(run / "pretraining" / "state.safetensors").get("state", {})
    n_prefixes = len(list(run.glob("prefixes/*.safetensors")))
    if (run / "results.json").exists():
        state = "done"
    elif (run / "model.safetensors").exists():
        state = f"{n_prefixes} prefix{'es' * (n_prefixes > 1)}" if n_prefixes else "pretrained"
    else:
        n_done, n_all = training.get("iter_num", 0), config.get("trainer", {}).get("max_iters", "?")
        state = f"pretraining {n_done}/{n_all} iterations" if training or config else "empty"
    times = [path.stat().st_mtime for path in run.rglob("[!.]*") if path.is_file()]  # one with a dot is being written
    changed = datetime.fromtimestamp(max(times, default=0.0))
    return RunStatus(run, state, config.get("preset"), config.get("seed"), changed)


def list_runs(folders: Iterable[str | Path] = FOLDERS) -> list[RunStatus]:
    """The status of every folder in ``folders``, those that changed last first."""
    runs = (run_status(path) for folder in folders for path in Path(folder).glob("*/"))
    return sorted(runs, key=attrgetter("changed"), reverse=True)


def default_run() -> Path | None:
    """The run in ``runs`` that changed last, else ``checkpoints/laptop``, else None; in the current folder."""
    stored = FOLDERS[1] / "laptop"
    newest = [run.path for run in list_runs(FOLDERS[:1]) if run.state != "empty"]
    return next(iter(newest), stored if stored.is_dir() else None)
