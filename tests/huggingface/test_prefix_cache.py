"""The file that knows transformers' cache: rows share one prefix without a copy, and reading changes nothing."""

from __future__ import annotations

import pytest
import torch
from hf_models import ARCHITECTURES, L, P, random_hf_model, random_values, tokens, with_placeholders

from mingpt.huggingface import cache as caches
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.prefix import Prefix


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_one_prefix_is_not_copied_for_each_row(architecture):
    lm = CausalLM(random_hf_model(architecture))
    prefix = Prefix("key_value", random_values(lm))
    shared = lm.transformers_cache(prefix, 50)
    for keys, values in caches.layer_pairs(shared):
        assert keys.shape[0] == values.shape[0] == 50
        assert keys.stride(0) == values.stride(0) == 0
    each = lm.transformers_cache(Prefix("key_value", prefix.values.expand(50, *prefix.values.shape[1:])), 50)
    for one, other in zip(caches.layer_pairs(shared), caches.layer_pairs(each), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_each_row_has_the_keys_and_values_of_its_own_prefix():
    lm = CausalLM(random_hf_model("llama"))
    values, rows = random_values(lm, 3), torch.tensor([2, 0, 0, 1, 2])
    keys = torch.stack(
        [pair[0] for pair in caches.layer_pairs(lm.transformers_cache(Prefix("key_value", values, rows), 5))]
    )
    for row, own in enumerate(rows):
        assert torch.equal(keys[:, row].transpose(1, 2).flatten(2), values[own, :, 0])  # (L, H, P, D) to (L, P, H * D)
    keys = torch.stack([pair[0] for pair in caches.layer_pairs(lm.transformers_cache(Prefix("key_value", values), 6))])
    assert torch.equal(keys.transpose(2, 3).flatten(3), values[:, :, 0].repeat_interleave(2, dim=0).transpose(0, 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_cache_that_is_only_read_gives_the_same_again(architecture):
    """Windows are shorter than prefix and content together, so a cache that is written to would drop positions."""
    lm = CausalLM(random_hf_model(architecture))
    prefix, x = Prefix("key_value", random_values(lm)), tokens()
    cache, name = caches.read_only(lm.transformers_cache(prefix, len(x))), caches.keyword(lm.model)
    first, second = (lm.model(x, use_cache=False, **{name: cache}).logits for _ in range(2))
    assert torch.equal(first, second)
    assert all(keys.shape[-2] == P for keys, _ in caches.layer_pairs(cache))
    assert torch.equal(first, lm(with_placeholders(x), prefixes=prefix)[0][:, P:])
    written = lm.transformers_cache(prefix, len(x))
    lm.model(x, **{name: written}, use_cache=True)
    assert written.get_seq_length() == P + x.shape[1]
    assert len(written.layers) == L


def test_a_model_without_a_cache_of_keys_and_values_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(ValueError, match="not all layers of the model cache keys and values; choose another"):
        CausalLM(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)))
