"""Run folders: which there are, what state each is in, and which one a command means when none is named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDERS = (Path("runs"), Path("checkpoints"))
"""Where runs are, relative to the current folder."""


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        state: "empty", "pretraining 100/700 iterations", "pretrained", "3 prefixes" or "done".
        preset: that its config.json names, None where there is no such file.
        seed: likewise.
        n_bytes: the size of its files together.
        changed: when a file of it last changed, in seconds since 1970; 0 for a folder without files.
    """

    path: Path
    state: str
    preset: str | None
    seed: int | None
    n_bytes: int
    changed: float


def run_status(run: str | Path) -> RunStatus:
    """Look at a run's folder. Of a checkpoint only the header is read."""
    run, config = Path(run), {}
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((run / "config.json").read_text())
    files = [path.stat() for path in run.rglob("[!.]*") if path.is_file()]  # a name with a dot is being written
    n_bytes, changed = sum(each.st_size for each in files), max((each.st_mtime for each in files), default=0.0)
    return RunStatus(run, _state(run, config), config.get("preset"), config.get("seed"), n_bytes, changed)


def list_runs(folders: Iterable[str | Path] = FOLDERS) -> list[RunStatus]:
    """The status of every folder in ``folders``, those that changed last first."""
    runs = [run_status(path) for folder in folders for path in Path(folder).glob("*/")]
    return sorted(runs, key=lambda run: (-run.changed, run.path))


def default_run() -> Path | None:
    """The run in ``runs`` that changed last, else ``checkpoints/laptop``, else None; in the current folder."""
    stored = FOLDERS[1] / "laptop"
    newest = [run.path for run in list_runs(FOLDERS[:1]) if run.state != "empty"]
    return next(iter(newest), stored if stored.is_dir() else None)


def _state(run: Path, config: dict[str, Any]) -> str:
    if (run / "results.json").exists():
        return "done"
    if (run / "model.safetensors").exists():
        # A checkpoint with a state is of a training that goes on.
        n = sum("state" not in _description(path) for path in run.glob("prefixes/*.safetensors"))
        return f"{n} prefix{'es' * (n > 1)}" if n else "pretrained"
    state = _description(run / "pretraining" / "state.safetensors").get("state", {})
    if not (state or config):
        return "empty"
    return f"pretraining {state.get('iter_num', 0)}/{config.get('trainer', {}).get('max_iters', '?')} iterations"


def _description(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, from its header alone. Empty if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
        n_bytes = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
        return json.loads(json.loads(file.read(n_bytes))["__metadata__"]["mingpt"])["description"]
    return {}
