"""Every method: its count, its groups of rows, what it trains and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from reference import random_model

from mingpt.adapters import METHODS
from mingpt.datasets import CustomDataset
from mingpt.storage import CheckpointError, load_adapter, save_adapter
from mingpt.tasks import Add1, LessThan, SortAscending
from mingpt.trainer import AdapterTrainer, Trainer
from mingpt.utils import set_seed

LENGTH, NUM_DIGITS, PADDING, SIZE = 4, 6, 3, 2
TASKS = [SortAscending(), Add1(), LessThan()]


def new_model():
    return random_model(std=0.2, n_head=2, n_embd=16, vocab_size=NUM_DIGITS + 3, block_size=PADDING + 2 * LENGTH - 1)


def datasets():
    return [CustomDataset("train", [task], LENGTH, NUM_DIGITS, prefix_padding=PADDING) for task in TASKS]


def new_adapters(name, model):
    """Three, each from a seed of its own, in one."""
    made = []
    for seed, data in enumerate(datasets()):
        set_seed(seed)
        made.append(METHODS[name](model, data, SIZE))
    return made[0].extend(made[1:])


@pytest.mark.parametrize("name", METHODS)
def test_a_group_of_rows_has_its_own_adapter_only(name):
    """In one batch the adapters compute what each computes alone, and the count is the formula's."""
    model = new_model()
    adapter = new_adapters(name, model)
    assert adapter.n_parameters == METHODS[name].count(model.config, SIZE)
    x = torch.cat([data.batch(range(5))[0] for data in datasets()])
    before = model(x)[0]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        with adapter.attached() as prefix:
            together = model(x, prefixes=prefix, n_last=LENGTH)[0]
        with adapter.attached([2, 0]) as prefix:
            swapped = model(torch.cat([x[10:], x[:5]]), prefixes=prefix, n_last=LENGTH)[0]
        for number in range(3):
            rows = slice(5 * number, 5 * number + 5)
            with adapter.attached([number]) as prefix:
                alone = model(x[rows], prefixes=prefix, n_last=LENGTH)[0]
            torch.testing.assert_close(together[rows], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(swapped, torch.cat([together[10:], together[:5]]), atol=1e-4, rtol=1e-4)
    assert (together - before[:, -LENGTH:]).abs().max() > 1e-3
    assert torch.equal(model(x)[0], before)


@pytest.mark.parametrize("name", METHODS)
def test_training_together_is_training_alone_and_leaves_the_model(name):
    model = new_model()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = Trainer.get_default_config()
    config.merge_from_dict({"max_iters": 4, "batch_size": 5, "learning_rate": 0.01, "precision": "float32"})
    config.merge_from_dict({"device": "cpu", "progress": False})
    rates = [0.003, 0.01, 0.02]
    together = new_adapters(name, model)
    began = [parameter.detach().clone() for parameter in together.parameters()]
    AdapterTrainer(config, model, datasets(), together, rates).run()
    change = [(own - old).abs().flatten(1).max(1).values for own, old in zip(together.parameters(), began, strict=True)]
    assert torch.stack(change).max(0).values.min() > 1e-4
    set_seed(2)
    alone = METHODS[name](model, datasets()[2], SIZE)
    AdapterTrainer(config, model, datasets()[2:], alone, rates[2:]).run()
    # By what they compute: rounding moves the biases of keys, which change nothing and get no other gradient.
    x = datasets()[2].with_split("test").batch(range(50))[0]
    with torch.no_grad():
        with together.attached([2]) as prefix:
            of_all = model(x, prefixes=prefix, n_last=LENGTH)[0]
        with alone.attached() as prefix:
            by_itself = model(x, prefixes=prefix, n_last=LENGTH)[0]
    torch.testing.assert_close(of_all, by_itself, atol=1e-4, rtol=1e-4)
    assert (of_all - model(x)[0][:, -LENGTH:]).abs().max() > 1e-2
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_an_adapter_is_read_back_as_it_was(tmp_path, name):
    """One of several, into a fresh model of the same weights; another model is refused."""
    model, data = new_model(), datasets()[1]
    adapter = new_adapters(name, model)
    adapter.detach()
    for parameter in adapter.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    x = data.with_split("test").batch(range(20))[0]
    with adapter.attached([1]) as prefix:
        expected = model(x, prefixes=prefix, n_last=LENGTH)[0]
    save_adapter(tmp_path / "one.safetensors", adapter, name, SIZE, data, 1, note="mine")
    other = new_model()
    loaded, description = load_adapter(tmp_path / "one.safetensors", other)
    plain = other(x)[0]
    assert (type(loaded), loaded.n_adapters, description["note"]) == (METHODS[name], 1, "mine")
    with loaded.attached() as prefix:
        assert torch.equal(other(x, prefixes=prefix, n_last=LENGTH)[0], expected)
    assert torch.equal(other(x)[0], plain)
    assert load_adapter(tmp_path / "one.safetensors", other, data)[1] == description
    with pytest.raises(CheckpointError, match="it was made with data"):
        load_adapter(tmp_path / "one.safetensors", other, datasets()[0])
    next(other.parameters()).mul_(2)
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        load_adapter(tmp_path / "one.safetensors", other)


def test_loreft_does_not_jump_where_a_number_of_its_basis_crosses_zero():
    model = new_model()
    adapter = METHODS["loreft"](model, datasets()[0], SIZE)
    x, outputs = datasets()[0].batch(range(5))[0], []
    for value in (1e-6, -1e-6):
        with torch.no_grad():
            for basis in adapter.basis:
                basis[0, 0, :] = value
            with adapter.attached():
                outputs.append(model(x)[0])
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lora-mlp", "lora-attention", "dora", "vera"])
def test_merged_the_model_computes_what_it_did_with_the_adapter(name):
    model = new_model()
    adapter = METHODS[name](model, datasets()[0], SIZE)
    x = datasets()[0].batch(range(5))[0]
    with torch.no_grad():
        before = model(x)[0]
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        with adapter.attached():
            attached = model(x)[0]
        adapter.merge()
        torch.testing.assert_close(model(x)[0], attached, atol=1e-4, rtol=1e-4)
    assert (attached - before).abs().max() > 1e-2
