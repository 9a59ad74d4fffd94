"""Studies: each cell once, the same to the byte however they are shared out."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
from dataclasses import replace

import pytest
from pandas import DataFrame
from pandas.testing import assert_frame_equal
from test_reproduction import tiny_config

from mingpt.evaluation import evaluate
from mingpt.experiments import pipeline, sweep
from mingpt.experiments.sweep import Study, run_packs, run_study
from mingpt.storage.files import LockedError, locked
from mingpt.trainer import AdapterTrainer

N_KILLS = int(os.environ.get("N_KILLS", "8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    pipeline.pretrain(tiny_config(), folder)
    return str(folder)


def new_study(folder, run, **options):
    prefix = {"batch_size": 4, "warmup_iters": 0}
    axes = {"methods": ["key_value", "lora-mlp"], "tasks": ["Add1", "SortAscending"], "seeds": [0, 1]}
    axes |= {"max_iters": [3], "learning_rates": [0.1, 0.2], "n_parameters": 1000}
    return Study(folder, [run], n_rows=20, prefix=prefix, **axes | options)


def test_a_table_does_not_depend_on_who_computes_it(run, tmp_path):
    one, three = new_study(tmp_path / "one", run, pack=3), new_study(tmp_path / "three", run, pack=3)
    run_packs(one)
    one.write_tables()
    run_study(three, n_processes=3)
    table = (tmp_path / "one" / "results.csv").read_bytes()
    assert table == (tmp_path / "three" / "results.csv").read_bytes()
    assert len(one.results()) == len(one.cells) == 16


def test_submitit_gives_the_same_table(run, tmp_path):
    here, job = new_study(tmp_path / "here", run), new_study(tmp_path / "job", run)
    run_packs(here)
    here.write_tables()
    run_study(job, n_processes=2, slurm={"cluster": "local", "timeout_min": 5})
    assert (here.folder / "results.csv").read_bytes() == (job.folder / "results.csv").read_bytes()


def test_rates_can_be_those_that_another_study_has_found_best(run, tmp_path):
    there = new_study(tmp_path / "there", run)
    run_packs(there)
    there.write_tables()
    mean = there.results().groupby(["method", "task", "learning_rate"])["loss"].mean()
    best = {key: mean[key].idxmin() for key in mean.index.droplevel(2)}
    assert set(best.values()) == {0.1, 0.2}
    here = new_study(tmp_path / "here", run, learning_rates="there", seeds=[2], choose_by="loss")
    assert {(cell.method, cell.task): cell.learning_rate for cell in here.cells} == best
    with pytest.raises(ValueError, match="learning_rates has none for 'key_value of size 3 on Add1'"):
        replace(here, sizes={"key_value": [3]}).keys  # noqa: B018
    with pytest.raises(ValueError, match="a search needs learning_rates that are one list"):
        sweep.search_rates(here)


@pytest.mark.parametrize("n_written", [0, 1, 5])
def test_a_pack_that_was_cut_off_is_not_trained_again(run, tmp_path, monkeypatch, n_written):
    """Its last state is there until all its results are."""
    whole, cut = new_study(tmp_path / "whole", run), new_study(tmp_path / "cut", run)
    run_packs(whole)
    whole.write_tables()
    write, written, steps = sweep.cached_json, [], []

    def killed(path, *rest):
        if len(written) == n_written:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *rest)

    monkeypatch.setattr(sweep, "cached_json", killed)
    with pytest.raises(KeyboardInterrupt):
        run_packs(cut)
    assert len(cut.missing()) == 16 - n_written
    monkeypatch.setattr(sweep, "cached_json", write)
    step = AdapterTrainer._step
    monkeypatch.setattr(AdapterTrainer, "_step", lambda self, x, y: (steps.append(len(x)), step(self, x, y)))
    stamps = {path: path.stat().st_mtime_ns for path in written}
    run_packs(cut)
    cut.write_tables()
    assert steps == [4 * 8] * 3  # the other pack's, 8 cells of 4 rows
    assert {path: path.stat().st_mtime_ns for path in written} == stamps
    assert (whole.folder / "results.csv").read_bytes() == (cut.folder / "results.csv").read_bytes()
    assert not list(cut.folder.glob("packs/*.safetensors"))


def test_kills_at_random_moments_lose_no_cell_and_repeat_none(run, tmp_path):
    """Whatever a killed process has written stays as it is, and the table is that of a run that was left alone."""
    options = {"pack": 3, "max_iters": [40], "seeds": range(N_KILLS // 2)}
    whole, cut = new_study(tmp_path / "whole", run, **options), new_study(tmp_path / "cut", run, **options)
    cut = replace(cut, prefix=cut.prefix | {"checkpoint_every": 2})
    whole = replace(whole, prefix=cut.prefix)
    run_packs(whole)
    whole.write_tables()
    context, moments = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["mingpt.experiments.sweep"])
    stamps, n_cut = {}, 0
    while n_cut < N_KILLS and cut.missing():
        process = context.Process(target=run_packs, args=[cut])
        process.start()
        process.join(moments.uniform(0.3, 1.5))
        n_cut += process.is_alive()
        process.kill()
        process.join()
        found = {path: path.stat().st_mtime_ns for path in cut.folder.glob("cells/*/result.json")}
        assert found.items() >= stamps.items()
        stamps = found
    assert n_cut > N_KILLS // 2
    run_packs(cut)
    cut.write_tables()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (whole.folder / "results.csv").read_bytes() == (cut.folder / "results.csv").read_bytes()


@pytest.mark.parametrize("options", [{}, {"search": {"seeds": [5]}}])
def test_a_study_that_another_process_computes_is_not_taken_for_complete(run, tmp_path, options):
    study = new_study(tmp_path / "study", run, pack=3, **options)
    asked = (
        replace(study, search=None, split="validation", folder=study.folder / "search", seeds=[5]) if options else study
    )
    held = asked.packs[1]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(hold, [asked.lock(held)])
        with pytest.raises(LockedError, match=f"another process computes {len(held)} of the {len(asked.cells)} cells"):
            run_study(study, n_processes=1)
    assert not (study.folder / "results.csv").exists()
    assert not (study.folder / "rates.json").exists()
    assert len(run_study(study, n_processes=1)) == (8 if options else 16)


def hold(lock):
    """Hold a lock for as long as this process lives."""
    held = locked(lock)
    held.__enter__()
    HELD.append(held)


HELD = []


def test_a_larger_study_computes_only_what_is_new(run, tmp_path, monkeypatch):
    study = new_study(tmp_path / "study", run, methods=["key_value"])
    run_packs(study)
    step, steps = AdapterTrainer._step, []
    monkeypatch.setattr(AdapterTrainer, "_step", lambda self, x, y: (steps.append(len(x)), step(self, x, y)))
    larger = new_study(tmp_path / "study", run, methods=["key_value"], seeds=[0, 1, 2])
    run_packs(larger)
    assert steps == [4 * 4] * 3  # two tasks and two rates with the third seed
    assert not larger.missing()


def test_a_table_is_enough(run, tmp_path, monkeypatch):
    """What is read from it is what the cells' folders said, to the byte, and is not computed again."""
    whole, table = new_study(tmp_path / "whole", run), new_study(tmp_path / "table", run)
    run_study(whole, n_processes=1)
    table.folder.mkdir()
    for name in ("results.csv", "seconds.csv"):
        shutil.copy(whole.folder / name, table.folder / name)
    assert table.progress() == {"done": 16, "cells": 16}
    monkeypatch.setattr(AdapterTrainer, "run", lambda _: pytest.fail("trained again"))
    assert_frame_equal(run_study(table), whole.results())
    assert (table.folder / "results.csv").read_bytes() == (whole.folder / "results.csv").read_bytes()
    assert new_study(tmp_path / "table", run, seeds=[0, 7]).progress() == {"done": 8, "cells": 16}


def test_a_search_grows_the_grid_until_the_best_is_inside(run, tmp_path, monkeypatch):
    """By a result that is best at a rate of 1 for one method, and of 0.1 for the other."""
    seen = []

    def results(study):
        seen.append({name: list(rates) for name, rates in study.learning_rates.items()})
        best = {"key_value": 1.0, "lora-mlp": 0.1}
        cells = [cell._asdict() | {"accuracy": 0.5, "seconds": 1.0} for cell in study.cells]
        return DataFrame(cells).assign(loss=[abs(math.log(c["learning_rate"] / best[c["method"]])) for c in cells])

    monkeypatch.setattr(sweep, "compute", lambda *_: None)
    monkeypatch.setattr(Study, "results", results)
    monkeypatch.setattr(Study, "write_tables", lambda _: None)
    study = new_study(tmp_path / "study", run, seeds=[0])
    rates = sweep.search_rates(replace(study, learning_rates=[0.01, 0.1, 0.2]), step=5.0)
    assert rates == {"key_value": 1.0, "lora-mlp": 0.1}
    assert seen[0] == {"key_value": [0.01, 0.1, 0.2], "lora-mlp": [0.01, 0.1, 0.2]}
    assert seen[-1] == {"key_value": [0.01, 0.1, 0.2, 1.0, 5.0], "lora-mlp": [0.01, 0.1, 0.2]}


def test_a_search_goes_by_accuracy_or_by_loss(run, tmp_path, monkeypatch):
    def results(study):
        found = {0.01: (0.2, 2.0), 0.1: (0.1, 1.0), 0.2: (0.1, 3.0)}
        cells = [cell._asdict() | {"seconds": 1.0} for cell in study.cells]
        scores = [found.get(cell["learning_rate"], (0.0, 9.0)) for cell in cells]
        return DataFrame(cells).assign(accuracy=[a for a, _ in scores], loss=[loss for _, loss in scores])

    monkeypatch.setattr(sweep, "compute", lambda *_: None)
    monkeypatch.setattr(Study, "results", results)
    monkeypatch.setattr(Study, "write_tables", lambda _: None)
    study = new_study(tmp_path / "study", run, seeds=[0], methods=["key_value"], learning_rates=[0.01, 0.1, 0.2])
    assert sweep.search_rates(study) == {"key_value": 0.01}
    assert sweep.search_rates(replace(study, choose_by="loss")) == {"key_value": 0.1}
    with pytest.raises(ValueError, match="choose_by is"):
        replace(study, choose_by="los").keys  # noqa: B018


def test_a_search_chooses_on_validation_rows_and_scores_test_rows_once(run, tmp_path):
    study = new_study(tmp_path / "study", run, methods=["key_value"], split="test", search={"seeds": [0]})
    assert study.progress() == {"done": 0, "cells": 4}
    results = run_study(study, n_processes=1)
    assert study.progress() == {"done": 4, "cells": 4}
    assert {cell.learning_rate for cell in study.scored().cells} == set(results["learning_rate"])
    splits = [json.loads(path.read_text())["cache_key"] for path in study.folder.rglob("result.json")]
    tried = [key for key in splits if key["evaluation"]["split"] == "validation"]
    assert {key["seed"] for key in tried} == {0}
    chosen = set(results["learning_rate"])
    assert len(chosen) == 1
    assert chosen < {key["learning_rate"] for key in tried}
    scored = [key for key in splits if key["evaluation"]["split"] == "test"]
    assert sorted((key["task"], key["seed"]) for key in scored) == [
        (task, seed) for task in ("Add1", "SortAscending") for seed in (0, 1)
    ]
    assert len(results) == 4
    shutil.rmtree(study.folder / "cells")  # as in a clone, where the tables are all there is
    shutil.rmtree(study.folder / "search" / "cells")
    assert_frame_equal(run_study(study, n_processes=1), results)
    assert not list(study.folder.rglob("cells"))


def test_what_was_trained_is_kept_and_curves_say_how_it_got_there(run, tmp_path):
    prefix = {"batch_size": 4, "warmup_iters": 0, "validate_every": 2, "validation_rows": 10, "decay_fraction": 0.5}
    study = replace(new_study(tmp_path / "study", run, keep=True, max_iters=[7]), prefix=prefix)
    run_packs(study)
    results = study.results().set_index(["method", "task", "seed", "learning_rate"])
    model, _ = sweep.read_model(run)
    for cell in study.cells:
        found = results.loc[cell.method, cell.task, cell.seed, cell.learning_rate]
        assert len(found["curve"]) == 3
        rows = study.data(cell).with_split("validation")
        with study.adapter(cell).attached() as prefix:
            score = evaluate(model, rows, prefix, 20, precision="float32")
        assert score.n_correct == found["n_correct"]
    other = new_study(tmp_path / "other", run)
    with pytest.raises(FileNotFoundError):
        other.adapter(other.cells[0])


def test_a_rate_for_another_method_only_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="learning_rates has none for 'lora-mlp', only for key_value"):
        new_study(tmp_path, run, learning_rates={"key_value": [0.1]}).keys  # noqa: B018


def test_mistakes_are_one_line(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text('method = ["key_value"]')
    with pytest.raises(ValueError, match=r"unknown key 'method' \(did you mean 'methods'"):
        Study.read(path)
    path.write_text('methods = ["key_valu"]')
    with pytest.raises(ValueError, match="unknown method 'key_valu'"):
        Study.read(path)
