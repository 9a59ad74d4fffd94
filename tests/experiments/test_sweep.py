"""Studies: each cell once, the same to the byte however they are shared out."""

from __future__ import annotations

import pytest
from test_reproduction import tiny_config

from mingpt.experiments import pipeline
from mingpt.experiments.sweep import Study, run_pack, run_shard, run_study


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    pipeline.pretrain(tiny_config(), folder)
    return str(folder)


def new_study(folder, run, **options):
    prefix = {"batch_size": 4, "warmup_iters": 0}
    options = {"methods": ["key_value", "lora-mlp"], "tasks": ["Add1", "SortAscending"], "seeds": [0, 1]} | options
    return Study(folder, [run], max_iters=[3], n_rows=20, prefix=prefix, learning_rates=[0.1, 0.2], **options)


def test_a_table_does_not_depend_on_who_computes_it(run, tmp_path):
    one, three = new_study(tmp_path / "one", run, pack=3), new_study(tmp_path / "three", run, pack=3)
    run_shard(one)
    one.write_tables()
    run_study(three, n_processes=3)
    table = (tmp_path / "one" / "results.csv").read_bytes()
    assert table == (tmp_path / "three" / "results.csv").read_bytes()
    assert len(one.results()) == len(one.cells) == 16


def test_only_what_is_missing_is_written(run, tmp_path):
    study = new_study(tmp_path / "study", run)
    run_shard(study)
    stamps = {cell: study.path(cell).stat().st_mtime_ns for cell in study.cells}
    lost = study.cells[3]
    expected = study.path(lost).read_text()
    study.path(lost).unlink()
    assert study.missing() == [lost]
    for cells in study.packs:
        run_pack(study, cells)
    assert {cell: study.path(cell).stat().st_mtime_ns for cell in study.cells if cell != lost} == {
        cell: stamp for cell, stamp in stamps.items() if cell != lost
    }
    without_seconds = lambda text: [line for line in text.splitlines() if "seconds" not in line]  # noqa: E731
    assert without_seconds(study.path(lost).read_text()) == without_seconds(expected)


def test_mistakes_are_one_line(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text('method = ["key_value"]')
    with pytest.raises(ValueError, match=r"unknown key 'method' \(did you mean 'methods'"):
        Study.read(path)
    path.write_text('methods = ["key_valu"]')
    with pytest.raises(ValueError, match="unknown method 'key_valu'"):
        Study.read(path)
