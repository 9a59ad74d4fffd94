"""Prefixes of every kind: content sees what it would see if they were spliced into a full run, and nothing else.

Legend: B batch, T tokens, P prefix positions, C channels, H heads, L layers, V vocabulary, K prefixes.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_model, reference_forward, reference_generate, reference_loss

from mingpt.adapters import Reparametrization
from mingpt.decoding.generation import beam_search
from mingpt.prefix import (
    Prefix,
    as_key_value,
    as_prefix,
    average,
    concatenate,
    initial_prefix,
    interpolate,
)
from mingpt.training.precision import autocast

B, T, L, H, P, C, V = 3, 13, 2, 4, 5, 24, 11  # random_model's sizes
N = T - P  # content tokens
K = 4

SHAPES = {"activation": (L, P, C), "key_value": (L, 2, P, C), "prompt": (P, C)}
KINDS = sorted(SHAPES)


def random_tokens(n_rows=B, n_tokens=T, seed=1):
    return torch.randint(V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def random_targets(n_rows=B, n_tokens=T, n_silent=P + 2):
    targets = random_tokens(n_rows, n_tokens, seed=2)
    targets[:, :n_silent] = -1
    return targets


def random_values(kind, n=None, seed=3):
    """One prefix, or n of them."""
    shape = SHAPES[kind] if n is None else (n, *SHAPES[kind])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found, expected, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


# ------------------------------------------------------------------------------------------ the fast and the naive


@pytest.mark.parametrize("skip_layer_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_are_the_naive_splices(kind, skip_layer_norm):
    model, idx, targets = random_model(skip_layer_norm=skip_layer_norm), random_tokens(), random_targets()
    values = random_values(kind)
    logits, loss = model(idx, targets, prefixes=values)
    expected = reference_forward(model, idx, values, kind)
    assert logits.shape == (B, T, V)
    assert_close(logits[:, P:], expected[:, P:])
    assert_close(loss, reference_loss(expected, targets))
    assert (logits[:, :P] == 0).all()  # nothing is predicted there
    without = reference_forward(model, idx)
    assert (without - expected)[:, P:].abs().amax(dim=-1).min() > 1e-2  # the prefix reaches every content position


@pytest.mark.parametrize("skip_layer_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_prefix_are_the_naive_splices(kind, skip_layer_norm):
    model, idx, targets = random_model(skip_layer_norm=skip_layer_norm), random_tokens(), random_targets()
    values = random_values(kind).requires_grad_()
    naive_loss = reference_loss(reference_forward(model, idx, values, kind), targets)
    (expected,) = torch.autograd.grad(naive_loss, values)
    (found,) = torch.autograd.grad(model(idx, targets, prefixes=values)[1], values)
    assert expected.abs().amax() > 1e-2
    assert_close(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_weights_are_the_naive_splices(kind):
    """The weights need no gradient when a prefix is trained, but who asks for it gets the right one."""
    model, idx, targets, values = random_model(), random_tokens(), random_targets(), random_values(kind)
    names, weights = zip(*model.named_parameters(), strict=True)
    naive_loss = reference_loss(reference_forward(model, idx, values, kind), targets)
    expected = torch.autograd.grad(naive_loss, weights)
    found = torch.autograd.grad(model(idx, targets, prefixes=values)[1], weights)
    for name, one, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@given(
    kind=st.sampled_from(KINDS),
    n_rows=st.integers(1, 4),
    n_content=st.integers(1, 5),
    n_prefix=st.integers(1, 4),
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3),
    head_size=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_logits_are_the_naive_splices_at_any_size(kind, n_rows, n_content, n_prefix, n_layer, n_head, head_size, seed):
    n_tokens, n_embd = n_prefix + n_content, n_head * head_size
    model = random_model(seed, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=n_tokens)
    idx = random_tokens(n_rows, n_tokens, seed)
    leading = {"activation": (n_layer,), "key_value": (n_layer, 2), "prompt": ()}[kind]
    values = torch.randn(*leading, n_prefix, n_embd, generator=torch.Generator().manual_seed(seed))
    logits, _ = model(idx, prefixes=Prefix(kind, values[None]))
    expected = reference_forward(model, idx, values, kind)
    assert_close(logits[:, n_prefix:], expected[:, n_prefix:], atol=2e-5, rtol=1e-4)


def test_the_kv_cache_of_an_activation_prefix_is_a_key_value_prefix():
    model, idx, values = random_model(), random_tokens(), random_values("activation")
    cache = model.prefix_cache(Prefix("activation", values[None]))  # L layers of one pair of (1, H, 1, P, D)
    assert [part.shape for (pair,) in cache for part in pair] == [(1, H, 1, P, C // H)] * (2 * L)
    key_value = torch.stack([torch.stack([part.transpose(1, 3).reshape(P, C) for part in pair]) for (pair,) in cache])
    assert key_value.shape == SHAPES["key_value"]
    assert_close(model(idx, prefixes=key_value)[0], model(idx, prefixes=values)[0])
    for (own,), (split,) in zip(cache, model.prefix_cache(Prefix("key_value", key_value[None])), strict=True):
        assert torch.equal(own[0], split[0])
        assert torch.equal(own[1], split[1])


def test_a_prompt_of_tokens_embeddings_is_these_tokens():
    model, idx = random_model(), random_tokens()
    idx[:, :P] = idx[0, :P]  # one prompt for all rows
    prompt = model.transformer.wte.weight[idx[0, :P]].detach()
    assert_close(model(idx, prefixes=prompt)[0][:, P:], model(idx)[0][:, P:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_placeholders_are_not_looked_at(kind):
    model, idx, values = random_model(), random_tokens(), random_values(kind)
    changed = idx.clone()
    changed[:, :P] = (changed[:, :P] + 3) % V
    assert torch.equal(model(changed, prefixes=values)[0], model(idx, prefixes=values)[0])


def test_a_prefix_may_be_shorter_than_the_padding():
    model, idx, values = random_model(), random_tokens(), random_values("activation")[:, :2]
    idx[:, :P] = 0
    assert_close(model(idx, prefixes=values)[0][:, 2:], reference_forward(model, idx, values)[:, 2:])


# ----------------------------------------------------------------------------------------------- several prefixes


def in_every_form(kind, n=B):
    """The same n prefixes for n rows, in each way there is to say so, with which of them each row has."""
    values, rows = random_values(kind, K), torch.tensor([2, 0, 3, 2, 1, 0, 3][:n])
    forms = [Prefix(kind, values, rows), Prefix(kind, values[rows])]
    return [*forms, values[rows]] if kind == "activation" else forms, values[rows]


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_sees_its_own_prefix_only(kind):
    model, idx = random_model(), random_tokens()
    forms, of_row = in_every_form(kind)
    expected = reference_forward(model, idx, of_row, kind)
    for prefixes in forms:
        logits, _ = model(idx, prefixes=prefixes)
        assert_close(logits[:, P:], expected[:, P:])
        for row in range(B):  # the same as running it alone
            alone, _ = model(idx[row : row + 1], prefixes=Prefix(kind, of_row[row : row + 1]))
            assert_close(logits[row], alone[0])
    assert (expected[0] - reference_forward(model, idx, of_row[1], kind)[0])[P:].abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_more_or_fewer_than_the_prefixes(kind):
    model = random_model()
    for n_rows in (2, 7):
        idx = random_tokens(n_rows)
        forms, of_row = in_every_form(kind, n_rows)
        assert_close(model(idx, prefixes=forms[0])[0][:, P:], reference_forward(model, idx, of_row, kind)[:, P:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows_each", [1, 2, 3])
def test_without_rows_each_prefix_has_its_share_of_consecutive_rows(kind, rows_each):
    """And the function and its gradients are those of the naive splice, row by row."""
    model, values = random_model(), random_values(kind, K).requires_grad_()
    idx, targets = random_tokens(K * rows_each), random_targets(K * rows_each)
    logits, loss = model(idx, targets, prefixes=Prefix(kind, values))
    expected = reference_forward(model, idx, values.repeat_interleave(rows_each, dim=0), kind)
    assert_close(logits[:, P:], expected[:, P:])
    (found,) = torch.autograd.grad(loss, values)
    (naive,) = torch.autograd.grad(reference_loss(expected, targets), values)
    assert_close(found, naive, rtol=1e-4)


def test_a_group_of_rows_reads_on():
    """What a batch has read after K prefixes is a cache that it can read on from."""
    model, values, idx = random_model(), random_values("activation", K), random_tokens(2 * K)
    cache = model.prefix_cache(Prefix("activation", values))
    first, cache = model.forward_cached(idx[:, P : P + 3], cache)
    second, _ = model.forward_cached(idx[:, P + 3 :], cache)
    whole, _ = model(idx, prefixes=Prefix("activation", values))
    assert_close(torch.cat([first, second], dim=1), whole[:, P:])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_prefixes_of_the_rows_that_are_scored(kind):
    """Prefix k's gradient is the sum over its rows: none without a row, or where its rows score no target."""
    model, idx, targets = random_model(), random_tokens(), random_targets()
    targets[1] = -1  # row 1, which has prefix 0, scores nothing
    values, rows = random_values(kind, K).requires_grad_(), torch.tensor([2, 0, 2])
    (found,) = torch.autograd.grad(model(idx, targets, prefixes=Prefix(kind, values, rows))[1], values)
    assert (found.flatten(1).abs().amax(dim=1) > 0).tolist() == [False, False, True, False]
    lone = values[2].detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(idx[::2], targets[::2], prefixes=Prefix(kind, lone[None]))[1], lone)
    assert_close(found[2], expected, rtol=1e-4)


def test_gradients_of_a_batch_do_not_mix_its_prefixes():
    model, idx = random_model(), random_tokens()
    values = random_values("activation", B).requires_grad_()
    logits, _ = model(idx, prefixes=values)
    for row in range(B):
        (gradient,) = torch.autograd.grad(logits[row].sum(), values, retain_graph=True)
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).tolist() == [row == other for other in range(B)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_and_layer_of_a_prefix_learns(kind):
    model, idx, targets, values = random_model(), random_tokens(), random_targets(), random_values(kind)
    values.requires_grad_()
    (gradient,) = torch.autograd.grad(model(idx, targets, prefixes=values)[1], values)
    assert (gradient.abs().amax(dim=-1) > 0).all()


def test_only_the_prefix_gets_a_gradient_from_a_frozen_model():
    model, idx, targets = random_model().requires_grad_(False), random_tokens(), random_targets()
    values = random_values("activation").requires_grad_()
    model(idx, targets, prefixes=values)[1].backward()
    assert values.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("form", ["one", "per row", "rows"])
@pytest.mark.parametrize("kind", ["activation", "prompt"])
def test_the_record_is_the_naive_runs_with_the_prefixs_own_rows(kind, form):
    model, idx = random_model(), random_tokens()
    forms, of_row = in_every_form(kind)
    prefixes = {"rows": forms[0], "per row": forms[1], "one": Prefix(kind, of_row[:1])}[form]
    record, expected = [("before", torch.zeros(1))], []
    model(idx, prefixes=prefixes, activations_record=record)
    reference_forward(model, idx, of_row[0] if form == "one" else of_row, kind, expected)
    assert record.pop(0)[0] == "before"
    assert [name for name, _ in record] == ["attention", "attn_block_output"] * L
    for (_, found), (_, naive) in zip(record, expected, strict=True):
        assert_close(found, naive)
    for _, attention in record[::2]:
        assert attention.shape == (B, H, T, T)
        assert not attention.requires_grad
        assert_close(attention.sum(dim=-1), torch.ones(B, H, T))


def test_the_record_of_a_key_value_prefix_is_zero_where_it_has_no_queries():
    model, idx, values = random_model(), random_tokens(), random_values("key_value")
    record, expected = [], []
    model(idx, prefixes=values, activations_record=record)
    reference_forward(model, idx, values, "key_value", expected)
    for (name, found), (_, naive) in zip(record, expected, strict=True):
        assert found.shape == naive.shape
        is_prefix = torch.arange(T) < P
        positions = -2  # (B, H, T, T) and (B, T, C)
        assert_close(
            found.index_select(positions, torch.arange(P, T)), naive.index_select(positions, torch.arange(P, T))
        )
        assert (found.index_select(positions, torch.arange(T)[is_prefix]) == 0).all(), name


def test_recording_changes_no_logits():
    model, idx, values = random_model(), random_tokens(), random_values("activation")
    assert torch.equal(model(idx, prefixes=values, activations_record=[])[0], model(idx, prefixes=values)[0])


# ------------------------------------------------------------------------------------------------ what users give


@pytest.mark.parametrize(
    "shape, kind, values_shape",
    [
        ((L, P, C), "activation", (1, L, P, C)),
        ((B, L, P, C), "activation", (B, L, P, C)),
        ((L, 2, P, C), "key_value", (1, L, 2, P, C)),
        ((P, C), "prompt", (1, P, C)),
    ],
)
def test_the_shape_says_the_kind(shape, kind, values_shape):
    model, values = random_model(), torch.randn(shape)
    prefix = as_prefix(values, model, B)
    assert (prefix.kind, tuple(prefix.values.shape), prefix.rows) == (kind, values_shape, None)
    assert prefix.n_positions == P
    assert prefix.n_prefixes == values_shape[0]
    assert torch.equal(prefix.values.reshape(-1), values.reshape(-1))
    assert as_prefix(prefix, model, B) is prefix


def test_a_shape_of_two_kinds_is_refused_until_it_is_named():
    """(2, 2, P, C) for two rows and two layers is one activation prefix per row, and also a key_value prefix."""
    model, idx, values = random_model(), random_tokens(2), random_values("key_value")
    with pytest.raises(ValueError, match="one per row and also key_value"):
        model(idx, prefixes=values)
    as_key_value, as_activation = Prefix("key_value", values[None]), Prefix("activation", values)
    assert_close(model(idx, prefixes=as_key_value)[0][:, P:], reference_forward(model, idx, values, "key_value")[:, P:])
    assert_close(model(idx, prefixes=as_activation)[0][:, P:], reference_forward(model, idx, values)[:, P:])
    assert as_prefix(values, model, batch_size=3).kind == "key_value"  # not ambiguous for three rows
    three_layers = torch.randn(3, 2, P, C)
    assert as_prefix(three_layers, model, batch_size=3).kind == "activation"
    assert as_prefix(three_layers, random_model(n_layer=3), batch_size=3).kind == "key_value"


@pytest.mark.parametrize(
    "shape, message",
    [
        ((L + 1, P, C), "3 layers, the model has 2"),
        ((L, P, C + 1), "25 channels, the model has 24"),
        ((P, C - 1), "23 channels, the model has 24"),
        ((B, L + 1, P, C), "3 layers, the model has 2"),
        ((B + 1, L, P, C), "4 prefixes for 3 rows"),
        ((L, 2, P, C + 2), "26 channels, the model has 24"),
        ((C,), "of no known kind"),
        ((B, L, 2, P, C), "of no known kind"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        random_model()(random_tokens(), prefixes=torch.zeros(shape))


@pytest.mark.parametrize(
    "kind, shape, rows, message",
    [
        ("activation", (K, L, P, C), None, "3 rows cannot be shared out evenly to 4 prefixes"),
        ("activation", (K, L, P, C), 2, r"rows has shape \(2,\), expected \(3,\)"),
        ("key_value", (1, L + 1, 2, P, C), None, "3 layers, the model has 2"),
        ("key_value", (1, L, 3, P, C), None, "keys and values"),
        ("prompt", (2, P, C), None, "3 rows cannot be shared out evenly to 2 prefixes"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(kind, shape, rows, message):
    rows = None if rows is None else torch.zeros(rows, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        random_model()(random_tokens(), prefixes=Prefix(kind, torch.zeros(shape), rows))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_without_the_axis_of_prefixes_is_refused(kind):
    with pytest.raises(ValueError, match=rf"{kind} prefixes have the shape \(K, "):
        Prefix(kind, torch.zeros(SHAPES[kind]))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"'soft'.*activation, key_value, prompt"):
        Prefix("soft", torch.zeros(1, P, C))


@pytest.mark.parametrize("prefixes", [[[1.0]], "activation", 3])
def test_something_else_is_refused(prefixes):
    with pytest.raises(TypeError, match=f"got {type(prefixes).__name__}"):
        random_model()(random_tokens(), prefixes=prefixes)


def test_a_prefix_that_leaves_no_content_is_refused():
    with pytest.raises(ValueError, match="5 prefix positions leave no content in 5 tokens"):
        random_model()(random_tokens(n_tokens=P), prefixes=random_values("activation"))


# ------------------------------------------------------------------------------------------- where training starts


def test_an_initial_prefix_of_the_padding_changes_nothing():
    """It is what each block sees at P zeros, so training starts from the model as it is without a prefix."""
    model, idx = random_model(), random_tokens()
    idx[:, :P] = 0
    prefix = initial_prefix(model, P)
    assert_close(model(idx, prefixes=prefix)[0][:, P:], model(idx)[0][:, P:])
    transformer = model.transformer  # the first block sees the embeddings of a zero at each position, in their order
    assert torch.equal(prefix[0], transformer.wte.weight[0] + transformer.wpe.weight[:P])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_of_tokens_is_what_content_sees_after_them(kind):
    model, idx = random_model(), random_tokens()
    idx[:, :P] = tokens = torch.tensor([7, 2, 2, 0, 10])
    prefix = initial_prefix(model, P, tokens.tolist(), kind=kind)
    assert prefix.shape == SHAPES[kind]
    assert_close(model(idx, prefixes=prefix)[0][:, P:], model(idx)[0][:, P:])
    idx[:, :P] = 0
    assert_close(model(idx, prefixes=initial_prefix(model, P, kind=kind))[0][:, P:], model(idx)[0][:, P:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_initial_prefix_is_standard_normal(kind):
    model = random_model()
    prefixes = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        prefixes.append(initial_prefix(model, 200, "random", kind))
    prefix, again, other = prefixes
    assert prefix.mean().item() == pytest.approx(0, abs=0.1)
    assert prefix.std().item() == pytest.approx(1, rel=0.05)
    assert torch.equal(prefix, again)
    assert not torch.equal(prefix, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["padding", "random", range(P)])
def test_an_initial_prefix_is_ready_to_be_trained(init, kind):
    prefix = initial_prefix(random_model(), P, init, kind=kind)
    assert prefix.shape == SHAPES[kind]
    assert prefix.dtype == torch.float32
    assert prefix.is_leaf
    assert prefix.requires_grad


@pytest.mark.parametrize(
    ("init", "kind", "message"),
    [
        ("zeros", "activation", r"'zeros'.*padding or random"),
        ("padding", "keys", r"'keys'.*activation, key_value, prompt"),
        (range(P + 1), "activation", f"needs {P} tokens"),
        ([0, 0, 0, 0, V], "prompt", f"from 0 to {V - 1}"),
    ],
)
def test_an_unknown_initialisation_is_refused(init, kind, message):
    with pytest.raises(ValueError, match=message):
        initial_prefix(random_model(), P, init, kind=kind)


def test_a_reparametrization_begins_at_its_init_and_trains_all_its_parameters():
    init = random_values("key_value", K)
    made = Reparametrization(random_model(), init)
    assert torch.equal(made.prefix().values, init)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    for k in range(K):  # Li & Liang's network, for each position of one prefix
        for position in range(P):
            hidden = torch.tanh(made.embedding[k, position] @ made.w1[k] + made.b1[k, 0])
            expected = (hidden @ made.w2[k] + made.b2[k, 0]).view(L, 2, C) + init[k, :, :, position]
            assert_close(made.prefix().values[k, :, :, position], expected)
    (made.prefix().values[1] ** 2).sum().backward()
    for parameter in made.parameters():  # each prefix has a network of its own
        assert [bool(row.abs().sum() > 0) for row in parameter.grad] == [False, True, False, False]


# ------------------------------------------------------------------------------------------------------ algebra


@pytest.mark.parametrize("kind", ["activation", "key_value"])
def test_a_concatenation_in_the_place_of_one_is_attended_to_whole(kind):
    """It is the naive splice in a model whose positions are moved up: the content stays where it was."""
    model, values = random_model(), random_values(kind, 2)
    longer = random_model(block_size=13 + P)
    weights, name = model.state_dict(), "transformer.wpe.weight"
    longer.load_state_dict(weights | {name: torch.cat([weights[name][:P], weights[name]])})
    idx = random_tokens()
    both = concatenate(list(values), n_placeholders=P)
    assert (both.n_positions, both.n_placeholders) == (2 * P, P)
    expected = reference_forward(longer, F.pad(idx, (P, 0)), torch.cat(list(values), dim=-2), kind)
    assert_close(model(idx, prefixes=both)[0][:, P:], expected[:, 2 * P :])
    turned = concatenate([values[1], Prefix(kind, values[:1])], n_placeholders=P)  # attention does not see their order
    assert_close(model(idx, prefixes=turned)[0][:, P:], expected[:, 2 * P :])
    prompt = idx[:, : P + 4]
    expected = reference_generate(longer, F.pad(prompt, (P, 0)), 4, torch.cat(list(values), dim=-2), kind)
    assert torch.equal(model.generate(prompt, 4, prefixes=both), expected[:, P:])
    assert not torch.equal(model.generate(prompt, 4, prefixes=values[0]), expected[:, P:])
    beams, _ = beam_search(longer, F.pad(prompt, (P, 0)), 4, n_beams=3, prefixes=concatenate(list(values)))
    assert torch.equal(beam_search(model, prompt, 4, n_beams=3, prefixes=both)[0], beams[:, :, P:])


def test_rows_keep_the_placeholders_of_their_concatenations():
    model, values, idx = random_model(), random_values("activation", 2), random_tokens()
    parts = [Prefix("activation", values), Prefix("activation", values.flip(0)[:, :, :2])]
    both = concatenate(parts, n_placeholders=P)
    rows = torch.tensor([1, 0, 1])
    found = model(idx, prefixes=replace(both, rows=rows))[0]
    for row, k in enumerate(rows.tolist()):
        one = concatenate([values[k], values[1 - k, :, :2]], n_placeholders=P)
        assert_close(found[row], model(idx[row : row + 1], prefixes=one)[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_and_average(kind):
    first, second = random_values(kind, 2)
    assert torch.equal(interpolate(first, second, 0.0).values[0], first)
    assert torch.equal(interpolate(first, second, 1.0).values[0], second)
    assert_close(interpolate(first, second, 0.25).values[0], 0.75 * first + 0.25 * second)
    assert_close(average([first, second]).values, interpolate(first, second, 0.5).values)
    assert average([first, second]).kind == kind


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: average([]), "at least one"),
        (lambda: concatenate([random_values("activation"), random_values("prompt")]), "same kind"),
        (lambda: concatenate([random_values("activation"), random_values("activation")[:1]]), "same shape but for P"),
        (lambda: interpolate(random_values("prompt"), random_values("prompt")[:2], 0.5), "same shape"),
        (lambda: average([torch.zeros(3)]), "no known kind"),
    ],
)
def test_prefixes_that_do_not_go_together_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("combine", [lambda one, other: interpolate(one, other, 0.5), lambda *both: average(both)])
def test_interpolation_and_average_keep_rows_and_placeholders(combine):
    values, rows = random_values("activation", 4).view(2, 2, L, P, C), torch.tensor([1, 0, 1])
    one, other = (Prefix("activation", each, rows, n_placeholders=2 * P) for each in values)
    mixed = combine(one, other)
    assert torch.equal(mixed.rows, rows)
    assert mixed.n_placeholders == 2 * P
    with pytest.raises(ValueError, match="same rows"):
        combine(one, replace(other, rows=rows.flip(0)[[0, 0, 1]]))
    with pytest.raises(ValueError, match="same rows"):
        combine(one, replace(other, rows=None))
    with pytest.raises(ValueError, match="number of placeholders"):
        combine(one, replace(other, n_placeholders=P))


def test_a_concatenation_keeps_rows_and_adds_placeholders_up():
    values, rows = random_values("key_value", 2), torch.tensor([1, 0, 1])
    one = Prefix("key_value", values, rows, n_placeholders=2)
    both = concatenate([one, Prefix("key_value", values, rows)])
    assert torch.equal(both.rows, rows)
    assert (both.n_positions, both.n_placeholders) == (2 * P, 2 + P)
    with pytest.raises(ValueError, match="same rows"):
        concatenate([one, Prefix("key_value", values)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_initial_prefix_does_not_depend_on_the_models_mode(kind):
    model = random_model(embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)
    expected = initial_prefix(model, P, kind=kind)
    model.train()
    assert torch.equal(initial_prefix(model, P, kind=kind), expected)
    assert all(module.training for module in model.modules())
    prompt = random_values("prompt")
    assert torch.equal(as_key_value(model, prompt), as_key_value(model.eval(), prompt))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda values: Prefix("activation", values.long()), r"floating dtype, got .* of torch.int64"),
        (lambda values: Prefix("activation", values, torch.tensor([0, 2])), r"from 0 to 1, .*\[0, 2\]"),
        (lambda values: Prefix("activation", values, torch.tensor([-1, 0])), "from 0 to 1"),
        (lambda values: Prefix("activation", values, torch.tensor([0.0, 1.0])), "int64 .* got torch.float32"),
        (lambda values: Prefix("activation", values, torch.zeros(2, 2, dtype=torch.int64)), r"shape \(2, 2\)"),
        (lambda values: Prefix("activation", values, torch.zeros(2, dtype=torch.int64, device="meta")), "on meta"),
        (
            lambda values: random_model()(random_tokens(2), prefixes=values[0].to("meta")),
            "is on meta, the model on cpu",
        ),
        (lambda values: random_model()(random_tokens(2), prefixes=values[0].long()), "floating dtype"),
    ],
)
def test_values_and_rows_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(random_values("activation", 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefixes_of_some_rows(kind):
    values = random_values(kind, 3)
    prefix, indices = Prefix(kind, values, n_placeholders=7), torch.tensor([5, 0, 2])
    assert prefix.for_rows(indices, 6).rows.tolist() == [2, 0, 1]
    assert prefix.for_rows(slice(1, 4), 6).rows.tolist() == [0, 1, 1]
    assert prefix.for_rows(indices, 6).n_placeholders == 7
    explicit = replace(prefix, rows=torch.tensor([2, 2, 1, 0, 0, 1]))
    assert explicit.for_rows(indices, 6).rows.tolist() == [1, 2, 1]
    one = Prefix(kind, values[:1], torch.zeros(6, dtype=torch.int64))
    one.for_rows(slice(0, 2), 6).check(random_model(), 2)


def test_prefixes_are_compared_by_identity():
    """Their tensors have no single truth value."""
    values = random_values("activation", 2)
    one = Prefix("activation", values)
    assert one == one
    assert one != Prefix("activation", values)


# ------------------------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close(kind):
    """As in test_model: bfloat16 keeps 8 bits, so logits are off by about a percent, and gradients by a few."""
    model, idx, targets = random_model(), random_tokens(), random_targets()
    values = random_values(kind).requires_grad_()
    expected, expected_loss = model(idx, targets, prefixes=values)
    record = []
    with autocast("bfloat16", "cpu"):
        logits, loss = model(idx, targets, prefixes=values, activations_record=record)
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02)
    assert all(tensor.dtype == torch.float32 for _, tensor in record)
    (gradient,) = torch.autograd.grad(loss, values)
    (exact,) = torch.autograd.grad(expected_loss, values)
    assert gradient.dtype == torch.float32
    assert (gradient - exact).norm() < 0.1 * exact.norm()
