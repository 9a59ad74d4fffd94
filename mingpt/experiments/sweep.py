"""Studies: a grid of cells, each of which fits one model to one task by one method, and is computed once.

A study is a TOML file, or a ``Study`` in Python. What its cells come to is in the folder of the same name:

    cells/<hash>/result.json     a cell's scores with its cache key, of which they are a function; also in results.csv
    packs/                       what is being trained, and the study as its processes read it
    results.csv, seconds.csv     the table, and what each cell took
    rates.json                   each method's rate, where it was searched; its tries are a study in search/

Cells of one model, method and size train in one batch, a pack. Which cells go together is a function of the study, and
every pack is computed by one thread, so the table is the same to the byte however the packs are shared out.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from mingpt.adapters import METHODS, Adapter, size_for
from mingpt.algebra import AnyTask
from mingpt.evaluation import evaluate
from mingpt.experiments.pipeline import dataset
from mingpt.experiments.presets import get_default_config, run_config
from mingpt.model import GPT
from mingpt.storage.cache import cached_json, read_cached_json
from mingpt.storage.checkpoint import json_checksum, weights_hash
from mingpt.storage.files import LockedError, locked, parsing, read_json, write_atomic
from mingpt.storage.weights import load_adapter, load_model, save_adapter
from mingpt.tasks import TEST_TASKS
from mingpt.trainer import AdapterTrainer, DivergedError, recipe
from mingpt.training.batches import TaskDataset
from mingpt.training.precision import resolve_precision
from mingpt.utils import CfgNode, nearest, set_seed

if TYPE_CHECKING:
    from pandas import DataFrame


class Cell(NamedTuple):
    """One fit: ``size`` is a rank or a number of positions, ``seed`` that of the data and the initial values."""

    run: str
    method: str
    size: int
    max_iters: int
    task: str
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Study:
    """A grid of cells.

    Attributes:
        folder: where the results are; text too.
        runs: folders with a model.safetensors.
        methods: see ``mingpt.adapters.METHODS``.
        tasks: their names.
        seeds: at least five for a claim.
        learning_rates: for every method, or a list for each; or the name of a study beside this one, whose results give
            each method, size and task the rate that was best there.
        max_iters: iterations; the rate decays within them.
        sizes: ranks or numbers of positions, by method; one that is not named is as large as ``n_parameters`` allows.
        n_parameters: trainable parameters an adapter may have, those of 10 activations a layer by default.
        prefix: changes of the presets' configuration for what is trained beside the model.
        split: of the rows that are scored: "validation", or "test" for what is published.
        n_rows: how many.
        pack: cells that may train in one batch.
        keep: whether each cell's folder gets what was trained, for ``adapter``.
        search: changes of the study with which each method's rate is chosen from ``learning_rates`` on validation rows
            first, such as fewer tasks and seeds; see ``search_rates``. Without, there is no search.
        choose_by: what says which rate is best, "accuracy" or, where hardly a row is solved, "loss".
    """

    folder: Path
    runs: Sequence[str] = ("checkpoints/laptop",)
    methods: Sequence[str] = ("key_value",)
    tasks: Sequence[str] = tuple(map(str, TEST_TASKS))
    seeds: Sequence[int] = (0,)
    learning_rates: Sequence[float] | Mapping[str, Sequence[float]] | str = (0.1,)
    max_iters: Sequence[int] = (400,)
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    n_parameters: int | None = None
    prefix: Mapping[str, Any] = field(default_factory=dict)
    split: str = "validation"
    n_rows: int = 1000
    pack: int = 24
    keep: bool = False
    search: Mapping[str, Any] | None = None
    choose_by: str = "accuracy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """Read a study from a TOML file; its folder has the file's name. Or from a JSON file, which names the folder.

        Raises:
            ValueError: naming the file and what is wrong in it.
        """
        path = Path(path)
        with parsing(path, "a study"):
            found: dict[str, Any] = {"folder": path.with_suffix("")}
            found |= json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
            known = [each.name for each in fields(cls)]
            for key in found.keys() - known:
                raise ValueError(f"unknown key {key!r}{nearest(key, known)}; the keys are {', '.join(known[1:])}")
            study = cls(**found)
            study.keys  # noqa: B018  (finds the mistakes in the grid)
        return study

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells of the grid, in order.

        Raises:
            ValueError: for an unknown method or task, an empty axis, or a method that cannot be so small.
        """
        if self.choose_by not in ("accuracy", "loss"):
            raise ValueError(f'choose_by is "accuracy" or "loss", got {self.choose_by!r}')
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}; choose from {', '.join(METHODS)}")
        tasks = [str(AnyTask.parse(name)) for name in self.tasks]
        cells = []
        for run, method, max_iters in itertools.product(self.runs, self.methods, self.max_iters):
            for size, task in itertools.product(self.sizes.get(method) or [self._size(run, method)], tasks):
                grid = itertools.product([task], self.seeds, self._rates(method, size, task))
                cells += [Cell(run, method, size, max_iters, *each) for each in grid]
        if not cells:
            raise ValueError("the grid has no cells; every axis needs a value")
        return list(dict.fromkeys(cells))

    def _rates(self, method: str, size: int, task: str) -> Sequence[float]:
        """The learning rates of a method at a size on a task."""
        rates, name = self.learning_rates, method
        if isinstance(rates, str):
            rates, name = self._rates_there, f"{method} of size {size} on {task}"
        if not isinstance(rates, Mapping):
            return rates
        if name not in rates:
            raise ValueError(f"learning_rates has none for {name!r}, only for {', '.join(rates)}")
        return rates[name]

    @cached_property
    def _rates_there(self) -> dict[str, list[float]]:
        """What the study that ``learning_rates`` names has found best."""
        import pandas as pd

        file = self.folder.with_name(str(self.learning_rates)) / "results.csv"
        with parsing(file, "the results of a study"):
            best = best_rates(pd.read_csv(file), ["method", "size", "task"], self.choose_by)
        columns = [best[name] for name in ("method", "size", "task", "learning_rate")]
        return {f"{method} of size {size} on {task}": [rate] for method, size, task, rate in zip(*columns, strict=True)}

    def _size(self, run: str, method: str) -> int:
        config, n_placeholders = read_model(run)[0].config, self.config(run, 0).data.prefix_size
        n_parameters = self.n_parameters or 10 * config.n_layer * config.n_embd
        return size_for(METHODS[method], config, n_parameters, n_placeholders)

    def config(self, run: str, seed: int) -> CfgNode:
        """The configuration of a cell's training and data."""
        config = get_default_config()
        config.data, config.seed = run_config(run).data, seed
        config.prefix.update_from({"validate_every": None} | dict(self.prefix), "the study's prefix")
        config.prefix.merge_from_dict({"max_iters": max(self.max_iters), "progress": False, "device": "cpu"})
        return config

    def data(self, cell: Cell) -> TaskDataset:
        """What a cell is trained on."""
        return dataset(self.config(cell.run, cell.seed), "train", [AnyTask.parse(cell.task)])

    @cached_property
    def keys(self) -> dict[Cell, dict[str, Any]]:
        """By cell, what its result is a function of."""
        described: dict[tuple[Any, ...], dict[str, Any]] = {}  # by what several cells share
        keys = {}
        for cell in self.cells:
            shared = cell.run, cell.task, cell.seed
            if shared not in described:
                described[shared] = self.data(cell).describe()
            keys[cell] = cell._asdict() | self._shared_key | {"run": read_model(cell.run)[1], "data": described[shared]}
        return keys

    @cached_property
    def _shared_key(self) -> dict[str, Any]:
        config = self.config(self.runs[0], 0).prefix
        own = {name: value for name, value in recipe(config).items() if name not in ("learning_rate", "max_iters")}
        own["precision"] = resolve_precision(config.precision, "cpu")
        return {"stage": "sweep", "recipe": own, "evaluation": {"split": self.split, "n_rows": self.n_rows}}

    @cached_property
    def paths(self) -> dict[Cell, Path]:
        """By cell, the file of its result."""
        return {
            cell: self.folder / "cells" / json_checksum(key)[:16] / "result.json" for cell, key in self.keys.items()
        }

    @cached_property
    def packs(self) -> list[list[Cell]]:
        """The cells that train together."""
        groups = itertools.groupby(sorted(self.cells, key=lambda cell: cell[:4]), key=lambda cell: cell[:4])
        found = (list(own) for _, own in groups)
        return [own[n : n + self.pack] for own in found for n in range(0, len(own), self.pack)]

    def state(self, cells: Sequence[Cell]) -> Path:
        """The file of the training of some cells in one batch, while it goes on."""
        return self.folder / "packs" / f"{json_checksum([self.keys[cell] for cell in cells])[:16]}.safetensors"

    def lock(self, cells: Sequence[Cell]) -> Path:
        """The file of the lock that who computes these cells holds."""
        return self.state(cells).with_suffix(".lock")

    def adapter(self, cell: Cell) -> Adapter:
        """What a cell has trained, for ``read_model(cell.run)``.

        Raises:
            FileNotFoundError: if it was not kept.
        """
        return load_adapter(self._adapter_path(cell), read_model(cell.run)[0])[0]

    def _adapter_path(self, cell: Cell) -> Path:
        return self.paths[cell].with_name("adapter.safetensors")

    @cached_property
    def _tables(self) -> dict[str, dict[str, Any]]:
        """By the name of a cell's folder, what results.csv and seconds.csv say; the folder itself may be gone."""
        rows: dict[str, dict[str, Any]] = {}
        for name in ("results", "seconds"):
            if (path := self.folder / f"{name}.csv").exists():
                with parsing(path, "a row for each cell"), path.open(newline="") as file:
                    for row in csv.DictReader(file):
                        own = {key: _parse(text) for key, text in row.items()} | {"cell": row["cell"]}
                        rows[row["cell"]] = rows.get(row["cell"], {}) | own
        return rows

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell has a result, in its folder or in the table."""
        return self.paths[cell].exists() or self.paths[cell].parent.name in self._tables

    def missing(self) -> list[Cell]:
        """The cells that have no result yet."""
        return [cell for cell in self.cells if not self.is_done(cell)]

    def scored(self) -> Study | None:
        """The grid that is scored: after a search it has the rates that were chosen, before it there is none."""
        path = self.folder / "rates.json"
        if self.search is None:
            return self
        with parsing(path, "a learning rate for each method"):
            rates = {name: [float(rate)] for name, rate in read_json(path).items()} if path.exists() else {}
        return replace(self, search=None, learning_rates=rates) if rates.keys() >= set(self.methods) else None

    def progress(self) -> dict[str, int]:
        """How many cells have a result, "done", and how many there are, "cells"; without the tries of a search."""
        scored = self.scored()
        cells = {cell[:-1] for cell in self.cells} if self.search is not None else self.cells
        return {"done": len(scored.cells) - len(scored.missing()) if scored else 0, "cells": len(cells)}

    def results(self) -> DataFrame:
        """A row for each cell that has a result: the cell, and what it came to.

        Columns beside the cell's: cell (its folder's name, a hash of its cache key), n_parameters, n_correct, n_rows,
        accuracy, loss (mean cross-entropy of the same rows in nats), n_iters (below max_iters where it ended at its
        plateau, or diverged: then is_diverged says so), curve (accuracy on ``validation_rows`` validation rows after
        every ``validate_every`` iterations), seconds (its share of the pack's).
        """
        import pandas as pd

        rows = []
        for cell, path in self.paths.items():
            name = path.parent.name
            if path.exists():
                rows.append({"cell": name} | cell._asdict() | read_cached_json(path)["value"])
            elif name in self._tables:
                rows.append(self._tables[name])
        return pd.DataFrame(rows)

    def write_tables(self) -> None:
        """Write results.csv and seconds.csv."""
        table = self.results()
        for name, columns in (("results", table.columns.drop("seconds")), ("seconds", ["cell", "seconds"])):
            write_atomic(self.folder / f"{name}.csv", table[columns].to_csv(index=False).encode())


def _parse(text: str) -> Any:
    """A number or a list, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@cache
def read_model(run: str) -> tuple[GPT, str]:
    """A run's model, in evaluation mode on the CPU, and the hash of its weights."""
    model, _ = load_model(Path(run) / "model.safetensors")
    return model, weights_hash(model)


# ------------------------------------------------------------------------------------------------------ computing


def run_pack(study: Study, cells: Sequence[Cell]) -> None:
    """Train what is missing of a pack in one batch, score it and write it. A pack that was cut off goes on."""
    missing, lock = [cell for cell in cells if not study.is_done(cell)], study.lock(cells)
    if not missing:
        study.state(cells).unlink(missing_ok=True)  # of one that was cut off when it had written all results
        return
    if not study.state(cells).exists():  # else it was cut off while its results were written
        cells = missing
    state = study.state(cells)
    torch.set_num_threads(1)
    model, config = read_model(cells[0].run)[0], study.config(cells[0].run, 0)
    data = {cell: study.data(cell) for cell in cells}
    adapters, method = [], cast(Callable[..., Adapter], METHODS[cells[0].method])
    for cell in cells:
        set_seed(cell.seed + 1)
        adapters.append(method(model, data[cell], cell.size))
    adapter = adapters[0].extend(adapters[1:])
    config.prefix.max_iters = cells[0].max_iters
    config.prefix.checkpoint_path = state
    rates = [cell.learning_rate for cell in cells]
    trainer = AdapterTrainer(config.prefix, model, list(data.values()), adapter, rates)
    trainer.cache_key = {"cells": [study.keys[cell] for cell in cells]}
    with contextlib.suppress(DivergedError):  # the others are none the worse for it, and its result says so
        trainer.run()

    def score(number: int, cell: Cell) -> dict[str, Any]:
        rows = data[cell].with_split(study.split)
        with torch.no_grad(), adapter.attached([number]) as prefix:
            found = evaluate(model, rows, prefix, study.n_rows, precision="float32")
            loss = model(*rows.batch(range(study.n_rows)), prefixes=prefix)[1]
        return {
            "n_parameters": adapter.n_parameters,
            "n_correct": found.n_correct,
            "n_rows": found.n_rows,
            "accuracy": found.accuracy,
            "loss": loss.item() if math.isfinite(loss.item()) else None,
            "n_iters": int(trainer.n_iters[number]),
            "curve": [round(each, 4) for each in trainer.curves[number].tolist() if each == each],
            "seconds": trainer.seconds / len(cells),
        } | ({"is_diverged": True} if trainer.is_diverged[number] else {})

    for number, cell in enumerate(cells):
        if study.keep:
            save_adapter(study._adapter_path(cell), adapter, cell.method, cell.size, data[cell], number)
        cached_json(study.paths[cell], study.keys[cell], partial(score, number, cell), lock)
    state.unlink(missing_ok=True)


def run_packs(study: Study) -> None:
    """Compute what is missing of a study, but for the packs that other processes are computing."""
    for cells in study.packs:
        is_left = study.state(cells).exists() or study.lock(cells).exists()
        if is_left or not all(map(study.is_done, cells)):
            with contextlib.suppress(LockedError), locked(study.lock(cells)):
                run_pack(study, cells)


def run_study(study: Study, n_processes: int | None = None, slurm: Mapping[str, Any] | None = None) -> DataFrame:
    """Compute what is missing of a study, write its tables, and return its results.

    Args:
        study: any.
        n_processes: on this machine, one for each core by default; or of Slurm's job array.
        slurm: parameters of submitit's executor, such as ``{"timeout_min": 240}``; jobs are requeued when they are
            preempted. ``{"cluster": "local"}`` runs them here. None does without submitit.

    Raises:
        RuntimeError: if a process fails, with its number.
        LockedError: if another process still computes some of the cells; the others are kept.
    """
    if study.search is not None:
        rates = search_rates(replace(study, search=None, split="validation", **study.search), n_processes, slurm)
        write_atomic(study.folder / "rates.json", json.dumps(rates, indent=1).encode())
        study = cast(Study, study.scored())
    compute(study, n_processes, slurm)
    study.write_tables()
    return study.results()


def compute(study: Study, n_processes: int | None = None, slurm: Mapping[str, Any] | None = None) -> None:
    """Compute what is missing of a study without a search, and leave its tables as they are; see ``run_study``."""
    n_processes = min(n_processes or os.cpu_count() or 1, len(study.packs))
    text = json.dumps(asdict(study) | {"folder": str(study.folder)})
    file = study.folder / "packs" / f"study-{json_checksum(text)[:8]}.json"
    write_atomic(file, text.encode())
    commands = [[sys.executable, "-m", "mingpt", "sweep", str(file), "--worker"]] * n_processes
    if slurm is not None:
        _submit(study, commands, dict(slurm))
    elif study.missing():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen(command, env=environment) for command in commands]
        try:
            for _ in _progress(study):
                if all(process.poll() is not None for process in processes):
                    break
            for process in processes:
                process.wait()
        finally:
            for process in processes:
                process.terminate()
            for process in processes:  # they save first
                process.wait()
        failed = [number for number, process in enumerate(processes) if process.wait()]
        if failed:
            raise RuntimeError(f"processes {failed} of the sweep failed; the same command goes on with what is missing")
    if left := study.missing():  # a rate must not be chosen, nor a table shown, of the others
        raise LockedError(
            f"another process computes {len(left)} of the {len(study.cells)} cells of {study.folder}; "
            "give the command again when it has ended"
        )


def _progress(study: Study) -> Iterator[None]:
    """Show a bar over the study's cells while the caller waits."""
    from tqdm import tqdm

    missing = study.missing()
    interval = 0.1 if sys.stderr.isatty() else 60.0  # a log file gets a line a minute
    n_done = len(study.cells) - len(missing)
    with tqdm(total=len(study.cells), initial=n_done, unit="cell", mininterval=interval) as bar:
        while missing:
            left = [cell for cell in missing if not study.is_done(cell)]
            bar.update(len(missing) - len(left))
            missing = left
            yield
            time.sleep(0.5)


def _submit(study: Study, commands: list[list[str]], parameters: dict[str, Any]) -> None:
    """Run commands as a job array of Slurm, or of submitit's local executor, and wait for them."""
    import submitit

    executor = submitit.AutoExecutor(study.folder / "jobs", cluster=parameters.pop("cluster", None))
    executor.update_parameters(slurm_additional_parameters={"requeue": True}, **parameters)
    with executor.batch():
        jobs = [executor.submit(submitit.helpers.CommandFunction(command)) for command in commands]
    for job in jobs:
        job.result()


def search_rates(
    study: Study, n_processes: int | None = None, slurm: Mapping[str, Any] | None = None, step: float = 10**0.5
) -> dict[str, float]:
    """Choose each method's learning rate by the mean over the tasks and seeds of a study, and of its rows.

    Every method is tried at the same rates. While one is best at an end of them, its grid grows there by ``step``.
    All tries are the results of a study in the folder ``search``.

    Returns:
        The rate by method; where ``choose_by`` is equal, the other of accuracy and loss decides.
    """
    if isinstance(study.learning_rates, Mapping | str):
        raise ValueError("a search needs learning_rates that are one list for every method, such as [0.03, 0.1, 0.3]")
    rates = {name: sorted(study.learning_rates) for name in study.methods}
    while True:
        tried = replace(study, folder=study.folder / "search", learning_rates=rates)
        compute(tried, n_processes, slurm)
        chosen = best_rates(tried.results(), ["method"], study.choose_by)
        best = dict(zip(chosen["method"], chosen["learning_rate"].astype(float), strict=True))
        grown = {name: _grow(rates[name], best[name], step) for name in rates}
        if grown == rates:
            tried.write_tables()  # not before: a table may be all there is of tries at the rates of a larger grid
            return {name: best[name] for name in study.methods}
        rates = grown


def best_rates(results: DataFrame, keys: Sequence[str], choose_by: str = "accuracy") -> DataFrame:
    """The learning rate with the best mean, of each method and whatever else ``keys`` name.

    Args:
        results: of a study.
        keys: its columns, such as ["method", "size", "task"].
        choose_by: "accuracy" or "loss"; where it is equal, the other decides.

    Returns:
        A row for each combination, with the keys and "learning_rate".
    """
    means = cast(Any, results).groupby([*keys, "learning_rate"])[["accuracy", "loss"]].mean().reset_index()
    first = sorted(["accuracy", "loss"], key=choose_by.__ne__)
    ordered = means.sort_values(first, ascending=[name == "loss" for name in first])
    return ordered.drop_duplicates(list(keys))[[*keys, "learning_rate"]]


def _grow(rates: list[float], best: float, step: float) -> list[float]:
    """The rates with one more at the end where the best one is."""
    if best == rates[0]:
        return [best / step, *rates]
    return [*rates, best * step] if best == rates[-1] else rates
