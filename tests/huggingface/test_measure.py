"""The paper's statements on models of transformers: they hold where promised, and the numbers are those of theory."""

from __future__ import annotations

import pytest
import torch
from hf_models import ARCHITECTURES, L, P, T, V, random_hf_model, random_values, tokens, with_placeholders

from mingpt.analysis.theory import attention_invariance, bias_subspace, random_case
from mingpt.huggingface import cache as caches
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.huggingface.measure import _attention, measure
from mingpt.prefix import Prefix
from mingpt.storage.huggingface import to_huggingface


@pytest.mark.parametrize("kind", ["key_value", "prompt"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_statements_hold(architecture, kind):
    """Also under sliding windows and soft-capping: each score is a function of its own query and key."""
    lm = CausalLM(random_hf_model(architecture))
    found = measure(lm, with_placeholders(tokens(6)), random_values(lm, kind=kind)[0])
    shape, bias = (L, lm.config.n_head), found.bias
    assert found.invariance.deviation.shape == found.invariance.share.shape == found.movement.shape == shape
    assert found.invariance.deviation.max() <= 1e-5
    assert found.invariance.share.min() > 0.01
    assert found.invariance.share.max() < 1
    assert (bias.error <= 1e-5 * bias.magnitude.clamp(min=1)).all()
    assert bias.out_of_span.max() <= 1e-5
    assert (bias.rank == P).all()
    assert (bias.effective_rank >= 1).all()
    assert (bias.effective_rank <= P).all()
    assert found.movement[0].max() <= 1e-5
    assert found.movement[1:].min() > 0.05
    assert (found.distance <= found.movement * (P + T)).all()
    assert found.direction.shape == (*shape, lm.config.head_size)
    assert found.direction.norm(dim=-1).allclose(torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_the_share_is_that_of_the_attention_weights_that_transformers_gives(architecture):
    model = random_hf_model(architecture)
    lm, x = CausalLM(model), with_placeholders(tokens(6))
    prefix = Prefix("key_value", random_values(lm))
    before = model.config._attn_implementation
    found = measure(lm, x, prefix)
    assert model.config._attn_implementation == before
    cache = lm.transformers_cache(prefix, len(x))
    model.set_attn_implementation("eager")
    attentions = model(x[:, P:], output_attentions=True, **{caches.keyword(model): cache}).attentions
    expected = torch.stack([each[..., :-T].sum(dim=-1).mean(dim=(0, 2)) for each in attentions])
    assert (found.invariance.share - expected).abs().max() <= 1e-5


def test_a_window_hides_the_prefix_from_later_tokens():
    """The same weights with and without a window; the longer the text, the less of it sees the prefix."""
    lm, plain = (CausalLM(random_hf_model("mistral", sliding_window=window)) for window in (6, None))
    values, x = random_values(lm)[0], with_placeholders(tokens(4, 30))
    windowed, full = (measure(each, x, values).invariance.share for each in (lm, plain))
    assert windowed[0].max() < full[0].min()
    assert windowed.max() <= 5 / 30  # five of the thirty tokens reach a prefix position
    assert measure(lm, x[:, : P + 5], values).invariance.share.max() > 0.2


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["key_value", "prompt"])
def test_numbers_are_those_of_theory_on_our_gpt(kind, batch_size):
    for seed, sizes in enumerate([(3, 4, 6, 4, 9), (2, 1, 5, 7, 3), (1, 3, 4, 1, 1)]):
        model, prefix, x = random_case(seed, *sizes, kind)
        found = measure(CausalLM(to_huggingface(model)), x, prefix, batch_size=batch_size)
        for ours, expected in (
            (found.invariance, attention_invariance(model, prefix, x)),
            (found.bias, bias_subspace(model, prefix, x)),
        ):
            for name, one, other in zip(expected._fields, ours, expected, strict=True):
                assert one.shape == other.shape, name
                assert (one - other).abs().max() <= 1e-5 * max(1, other.abs().max()), name


def test_one_position_has_one_direction_which_is_its_value():
    lm = CausalLM(random_hf_model("llama"))
    values = random_values(lm, n_positions=1)
    found = measure(lm, with_placeholders(tokens(), 1), values[0])
    own = values[0, :, 1, 0].unflatten(-1, (2, -1)).repeat_interleave(2, dim=1).double()  # (L, H, D)
    assert found.direction_share.allclose(torch.ones(L, 4, dtype=torch.float64))
    assert found.direction.allclose(own / own.norm(dim=-1, keepdim=True), atol=1e-5)
    nothing = measure(lm, with_placeholders(tokens(), 1), torch.zeros_like(values[0]))
    assert not nothing.direction.any()
    assert not nothing.bias.rank.any()


def test_what_is_not_a_prefix_does_change_relative_attention():
    """The measure is not blind: queries that change show in the first layer."""
    lm, x = CausalLM(random_hf_model("llama")), tokens()

    class Changed:
        def __enter__(self):  # the base model has other queries
            lm.model.model.layers[0].self_attn.q_proj.weight.data *= 2

        def __exit__(self, *_):
            lm.model.model.layers[0].self_attn.q_proj.weight.data /= 2

    found = measure(lm, x, base=Changed)
    assert found.movement[0].min() > 0.05
    assert found.invariance is found.bias is found.direction is None
    assert measure(lm, x).movement.max() <= 1e-6
    shifted = measure(lm, with_placeholders(x), random_values(lm)[0], base=Changed)
    assert shifted.movement[0].min() > 0.05
    assert shifted.invariance.deviation.max() <= 1e-5


def test_models_that_cannot_be_measured_are_refused():
    lm = CausalLM(random_hf_model("llama"))
    x, before = with_placeholders(tokens()), lm.model.config._attn_implementation
    with pytest.raises(ValueError, match="the measurement is of one prefix, got 3"):
        measure(lm, x, Prefix("key_value", random_values(lm, 3)))
    with pytest.raises(ValueError, match="tokens go from 0"):
        measure(lm, x + V, random_values(lm)[0])
    assert lm.model.config._attn_implementation == before
    lm.model.set_attn_implementation = lambda name: None  # as a model that does not ask the registry
    with pytest.raises(ValueError, match="llama takes its attention from transformers' registry in 0 of 3 layers"):
        measure(lm, x, random_values(lm)[0])


def test_attention_sinks_are_refused():
    heads = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="models with attention sinks cannot be measured"):
        _attention(None, heads, heads, heads, None, s_aux=torch.zeros(2))
