"""LoRA: beside the model, detached, merged, trained; as PEFT computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import random_model

from mingpt.adapters import LoRA
from mingpt.datasets import CustomDataset
from mingpt.evaluation import evaluate
from mingpt.tasks import Add1, SortAscending
from mingpt.trainer import AdapterTrainer, Trainer
from mingpt.utils import set_seed

LENGTH, NUM_DIGITS = 4, 6


def new_model(n_embd=16):
    return random_model(std=0.2, n_head=2, n_embd=n_embd, vocab_size=NUM_DIGITS + 3, block_size=2 * LENGTH - 1)


def random_lora(model, **options):
    """One that does something."""
    set_seed(1)
    lora = LoRA(model, **options)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return lora


def updates_of(lora):
    """What each layer's weight gains, (O, I) each."""
    return [(lora.scale * b @ a)[0] for a, b in zip(lora.a, lora.b, strict=True)]


@pytest.fixture
def x():
    return torch.randint(NUM_DIGITS + 3, (5, 7), generator=torch.Generator().manual_seed(3))


def test_it_starts_as_nothing(x):
    model = new_model()
    before = model(x)[0]
    lora = LoRA(model, rank=3)
    assert torch.equal(model(x)[0], before)
    assert lora.n_parameters == sum(p.numel() for p in lora.parameters()) == 2 * 2 * 3 * (16 + 64)
    assert all(a.abs().max() > 0 for a in lora.a)


@pytest.mark.parametrize("targets", ["mlp", "attn", r"h\.1\.mlp\.c_fc", "."])
@pytest.mark.parametrize(("rank", "alpha"), [(1, None), (3, 6.0)])
def test_attached_merged_and_by_hand_are_the_same(x, targets, rank, alpha):
    model = new_model()
    original = copy.deepcopy(model)
    lora = random_lora(model, rank=rank, targets=targets, alpha=alpha)
    with torch.no_grad():
        attached = model(x)[0]
        assert (attached - original(x)[0]).abs().max() > 1e-3
        by_hand = copy.deepcopy(original)
        modules = dict(by_hand.named_modules())
        scale = 1.0 if alpha is None else alpha / rank
        for name, a, b in zip(lora.names, lora.a, lora.b, strict=True):
            modules[name].weight += (scale * b @ a)[0]
        assert torch.allclose(by_hand(x)[0], attached, atol=1e-5)
        lora.detach()
        assert torch.equal(model(x)[0], original(x)[0])
        lora.attach()
        lora.attach()
        assert torch.equal(model(x)[0], attached)
        lora.merge()
        assert torch.equal(model(x)[0], by_hand(x)[0])


def test_a_lora_is_in_the_cache_and_with_a_prefix_too(x):
    """Generation and prefixes go through the same layers."""
    model = new_model()
    prefix = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(4))
    lora = random_lora(model, targets="attn|mlp")
    attached = model.generate(x[:, :4], 3), model(x, prefixes=prefix)[0]
    lora.merge()
    merged = model.generate(x[:, :4], 3), model(x, prefixes=prefix)[0]
    assert torch.equal(attached[0], merged[0])
    assert torch.allclose(attached[1], merged[1], atol=1e-5)


def test_two_add_up(x):
    model = new_model()
    alone = [updates_of(random_lora(copy.deepcopy(model), targets=targets))[0] for targets in ("c_fc", "c_attn")]
    first, second = (random_lora(model, targets=targets) for targets in ("c_fc", "c_attn"))
    both = model(x)[0]
    assert torch.equal(updates_of(first)[0], alone[0])
    first.merge()
    second.merge()
    assert torch.allclose(model(x)[0], both, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": "mpl"},
            r"no linear layer's name matches the rule 'mpl'; there are transformer.h.0.attn.c_attn \.\.\. lm_head",
        ),
        ({"targets": []}, r"targets is \[\]; give a regular expression"),
        ({"targets": ""}, "targets is ''; give a regular expression"),
        (
            {"targets": ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_cf"]},
            r"matches the rule 'transformer.h.1.mlp.c_cf' \(did you mean 'transformer.h.1.mlp.c_fc'\?\)",
        ),
        ({"targets": ["mlp"]}, "no linear layer's name matches the rule 'mlp'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(new_model(), **options)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"no linear layer's name matches the rule '.*'; there are none"):
        LoRA(torch.nn.Sequential(torch.nn.LayerNorm(3)))


def test_names_are_those_layers_and_no_others():
    names = ["transformer.h.1.mlp.c_fc", "transformer.h.0.attn.c_proj"]
    assert LoRA(new_model(), targets=names).names == (names[1], names[0])  # in the model's order


def test_updates_are_merged_once(x):
    model = new_model()
    lora = random_lora(model)
    lora.merge()
    merged = model(x)[0]
    for again in (lora.merge, lora.attach):
        with pytest.raises(RuntimeError, match="this LoRA is merged"):
            again()
        assert torch.equal(model(x)[0], merged)


def test_a_detached_lora_can_be_merged(x):
    model = new_model()
    lora = random_lora(model)
    attached = model(x)[0]
    lora.detach()
    lora.merge()
    assert torch.allclose(model(x)[0], attached, atol=1e-5)


def test_two_on_one_layer_add_up(x):
    model = new_model()
    original = copy.deepcopy(model)
    first, second = random_lora(model, targets="c_fc"), random_lora(model, targets="c_fc")
    both = model(x)[0]
    modules = dict(original.named_modules())
    with torch.no_grad():
        for name, *updates in zip(first.names, updates_of(first), updates_of(second), strict=True):
            modules[name].weight += sum(updates)
    assert torch.allclose(original(x)[0], both, atol=1e-5)


def test_it_computes_what_peft_does(x):
    peft = pytest.importorskip("peft")
    model, theirs = new_model(), new_model()
    lora = random_lora(model, rank=2, targets="attn|mlp", alpha=4.0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0.0)
    peft.inject_adapter_in_model(config, theirs)
    modules = dict(theirs.named_modules())
    for name, a, b in zip(lora.names, lora.a, lora.b, strict=True):
        modules[name].lora_A["default"].weight.data = a.data[0].clone()
        modules[name].lora_B["default"].weight.data = b.data[0].clone()
    data = CustomDataset("train", [Add1()], LENGTH, NUM_DIGITS)
    inputs, targets = data.batch(range(4))
    (ours, our_loss), (logits, loss) = model(inputs, targets), theirs(inputs, targets)
    assert torch.allclose(ours, logits, atol=1e-6)
    our_loss.backward()
    loss.backward()
    for name, a, b in zip(lora.names, lora.a, lora.b, strict=True):
        assert torch.allclose(a.grad[0], modules[name].lora_A["default"].weight.grad, atol=1e-6)
        assert torch.allclose(b.grad[0], modules[name].lora_B["default"].weight.grad, atol=1e-6)


def small_config(n_iters, **changes):
    config = Trainer.get_default_config()
    config.merge_from_dict({"device": "cpu", "precision": "float32", "progress": False, "max_iters": n_iters})
    config.merge_from_dict({"batch_size": 32, "learning_rate": 2e-2} | changes)
    return config


def test_training_learns_and_leaves_the_model_as_it_is():
    model = new_model(n_embd=32)
    data = {split: CustomDataset(split, [SortAscending()], LENGTH, NUM_DIGITS) for split in ("train", "test")}
    original = copy.deepcopy(model.state_dict())
    set_seed(0)
    lora = LoRA(model, rank=8, targets=".")
    before = evaluate(model, data["test"], n_rows=200).accuracy
    AdapterTrainer(small_config(400), model, data["train"], lora).run()
    after = evaluate(model, data["test"], n_rows=200).accuracy
    assert before < 0.1
    assert after > 0.5
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    lora.detach()
    assert evaluate(model, data["test"], n_rows=200).accuracy == before


def test_training_resumes_exactly(tmp_path):
    data = CustomDataset("train", [Add1()], LENGTH, NUM_DIGITS)

    def run(path, stops_at=None):
        set_seed(5)
        model = new_model()
        lora = LoRA(model, rank=2)
        trainer = AdapterTrainer(small_config(12, checkpoint_path=path), model, data, lora)
        if stops_at is not None:
            trainer.is_finished = lambda: trainer.iter_num >= stops_at
        trainer.run()
        return [parameter.detach().clone() for parameter in lora.parameters()]

    whole = run(tmp_path / "whole.safetensors")
    run(tmp_path / "parts.safetensors", stops_at=5)
    parts = run(tmp_path / "parts.safetensors")
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
    set_seed(0)
    model = new_model()
    other = AdapterTrainer(
        small_config(12, checkpoint_path=tmp_path / "parts.safetensors"), model, data, LoRA(model, 2, "attn")
    )
    with pytest.raises(ValueError, match=r"it was made with trained\.a"):
        other.run()
