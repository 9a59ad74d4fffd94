"""Every table that fits a small interpreter is run."""

from __future__ import annotations

import itertools

import pytest
import torch

from mingpt.analysis.constructions import function_interpreter, sequence_interpreter, virtual_tokens


def every_table(vocab_size, n_gates):
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=n_gates)))


@pytest.mark.parametrize(("vocab_size", "length"), [(2, 7), (4, 4), (10, 3), (3, 1)])
def test_one_virtual_token_makes_it_generate_any_sequence(vocab_size, length):
    model, tables = sequence_interpreter(vocab_size, length), every_table(vocab_size, length)
    for start in (0, vocab_size - 1):
        prompts = torch.full((len(tables), 2), start)
        generated = model.generate(prompts, length, prefixes=virtual_tokens(model, tables))
        assert torch.equal(generated[:, 2:], tables)
    logits, _ = model(torch.zeros(1, 2, dtype=torch.int64), prefixes=virtual_tokens(model, tables[:1]))
    assert logits[0, 1].tolist() == pytest.approx([1.0] + [0.0] * (vocab_size - 1), abs=1e-5)  # no close call


@pytest.mark.parametrize("vocab_size", [2, 3, 5])
def test_one_virtual_token_makes_it_compute_any_function(vocab_size):
    model, tables = function_interpreter(vocab_size), every_table(vocab_size, vocab_size)
    for token in range(vocab_size):
        prompts = torch.tensor([[0, token]]).expand(len(tables), -1)
        generated = model.generate(prompts, 1, prefixes=virtual_tokens(model, tables))
        assert torch.equal(generated[:, 2], tables[:, token])


def test_the_weights_do_not_know_the_virtual_tokens():
    """Nothing but the prefix differs; with none, all tokens are equally likely."""
    model = function_interpreter(4)
    logits, _ = model(torch.tensor([[0, 2]]))
    assert logits.max() - logits.min() < 1e-5


@pytest.mark.parametrize("tables", [torch.zeros(2, 3), torch.tensor([[0, 1, 2, 4]]), torch.tensor([0, 1, 2, 3])])
def test_tables_that_do_not_fit_are_refused(tables):
    with pytest.raises(ValueError, match=r"must be \(K, 4\) tokens from 0 to 3, got"):
        virtual_tokens(function_interpreter(4), tables.long())
