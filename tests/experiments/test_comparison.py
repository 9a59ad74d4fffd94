"""Methods side by side: equal numbers, equal training, nothing computed twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from test_reproduction import tiny_config

from mingpt.cli import cli
from mingpt.evaluation import evaluate
from mingpt.experiments import comparison, pipeline, reproduction
from mingpt.experiments.comparison import METHODS, compare, format_table, results_table
from mingpt.storage import weights
from mingpt.tasks import PRETRAINING_TASKS, DoubleHistogram, SortAscending, Task
from mingpt.trainer import Trainer

TASKS = [DoubleHistogram(), Task.parse("SortAscending+Add1")]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    reproduction.reproduce(tiny_config(), folder)
    return folder, compare(tiny_config(), folder, TASKS)


def test_every_method_is_scored_on_every_task(compared):
    _, results = compared
    pairs = list(zip(results["method"], results["task"], strict=True))
    assert pairs == [(name, str(task)) for name in METHODS for task in TASKS]
    assert set(results["n_rows"]) == {12}


def test_methods_train_as_many_parameters_as_a_prefix_at_most(compared):
    folder, results = compared
    model, _ = weights.load_model(folder / "model.safetensors")
    n_parameters = dict(zip(results["method"], results["n_parameters"], strict=True))
    assert n_parameters.pop("full") == model.n_parameters
    budget = 2 * 10 * 8  # layers, positions, channels
    per_unit = {"lora-mlp": 2 * 2 * (8 + 32), "lora-attention": 2 * (8 + 24), "prompt": 8, "key_value": 32}
    for name, number in n_parameters.items():
        unit = per_unit.get(name.removesuffix("-mlp") if name.startswith("key") else name, 16)
        assert number % unit == 0
        assert number <= budget
        if name != "prompt":  # the input has no more placeholders
            assert number > budget - unit
    assert n_parameters["prompt"] == 10 * 8
    assert ((results["n_trained"] > results["n_parameters"]) == (results["method"] == "key_value-mlp")).all()


def test_a_result_is_the_score_of_what_was_trained(compared):
    folder, results = compared
    n_correct = results.set_index(["method", "task"])["n_correct"]
    model, _ = weights.load_model(folder / "model.safetensors")
    prefixes = weights.load_prefixes(folder / "comparison" / "activation" / "prefixes", model)
    task = TASKS[1]
    data = pipeline.dataset(tiny_config(), "test", [task])
    assert n_correct["activation", str(task)] == evaluate(model, data, prefixes[str(task)], 12).n_correct
    tuned, _ = weights.load_model(folder / "comparison" / "full" / f"{task}.safetensors")
    assert n_correct["full", str(task)] == evaluate(tuned, data, None, 12).n_correct


def test_nothing_is_computed_twice_and_what_is_missing_is(compared, monkeypatch):
    folder, results = compared
    trained = []
    original = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (trained.append(self.train_dataset), original(self)))
    again = compare(tiny_config(), folder, TASKS[::-1], ["prompt", "full"])
    index = ["method", "task"]
    assert (
        again.set_index(index)
        .sort_index()
        .equals(results[results["method"].isin(["prompt", "full"])].set_index(index).sort_index())
    )
    assert trained == []
    more = compare(tiny_config(), folder, [*TASKS, SortAscending()], ["lora-mlp"])
    assert [str(each.datasets[0].tasks[0]) for each in trained] == ["SortAscending"]
    assert more[:2].equals(results[results["method"] == "lora-mlp"].reset_index(drop=True))
    assert len(list((folder / "comparison" / "lora-mlp").glob("*.json"))) == 3


@pytest.mark.parametrize("changes", [{"learning_rate": 0.2}, {"init": "random"}])
def test_an_edited_method_is_fitted_anew(compared, monkeypatch, changes):
    folder, _ = compared
    before = compare(tiny_config(), folder, TASKS[:1], ["prompt"])
    monkeypatch.setitem(METHODS, "prompt", replace(METHODS["prompt"], **changes))
    trained, original = [], Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (trained.append(self.config.learning_rate), original(self)))
    compare(tiny_config(), folder, TASKS[:1], ["prompt"])
    assert trained == [METHODS["prompt"].learning_rate]
    monkeypatch.undo()
    assert compare(tiny_config(), folder, TASKS[:1], ["prompt"]).equals(before)


def test_a_prefix_starts_from_the_known_one_that_fits_best(compared):
    folder, _ = compared
    config = tiny_config()
    model, _ = pipeline.pretrain(config, folder)
    loaded = weights.load_prefixes(folder / "activation_prefixes", model)
    known = {str(task): loaded[str(task)] for task in PRETRAINING_TASKS}
    inits = comparison._init(config, model, TASKS, "prefix", 10, known)
    for init, task in zip(inits, TASKS, strict=True):
        x, y = pipeline.dataset(config, "train", [task]).batch(range(200))
        losses = [model(x, y, prefixes=prefix)[1].item() for prefix in known.values()]
        assert torch.equal(init, list(known.values())[losses.index(min(losses))].values[0])
    mean = comparison._init(config, model, TASKS, "mean", 10, known)
    torch.testing.assert_close(mean, sum(prefix.values[0] for prefix in known.values()) / 7)
    assert comparison._init(config, model, TASKS, "prefix", 4, known).shape[2] == 4  # as many as fit the budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lora_mlp"]}, r"unknown method 'lora_mlp'.*lora-mlp"),
        ({"methods": ["lora-mlp"], "n_parameters": 100}, "100 trainable parameters are too few"),
    ],
)
def test_what_cannot_be_compared_is_refused(compared, options, message):
    folder, _ = compared
    with pytest.raises(ValueError, match=message):
        compare(tiny_config(), folder, TASKS, **options)


def test_the_table_and_the_command_say_every_result(compared):
    folder, results = compared
    table = results_table(results)
    assert list(table.columns) == list(METHODS)
    for each in results.itertuples():
        assert table.loc[each.task, each.method] == 100 * each.accuracy == pytest.approx(100 * each.n_correct / 12)
        assert table.loc["parameters a task", each.method] == each.n_parameters
    names = [argument for task in TASKS for argument in ("--task", str(task))]
    result = CliRunner().invoke(cli, ["compare", "--run", str(folder), *names])
    assert result.exit_code == 0, result.output
    assert format_table(results) in result.stdout
    assert (folder / "figures" / "comparison.png").stat().st_size > 10_000
