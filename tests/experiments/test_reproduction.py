"""The flagship experiment: stages, resumption, what a folder refuses; models and prefixes on disk."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mingpt.datasets import CustomDataset
from mingpt.evaluation import AccuracyMatrix, Score, bayes_loss
from mingpt.experiments import pipeline, reproduction
from mingpt.prefix import initial_prefix
from mingpt.storage import weights
from mingpt.storage.checkpoint import CheckpointError
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS, Add1, InverseBinary, SortAscending, SortDescending


def tiny_config(**overrides):
    config = reproduction.get_default_config("smoke")
    settings = {
        "model.n_embd": 8,
        "trainer.max_iters": 4,
        "trainer.batch_size": 14,
        "prefix.max_iters": 3,
        "prefix.batch_size": 2,
        "evaluation.n_rows": 12,
        "evaluation.n_matrix_rows": 6,
    }
    for key, value in {**settings, **overrides}.items():
        config.override(key, value)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, reproduction.reproduce(tiny_config(), folder)


def test_a_run_leaves_everything_that_it_promises(finished):
    folder, results = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "results.json",
        "model.safetensors",
        "prefixes.safetensors",
        "pretraining/metrics.jsonl",
        "prefixes/metrics.jsonl",
        "figures/matrix.png",
        "figures/prefix_effect.png",
        "figures/pretraining.png",
        "figures/attention_none.png",
    } <= files
    assert list(results["tasks"]) == [name for names in reproduction.GROUPS.values() for name in names]
    assert len(results["tasks"]) == 16
    assert {row["with"]["n_rows"] for row in results["tasks"].values()} == {12}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))


def test_the_figures_are_those_of_the_models_on_disk(finished):
    folder, results = finished
    config = tiny_config()
    model, _ = weights.load_model(folder / "model.safetensors")
    prefixes, _ = weights.load_prefixes(folder / "prefixes.safetensors", model)
    without, with_prefix, matrix = reproduction.evaluate_run(config, model, prefixes, [*PRETRAINING_TASKS, *TEST_TASKS])
    loaded_with, loaded_without = reproduction.scores_of(results)
    assert loaded_with == with_prefix
    assert loaded_without == {name: score for name, score in without.items() if name != reproduction.MIXED}
    assert AccuracyMatrix.from_dict(results["matrix"]).accuracies.tolist() == matrix.accuracies.tolist()


def test_the_table_has_a_line_for_each_task_with_the_published_figures(finished):
    lines = reproduction.format_table(finished[1]).splitlines()
    for task in [*PRETRAINING_TASKS, *TEST_TASKS]:
        (line,) = [line for line in lines if line.split(" ")[0] == str(task)]
        published = reproduction.PUBLISHED["with"].get(str(task))
        row = finished[1]["tasks"][str(task)]
        chain = "-" if row["chain"] is None else f"{100 * row['chain']['accuracy']:.2f}"
        assert line.split()[-2:] == ["-" if published is None else f"({published:.2f})", chain]
        score = Score.from_dict(row["with"])
        assert f" {100 * score.accuracy:.2f} " in line
        assert (row["chain"] is None) == (len(task.tasks) == 1)
    assert max(map(len, lines)) <= 120


def test_the_same_command_again_does_nothing(finished, monkeypatch):
    folder, results = finished
    monkeypatch.setattr(reproduction, "pretrain", None)
    assert reproduction.reproduce(tiny_config(), folder) == json.loads(json.dumps(results))
    watched = tiny_config(**{"trainer.progress": True, "trainer.log_every": 1})
    assert reproduction.reproduce(watched, folder)["mixed"] == results["mixed"]


def test_another_configuration_is_refused_and_named(finished):
    with pytest.raises(ValueError, match=r"trainer\.max_iters = 4, this one has 5; choose another folder"):
        reproduction.reproduce(tiny_config(**{"trainer.max_iters": 5}), finished[0])
    with pytest.raises(ValueError, match=r"prefix\.parallel = 'fsdp' leaves the model split"):
        reproduction.reproduce(tiny_config(**{"prefix.parallel": "fsdp"}), finished[0])
    with pytest.raises(ValueError, match="seed = 0, this one has 1"):
        reproduction.reproduce(tiny_config(seed=1), finished[0])


def test_a_run_cut_off_in_any_stage_ends_with_the_same_results(finished, tmp_path, monkeypatch):
    _, results = finished
    settings = {"trainer.checkpoint_every": 1, "prefix.checkpoint_every": 1}
    steps = []

    def cut_off(trainer):
        steps.append(type(trainer).__name__)
        if len(steps) in (2, 6):
            raise KeyboardInterrupt

    def with_cut(self, config, *arguments):
        original(self, config, *arguments)
        self.add_callback("on_batch_end", cut_off)

    original = reproduction.Trainer.__init__
    monkeypatch.setattr(reproduction.Trainer, "__init__", with_cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reproduction.reproduce(tiny_config(**settings), tmp_path)
        assert not (tmp_path / "results.json").exists()
    resumed = reproduction.reproduce(tiny_config(**settings), tmp_path)
    assert {"Trainer", "PrefixTrainer"} == set(steps)
    assert len(steps) < 2 * (4 + 3)
    for key in ("tasks", "mixed", "matrix"):
        assert resumed[key] == results[key]


def test_presets():
    assert reproduction.get_default_config("seed").model.n_layer == 12
    assert reproduction.get_default_config().preset == "laptop"
    with pytest.raises(ValueError, match="did you mean 'smoke'"):
        reproduction.get_default_config("smoky")
    one, other = reproduction.get_default_config(), reproduction.get_default_config()
    one.trainer.max_iters = 1
    assert other.trainer.max_iters != 1


# ----------------------------------------------------------------------------------------------------- the store


def test_prefixes_of_another_model_are_refused(finished, tmp_path):
    folder, _ = finished
    other = pipeline.build_model(tiny_config())
    with pytest.raises(CheckpointError, match=r"prefixes\.safetensors: field 'model'"):
        weights.load_prefixes(folder / "prefixes.safetensors", other)
    wider = pipeline.build_model(tiny_config(**{"model.n_embd": 16}))
    with pytest.raises(CheckpointError, match=r"n_embd' is 8, expected 16"):
        weights.load_prefixes(folder / "prefixes.safetensors", wider)
    with pytest.raises(CheckpointError, match="'kind' is 'prefixes', expected 'model'"):
        weights.load_model(folder / "prefixes.safetensors")
    with pytest.raises(CheckpointError, match="'kind' is 'model', expected 'prefixes'"):
        weights.load_prefixes(folder / "model.safetensors", other)


def test_a_model_comes_back_as_it_was(tmp_path):
    config = tiny_config(**{"model.skip_layer_norm": True})
    model = pipeline.build_model(config).eval()
    weights.save_model(tmp_path / "m.safetensors", model, note="kept")
    back, description = weights.load_model(tmp_path / "m.safetensors")
    assert description["note"] == "kept"
    assert back.config == model.config
    assert not back.training
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)
    prefixes = {"B": initial_prefix(model, 4), "A+B": initial_prefix(model, 4, init="random")}
    weights.save_prefixes(tmp_path / "p.safetensors", prefixes, model)
    loaded, _ = weights.load_prefixes(tmp_path / "p.safetensors", back)
    assert list(loaded) == ["B", "A+B"]
    assert all(torch.equal(loaded[name], prefixes[name]) for name in prefixes)


# ------------------------------------------------------------------------------------------- the best possible loss


def test_nothing_is_left_to_guess_about_a_single_task():
    assert bayes_loss(CustomDataset("test", [SortAscending()]), 100) == 0.0
    assert bayes_loss(CustomDataset("test", [Add1(), InverseBinary()]), 100) == 0.0  # their rows differ


def test_the_best_loss_is_that_of_bayes_rule_row_by_row():
    tasks = [SortAscending(), SortDescending(), Add1(), SortAscending()]
    dataset = CustomDataset("test", tasks, length=3, num_digits=4)
    inputs, solutions = dataset.rows(range(200))
    total = 0.0
    for row, solution in zip(inputs, solutions, strict=True):
        candidates = [task(row).tolist() for task in tasks]  # all of them pose all rows equally often
        for position, token in enumerate(solution):
            fitting = [c for c in candidates if c[position] == token]
            total -= math.log(len(fitting) / len(candidates))
            candidates = fitting
    assert bayes_loss(dataset, 200) == pytest.approx(total / solutions.size, rel=1e-12)
