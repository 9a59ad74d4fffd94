"""Optimizers, learning-rate schedules, and the precision of matrix products."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.training.optimizers import SCHEDULES, Muon, build_optimizer, learning_rate_factor
from mingpt.training.precision import PRECISIONS, autocast, resolve_precision


def new_model(seed=0, **options):
    config = GPT.get_default_config()
    config.model_type = None
    config.merge_from_dict({"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 9, "block_size": 7} | options)
    torch.manual_seed(seed)
    return GPT(config).eval()


def new_config(**options):
    config = Trainer.get_default_config()
    config.merge_from_dict(options)
    return config


def is_block_matrix(name):
    return name.startswith("transformer.h.") and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def is_linear_weight(name):
    return is_block_matrix(name) or name == "lm_head.weight"


def groups_by_name(model, optimizer):
    """Each group with the names of its parameters; every parameter must be in exactly one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(group, [names[id(p)] for p in group["params"]]) for group in optimizer.param_groups]
    assert sorted(name for _, members in found for name in members) == sorted(names.values())
    return found


def step(model, optimizer, n, first=0):
    for i in range(first, first + n):
        x = (torch.arange(14).view(2, 7) * (i + 1)) % 9
        optimizer.zero_grad()
        model(x, x.roll(-1, dims=1))[1].backward()
        optimizer.step()


# --------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("skip_layer_norm", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_for_weights_of_linear_layers_only(name, skip_layer_norm):
    model = new_model(skip_layer_norm=skip_layer_norm)
    optimizer = build_optimizer(model, new_config(optimizer=name, weight_decay=0.3))
    for group, members in groups_by_name(model, optimizer):
        for member in members:
            assert group["weight_decay"] == (0.3 if is_linear_weight(member) else 0.0), member


def test_adamw_is_minGPTs():
    model = new_model()
    optimizer = build_optimizer(model, new_config(learning_rate=0.02, betas=[0.7, 0.8]))
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["lr"] == 0.02 and group["betas"] == (0.7, 0.8) for group in optimizer.param_groups)


def test_muon_has_exactly_the_matrices_of_the_blocks():
    model = new_model()
    config = new_config(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.02)
    optimizer = build_optimizer(model, config)
    groups = groups_by_name(model, optimizer)
    assert [group["lr"] for group, _ in groups] == [0.02, 0.01, 0.01]
    assert optimizer.param_groups[1:] == optimizer.others.param_groups
    members = set(groups[0][1])
    assert members == {name for name, _ in model.named_parameters() if is_block_matrix(name)}
    assert len(members) == 2 * 4


def test_every_parameter_is_stepped():
    model = new_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, build_optimizer(model, new_config(optimizer="muon")), 1)
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


def test_zero_grad_reaches_all():
    model = new_model()
    optimizer = build_optimizer(model, new_config(optimizer="muon"))
    for is_none in (False, True):
        x = torch.zeros(1, 7, dtype=torch.int64)
        model(x, x)[1].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.zero_grad(set_to_none=is_none)
        assert all((p.grad is None) if is_none else (p.grad == 0).all() for p in model.parameters())


def test_changing_a_group_changes_its_optimizer():
    model = new_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, new_config(optimizer="muon"))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_that_is_loaded_continues_identically(name):
    config = new_config(optimizer=name, learning_rate=0.01)
    model = new_model()
    optimizer = build_optimizer(model, config)
    step(model, optimizer, 3)
    other = new_model(seed=1)
    other.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    other_optimizer = build_optimizer(other, new_config(optimizer=name, learning_rate=0.5))
    other_optimizer.load_state_dict(state)
    fresh = new_model(seed=1)
    fresh.load_state_dict(model.state_dict())
    step(fresh, build_optimizer(fresh, config), 3, first=3)
    step(model, optimizer, 3, first=3)
    step(other, other_optimizer, 3, first=3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    assert any(not torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_state_of_other_optimizers_is_refused():
    model = new_model()
    state = build_optimizer(model, new_config()).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        build_optimizer(model, new_config(optimizer="muon")).load_state_dict(state)


@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_muon_is_torchs(momentum):
    """One batch of products for all matrices of a shape, or of its transpose, rounds as one product after another."""
    shapes = [(24, 8), (8, 8), (8, 24), (8, 8), (16, 8), (24, 8)]
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]

    def train(build):
        parameters = [nn.Parameter(value.clone()) for value in start]
        unused = nn.Parameter(torch.ones(3, 3))
        optimizer = build([*parameters, unused])
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(unused, torch.ones(3, 3))
        return parameters

    others = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    ours = train(lambda params: Muon(params, others, 0.1, momentum, 0.3))
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}
    theirs = train(lambda params: torch.optim.Muon(params, **options))
    for own, other, first in zip(ours, theirs, start, strict=True):
        assert (own - other).norm() < 0.01 * (other - first).norm()


def test_muons_update_has_the_size_of_adamws():
    """The scale that Liu et al. 2025 match: a root mean square of 0.2 of the learning rate, whatever the shape."""
    model = new_model(n_layer=1, n_embd=128)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)  # of full rank, as one small batch's gradient is not
    build_optimizer(model, new_config(optimizer="muon", muon_learning_rate=0.1, weight_decay=0.0)).step()
    for name, parameter in model.named_parameters():
        if is_block_matrix(name):
            assert 0.13 * 0.1 < (parameter - before[name]).square().mean().sqrt() < 0.27 * 0.1, name


def test_muon_needs_a_models_blocks():
    class Other(nn.Linear):
        def configure_optimizers(self, config):
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(ValueError, match="muon"):
        build_optimizer(Other(2, 2), new_config(optimizer="muon"))


# ----------------------------------------------------------------------------------------------------- schedules


def factors(**options):
    config = new_config(**options)
    return [learning_rate_factor(i, config) for i in range(config.max_iters + 1)]


schedules = st.fixed_dictionaries(
    {
        "lr_schedule": st.sampled_from(SCHEDULES),
        "max_iters": st.integers(1, 300),
        "warmup_iters": st.integers(0, 50),
        "decay_fraction": st.floats(0.0, 1.0),
    }
)


@settings(max_examples=200, deadline=None)
@given(schedules)
def test_a_factor_is_between_0_and_1_and_rises_once_and_falls_once(options):
    found = factors(**options)
    n_warmup, n_decay = options["warmup_iters"], max(1.0, options["max_iters"] * options["decay_fraction"])
    assert all(0.0 <= factor <= 1.0 for factor in found)
    assert all(factor > 0 for factor in found[:-1])
    if options["lr_schedule"] != "constant":
        assert found[-1] == pytest.approx(0.0, abs=1e-12)
    jump = 1 / (n_warmup + 1) + (math.pi / 2) / n_decay
    assert all(abs(a - b) <= jump + 1e-9 for a, b in itertools.pairwise(found))
    start_of_decay = options["max_iters"] - n_decay if options["lr_schedule"] != "constant" else math.inf
    for i, factor in enumerate(found):
        if i <= start_of_decay:
            assert factor == pytest.approx(min(1.0, (i + 1) / (n_warmup + 1)))
        elif i > n_warmup:
            assert factor <= found[i - 1]


def test_each_schedule_has_its_shape():
    options = {"max_iters": 100, "warmup_iters": 9, "decay_fraction": 0.4}
    constant, linear, cosine = (factors(lr_schedule=name, **options) for name in ("constant", "linear", "cosine"))
    assert constant == pytest.approx([(i + 1) / 10 for i in range(10)] + [1.0] * 91)
    assert linear[:61] == cosine[:61] == constant[:61]
    assert linear[60:] == pytest.approx([1 - i / 40 for i in range(41)])
    assert cosine[60:] == pytest.approx([(1 + math.cos(math.pi * i / 40)) / 2 for i in range(41)], abs=1e-12)
    assert cosine[80] == pytest.approx(0.5)


def test_no_warm_up_starts_at_the_top():
    assert factors(max_iters=3, warmup_iters=0) == [1.0] * 4


def test_a_constant_rate_needs_no_end():
    config = new_config(warmup_iters=1)
    assert [learning_rate_factor(i, config) for i in (0, 1, 10**9)] == [0.5, 1.0, 1.0]


# ----------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({}, "float32"),
        ({"avx2": True, "avx512_f": True, "amx_int8": True}, "float32"),
        ({"amx_bf16": False, "avx512_bf16": False}, "float32"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", "cpu") == expected
    assert resolve_precision("auto", torch.device("cpu")) == expected
    assert autocast("auto", "cpu")._enabled == (expected == "bfloat16")
    assert resolve_precision("auto", "meta") == "float32"


@pytest.mark.parametrize("is_native", [True, False])
def test_auto_on_a_gpu_asks_for_native_support(monkeypatch, is_native):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native or including_emulation
    )
    assert resolve_precision("auto", "cuda:0") == ("bfloat16" if is_native else "float32")


@pytest.mark.parametrize("capabilities", [{}, {"amx_bf16": True}])
def test_what_is_asked_for_is_not_overruled(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    for precision in ("float32", "bfloat16"):
        assert resolve_precision(precision, "cpu") == precision
        with autocast(precision, "cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, precision)
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("precision", ["float16", "fp32", "", None])
def test_an_unknown_precision_is_named(precision):
    for function in (resolve_precision, autocast):
        with pytest.raises(ValueError, match=f"{precision!r}.*{', '.join(PRECISIONS)}"):
            function(precision, "cpu")
