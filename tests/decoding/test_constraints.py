"""Constraints: the masks allow exactly the language, and whatever is generated under them is in it, whole.

Legend: B batch, T tokens of the prompt, N tokens to generate, V vocabulary.
"""

import functools
import itertools
import re

import numpy as np
import pytest
import torch
from properties import check_processor_laws
from reference import random_model
from test_automata import (
    EXPRESSIONS,
    LANGUAGES,
    LETTERS,
    all_strings,
    as_ours,
    expressions,
    is_balanced,
    is_expression,
    matches,
)

from mingpt.decoding.automata import DFA, PDA
from mingpt.decoding.constraints import MonotoneConstraint, MultisetConstraint, PushdownConstraint, RegularConstraint
from mingpt.decoding.generation import beam_search, generate
from mingpt.decoding.logits_processors import Context
from mingpt.prefix import Prefix
from mingpt.training.precision import autocast

T, V, N_NEW = 8, 11, 5  # V is random_model's


def random_prompts(n_rows, seed=1, n_tokens=T, high=V):
    return torch.randint(high, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def are_allowed(constraint, strings, prompt=None):
    """Whether the masks allow each token of each string (B, N) in its turn, (B,) of bool."""
    batch, n_new = strings.shape
    tokens = torch.zeros(batch, 1, dtype=torch.int64) if prompt is None else prompt
    n_prompt, result = tokens.shape[1], torch.ones(batch, dtype=torch.bool)
    state = constraint.init(Context(tokens, n_prompt, n_new, constraint.vocab_size))
    for step in range(n_new):
        state, allowed = constraint.allowed(state, Context(tokens, n_prompt, n_new, constraint.vocab_size))
        assert allowed[result].any(dim=1).all()  # what is begun can be ended
        # A row that has left the language goes on with any token that would be allowed, or none would be left to it.
        result &= allowed.gather(1, strings[:, step, None])[:, 0]
        taken = torch.where(result, strings[:, step], allowed.int().argmax(dim=1))
        tokens = torch.cat([tokens, taken[:, None]], dim=1)
    return result


def assert_masks_are_the_language(make, automaton, members, strings):
    constraint, n_tokens = make(automaton), strings.shape[1]
    constraint.vocab_size = automaton.vocab_size
    if members.any():
        parts = [are_allowed(constraint, part) for part in strings.split(100_000)]
        assert torch.equal(torch.cat(parts), members)
        return
    with pytest.raises(ValueError, match=f"accepts nothing of {n_tokens} tokens"):
        constraint.init(Context(torch.zeros(1, 1, dtype=torch.int64), 1, n_tokens, automaton.vocab_size))


# ------------------------------------------------------------------------------------------- exactly the language


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_masks_of_an_expression_are_its_language(expression):
    """All 87,380 strings of up to eight tokens."""
    dfa = DFA.from_regex(expression, 4, LETTERS)
    for n_tokens in range(1, 9):
        strings = all_strings(n_tokens)
        assert_masks_are_the_language(RegularConstraint, dfa, matches(expression, strings), strings)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_masks_of_a_pushdown_automaton_are_its_language(language):
    pda, is_member = LANGUAGES[language]
    for n_tokens in range(1, 9):
        strings = all_strings(n_tokens)
        members = torch.tensor([is_member(row) for row in strings.tolist()])
        assert_masks_are_the_language(PushdownConstraint, pda, members, strings)


TEN_LETTERS = "abcdefghij"
TEN_EXPRESSIONS = [
    "a*[b-d]+[e-j]?",
    "[a-e]*[f-j]+",
    "(a[a-j])*",
    "[^a]*a[^a]*",
    "(a|bc|def)*",
    "[a-j]?[b-j]{2}(ab)*",
    "((a|b)(c|d|e))*[f-j]{0,3}",
    "j+i*h+|(ab)*c?",
    "[a-j]*ab[a-j]*",
    "(a(b(cd)*e)*f)*|[g-j]+",
]
TEN_LANGUAGES = {
    "three brackets": (
        PDA.balanced([(0, 1), (2, 3), (4, 5)], 10),
        lambda row: is_balanced(row, [(0, 1), (2, 3), (4, 5)]),
    ),
    "shallow": (PDA.balanced([(0, 9)], 10, depth=2), lambda row: is_balanced(row, [(0, 9)]) and row[:3] != (0, 0, 0)),
    "expressions": (expressions([0, 4, 5, 6], [1, 7], (2, 3), 10), lambda row: is_ten_expression(row)),
}


def is_ten_expression(row):
    kinds = {**dict.fromkeys((0, 4, 5, 6), 0), **dict.fromkeys((1, 7), 1), 2: 2, 3: 3}
    return all(token in kinds for token in row) and is_expression([kinds[token] for token in row])


@functools.cache
def strings_of_ten(n_tokens):
    """All strings of that length over ten tokens, as tokens and as letters."""
    rows = list(itertools.product(range(10), repeat=n_tokens))
    return torch.tensor(rows), rows, list(map("".join, itertools.product(TEN_LETTERS, repeat=n_tokens)))


@pytest.mark.slow
@pytest.mark.parametrize("expression", TEN_EXPRESSIONS)
def test_the_masks_over_ten_tokens(expression):
    """All 1,111,110 strings of up to six tokens."""
    dfa, pattern = DFA.from_regex(as_ours(expression), 10, TEN_LETTERS), re.compile(expression)
    for n_tokens in range(1, 7):
        tokens, _, texts = strings_of_ten(n_tokens)
        members = torch.tensor([pattern.fullmatch(text) is not None for text in texts])
        assert_masks_are_the_language(RegularConstraint, dfa, members, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("language", TEN_LANGUAGES)
def test_the_masks_of_a_pushdown_automaton_over_ten_tokens(language):
    pda, is_member = TEN_LANGUAGES[language]
    for n_tokens in range(1, 7):
        tokens, rows, _ = strings_of_ten(n_tokens)
        members = torch.tensor([is_member(row) for row in rows])
        assert_masks_are_the_language(PushdownConstraint, pda, members, tokens)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [2, 6, 8])
def test_the_masks_know_how_deep_the_stack_is(depth, n_tokens):
    pda = PDA.balanced([(0, 1), (2, 3)], 4, depth)
    strings = all_strings(n_tokens)
    assert_masks_are_the_language(PushdownConstraint, pda, pda.accepts(strings), strings)


def test_permutations_and_sorted_rows():
    strings = all_strings(4)
    prompt = torch.tensor([[3, 3, 1, 0, 2, 1, 1]]).expand(len(strings), -1)
    permutation = MultisetConstraint()
    permutation.vocab_size = 4
    expected = (strings.sort(dim=1).values == torch.tensor([0, 1, 1, 2])).all(dim=1)
    assert torch.equal(are_allowed(permutation, strings, prompt), expected)
    for is_descending in (False, True):
        monotone = MonotoneConstraint(is_descending)
        monotone.vocab_size = 4
        expected = (strings.sort(dim=1, descending=is_descending).values == strings).all(dim=1)
        assert torch.equal(are_allowed(monotone, strings), expected)


def test_a_permutation_is_of_the_content_without_placeholders():
    """With a prefix of three positions, its placeholders are no tokens that could be used; without one they are."""
    prompts = torch.cat([torch.zeros(6, 3, dtype=torch.int64), random_prompts(6, n_tokens=4) % (V - 1) + 1], dim=1)
    prefix = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    model, permutation = random_model(block_size=20), MultisetConstraint()
    tokens = generate(model, prompts, 4, logits_processors=[permutation], prefixes=prefix)
    assert torch.equal(tokens[:, 7:].sort(dim=1).values, prompts[:, 3:].sort(dim=1).values)
    with pytest.raises(ValueError, match="5 tokens cannot be a permutation of a prompt of 4, placeholders aside"):
        generate(model, prompts, 5, logits_processors=[permutation], prefixes=prefix)
    padded = generate(model, prompts, 7, logits_processors=[permutation])  # without a prefix padding is content
    assert torch.equal(padded[:, 7:].sort(dim=1).values, prompts.sort(dim=1).values)


def test_a_monotone_row_may_begin_anywhere():
    """Neither the prompt nor placeholders bound the first token."""
    prompts = torch.tensor([[0, 0, 5], [0, 0, 9]])
    for n_placeholders in (0, 2):
        _, allowed = MonotoneConstraint().allowed({}, Context(prompts, 3, 2, V, n_placeholders=n_placeholders))
        assert allowed.all()


def test_nothing_to_generate_is_a_permutation_of_nothing():
    state = MultisetConstraint().init(Context(random_prompts(2), T, 0, V))
    assert not state["counts"].any()


def constraints(n_new=N_NEW):
    """Constraints over V tokens whose languages have members of 6 tokens, and how to check one."""
    ends = DFA.from_regex("1* (2|3) (4 5)* 0*", V)
    return {
        "expression": (RegularConstraint(DFA.from_regex("1* (2|3)+ [5-9]*", V)), None),
        "ended": (RegularConstraint(ends), lambda rows, _: ends.accepts(rows).all()),
        "brackets": (
            PushdownConstraint(PDA.balanced([(1, 2), (3, 4)], V)),
            lambda rows, _: all(is_balanced(row, [(1, 2), (3, 4)]) for row in rows.tolist()),
        ),
        "shallow": (PushdownConstraint(PDA.balanced([(1, 2), (3, 4)], V, depth=2)), None),
        "arithmetic": (PushdownConstraint(expressions([1, 2, 3, 9], [4, 5], (6, 7), V)), None),
        "permutation": (
            MultisetConstraint(),
            lambda rows, given: torch.equal(rows.sort(dim=1).values, given.sort(dim=1).values),
        ),
        "ascending": (MonotoneConstraint(), lambda rows, _: (rows.diff(dim=1) >= 0).all()),
        "descending": (MonotoneConstraint(is_descending=True), lambda rows, _: (rows.diff(dim=1) <= 0).all()),
    }


def is_in_language(name, rows, given):
    constraint, check = constraints()[name]
    automaton = getattr(constraint, "dfa", None) or getattr(constraint, "pda", None)
    return bool(check(rows, given) if check else automaton.accepts(rows).all())


LENGTH = {name: 5 if name == "arithmetic" else 6 for name in constraints()}


@pytest.mark.parametrize("name", constraints())
def test_the_laws(name):
    check_processor_laws(constraints()[name][0], vocab_size=V, n_new=LENGTH[name])


@pytest.mark.parametrize("name", constraints())
def test_ten_thousand_samples_are_in_the_language(name):
    """Of an untrained model, whose own choices hardly ever are."""
    n_new = LENGTH[name]
    model, prompts = random_model(block_size=T + n_new), random_prompts(10_000)
    free = generate(model, prompts, n_new, do_sample=True, seed=0)[:, T:]
    assert not is_in_language(name, free, prompts[:, -n_new:])
    tokens = generate(model, prompts, n_new, do_sample=True, seed=0, logits_processors=[constraints()[name][0]])[:, T:]
    assert is_in_language(name, tokens, prompts[:, -n_new:])
    assert len(tokens.unique(dim=0)) > 3


@pytest.mark.parametrize("name", constraints())
@pytest.mark.parametrize("form", ["alone", "prefix", "prefix a row", "after a function", "bfloat16", "beams"])
def test_a_constraint_holds_in_every_way_of_decoding(name, form):
    n_new, constraint = LENGTH[name], constraints()[name][0]
    model, prompts = random_model(block_size=T + n_new), random_prompts(6)
    values = torch.randn(6, 2, 2, 24, generator=torch.Generator().manual_seed(0))
    options = {
        "prefix": {"prefixes": values[0]},
        "prefix a row": {"prefixes": Prefix("activation", values[:3], torch.tensor([0, 2, 1, 1, 0, 2]))},
    }.get(form, {})
    processors = [lambda _, logits: logits / 2, constraint] if form == "after a function" else [constraint]
    if form == "beams":
        tokens, scores = beam_search(model, prompts, n_new, 3, logits_processors=processors)
        is_found = ~scores.isneginf()
        given = prompts[:, None, -n_new:].expand(-1, 3, -1)[is_found]
        assert is_in_language(name, tokens[is_found][:, T:], given)
        return
    with autocast("bfloat16" if form == "bfloat16" else "float32", "cpu"):
        tokens = generate(model, prompts, n_new, logits_processors=processors, **options)
    assert is_in_language(name, tokens[:, T:], prompts[:, -n_new:])


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_language_without_the_needed_length_is_refused():
    model, prompts = random_model(), random_prompts(2)
    for constraint, message in (
        (
            RegularConstraint(DFA.from_regex("(1 2)*", V)),
            "nothing of 5 tokens; the first lengths that it accepts: 0, 2, 4, 6, 8, 10",
        ),
        (RegularConstraint(DFA.from_regex("1 2", V)), "nothing of 5 tokens; the first lengths that it accepts: 2"),
        (RegularConstraint(DFA.from_regex("1 & 2", V)), "the first lengths that it accepts: none up to 64"),
        (
            PushdownConstraint(PDA.balanced([(1, 2)], V)),
            "nothing of 5 tokens; the first lengths that it accepts: 0, 2, 4",
        ),
        (RegularConstraint(DFA.from_regex("1*", V + 1)), f"knows {V + 1} tokens, the model has {V}"),
        (PushdownConstraint(PDA.balanced([(1, 2)], 3)), f"knows 3 tokens, the model has {V}"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, N_NEW, logits_processors=[constraint])
    with pytest.raises(ValueError, match="9 tokens cannot be a permutation of a prompt of 8"):
        generate(model, prompts, 9, logits_processors=[MultisetConstraint()])


def test_constraints_that_contradict_each_other_say_where():
    model, prompts = random_model(), torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    late = RegularConstraint(DFA.from_regex(". 1 .", V))
    with pytest.raises(
        ValueError, match=r"row 0 at step 1, after \[2\].*processors: RegularConstraint, RegularConstraint"
    ):
        generate(model, prompts, 3, logits_processors=[RegularConstraint(DFA.from_regex("2 3 .", V)), late])


def test_what_rows_share_is_not_repeated_for_each():
    """An automaton's tables have the size of the automaton, whatever the batch."""
    for constraint in (constraints()["expression"][0], constraints()["brackets"][0]):
        small, large = (constraint.init(Context(random_prompts(n_rows), T, 6, V)) for n_rows in (1, 100))
        shared, same = small.pop("shared"), large.pop("shared")
        assert sorted(small) in (["state"], ["level", "levels", "stack", "state"])
        assert all((len(small[name]), len(large[name])) == (1, 100) for name in small)
        assert all(np.array_equal(shared[name], same[name]) for name in shared)
