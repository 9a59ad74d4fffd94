"""How the torture tests run commands, and when two folders are the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mingpt.storage.checkpoint import checksum, load_checkpoint

HERE = Path(__file__).parent
ACTIONS = {"kill": 1, "stop": 2, "no space": 3, "I/O error": 4, "no space from then on": 5, "short write": 6}
"""See shim.c."""

IS_ALL = os.environ.get("TORTURE") == "all"
SEED = int(os.environ.get("TORTURE_SEED", time.time_ns() % 10**6))
TALLY: Counter[tuple[str, str]] = Counter()
"""How many faults were tried, and how many of them failed, by class."""


class Server:
    """A process that runs jobs, see ``torture.server``."""

    def __init__(self, shim: Path):
        environment = os.environ | {
            "LD_PRELOAD": str(shim),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
            "COLUMNS": "100",
        }
        command = [sys.executable, "-m", "torture.server"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        return self.process.stdout.readline().strip()

    def run(self, **job: Any) -> dict[str, Any]:
        """Run a job to its end, or until it stops."""
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.answer())

    def close(self) -> None:
        self.process.communicate()


@dataclass(frozen=True)
class Case:
    """A command that is faulted, in a copy of a folder in which other commands have run.

    Attributes:
        job: what the server runs.
        before: of which command's folder it is a copy, None for an empty one.
        files: by name, what else is in the folder.
    """

    job: dict[str, Any]
    before: str | None = None
    files: dict[str, str] | None = None


def command(text: str) -> dict[str, Any]:
    return {"argv": text.split()}


_SMALL = (
    "--preset smoke --run run --set trainer.max_iters=3 --set trainer.checkpoint_every=1 --set prefix.max_iters=2 "
    "--set prefix.checkpoint_every=1 --set model.n_layer=1 --set model.n_embd=8 --set model.n_head=1 "
    "--set trainer.batch_size=4 --set prefix.batch_size=2 --set trainer.log_every=1 "
    "--set evaluation.n_rows=4 --set evaluation.n_matrix_rows=2"
)
_STUDY = """runs = ["run"]
methods = ["key_value", "lora-mlp"]
tasks = ["Add1"]
seeds = [0, 1]
max_iters = [2]
n_rows = 4
n_parameters = 200
[prefix]
batch_size = 2
checkpoint_every = 1
"""
_ROWS = "".join(f"[{n}, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n" for n in range(1, 6))

CASES = {
    "pretrain": Case(command(f"pretrain {_SMALL}")),
    "reproduce": Case(command(f"reproduce Add1 {_SMALL}")),
    "prefix": Case(command("prefix Add1 SortAscending --run run"), "pretrain"),
    "sweep, a worker": Case(command("sweep study.toml --worker"), "pretrain", {"study.toml": _STUDY}),
    "sweep, its tables": Case(command("sweep study.toml --processes 1"), "sweep, a worker"),
    "predict": Case(
        command("predict in.jsonl out.jsonl --task Add1 --run run --batch-size 2"), "prefix", {"in.jsonl": _ROWS}
    ),
    "chain": Case(
        command("chain in.jsonl out.jsonl --task SortAscending+Add1 --run run --batch-size 2"),
        "prefix",
        {"in.jsonl": _ROWS},
    ),
    "export": Case(command("export out --run run"), "prefix"),
    "Trainer": Case({"call": "bare_trainer"}),
}


class Bench:
    """Folders of the cases, before and after they have run without a fault."""

    def __init__(self, server: Server, root: Path):
        self.server, self.root = server, root
        self._done: dict[str, Path] = {}
        self._n = 0

    def fresh(self, name: str) -> Path:
        """A new folder as a case finds it."""
        case = CASES[name]
        self._n += 1
        folder = self.root / f"trial-{self._n}"
        if case.before:
            shutil.copytree(self.done(case.before), folder, symlinks=True)
        else:
            folder.mkdir()
        for file, text in (case.files or {}).items():
            (folder / file).write_text(text)
        return folder

    def run(self, name: str, folder: Path, **options: Any) -> dict[str, Any]:
        """Run a case in a folder."""
        return self.server.run(**CASES[name].job | {"cwd": str(folder), "root": str(folder)} | options)

    def done(self, name: str) -> Path:
        """The folder of a case that has run without a fault."""
        if name not in self._done:
            folder = self.fresh(name)
            result = self.run(name, folder)
            assert result["rc"] == 0, result
            self._done[name] = folder
        return self._done[name]


def snapshot(folder: Path) -> dict[str, Any]:
    """By name, every file of a folder but for the times in it."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors" and "out" not in path.parts:
        tensors, description = load_checkpoint(path)
        return checksum(tensors), _without_times(description)
    if path.suffix == ".json":
        return _without_times(json.loads(path.read_text()))
    if path.name == "metrics.jsonl":
        return [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "seconds.csv":
        return len(path.read_text().splitlines())
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        times = ("seconds", "iter_dt", "checksum")
        return {key: _without_times(each) for key, each in value.items() if key not in times}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Which files differ, are missing or are strays; empty where none is."""
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return ", ".join(
        f"{name} {'is missing' if name not in found else 'is a stray' if name not in expected else 'differs'}"
        for name in names
    )


def sample(numbers: list[Any], n: int, name: str) -> list[Any]:
    """All of them, or n that the seed chooses."""
    return numbers if IS_ALL or len(numbers) <= n else sorted(random.Random(f"{SEED} {name}").sample(numbers, n))


def tally(kind: str, n_tried: int, failures: list[str]) -> None:
    """Count, and fail where something has failed."""
    TALLY[kind, "tried"] += n_tried
    TALLY[kind, "failed"] += len(failures)
    assert not failures, f"seed {SEED}, {len(failures)} of {n_tried} failed:\n" + "\n".join(failures[:20])
