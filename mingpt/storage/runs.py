"""Run folders: which there are, what state each is in, and which one a command means when none is named."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from mingpt.distributed import run_on_main
from mingpt.storage.checkpoint import read_description
from mingpt.storage.files import naming, read_json, scratch_folder, write_atomic

FOLDERS = (Path("runs"), Path("checkpoints"))
"""Where runs are, relative to the current folder."""

STORED_RUN, OWN_RUN = (folder / "laptop" for folder in reversed(FOLDERS))
"""The run that comes with the repository, and its copy, which commands write into."""


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
    runs = (run_status(path) for folder in folders for path in Path(folder).glob("[!.]*/"))
    return sorted(runs, key=attrgetter("changed"), reverse=True)


def default_run() -> Path | None:
    """The run in ``runs`` that changed last, else ``checkpoints/laptop``, else None; in the current folder."""
    newest = [run.path for run in list_runs(FOLDERS[:1]) if run.state != "empty"]
    return next(iter(newest), STORED_RUN if STORED_RUN.is_dir() else None)


def writable_run(run: Path, wait: bool = False) -> Path:
    """The run to write into instead of a run that was not asked for by name: the same, or the copy of the stored one.

    The copy, ``runs/laptop``, appears when it is complete. All processes of a job must get here.

    Args:
        run: the folder.
        wait: whether to wait for another process that is making the copy.

    Raises:
        LockedError: if another process is making the copy.
        ValueError: if something else is in its place.
    """
    folder = OWN_RUN.with_name(f".{OWN_RUN.name}.partial")

    def copy() -> None:
        if run_status(OWN_RUN).state != "empty":  # another process has just made it
            return
        if OWN_RUN.exists() and any(OWN_RUN.iterdir()):
            raise ValueError(f"{OWN_RUN} is to be a copy of {STORED_RUN}, and other files are there; remove it")
        shutil.rmtree(folder / "all", ignore_errors=True)  # of a copy that was cut off
        try:
            for path in STORED_RUN.rglob("[!.]*"):
                if path.is_file():
                    write_atomic(folder / "all" / path.relative_to(STORED_RUN), path.read_bytes())
            with naming(OWN_RUN):
                (folder / "all").rename(OWN_RUN)
        finally:
            shutil.rmtree(folder / "all", ignore_errors=True)

    if run == STORED_RUN or (run == OWN_RUN and run_on_main(folder.exists)):  # left by a process that was killed
        with scratch_folder(folder, wait):
            if run == STORED_RUN:
                run_on_main(copy)
        return OWN_RUN
    return run
