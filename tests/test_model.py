"""The network: the same function as the naive one, causal, row by row, with minGPT's names, sizes and initialisation.

Legend: B batch, T tokens, S cached positions, C channels, H heads, L layers, V vocabulary.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_model, reference_forward, reference_loss

from mingpt.kv_cache import KVCache, n_positions
from mingpt.model import GPT, PRESETS
from mingpt.training.precision import autocast
from mingpt.utils import CfgNode, set_seed

B, T, L, H, C, V, BLOCK = 3, 11, 2, 4, 24, 11, 13  # random_model's sizes
SHARED = 5  # first tokens that are the same in every row


def make_config(**values):
    config = GPT.get_default_config()
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "vocab_size": V, "block_size": BLOCK}
    config.merge_from_dict({"model_type": None} | sizes | values)
    return config


def random_tokens(n_rows=B, n_tokens=T, seed=1, n_shared=0):
    tokens = torch.randint(V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))
    tokens[:, :n_shared] = tokens[:1, :n_shared]
    return tokens


def random_targets(n_rows=B, n_tokens=T, n_silent=6):
    targets = random_tokens(n_rows, n_tokens, seed=2)
    targets[:, :n_silent] = -1
    return targets


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------- the same function as the naive one


@pytest.mark.parametrize("skip_layer_norm", [False, True])
@pytest.mark.parametrize("n_shared", [0, 1, SHARED])
def test_forward_is_the_naive_one(skip_layer_norm, n_shared):
    model, idx, targets = (
        random_model(skip_layer_norm=skip_layer_norm),
        random_tokens(n_shared=SHARED),
        random_targets(),
    )
    logits, loss = model(idx, targets, n_shared=n_shared)
    expected = reference_forward(model, idx)
    assert logits.shape == (B, T, V)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, reference_loss(expected, targets), atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.3  # not a comparison of zeros
    assert model(idx)[1] is None


@pytest.mark.parametrize("n_shared", [0, SHARED])
def test_gradients_of_the_weights_are_the_naive_ones(n_shared):
    model, idx, targets = random_model(), random_tokens(n_shared=SHARED), random_targets(n_silent=3)
    expected = gradients(model, reference_loss(reference_forward(model, idx), targets))
    found = gradients(model, model(idx, targets, n_shared=n_shared)[1])
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    # Every weight learns; the rows of wte and wpe that no token uses are the only ones that do not.
    for name, gradient in found.items():
        used = {"transformer.wte.weight": idx.unique(), "transformer.wpe.weight": torch.arange(T)}
        is_key_bias = name.endswith("c_attn.bias")  # softmax does not see what is added to all keys
        rows = gradient[used.get(name, slice(None))].flatten(1) if gradient.ndim > 1 else gradient[:, None]
        assert is_key_bias or (rows.abs().amax(dim=1) > 0).all(), name


@given(
    n_rows=st.integers(1, 4),
    n_tokens=st.integers(1, 9),
    n_shared=st.integers(0, 8),
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3),
    head_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_forward_is_the_naive_one_at_any_size(n_rows, n_tokens, n_shared, n_layer, n_head, head_size, seed):
    model = random_model(seed, n_layer=n_layer, n_head=n_head, n_embd=n_head * head_size, block_size=n_tokens)
    n_shared = min(n_shared, n_tokens - 1)
    idx = random_tokens(n_rows, n_tokens, seed, n_shared)
    torch.testing.assert_close(model(idx, n_shared=n_shared)[0], reference_forward(model, idx), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("gelu_approximate", ["tanh", "none"])
def test_either_gelu_is_the_naive_one(gelu_approximate):
    model, idx = random_model(std=0.5, gelu_approximate=gelu_approximate), random_tokens()
    torch.testing.assert_close(model(idx)[0], reference_forward(model, idx), atol=2e-5, rtol=1e-5)
    other = random_model(std=0.5, gelu_approximate={"tanh": "none", "none": "tanh"}[gelu_approximate])
    assert (other(idx)[0] - model(idx)[0]).abs().max() > 1e-4  # they are two functions


def test_the_kv_cache_is_what_was_read_before():
    model, idx = random_model(), random_tokens()
    whole, _ = model.forward_cached(idx)
    kv_cache, pieces = None, []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, T)):
        logits, kv_cache = model.forward_cached(idx[:, start:end], kv_cache)
        pieces.append(logits)
        assert len(kv_cache) == L
        assert sum(keys.shape[3] for keys, _ in kv_cache[-1]) == end
        assert kv_cache[0][-1][0].shape == kv_cache[-1][-1][1].shape == (1, H, B, end - start, C // H)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_the_loss_scores_only_targets_that_are_given():
    model, idx = random_model(), random_tokens()
    targets = torch.full((B, T), -1)
    targets[1, 4], targets[2, 9] = 3, 8
    log_p = F.log_softmax(reference_forward(model, idx), dim=-1)
    expected = -(log_p[1, 4, 3] + log_p[2, 9, 8]) / 2
    torch.testing.assert_close(model(idx, targets)[1], expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- what may depend on what


@pytest.mark.parametrize("n_cached", [0, 4])
def test_causality_by_gradients(n_cached):
    """Each position's logits depend on its own and every earlier embedding of its own row, and on nothing else."""
    model, n_tokens = random_model(), 6
    generator = torch.Generator().manual_seed(3)
    kv_cache = None
    if n_cached:
        kv_cache = [
            [tuple(torch.randn(1, H, 1, n_cached, C // H, generator=generator, requires_grad=True) for _ in range(2))]
            for _ in range(L)
        ]
    embeddings = torch.randn(B, n_tokens, C, generator=generator, requires_grad=True)
    logits, _ = model.forward_cached(embeddings, kv_cache)  # (B, T, V)
    direction = torch.randn(V, generator=generator)
    flat_cache = [part for layer in kv_cache or () for piece in layer for part in piece]
    for row in range(B):
        for t in range(n_tokens):
            own, *of_cache = torch.autograd.grad(
                (logits[row, t] * direction).sum(), [embeddings, *flat_cache], retain_graph=True
            )
            is_seen = own.abs().amax(dim=-1) > 0  # (B, T)
            expected = torch.zeros(B, n_tokens, dtype=torch.bool)
            expected[row, : t + 1] = True
            assert is_seen.equal(expected), (row, t)
            assert all((gradient.abs().amax(dim=-1) > 0).all() for gradient in of_cache)  # all of the cache


def test_causality_by_tokens():
    model, idx = random_model(), random_tokens()
    logits = model(idx)[0]
    for t in range(T):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        is_same = (model(changed)[0] == logits).all(dim=-1)  # (B, T)
        assert is_same[:, :t].all()
        assert not is_same[:, t:].any()


def test_a_row_does_not_depend_on_the_others():
    model, idx = random_model(), random_tokens()
    together = model(idx)[0]
    for row in range(B):
        torch.testing.assert_close(model(idx[row : row + 1])[0][0], together[row], atol=1e-5, rtol=1e-5)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(idx[order])[0], together[order], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("n_shared", [0, SHARED])
def test_the_record_is_the_naive_runs(n_shared):
    model, idx = random_model(), random_tokens(n_shared=SHARED)
    before = ("attention", torch.zeros(1))
    record, expected = [before], []
    logits, _ = model(idx, activations_record=record, n_shared=n_shared)
    reference_forward(model, idx, record=expected)
    assert record[0] is before  # a list that has entries is extended
    record = record[1:]
    assert [name for name, _ in record] == ["attention", "attn_block_output"] * L
    for (_, found), (_, naive) in zip(record, expected, strict=True):
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found, naive, atol=1e-5, rtol=1e-5)
    for _, attention in record[::2]:
        assert attention.shape == (B, H, T, T)
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(B, H, T))
        assert (attention.triu(1) == 0).all()
    torch.testing.assert_close(logits, model(idx)[0], atol=1e-5, rtol=1e-5)  # recording changes nothing


# ------------------------------------------------------------------------------------------- names and checkpoints


def state_names(n_layer):
    modules = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    in_blocks = [
        f"transformer.h.{layer}.{module}.{part}"
        for layer in range(n_layer)
        for module in modules
        for part in ("weight", "bias")
    ]
    ends = ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    return ["transformer.wte.weight", "transformer.wpe.weight", *in_blocks, *ends]


def test_state_dict_has_the_names_and_shapes_of_mingpt():
    state = GPT(make_config()).state_dict()
    assert list(state) == state_names(2)
    shapes = {
        "transformer.wte.weight": (V, C),
        "transformer.wpe.weight": (BLOCK, C),
        "transformer.h.1.ln_1.weight": (C,),
        "transformer.h.1.attn.c_attn.weight": (3 * C, C),
        "transformer.h.1.attn.c_attn.bias": (3 * C,),
        "transformer.h.1.attn.c_proj.weight": (C, C),
        "transformer.h.1.mlp.c_fc.weight": (4 * C, C),
        "transformer.h.1.mlp.c_proj.weight": (C, 4 * C),
        "lm_head.weight": (V, C),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_skip_layer_norm_removes_ln_1_and_nothing_else():
    state = GPT(make_config(skip_layer_norm=True)).state_dict()
    assert list(state) == [name for name in state_names(2) if ".ln_1." not in name]


def test_a_checkpoint_of_mingpt_with_its_masks_loads():
    model, other, idx = random_model(0), random_model(1), random_tokens()
    state = model.state_dict()
    for layer in range(L):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(BLOCK, BLOCK).tril().view(1, 1, BLOCK, BLOCK)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    names = list(state)
    assert not torch.equal(other(idx)[0], model(idx)[0])
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(idx)[0], model(idx)[0])
    assert list(state) == names  # the caller's dictionary stays whole


@pytest.mark.parametrize("name", ["transformer.h.0.attn.scale", "transformer.h.0.mlp.bias", "bias"])
def test_other_unknown_weights_are_refused(name):
    state = GPT(make_config()).state_dict() | {name: torch.zeros(1)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        GPT(make_config()).load_state_dict(state)


def test_missing_weights_are_refused():
    state = GPT(make_config()).state_dict()
    del state["transformer.h.1.attn.c_attn.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        GPT(make_config()).load_state_dict(state)


def test_state_dict_goes_through_a_file(tmp_path):
    model, other, idx = random_model(0), random_model(1), random_tokens()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other(idx)[0], model(idx)[0])


# --------------------------------------------------------------------------------------------- the configuration


def test_default_config():
    config = GPT.get_default_config().to_dict()
    dropouts = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    missing = dict.fromkeys(("n_layer", "n_head", "n_embd", "vocab_size", "block_size"))
    others = {"model_type": "gpt", "skip_layer_norm": False, "gelu_approximate": "tanh", "init": "gpt2"}
    assert config == others | missing | dropouts


def test_with_zero_residuals_the_blocks_begin_as_the_identity():
    model, idx = GPT(make_config(init="zero_residual")).eval(), random_tokens()
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:T]
    assert torch.equal(model(idx)[0], model.lm_head(model.transformer.ln_f(x)))
    for name, weight in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            assert weight.std().item() == pytest.approx(1 / math.sqrt(C), rel=0.1)


@pytest.mark.parametrize("changes", [{"init": "zero"}, {"gelu_approximate": "erf"}])
def test_an_unknown_choice_is_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        GPT(make_config(**changes))


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("openai-gpt", (12, 12, 768)),
        ("gpt2", (12, 12, 768)),
        ("gpt2-medium", (24, 16, 1024)),
        ("gpt2-large", (36, 20, 1280)),
        ("gpt2-xl", (48, 25, 1600)),
        ("gopher-44m", (8, 16, 512)),
        ("gpt-mini", (6, 6, 192)),
        ("gpt-micro", (4, 4, 128)),
        ("gpt-nano", (3, 3, 48)),
    ],
)
def test_presets(name, sizes):
    config = GPT.get_default_config()
    config.merge_from_dict({"model_type": name, "vocab_size": 5, "block_size": 7})
    before = config.to_dict()
    with torch.device("meta"):
        model = GPT(config)
    assert (model.config.n_layer, model.config.n_head, model.config.n_embd) == sizes
    assert len(model.blocks) == sizes[0]
    assert config.to_dict() == before  # the caller's configuration stays as it is
    assert name in PRESETS


@pytest.mark.parametrize(
    "name, n_parameters",
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_the_presets_of_gpt2_have_its_number_of_parameters(name, n_parameters):
    config = GPT.get_default_config()
    config.merge_from_dict({"model_type": name, "vocab_size": 50257, "block_size": 1024})
    with torch.device("meta"):
        assert GPT(config).n_parameters == n_parameters


def test_a_later_change_of_the_callers_config_does_not_reach_the_model():
    config = make_config()
    model = GPT(config)
    config.n_layer = 7
    assert model.config.n_layer == L
    assert model.block_size == BLOCK


def test_an_unknown_key_warns_and_has_no_effect():
    config = make_config()
    with pytest.warns(UserWarning, match="batch_size"):
        config.batch_size = 512  # as the seed notebook does
    model = GPT(config)
    assert model(random_tokens())[0].shape == (B, T, V)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"block_size": None}, "block_size"),
        ({"n_layer": None}, "n_layer"),
        ({"n_head": None}, "n_head"),
        ({"n_embd": None}, "n_embd"),
        ({"n_layer": 0}, "n_layer.*got 0"),
        ({"n_embd": 24.0}, r"n_embd.*got 24\.0"),
        ({"block_size": -1}, "block_size.*got -1"),
        ({"n_embd": 25}, "n_embd = 25 .* n_head = 4"),
        ({"model_type": "gpt-nano"}, "not both"),
        ({"model_type": "gpt", "n_layer": None, "n_head": None, "n_embd": None}, "unknown model_type 'gpt'"),
        ({"model_type": "gpt-nan", "n_layer": None, "n_head": None, "n_embd": None}, "did you mean 'gpt-nano'"),
    ],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GPT(make_config(**values))


def test_too_many_tokens_are_refused():
    model = random_model()
    assert model(random_tokens(n_tokens=BLOCK))[0].shape == (B, BLOCK, V)
    with pytest.raises(ValueError, match=r"14 tokens .* block_size = 13"):
        model(random_tokens(n_tokens=BLOCK + 1))


@pytest.mark.parametrize(
    "idx, message",
    [
        (torch.zeros(T, dtype=torch.int64), r"shape \(B, T\), got torch.int64 of shape \(11,\)"),
        (torch.zeros(B, T), "tokens are integers"),
        (torch.full((B, T), V), f"from 0 to {V - 1} .* got {V} to {V}"),
        (torch.full((B, T), -1), f"from 0 to {V - 1} .* got -1"),
    ],
)
def test_what_is_no_tokens_is_refused(idx, message):
    with pytest.raises(ValueError, match=message):
        random_model()(idx)


def test_reading_on_beyond_the_block_is_refused():
    model, idx = random_model(), random_tokens()
    _, kv_cache = model.forward_cached(idx)
    assert model.forward_cached(idx[:, :2], kv_cache)[0].shape == (B, 2, V)
    with pytest.raises(ValueError, match=r"14 tokens .* block_size = 13"):
        model.forward_cached(idx[:, :3], kv_cache)
    with pytest.raises(ValueError, match=r"shape \(B, T\), got \(11,\)"):
        model.forward_cached(idx[0])


def test_a_decode_buffer_gives_what_a_list_of_pieces_gives_and_records_it():
    """There is one attention path: logits, weights and dropout are the same after either."""
    model, idx = random_model(), random_tokens()
    _, pieces = model.forward_cached(idx[:, :6])
    buffers = [KVCache(layer, B, BLOCK) for layer in pieces]
    expected, found = [], []
    for start, end in ((6, 7), (7, 10)):
        logits, pieces = model.forward_cached(idx[:, start:end], pieces, record=expected)
        own, buffers = model.forward_cached(idx[:, start:end], buffers, record=found)
        torch.testing.assert_close(own, logits, atol=1e-5, rtol=1e-5)
        assert n_positions(buffers) == n_positions(pieces) == end
    assert [name for name, _ in found] == ["attention", "attn_block_output"] * 2 * L
    for (_, one), (_, other) in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_attention_dropout_is_applied_after_a_decode_buffer():
    set_seed(0)
    model, idx = random_model(attn_pdrop=0.5).train(), random_tokens()
    _, pieces = model.forward_cached(idx[:, :6])
    one, other = (
        model.forward_cached(idx[:, 6:7], [KVCache(layer, B, BLOCK) for layer in pieces])[0] for _ in range(2)
    )
    assert not torch.equal(one, other)


def test_a_models_configuration_makes_another_model_like_it():
    config = GPT.get_default_config()
    config.merge_from_dict({"model_type": "gpt-nano", "vocab_size": 5, "block_size": 7})
    model = GPT(config)
    assert GPT(model.config).config.to_dict() == model.config.to_dict()
    assert config.model_type == "gpt-nano"


def test_nothing_left_after_the_shared_tokens_is_refused():
    with pytest.raises(ValueError, match="no content"):
        random_model()(random_tokens(), n_shared=T)


# ------------------------------------------------------------------------------------ initialisation and dropout


def test_initialisation_is_gpt2s():
    set_seed(0)
    n_layer = 3
    model = GPT(make_config(n_layer=n_layer, n_embd=96, vocab_size=101, block_size=107))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_dropout_is_off_in_evaluation_and_on_in_training():
    set_seed(0)
    model, idx = random_model(embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1), random_tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    torch.testing.assert_close(model(idx)[0], reference_forward(model, idx), atol=1e-5, rtol=1e-5)
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_without_dropout_training_and_evaluation_agree():
    model, idx = random_model(), random_tokens()
    assert torch.equal(model.eval()(idx)[0], model.train()(idx)[0])


@pytest.mark.parametrize("place", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_is_applied(place):
    set_seed(0)
    model, idx = random_model(**{place: 0.5}).train(), random_tokens()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_the_residual_dropout_is_applied_to_what_each_part_adds(part):
    set_seed(0)
    block = random_model(resid_pdrop=0.5).train().blocks[0]
    out = getattr(block, part)(torch.randn(B, T, C))
    out = out[0] if part == "attn" else out
    assert (out == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_weights_train_with_n_shared_under_dropout():
    set_seed(0)
    model = random_model(embd_pdrop=0.2, resid_pdrop=0.2, attn_pdrop=0.2).train()
    found = gradients(model, model(random_tokens(n_shared=SHARED), random_targets(), n_shared=SHARED)[1])
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["transformer.h.0.mlp.c_fc.weight"].abs().max() > 0


def test_weight_decay_is_on_the_weights_of_linear_layers_only():
    model = random_model()
    config = CfgNode(learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = model.configure_optimizers(config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay.pop(id(p)) for name, p in model.named_parameters()}
    assert not decay
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "lm_head.weight")
    assert found == {name: 0.1 if name.endswith(linear) else 0.0 for name in found}
    assert all(group["lr"] == 1e-3 and group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


# ----------------------------------------------------------------------------------------------------- bfloat16


def test_bfloat16_is_close():
    """bfloat16 keeps 8 bits: each product is off by up to 0.4%, so a few layers' logits by about a percent."""
    model, idx, targets = random_model(), random_tokens(n_shared=SHARED), random_targets()
    expected, expected_loss = model(idx, targets)
    for n_shared in (0, SHARED):
        with autocast("bfloat16", "cpu"):
            logits, loss = model(idx, targets, n_shared=n_shared)
        assert (logits.float() - expected).norm() < 0.05 * expected.norm()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02)
        assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


# ------------------------------------------------------------------------------------------ GPT-2 of transformers


def random_gpt2(seed=0, **changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 24, "vocab_size": 37, "n_positions": 17}
    model = GPT2LMHeadModel(GPT2Config(**sizes | {"bos_token_id": 0, "eos_token_id": 0} | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("activation_function", ["gelu_new", "gelu"])
def test_a_gpt2_of_transformers_keeps_its_logits(tie_word_embeddings, activation_function):
    theirs = random_gpt2(tie_word_embeddings=tie_word_embeddings, activation_function=activation_function)
    ours = GPT.from_huggingface(theirs)
    idx = torch.randint(37, (B, 15), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = theirs(idx).logits
    torch.testing.assert_close(ours(idx)[0], expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.3
    is_tied = torch.equal(ours.lm_head.weight, ours.transformer.wte.weight)
    assert is_tied == tie_word_embeddings  # the values are; the tensors are two, as in minGPT
    assert ours.lm_head.weight is not ours.transformer.wte.weight
    assert not ours.training
    assert ours.block_size == 17


def test_the_copy_of_a_gpt2_has_its_own_weights():
    theirs = random_gpt2()
    ours = GPT.from_huggingface(theirs)
    before = theirs.transformer.wte.weight.clone()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(theirs.transformer.wte.weight, before)


def test_generation_is_that_of_transformers():
    theirs = random_gpt2()
    ours = GPT.from_huggingface(theirs)
    idx = torch.randint(1, 37, (B, 6), generator=torch.Generator().manual_seed(4))
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(ours.generate(idx, 9), expected)


@pytest.mark.parametrize(
    "name, value",
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 48),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_a_gpt2_that_is_another_function_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        GPT.from_huggingface(random_gpt2(**{name: value}))


def test_an_explicit_n_inner_of_the_usual_size_is_accepted():
    assert GPT.from_huggingface(random_gpt2(n_inner=96)).config.n_embd == 24


def test_from_pretrained_asks_transformers(monkeypatch):
    import transformers

    theirs, asked = random_gpt2(), []

    def from_pretrained(name):
        asked.append(name)
        return theirs

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", from_pretrained)
    model = GPT.from_pretrained("gpt2-medium")
    assert asked == ["gpt2-medium"]
    assert torch.equal(model.transformer.wte.weight, theirs.transformer.wte.weight)


@pytest.mark.parametrize("name", ["gpt3", "gpt-nano", "openai-gpt", ""])
def test_from_pretrained_of_another_name_is_refused(name):
    with pytest.raises(ValueError, match="gpt2-xl"):
        GPT.from_pretrained(name)
