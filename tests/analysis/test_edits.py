"""Prefixes taken apart, shortened, and made of what the model has cached."""

from __future__ import annotations

import pytest
import torch

from mingpt.analysis.edits import cut_biases, match_attention, steering_prefix, swap_keys
from mingpt.analysis.theory import random_case
from mingpt.prefix import Prefix, as_key_value

SIZES = {"n_layer": 3, "n_head": 2, "head_size": 8, "n_positions": 4, "n_tokens": 6}
KINDS = ["activation", "key_value", "prompt"]


def case(kind="key_value", **changes):
    return random_case(1, kind=kind, **SIZES | changes)


def test_swapped_keys_are_those_of_the_layers_alone():
    model, prefix, x = case()
    other = torch.randn_like(prefix.values[0, :, 0])
    swapped = swap_keys(prefix, other, [1])
    assert torch.equal(swapped.values[0, 1, 0], other[1])
    swapped.values[0, 1, 0] = prefix.values[0, 1, 0]
    assert torch.equal(swapped.values, prefix.values)
    assert torch.equal(swap_keys(prefix, other).values[0, :, 0], other)
    assert torch.equal(swap_keys(prefix, other).values[0, :, 1], prefix.values[0, :, 1])
    with torch.no_grad():
        assert not torch.allclose(model(x, prefixes=swap_keys(prefix, other))[0], model(x, prefixes=prefix)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_biases_in_all_directions_are_the_same_and_in_none_are_gone(kind):
    model, prefix, x = case(kind)
    expected = model(x, prefixes=prefix)[0]
    same = model(x, prefixes=cut_biases(model, prefix, x, 8))[0]
    assert torch.allclose(same[:, -6:], expected[:, -6:], atol=1e-4)
    none = cut_biases(model, prefix, x, 0)
    assert torch.equal(none.values[0, :, 0], as_key_value(model, prefix)[:, 0])
    assert none.values[0, :, 1].abs().max() == 0


@torch.no_grad()
def test_the_first_layer_keeps_the_largest_part_of_its_biases():
    """What rank 1 leaves of the first layer's biases, whose inputs do not change, is the largest singular value."""
    model, prefix, x = case(n_layer=1)
    cache = model.prefix_cache(prefix)

    def biases(prefix):
        block = model.blocks[0]
        hidden = block.ln_1(model.block_inputs(x, prefix)[0])
        weights = block.attn(hidden, cache[0])[2]  # the same keys
        values = model.prefix_cache(prefix)[0][0][1][0, :, 0]
        return (weights.transpose(1, 2).flatten(0, 1)[..., :4] @ values).transpose(0, 1).flatten(1, 2)

    full, cut = biases(prefix), biases(cut_biases(model, prefix, x, 1))
    sizes = torch.linalg.svdvals(full)
    assert torch.allclose((full - cut).norm(dim=(1, 2)), sizes[:, 1:].norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_prefix_of_as_many_positions_is_the_same(kind):
    model, prefix, x = case(kind)
    same = match_attention(model, prefix, x, 4)
    assert torch.allclose(model(x, prefixes=same)[0][:, -6:], model(x, prefixes=prefix)[0][:, -6:], atol=1e-3)


@torch.no_grad()
def test_positions_that_repeat_others_are_not_missed():
    """Two positions with the same key are one with the sum of what they give, but for their share."""
    model, prefix, x = case(n_layer=1, n_positions=2)
    values = prefix.values.clone()
    values[:, :, :, 1] = values[:, :, :, 0]
    twice = Prefix("key_value", values)
    full = model(x, prefixes=twice)[0][:, -6:]
    once = Prefix("key_value", values[:, :, :, :1], n_placeholders=2)
    matched = match_attention(model, twice, x, 1)
    assert (matched.n_positions, matched.n_placeholders) == (1, 2)
    error, plain = ((model(x, prefixes=each)[0][:, -6:] - full).norm() for each in (matched, once))
    assert error < 0.7 * plain


@torch.no_grad()
def test_steering_adds_the_difference_at_the_last_token():
    model, _, x = case()
    others = x.flip(1)
    none = steering_prefix(model, x, others, 3, 0.0)
    once, twice = (steering_prefix(model, x, others, 3, each).values - none.values for each in (1.0, 2.0))
    assert torch.allclose(twice, 2 * once, atol=1e-5)
    last = torch.stack([model.block_inputs(each)[1][:, -1] for each in (x, others)], dim=0)
    keys = [model.blocks[1].keys_values(each[:, None])[0] for each in last]  # (B, H, 1, 1, D)
    difference = (keys[0] - keys[1]).mean(dim=0).flatten()
    assert torch.allclose(once[0, 1, 0], difference.expand(3, -1), atol=1e-5)
