"""Automata: their language is the one that brute force finds, and what is said of completions is so.

Legend: S states, V vocabulary, N a length in tokens.
"""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mingpt.decoding.automata import DFA, PDA, POP, STAY

LETTERS = "abcd"

EXPRESSIONS = [
    "a*",
    "a*b*c*d*",
    "(ab)+",
    "a(b|c)*d",
    "(a|b)*c(a|b)*",
    "a?b?c?d?",
    "(a|b|c|d)(a|b|c|d)",
    "(aa|bb)*(cd)?",
    "a{2}b{1,3}",
    "((a|b)(c|d))*",
    "(a*b)*|c+d",
    "(a|b|c|d)*abba",
    "d(a|(b(c|d)*b))+",
]
"""Regular expressions as both Python's re and this package read them, over the letters a to d."""


def all_strings(n_tokens, vocab_size=4):
    """(V ** N, N) of int64, each string of that length."""
    strings = torch.tensor(list(itertools.product(range(vocab_size), repeat=n_tokens)), dtype=torch.int64)
    return strings.view(vocab_size**n_tokens, n_tokens)


def matches(expression, strings):
    """Whether Python's re matches each string whole, (B,) of bool."""
    pattern = re.compile(expression)
    return torch.tensor(
        [pattern.fullmatch("".join(LETTERS[token] for token in row)) is not None for row in strings.tolist()]
    )


# ------------------------------------------------------------------------------------------------- finite automata


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 5, 6])
def test_a_regular_expression_accepts_what_pythons_does(expression, n_tokens):
    strings = all_strings(n_tokens)
    assert torch.equal(DFA.from_regex(expression, 4, LETTERS).accepts(strings), matches(expression, strings))


regular_expressions = st.recursive(
    st.sampled_from([*LETTERS, "(a|b)", "[ac]", "[^b]"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: f"{pair[0]}{pair[1]}"),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        inner.map(lambda each: f"({each})*"),
        inner.map(lambda each: f"({each})?"),
        inner.map(lambda each: f"({each}){{1,2}}"),
    ),
    max_leaves=6,
)
"""In the syntax that Python's re shares; within brackets the names of tokens have spaces between them."""


def as_ours(expression):
    """Within brackets this package has spaces between names."""
    return re.sub(r"\[(\^?)(\w)(\w?)\]", r"[\1\2 \3]", expression)


@given(expression=regular_expressions, other=regular_expressions)
@settings(max_examples=60, deadline=None)
def test_random_expressions_and_their_algebra(expression, other):
    one, two = (DFA.from_regex(as_ours(each), 4, LETTERS) for each in (expression, other))
    for n_tokens in range(5):
        strings = all_strings(n_tokens)
        first, second = matches(expression, strings), matches(other, strings)
        assert torch.equal(one.accepts(strings), first)
        assert torch.equal((one & two).accepts(strings), first & second)
        assert torch.equal((one | two).accepts(strings), first | second)
        assert torch.equal((~one).accepts(strings), ~first)


@given(expression=regular_expressions)
@settings(max_examples=30, deadline=None)
def test_equal_languages_have_equal_minimal_tables(expression):
    one = DFA.from_regex(as_ours(expression), 4, LETTERS)
    same = (~~one | one) & ~(one & ~one)
    assert torch.equal(same.next, one.next)
    assert torch.equal(same.is_accepting, one.is_accepting)


@given(expression=regular_expressions)
@settings(max_examples=30, deadline=None)
def test_completable_counts_the_tokens_to_acceptance(expression):
    dfa = DFA.from_regex(as_ours(expression), 4, LETTERS)
    away = dfa.completable(4)  # (N + 1, S)
    for n_tokens in range(5):
        assert away[n_tokens, 0] == dfa.accepts(all_strings(n_tokens)).any()
    for token in range(4):  # a state is as far away as the best of what follows it, plus one
        assert (away[1:, :] | ~away[:-1, dfa.next[:, token]]).all()


def test_tokens_are_numbers_names_classes_and_any():
    dfa = DFA.from_regex("3 10 [1 4-6] [^0-11] .", 13)
    assert dfa.accepts(
        torch.tensor([[3, 10, 5, 12, 0], [3, 10, 4, 12, 12], [3, 10, 7, 12, 0], [3, 1, 5, 12, 0]])
    ).equal(torch.tensor([True, True, False, False]))
    names = ["(", ")", "and", "x1"]
    assert DFA.from_regex('"(" x1 (and x1)* ")"', 4, names).accepts(torch.tensor([[0, 3, 2, 3, 1]])).all()
    both = DFA.from_regex("(1*2*)&(.{3})", 3)
    assert both.accepts(all_strings(3, 3)).sum() == 4
    assert not both.accepts(all_strings(2, 3)).any()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("[1-3]", [1, 2, 3]),
        ("[1 - 3]", [1, 2, 3]),
        ("[ 1 -3  5 ]", [1, 2, 3, 5]),
        ("[4-4]", [4]),
        ("[^ 0-2 4 ]", [3, 5]),
    ],
)
def test_ranges_may_have_spaces(expression, expected):
    assert DFA.from_regex(expression, 6).accepts(torch.arange(6)[:, None]).nonzero().flatten().tolist() == expected


def test_names_that_are_no_words_are_quoted_within_brackets_too():
    names = ["+", "]", "1", "2"]
    for expression, expected in (('[^"+"]', [1, 2, 3]), ('["+"-"]" 2]', [0, 1, 3]), ('["]"1]', [1, 2])):
        accepted = DFA.from_regex(expression, 4, names).accepts(torch.arange(4)[:, None])
        assert accepted.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    "expression, message",
    [
        ("(1 2", "does not parse"),
        ("1 | | 2", "does not parse"),
        ("* 1", "does not parse"),
        ("1 $ 2", r"does not parse at '\$ 2'"),
        ("1 13", "'13', which is no token from 0 to 12"),
        ("1 x", "'x', which is no token"),
        ("2 []", r"does not parse at '\[\]'"),
        ("[^]", r"does not parse at '\[\^\]'"),
        ("[^+]", r"does not parse at '\[\^\+\]'; a name that is no word is quoted"),
        ("[1 3-]", r"does not parse at '\[1 3-\]'"),
        ("[1-3-5]", "does not parse"),
        ("[1, 2]", "does not parse"),
        ("[-1]", "does not parse"),
        ("1{2,x}", r"does not parse at '\{2,x\}'"),
        ("[5-3 7]", "descending range; write the lower token first"),
        ("[7 5 - 3]", "descending range"),
        ("[1-13]", "'13', which is no token"),
    ],
)
def test_an_expression_that_makes_no_sense_is_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        DFA.from_regex(expression, 13)


def test_a_class_that_no_token_matches_matches_nothing():
    dfa = DFA.from_regex("[^0-2] | 1", 3)
    assert dfa.accepts(torch.arange(3)[:, None]).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("shape", "n_accepting"), [((3,), 3), ((3, 2, 2), 3), ((3, 2), 2), ((0, 2), 0), ((3, 0), 3), ((), 1)]
)
def test_a_table_of_another_shape_is_refused(shape, n_accepting):
    table, is_accepting = torch.zeros(shape, dtype=torch.int64), torch.ones(n_accepting, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must be \(S, V\) and \(S,\)"):
        DFA(table, is_accepting)
    of_a_pda = table if n_accepting != 3 else table[..., :1]
    with pytest.raises(ValueError, match=r"must be \(S, G \+ 1, V\) and is_accepting \(S,\)"):
        PDA(of_a_pda, table, is_accepting)


def test_an_unknown_token_is_refused():
    dfa, pda = DFA.from_regex("2", 3), PDA.balanced([(0, 2)], 3)
    for make in (
        lambda: PDA.balanced([(0, -1)], 3),
        lambda: dfa.accepts(torch.tensor([[-1]])),
        lambda: pda.accepts(torch.tensor([[0, -1]])),
    ):
        with pytest.raises(ValueError, match="tokens go from 0 to 2 in this vocabulary, got -1"):
            make()
    with pytest.raises(ValueError, match="tokens go from 0 to 2 in this vocabulary, got 3"):
        dfa.accepts(torch.tensor([[3]]))


# --------------------------------------------------------------------------------------------- pushdown automata


def is_balanced(row, pairs):
    stack = []
    for token in row:
        if token in dict(pairs):
            stack.append(dict(pairs)[token])
        elif not stack or stack.pop() != token:
            return False
    return not stack


def is_expression(row):
    """By Python's own parser: token 0 is a digit, 1 an operator that cannot be a sign, 2 and 3 brackets."""
    text = "".join(["7", "%", "(", ")"][token] for token in row)
    if re.search(r"7\(|\)7|77|\(\)|\)\(", text):  # numbers of two digits, calls, tuples
        return False
    try:
        compile(text, "", "eval")
    except SyntaxError:
        return False
    return bool(text)


def is_same_number(row):
    """A number of 0s, then as many 1s, with any 2s between them."""
    n = row.count(0)
    return row.count(3) == 0 and row.count(1) == n and row == [0] * n + [2] * row.count(2) + [1] * n


def pda_of(moves, states, accepting, vocab_size, depth=16):
    """A PDA of one stack symbol from its moves (state, token, tops, new state, action); the first state is its start.

    ``tops`` says on which tops the move is possible: 0 is an empty stack, 1 the symbol.
    """
    following = torch.full((len(states), 2, vocab_size), -1)
    actions = torch.full_like(following, STAY)
    for state, token, tops, target, action in moves:
        for top in tops:
            following[states.index(state), top, token] = states.index(target)
            actions[states.index(state), top, token] = action
    return PDA(following, actions, torch.tensor([state in accepting for state in states]), depth)


def expressions(digits, operators, brackets, vocab_size):
    """Operands of one digit or in brackets, with an operator between two of them."""
    opening, closing = brackets
    moves = [
        *(("operand", digit, (0, 1), "after", STAY) for digit in digits),
        *(("after", operator, (0, 1), "operand", STAY) for operator in operators),
        ("operand", opening, (0, 1), "operand", 1),
        ("after", closing, (1,), "after", POP),
    ]
    return pda_of(moves, ["operand", "after"], ["after"], vocab_size)


def same_number(depth=16):
    moves = [
        ("first", 0, (0, 1), "first", 1),
        ("first", 2, (0, 1), "middle", STAY),
        ("middle", 2, (0, 1), "middle", STAY),
        *((state, 1, (1,), "last", POP) for state in ("first", "middle", "last")),
    ]
    states = ["first", "middle", "last"]
    return pda_of(moves, states, states, 4, depth)


LANGUAGES = {
    "one bracket": (PDA.balanced([(0, 1)], 4), lambda row: is_balanced(row, [(0, 1)])),
    "two brackets": (PDA.balanced([(0, 1), (2, 3)], 4), lambda row: is_balanced(row, [(0, 1), (2, 3)])),
    "expressions": (expressions([0], [1], (2, 3), 4), is_expression),
    "same number": (same_number(), is_same_number),
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 6, 7])
def test_a_pushdown_automaton_accepts_what_brute_force_does(language, n_tokens):
    pda, is_member = LANGUAGES[language]
    strings = all_strings(n_tokens)
    assert pda.accepts(strings).tolist() == [is_member(row) for row in strings.tolist()]
    assert pda.completable(8)[1][0, n_tokens] == pda.accepts(strings).any()


def test_what_needs_a_deeper_stack_is_refused():
    shallow, deep = PDA.balanced([(0, 1)], 2, depth=2), PDA.balanced([(0, 1)], 2, depth=3)
    deepest = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1]])
    assert shallow.accepts(deepest).tolist() == [False, True]
    assert deep.accepts(deepest).tolist() == [True, True]
    assert same_number(depth=2).completable(8)[1][0].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 1]
    moves = [("in", 0, (0, 1), "in", 1), ("in", 1, (1,), "out", POP), ("out", 1, (1,), "out", POP)]
    only_brackets = pda_of(moves, ["in", "out"], ["out"], 2, depth=2)
    assert only_brackets.completable(8)[1][0].tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "target, action, depth",
    [(2, STAY, 16), (0, 2, 16), (0, -2, 16), (0, POP, 16), (0, STAY, 0)],
    ids=["no state", "no symbol", "no action", "pops from an empty stack", "no depth"],
)
def test_moves_that_make_no_sense_are_refused(target, action, depth):
    following, move = torch.full((2, 2, 3), -1), torch.zeros(2, 2, 3, dtype=torch.int64)
    following[0, 0, 1], move[0, 0, 1] = target, action
    with pytest.raises(ValueError, match=r"a move goes beyond them .*: 2 states, 1 stack symbols and depth = "):
        PDA(following, move, torch.tensor([True, False]), depth)


@pytest.mark.parametrize("pairs", [[(0, 1), (0, 2)], [(1, 1)], [(0, 1), (1, 2)]])
def test_brackets_that_are_the_same_token_are_refused(pairs):
    with pytest.raises(ValueError, match="brackets must be different tokens"):
        PDA.balanced(pairs, 3)


def test_automata_over_different_vocabularies_are_not_combined():
    one, other = DFA.from_regex("1*", 3), DFA.from_regex("1*", 4)
    for combine in (lambda: one & other, lambda: one | other):
        with pytest.raises(ValueError, match="automata over 3 and 4 tokens cannot be combined"):
            combine()
