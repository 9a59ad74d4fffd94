"""The paper's statements about prefixes, on random models: what a prefix cannot change, and out of what its bias is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mingpt.analysis.theory import attention_invariance, bias_subspace, random_case
from mingpt.prefix import Prefix

CASES = {
    "seed": st.integers(0, 2**32),
    "n_layer": st.integers(1, 4),
    "n_head": st.integers(1, 4),
    "head_size": st.integers(1, 8),
    "n_positions": st.integers(1, 12),
    "n_tokens": st.integers(1, 12),
    "kind": st.sampled_from(["activation", "key_value", "prompt"]),
    "gain": st.floats(0.1, 2.0),
}


@settings(max_examples=200, deadline=None)
@given(**CASES)
def test_no_prefix_changes_which_content_is_attended_to(**case):
    model, prefix, x = random_case(**case)
    found = attention_invariance(model, prefix, x)
    assert found.deviation.shape == found.share.shape == (case["n_layer"], case["n_head"])
    assert found.deviation.max() <= 1e-5
    assert found.share.min() >= 0
    assert found.share.max() <= 1 + 1e-5


@settings(max_examples=200, deadline=None)
@example(
    seed=1219, n_layer=1, n_head=3, head_size=1, n_positions=1, n_tokens=1, kind="prompt", gain=2.0
)  # a token that pays the prefix less than 1e-30
@given(**CASES)
def test_a_prefix_scales_the_output_and_adds_a_bias_of_its_values(**case):
    model, prefix, x = random_case(**case)
    found = bias_subspace(model, prefix, x)
    assert (found.error <= 1e-5 * found.magnitude.clamp(min=1)).all()
    assert found.out_of_span.max() <= 1e-5
    assert (found.rank <= min(case["n_positions"], case["head_size"])).all()
    assert (found.effective_rank >= 1).all()
    assert (found.effective_rank <= found.rank).all()
    assert found.attention_perplexity.min() >= 1 - 1e-5
    assert found.attention_perplexity.max() <= case["n_positions"] + 1e-4


def test_a_prefix_that_takes_everything_leaves_nothing_to_compare():
    model, prefix, x = random_case(0, 2, 2, 4, 3, 6, "key_value")
    with torch.no_grad():
        model.blocks[0].attn.c_attn.bias[:8] += 100
    prefix.values[:, 0, 0] = 100.0
    found = attention_invariance(model, prefix, x)
    assert found.share[0].tolist() == pytest.approx([1, 1])
    assert found.share[1].max() < 1
    assert found.deviation.max() < 1e-5
    assert not bias_subspace(model, prefix, x).attention_perplexity.isnan().any()


def test_what_is_not_a_prefix_does_change_it():
    """The measure is not blind: weights that have been trained further give another attention."""
    model, prefix, x = random_case(0, 2, 2, 4, 3, 6, "activation")
    before = attention_invariance(model, prefix, x)
    original = model.blocks[1].attn.forward

    def forward(normed, kv_cache=(), *arguments):
        return original(normed + 0.1 * torch.arange(8.0) if kv_cache else normed, kv_cache, *arguments)

    model.blocks[1].attn.forward = forward
    after = attention_invariance(model, prefix, x)
    assert before.deviation.max() < 1e-6
    assert after.deviation[0].max() < 1e-6
    assert after.deviation[1].max() > 1e-3


def test_a_bias_of_something_else_is_seen():
    model, prefix, x = random_case(0, 2, 2, 4, 3, 6, "activation")
    with torch.no_grad():
        model.blocks[1].attn.c_proj.bias += 1
    assert bias_subspace(model, prefix, x).error.max() < 1e-5
    model.blocks[1].attn.register_forward_hook(lambda _, __, output: (output[0] + 0.01, *output[1:]))
    error = bias_subspace(model, prefix, x).error
    assert error[0] < 1e-5
    assert error[1] == pytest.approx(0.01, abs=1e-4)


def test_ranks_and_spreads_of_known_prefixes():
    model, prefix, x = random_case(1, 1, 2, 4, 3, 5, "key_value")
    values = prefix.values.clone()
    values[:, :, :, 1:] = values[:, :, :, :1]  # three positions that are one and the same
    found = bias_subspace(model, Prefix("key_value", values), x)
    assert found.rank.tolist() == found.effective_rank.tolist() == [[1, 1]]
    assert found.attention_perplexity == pytest.approx(3)


def test_one_prefix_at_a_time():
    model, prefix, x = random_case(0, 1, 1, 4, 3, 5, "activation")
    with pytest.raises(ValueError, match="of one prefix, got 3"):
        attention_invariance(model, prefix.values.repeat(3, 1, 1, 1), x)
    with pytest.raises(ValueError, match="3 prefix positions leave no content in 3 tokens"):
        bias_subspace(model, prefix, x[:, :3])


def test_figures_say_what_they_show(tmp_path):
    model, prefix, x = random_case(0, 3, 4, 4, 5, 6, "activation")
    for found in (attention_invariance(model, prefix, x), bias_subspace(model, prefix, x)):
        figure = found.figure("A prefix")
        figure.savefig(tmp_path / "figure.png")
        assert figure.get_suptitle().startswith("A prefix")
        assert all(ax.get_xlabel() == "head" and ax.get_title() for ax in figure.axes)
