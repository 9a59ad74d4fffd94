"""The flagship experiment: stages, resumption, what a folder refuses; models and prefixes on disk."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from mingpt.datasets import CustomDataset
from mingpt.evaluation import Score, bayes_loss, predict
from mingpt.experiments import pipeline, presets, reproduction
from mingpt.experiments.reproduction import EVERY_TASK
from mingpt.prefix import Prefix, initial_prefix
from mingpt.storage import weights
from mingpt.storage.checkpoint import CheckpointError
from mingpt.tasks import Add1, InverseBinary, Modulo, SortAscending, SortDescending
from mingpt.trainer import Trainer


def tiny_config(**overrides):
    config = presets.get_default_config("smoke")
    settings = {
        "model.n_embd": 8,
        "trainer.max_iters": 4,
        "trainer.batch_size": 14,
        "prefix.max_iters": 3,
        "prefix.batch_size": 2,
        "prefix.validate_every": 2,
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
        "prefixes/SortAscending+Add1.safetensors",
        "activation_prefixes/SortAscending+Add1.safetensors",
        "pretraining/metrics.jsonl",
        "figures/matrix.png",
        "figures/prefix_effect.png",
        "figures/pretraining.png",
        "figures/curves.png",
        "figures/attention_none.png",
    } <= files
    assert len(list(folder.glob("prefixes/training-*/metrics.jsonl"))) == 1
    assert list(results["tasks"]) == [str(task) for task in EVERY_TASK]
    for kind in reproduction.KINDS:
        assert {row[kind]["n_rows"] for row in results["tasks"].values()} == {12}
        assert list(results["n_iters"][kind]) == list(results["tasks"])
        # A validation after 2 of 3 iterations.
        assert {tuple(x for x, _ in curve) for curve in results["curves"][kind].values()} == {(2,)}
    assert json.loads((folder / "results.json").read_text())["value"] == results


def test_the_figures_are_those_of_the_models_on_disk(finished):
    folder, results = finished
    config = tiny_config()
    model, _ = weights.load_model(folder / "model.safetensors")
    loaded = {kind: weights.load_prefixes(folder / name, model) for kind, name in reproduction.KINDS.items()}
    assert {prefix.kind for prefix in loaded["activation"].values()} == {"activation"}
    prefixes = {kind: {str(task): own[str(task)] for task in EVERY_TASK} for kind, own in loaded.items()}
    found = reproduction.evaluate_run(config, model, prefixes, EVERY_TASK)
    assert found == {key: results[key] for key in ("mixed", "tasks", "matrix")}
    with_prefix, without = reproduction.scores_of(results, "key_value", "without")
    for name, row in found["tasks"].items():
        assert (with_prefix[name].to_dict(), without[name].to_dict()) == (row["key_value"], row["without"])


def test_the_table_has_a_row_for_each_task_with_the_published_figures(finished):
    table = reproduction.results_table(finished[1])
    assert list(table.index) == [*map(str, EVERY_TASK), reproduction.MIXED]
    for task in EVERY_TASK:
        row, cells = finished[1]["tasks"][str(task)], table.loc[str(task)]
        for kind in reproduction.KINDS:
            assert cells[f"{kind} prefix"] == 100 * Score.from_dict(row[kind]).accuracy
        published = reproduction.PUBLISHED["with"].get(str(task))
        assert cells["published, with"] == published or (published is None and math.isnan(cells["published, with"]))
        assert math.isnan(cells["as a chain"]) == (len(task.tasks) == 1) == (row["chain"] is None)
    lines = reproduction.format_table(finished[1]).splitlines()
    assert max(map(len, lines)) <= 140
    (line,) = [line for line in lines if line.startswith("SortAscending+Add1")]
    assert f"{table.loc['SortAscending+Add1', 'as a chain']:.2f}" in line.split()


def test_what_is_not_at_its_plateau_is_marked(finished):
    results = json.loads(json.dumps(finished[1]))
    results["n_iters"]["activation"]["Add1"] = 2
    lines = {line.split()[0]: line for line in reproduction.format_table(results).splitlines() if line}
    assert (lines["Add1"].count("*"), lines["Modulo"].count("*")) == (1, 2)
    assert "*: not at its plateau after 3 iterations" in reproduction.format_table(results)


def test_test_rows_are_read_only_after_the_last_training(tmp_path, monkeypatch):
    """So no rate, size or stop can have been chosen on them."""
    events, original_rows, original_step = [], CustomDataset.rows, Trainer._step
    monkeypatch.setattr(CustomDataset, "rows", lambda self, i: (events.append(self.split), original_rows(self, i))[1])
    monkeypatch.setattr(Trainer, "_step", lambda self, *xy: (events.append("step"), original_step(self, *xy))[1])
    reproduction.reproduce(tiny_config(), tmp_path, [Add1(), SortAscending() + Add1()])
    last_step = len(events) - events[::-1].index("step")
    assert {"train", "validation"} <= set(events[:last_step])
    assert "test" not in events[:last_step]
    assert "test" in events[last_step:]


def test_a_chain_is_what_its_prefixes_answer_one_after_the_other(finished):
    folder, results = finished
    model, prefixes, _ = pipeline.load_run(folder)
    task = SortAscending() + Add1()
    data = pipeline.dataset(tiny_config(), "test", [task])
    inputs, solutions = data.rows(range(12))
    first = predict(model, inputs, data.prefix_padding, prefixes["SortAscending"])
    score = Score.of(predict(model, first, data.prefix_padding, prefixes["Add1"]), solutions, inputs)
    assert results["tasks"][str(task)]["chain"] == score.to_dict()
    found = reproduction.evaluate_chains(tiny_config(), model, prefixes, [Add1(), task, SortDescending() + Modulo()])
    assert found.keys() == {str(task), "SortDescending+Modulo"}
    del prefixes["Add1"]
    assert not reproduction.evaluate_chains(tiny_config(), model, prefixes, [task])


def test_the_same_command_again_does_nothing(finished, monkeypatch):
    folder, results = finished
    for name in ("evaluate_run", "evaluate_chains", "draw_figures"):
        monkeypatch.setattr(reproduction, name, None)
    monkeypatch.setattr(reproduction.distributed, "map_over_ranks", None)
    assert reproduction.reproduce(tiny_config(), folder) == results
    watched = tiny_config(**{"trainer.progress": True, "trainer.log_every": 1})
    assert reproduction.reproduce(watched, folder)["mixed"] == results["mixed"]


def test_another_configuration_is_refused_and_named(finished):
    for settings, message in (
        ({"trainer.max_iters": 5}, r"recipe\.max_iters = 4, asked for is 5"),
        ({"prefix.parallel": "fsdp"}, r"prefix\.parallel = 'fsdp' leaves the model split"),
        ({"seed": 1}, "seed = 0, asked for is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            reproduction.reproduce(tiny_config(**settings), finished[0])


def test_what_is_asked_beyond_a_run_is_made_beside_it(finished, monkeypatch):
    """A longer training of the prefixes, another evaluation or fewer tasks: without another pretraining."""
    folder, results = finished
    before = (folder / "results.json").read_bytes()
    monkeypatch.setattr(pipeline, "build_model", None)  # nothing is pretrained
    longer = reproduction.reproduce(tiny_config(**{"prefix.max_iters": 5}), folder, [Add1()])
    assert list(longer["tasks"]) == ["Add1"]
    fewer_rows = reproduction.reproduce(tiny_config(**{"evaluation.n_rows": 7}), folder)
    assert fewer_rows["mixed"]["n_rows"] == 7
    assert (folder / "results.json").read_bytes() == before
    assert len(list(folder.glob("results*.json"))) == 3
    assert reproduction.reproduce(tiny_config(), folder) == results


def test_results_of_another_run_are_not_believed(finished, tmp_path):
    folder, results = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "prefixes")
    (tmp_path / "run" / "model.safetensors").unlink()
    other = reproduction.reproduce(tiny_config(seed=1), tmp_path / "run", [Add1()])
    assert other["mixed"] != results["mixed"] or other["tasks"]["Add1"] != results["tasks"]["Add1"]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert stored["value"] == results  # it stays, and the other is beside it


def test_an_error_in_a_figure_does_not_lose_the_results(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such font")

    monkeypatch.setattr(reproduction, "draw_figures", fail)
    with pytest.raises(RuntimeError, match="no such font"):
        reproduction.reproduce(tiny_config(), tmp_path, [Add1()])
    assert json.loads((tmp_path / "results.json").read_text())["value"]["tasks"]["Add1"]


def test_the_configuration_of_a_run_is_the_default_of_later_commands(finished, tmp_path):
    folder, _ = finished
    assert presets.run_config(folder) == tiny_config()
    assert presets.run_config(folder, overrides=["prefix.max_iters=9"]).prefix.max_iters == 9
    assert presets.run_config(folder, overrides=["prefix.max_iters=9"]).model.n_embd == 8
    assert presets.run_config(tmp_path, "smoke", 3).seed == 3
    with pytest.raises(ValueError, match="a run of preset 'smoke', not 'laptop'"):
        presets.run_config(folder, "laptop")
    with pytest.raises(ValueError, match="a run of seed 0, not 1"):
        presets.run_config(folder, seed=1)
    (tmp_path / "config.json").write_text('{"preset": "smoke", "trainer": {"max_itres": 3}}')
    with pytest.raises(ValueError, match=r"config\.json.*max_itres"):
        presets.run_config(tmp_path)


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

    original = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", with_cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reproduction.reproduce(tiny_config(**settings), tmp_path)
        assert not (tmp_path / "results.json").exists()
    resumed = reproduction.reproduce(tiny_config(**settings), tmp_path)
    assert {"Trainer", "AdapterTrainer"} == set(steps)
    assert len(steps) < 2 * (4 + 3) + 3
    for key in ("tasks", "mixed", "matrix"):
        assert resumed[key] == results[key]


def test_presets():
    assert presets.get_default_config("seed").model.n_layer == 12
    assert presets.get_default_config().preset == "laptop"
    with pytest.raises(ValueError, match="did you mean 'smoke'"):
        presets.get_default_config("smoky")
    one, other = presets.get_default_config(), presets.get_default_config()
    one.trainer.max_iters = 1
    assert other.trainer.max_iters != 1


# ------------------------------------------------------------------------------------------------ what is on disk


def test_prefixes_of_another_model_are_refused(finished):
    folder, _ = finished
    path, other = folder / "prefixes" / "Add1.safetensors", pipeline.build_model(tiny_config())
    with pytest.raises(CheckpointError, match=r"Add1\.safetensors: it was made with model = "):
        weights.load_prefix(path, other)
    wider = pipeline.build_model(tiny_config(**{"model.n_embd": 16}))
    with pytest.raises(CheckpointError, match="the prefix has 8 channels, the model has 16"):
        weights.load_prefix(path, wider)
    with pytest.raises(CheckpointError, match="kind = 'prefix', asked for is 'model'"):
        weights.load_model(path)
    with pytest.raises(CheckpointError, match="kind = 'model', asked for is 'prefix'"):
        weights.load_prefix(folder / "model.safetensors", other)


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


def test_a_prefix_comes_back_with_its_kind_and_placeholders(tmp_path):
    model = pipeline.build_model(tiny_config()).eval()
    for name, prefix in {
        "A+B": Prefix("activation", initial_prefix(model, 4)[None]),
        "B": Prefix("key_value", initial_prefix(model, 4, kind="key_value")[None], n_placeholders=7),
        "C": Prefix("prompt", initial_prefix(model, 2, kind="prompt")[None]),
    }.items():
        weights.save_prefix(tmp_path / f"{name}.safetensors", prefix, model)
        back, _ = weights.load_prefix(tmp_path / f"{name}.safetensors", model)
        assert (back.kind, back.n_placeholders) == (prefix.kind, prefix.n_placeholders)
        assert torch.equal(back.values, prefix.values)
    assert list(weights.load_prefixes(tmp_path, model)) == ["A+B", "B", "C"]
    weights.save_model(tmp_path / "model.safetensors", model)
    with pytest.raises(ValueError, match="without a description of its data"):
        pipeline.load_run(tmp_path)


# ------------------------------------------------------------------------------------------- the best possible loss


def test_nothing_is_left_to_guess_about_a_single_task():
    assert bayes_loss(CustomDataset("test", [SortAscending()]), 100) == 0.0
    assert bayes_loss(CustomDataset("test", [Add1(), InverseBinary()]), 100) == 0.0  # their rows differ


def test_the_bayes_loss_is_that_of_bayes_rule_row_by_row():
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
