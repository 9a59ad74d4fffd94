"""Stages: what each leaves is what it read back, and what was made otherwise is refused."""

from __future__ import annotations

import pytest
import torch
from test_reproduction import tiny_config

from mingpt.experiments import pipeline
from mingpt.prefix import as_prefix, initial_prefix
from mingpt.storage.checkpoint import CheckpointError
from mingpt.tasks import Add1, SortAscending, SortDescending
from mingpt.trainer import Trainer

TASKS = [SortAscending(), Add1()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return folder, pipeline.pretrain(tiny_config(), folder, TASKS)[0]


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def forbid_training(monkeypatch):
    def forbid():
        monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it was trained again"))

    return forbid


def test_a_model_of_other_tasks_or_another_budget_is_refused(run):
    folder, _ = run
    with pytest.raises(CheckpointError, match=r"field 'data\.tasks' is .*delete the file"):
        pipeline.pretrain(tiny_config(), folder, [Add1()])
    with pytest.raises(CheckpointError, match=r"field 'recipe\.max_iters' is 4, expected 5"):
        pipeline.pretrain(tiny_config(**{"trainer.max_iters": 5}), folder, TASKS)


def test_fine_tuning_is_of_a_copy_and_is_read_back(run, tmp_path, forbid_training):
    _, model = run
    before = weights_of(model)
    tuned, seconds = pipeline.fine_tune(tiny_config(), model, [SortDescending()], tmp_path)
    assert same(weights_of(model), before)
    assert not same(weights_of(tuned), before)
    assert not tuned.training
    forbid_training()
    again, seconds_again = pipeline.fine_tune(tiny_config(), model, [SortDescending()], tmp_path)
    assert same(weights_of(again), weights_of(tuned))
    assert seconds_again == seconds
    with pytest.raises(CheckpointError, match="field 'start'"):
        pipeline.fine_tune(tiny_config(), tuned, [SortDescending()], tmp_path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("activation", {}), ("key_value", {}), ("key_value", {"is_reparametrized": True}), ("prompt", {})],
)
def test_prefixes_of_every_kind_are_learned_and_read_back(run, tmp_path, forbid_training, kind, options):
    _, model = run
    learn = lambda **changes: pipeline.train_prefixes(  # noqa: E731
        tiny_config(), model, TASKS, tmp_path, kind=kind, n_positions=3, **options, **changes
    )
    prefixes, _ = learn()
    start = initial_prefix(model, 3, kind=kind).detach()
    assert list(prefixes) == ["SortAscending", "Add1"]
    for prefix in prefixes.values():
        assert as_prefix(prefix, model.config.n_layer, model.config.n_embd, 1).kind == kind
        assert not torch.equal(prefix, start)
    forbid_training()
    assert same(learn()[0], prefixes)
    with pytest.raises(CheckpointError, match="field 'start' is 'padding', expected 'random'"):
        learn(start="random")
    for changes, field in (({"n_positions": 2}, "n_positions"), ({"kind": "prompt"}, "n_axes")):
        if changes.get("kind") != kind:
            with pytest.raises(CheckpointError, match=f"field '{field}' is"):
                pipeline.train_prefixes(
                    tiny_config(), model, TASKS, tmp_path, **{"kind": kind, "n_positions": 3} | changes
                )


def test_prefixes_start_where_they_are_told_to(run, tmp_path):
    _, model = run
    config = tiny_config(**{"prefix.max_iters": 0})
    starts = torch.randn(2, model.config.n_layer, 4, model.config.n_embd)
    shapes = {"one": starts[1], "each": starts}
    for name, start in shapes.items():
        prefixes, _ = pipeline.train_prefixes(config, model, TASKS, tmp_path, name, start=start)
        expected = start.expand(2, *starts.shape[1:])
        assert torch.equal(torch.stack(list(prefixes.values())), expected)
    prefixes, _ = pipeline.train_prefixes(config, model, TASKS, tmp_path, "tokens", n_positions=4, start=[3, 1, 4, 1])
    assert torch.equal(prefixes["Add1"], initial_prefix(model, 4, [3, 1, 4, 1]).detach())


def test_a_lora_is_learned_beside_the_model_and_read_back(run, tmp_path, forbid_training):
    _, model = run
    before = weights_of(model)
    x = pipeline.dataset(tiny_config(), "test", TASKS).batch(range(6))[0]
    plain = model(x)[0]
    lora, _ = pipeline.train_lora(tiny_config(), model, Add1(), tmp_path, rank=2, targets=r"attn\.c_attn")
    assert same(weights_of(model), before)
    assert torch.equal(model(x)[0], plain)  # detached
    lora.attach()
    changed = model(x)[0]
    lora.detach()
    assert not torch.equal(changed, plain)
    forbid_training()
    again, _ = pipeline.train_lora(tiny_config(), model, Add1(), tmp_path, rank=2, targets=r"attn\.c_attn")
    assert torch.equal(model(x)[0], plain)
    again.attach()
    assert torch.equal(model(x)[0], changed)
    again.detach()
    with pytest.raises(CheckpointError, match="field 'rank' is 2, expected 1"):
        pipeline.train_lora(tiny_config(), model, Add1(), tmp_path, targets=r"attn\.c_attn")
    assert torch.equal(model(x)[0], plain)
    with pytest.raises(CheckpointError, match="field 'model'"):
        pipeline.train_lora(
            tiny_config(), pipeline.build_model(tiny_config()), Add1(), tmp_path, rank=2, targets=r"attn\.c_attn"
        )


def test_a_value_is_computed_once_and_for_its_settings_only(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {1: [0.5, None]}

    for _ in range(2):
        assert pipeline.cached(tmp_path / "v.json", {"values": (1, 2)}, compute) == {"1": [0.5, None]}
    assert len(calls) == 1
    with pytest.raises(CheckpointError, match=r"field 'values' is \[1, 2\], expected \[1, 3\]"):
        pipeline.cached(tmp_path / "v.json", {"values": (1, 3)}, compute)
