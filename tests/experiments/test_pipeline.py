"""The pipeline: what a stage leaves is what it reads back, and what was made otherwise is never believed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from test_reproduction import tiny_config

from mingpt.experiments import pipeline, run_folder
from mingpt.prefix import initial_prefix
from mingpt.storage.checkpoint import CheckpointError, read_description
from mingpt.tasks import Add1, SortAscending, SortDescending, Task
from mingpt.trainer import Trainer

TASKS = [SortAscending(), Add1()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, pipeline.pretrain(tiny_config(), folder, TASKS)[0]


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def values_of(prefixes):
    return {name: prefix.values for name, prefix in prefixes.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def forbid_training(monkeypatch):
    def forbid():
        monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it was trained again"))

    return forbid


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"data\.tasks = \['SortAscending', 'Add1'\]"),
        ({"trainer.max_iters": 5}, r"recipe\.max_iters = 4, asked for is 5"),
        ({"model.n_layer": 3}, r"init\.n_layer = 2, asked for is 3"),
        ({"model.n_embd": 16}, r"init\.n_embd = 8, asked for is 16"),
        ({"seed": 1}, "seed = 0, asked for is 1"),
    ],
)
def test_a_model_of_other_settings_is_refused(run, tmp_path, settings, message):
    """Also where the model's file was copied into a folder of another run."""
    folder, _ = run
    tasks = TASKS if settings else [Add1()]
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: it was made with {message}.*choose another folder"
    ):
        pipeline.pretrain(tiny_config(**settings), folder, tasks)
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        pipeline.pretrain(tiny_config(**settings), tmp_path, tasks)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("setting", ["trainer.optimizer", "prefix.lr_schedule", "prefix.device"])
def test_a_mistake_in_the_settings_leaves_nothing(tmp_path, setting):
    config = tiny_config()
    group, key = setting.split(".")
    setattr(getattr(config, group), key, "adam")
    with pytest.raises(ValueError, match="adam"):
        pipeline.pretrain(config, tmp_path / "run", TASKS)
    assert not (tmp_path / "run").exists()


def test_a_finished_stage_leaves_no_state_and_deleting_its_file_makes_it_anew(tmp_path, monkeypatch):
    model, _ = pipeline.pretrain(tiny_config(), tmp_path, TASKS)
    assert not list(tmp_path.rglob("state.safetensors"))
    runs, original = [], Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (runs.append(1), original(self)))
    pipeline.pretrain(tiny_config(), tmp_path, TASKS)
    assert runs == []
    (tmp_path / "model.safetensors").unlink()
    again, _ = pipeline.pretrain(tiny_config(), tmp_path, TASKS)
    assert runs == [1]
    assert same(weights_of(again), weights_of(model))


def test_fine_tuning_is_of_a_copy_and_is_read_back(run, tmp_path, forbid_training):
    _, model = run
    before = weights_of(model)
    tuned, seconds = pipeline.fine_tune(tiny_config(), model, [SortDescending()], tmp_path)
    assert same(weights_of(model), before)
    assert not same(weights_of(tuned), before)
    assert not tuned.training
    other, _ = pipeline.fine_tune(tiny_config(), tuned, [SortDescending()], tmp_path)  # of another model: beside it
    assert not same(weights_of(other), weights_of(tuned))
    forbid_training()
    again, seconds_again = pipeline.fine_tune(tiny_config(), model, [SortDescending()], tmp_path)
    assert same(weights_of(again), weights_of(tuned))
    assert seconds_again == seconds
    assert same(
        weights_of(pipeline.fine_tune(tiny_config(), tuned, [SortDescending()], tmp_path)[0]), weights_of(other)
    )


@pytest.mark.parametrize("kind", ["activation", "key_value", "prompt"])
def test_prefixes_of_every_kind_know_it_on_disk(run, tmp_path, forbid_training, kind):
    _, model = run
    train = lambda **changes: pipeline.train_prefixes(  # noqa: E731
        tiny_config(), model, TASKS, tmp_path, **{"kind": kind, "n_positions": 3} | changes
    )[0]
    prefixes, init = train(), initial_prefix(model, 3, kind=kind).detach()
    assert list(prefixes) == ["SortAscending", "Add1"]
    assert {path.name for path in (tmp_path / "prefixes").glob("*.safetensors")} == {
        "SortAscending.safetensors",
        "Add1.safetensors",
    }
    for prefix in prefixes.values():
        assert prefix.kind == kind
        assert prefix.n_prefixes == 1
        assert not torch.equal(prefix.values[0], init)
    other_init = "padding" if kind == "key_value" else "random"
    other_kind = "activation" if kind == "prompt" else "prompt"
    others = [train(init=other_init), train(n_positions=2), train(kind=other_kind)]
    assert all(not same(values_of(other), values_of(prefixes)) for other in others)
    forbid_training()
    assert same(values_of(train()), values_of(prefixes))  # what was asked beyond it has not replaced it
    assert same(values_of(train(init=other_init)), values_of(others[0]))


def test_only_missing_prefixes_are_trained(run, tmp_path, monkeypatch):
    _, model = run
    config = tiny_config()
    alone = values_of(pipeline.train_prefixes(config, model, [Add1()], tmp_path)[0])
    trained, original = [], Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (trained.append(self), original(self)))
    both = values_of(pipeline.train_prefixes(config, model, TASKS, tmp_path)[0])
    assert [[str(d.tasks[0]) for d in each.train_dataset.datasets] for each in trained] == [["SortAscending"]]
    assert torch.equal(both["Add1"], alone["Add1"])


@pytest.mark.parametrize("change", ["init", "model"])
def test_a_state_of_another_start_is_never_resumed(run, tmp_path, monkeypatch, change):
    """A prefix that was cut off while it was trained from the padding is not the one that starts at random."""
    _, model = run
    config = tiny_config(**{"prefix.checkpoint_every": 1, "trainer.checkpoint_every": 1})

    def train(folder, init, model):
        if change == "init":
            return values_of(pipeline.train_prefixes(config, model, TASKS, folder, init=init)[0])
        return weights_of(pipeline.fine_tune(config, model, TASKS, folder)[0])

    other_model = pipeline.fine_tune(tiny_config(), model, [Add1()], tmp_path / "other")[0]
    expected = train(tmp_path / "alone", "random", other_model if change == "model" else model)
    original = Trainer.run

    def cut_off(trainer):
        def stop(trainer):
            if trainer.iter_num == 2:
                raise KeyboardInterrupt

        trainer.add_callback("on_batch_end", stop)
        original(trainer)

    monkeypatch.setattr(Trainer, "run", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", "padding", model)
    monkeypatch.undo()
    assert list((tmp_path / "run").rglob("state.safetensors"))
    if change == "model":
        with pytest.raises(CheckpointError, match=r"state\.safetensors: it was made with .*init"):
            train(tmp_path / "run", "random", other_model)
    else:
        assert same(train(tmp_path / "run", "random", model), expected)


def test_other_settings_do_not_take_over_an_interrupted_pretraining(tmp_path, monkeypatch):
    def cut_off(trainer):
        if trainer.iter_num == 2:
            raise KeyboardInterrupt

    original = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (self.add_callback("on_batch_end", cut_off), original(self)))
    config = tiny_config(**{"trainer.checkpoint_every": 1})
    with pytest.raises(KeyboardInterrupt):
        pipeline.pretrain(config, tmp_path, TASKS)
    monkeypatch.undo()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.safetensors: it was made with recipe\.max_iters = 4"):
        pipeline.pretrain(tiny_config(**{"trainer.checkpoint_every": 1, "trainer.max_iters": 9}), tmp_path, TASKS)
    assert (tmp_path / "config.json").read_bytes() == before
    model, _ = pipeline.pretrain(config, tmp_path, TASKS)
    assert same(weights_of(model), weights_of(pipeline.pretrain(config, tmp_path / "alone", TASKS)[0]))


class Edited(Task):
    """A task whose code a user changes between two runs."""

    sign = 1

    def solve(self, x):
        return x if self.sign > 0 else x[..., ::-1]


def test_an_edited_task_is_another_one(run, tmp_path, monkeypatch):
    _, model = run
    first = values_of(pipeline.train_prefixes(tiny_config(), model, [Edited()], tmp_path)[0])
    monkeypatch.setattr(Edited, "sign", -1)
    assert not same(values_of(pipeline.train_prefixes(tiny_config(), model, [Edited()], tmp_path)[0]), first)


def test_prefixes_start_where_they_are_told_to(run, tmp_path):
    _, model = run
    config = tiny_config(**{"prefix.max_iters": 0})
    inits = torch.randn(2, model.config.n_layer, 4, model.config.n_embd)
    for name, init in {"one": inits[1], "each": inits}.items():
        prefixes, _ = pipeline.train_prefixes(config, model, TASKS, tmp_path, name, "activation", init=init)
        expected = init.expand(2, *inits.shape[1:])
        assert torch.equal(torch.cat(list(values_of(prefixes).values())), expected)
    prefixes, _ = pipeline.train_prefixes(config, model, TASKS, tmp_path, "tokens", n_positions=4, init=[3, 1, 4, 1])
    assert torch.equal(prefixes["Add1"].values[0], initial_prefix(model, 4, [3, 1, 4, 1], "key_value").detach())


def test_a_run_is_read_whole(run):
    folder, model = run
    prefixes, _ = pipeline.train_prefixes(tiny_config(), model, TASKS, folder)
    loaded, found, description = pipeline.load_run(folder, "cpu")
    assert same(weights_of(loaded), weights_of(model))
    assert same(values_of(found), values_of(prefixes))
    assert description["data"]["tasks"] == ["SortAscending", "Add1"]
    assert json.loads((folder / "config.json").read_text())["preset"] == "smoke"
    assert read_description(folder / "prefixes" / "Add1.safetensors")["task"] == "Add1"


def test_changed_settings_get_a_folder_of_their_own(tmp_path):
    """Never the stored model's, which would be refused."""
    config = tiny_config()
    stored = tmp_path / "checkpoints" / "paper"
    assert run_folder("paper", config, tmp_path) == tmp_path / "runs" / "paper"
    pipeline.pretrain(config, stored)
    assert run_folder("paper", config, tmp_path) == stored
    assert run_folder("paper", config.changed({"prefix.max_iters": 7}), tmp_path) == stored
    first, second = (config.changed({"model.n_embd": n_embd}) for n_embd in (24, 48))
    assert run_folder("paper", first, tmp_path) == tmp_path / "runs" / "paper"
    pipeline.pretrain(first, tmp_path / "runs" / "paper")
    assert run_folder("paper", first, tmp_path) == tmp_path / "runs" / "paper"
    other = run_folder("paper", second, tmp_path)
    assert other.parent == tmp_path / "runs"
    assert other.name.startswith("paper-")
    pipeline.pretrain(second, other)  # not refused
