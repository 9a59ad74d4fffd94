"""Grammars by llguidance: they keep the properties, and agree with the automata on regular languages."""

import json
import re

import pytest
import torch
from properties import check_processor_laws
from reference import random_model
from test_automata import EXPRESSIONS, LETTERS, all_strings

from mingpt.decoding.automata import DFA
from mingpt.decoding.generation import beam_search, generate
from mingpt.decoding.grammar import GrammarConstraint, tokenizer_of
from mingpt.decoding.logits_processors import Context

END, V = 10, 11  # V is random_model's
T = 8
SPELLINGS = ["0", "1", "2", "3", "4", "+", "*", "(", ")", "12", "end"]

LARK = """
start: term (("+" | "*") term)*
term: NUMBER | "(" start ")"
NUMBER: /[0-4]{1,2}/
"""


def random_prompts(n_rows, seed=1):
    return torch.randint(V, (n_rows, T), generator=torch.Generator().manual_seed(seed))


def texts(tokens):
    """The text of each row up to its end token, None where it has none."""
    rows = [row[: row.index(END)] if END in row else None for row in tokens.tolist()]
    return [None if row is None else "".join(SPELLINGS[token] for token in row) for row in rows]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_llguidance_agrees_on_regular_languages(expression):
    """After every beginning of up to four letters that can be completed, the same tokens may follow."""
    dfa = DFA.from_regex(f"({expression})e*", 5, [*LETTERS, "e"])
    grammar = GrammarConstraint("regex", expression, tokenizer_of([*LETTERS, "end"], end_token=4))
    can_end = dfa.completable(len(dfa.next)).any(dim=0)  # (S,)
    for n_tokens in range(5):
        strings = all_strings(n_tokens)
        states = torch.zeros(len(strings), dtype=torch.int64)
        for token in strings.T:
            states = dfa.next[states, token]
        strings, states = strings[can_end[states]], states[can_end[states]]
        if not len(strings):
            continue
        prompts = torch.zeros(len(strings), 1, dtype=torch.int64)
        state = grammar.init(Context(prompts, 1, 6, 5))
        for step in range(n_tokens + 1):
            tokens = torch.cat([prompts, strings[:, :step]], dim=1)
            state, allowed = grammar.allowed(state, Context(tokens, 1, 6, 5))
        assert torch.equal(allowed, can_end[dfa.next[states]])


def test_the_laws():
    check_processor_laws(GrammarConstraint("lark", LARK, tokenizer_of(SPELLINGS, END)), vocab_size=V)


def test_what_is_generated_is_in_the_grammar():
    model, prompts = random_model(block_size=40), random_prompts(300)
    grammar = GrammarConstraint("lark", LARK, tokenizer_of(SPELLINGS, END))
    tokens = generate(model, prompts, 30, logits_processors=[grammar], do_sample=True, seed=0, stop_token=END)
    found = [text for text in texts(tokens[:, T:]) if text is not None]
    assert len(found) > 100
    for text in found:
        assert re.fullmatch(r"[0-4+*()]+", text)
        assert isinstance(eval(re.sub(r"\d+", lambda match: str(int(match[0])), text)), int)
    best, scores = beam_search(model, prompts[:3], 30, 4, logits_processors=[grammar], stop_token=END)
    assert scores.isfinite().all()
    assert all(eval(text) is not None for text in texts(best[:, :, T:].flatten(0, 1)) if text is not None)


@pytest.mark.parametrize("form", ["regex", "lark", "json_schema", "choice"])
def test_every_token_whose_text_may_follow_is_allowed(form):
    """Also where only one text may follow, however it is split."""
    language = ["12+12*3", "112", "12(4)"]
    grammars = {"regex": "|".join(map(re.escape, language)), "choice": json.dumps(language)}
    grammars["lark"] = "start: " + " | ".join(map(json.dumps, language))
    grammars["json_schema"] = json.dumps({"enum": [112, 1212, 2]})
    strings = ["112", "1212", "2"] if form == "json_schema" else language
    grammar = GrammarConstraint(form, grammars[form], tokenizer_of(SPELLINGS, END))
    rows: list[list[int]] = [[]]
    while rows:
        tokens = torch.tensor([[0, *row] for row in rows])
        state = grammar.init(Context(tokens[:, :1], 1, 9, V))
        for step in range(1, tokens.shape[1] + 1):
            state, allowed = grammar.allowed(state, Context(tokens[:, :step], 1, 9, V))
        before, rows = rows, []
        for row, own in zip(before, allowed.tolist(), strict=True):
            text = "".join(SPELLINGS[token] for token in row)
            follows = [any(each.startswith(text + SPELLINGS[v]) for each in strings) for v in range(V)]
            follows[END] = text in strings
            assert own == follows, text
            rows += [[*row, v] for v in range(V) if own[v] and v != END]


def test_json_of_a_schema():
    spellings = [*'{}":,ab0', "true", "false", "end"]
    assert len(spellings) == V
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": [0]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    grammar = GrammarConstraint(
        "json_schema",
        json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}}),
        tokenizer_of(spellings, END),
    )
    model = random_model(block_size=40)
    tokens = generate(
        model, random_prompts(50), 30, logits_processors=[grammar], do_sample=True, seed=0, stop_token=END
    )
    for row in tokens[:, T:].tolist():
        value = json.loads("".join(spellings[token] for token in row[: row.index(END)]))
        assert value in ({"a": True, "b": 0}, {"a": False, "b": 0})


def test_what_makes_no_sense_is_refused():
    tokenizer = tokenizer_of(SPELLINGS, END)
    with pytest.raises(ValueError, match=r"the grammar cannot go on: .*foo"):
        GrammarConstraint("lark", "start: foo", tokenizer)
    with pytest.raises(ValueError, match="the grammar cannot go on"):
        GrammarConstraint("regex", "(1", tokenizer)
    with pytest.raises(ValueError, match="Unknown grammar type: yacc"):
        GrammarConstraint("yacc", "1", tokenizer)
    with pytest.raises(ValueError, match=f"has {V} tokens, the model 5"):
        GrammarConstraint("regex", "1", tokenizer).init(Context(torch.zeros(1, 1, dtype=torch.int64), 1, 3, 5))
    for end_token in (-1, V):
        with pytest.raises(ValueError, match=f"there is no token {end_token} to end with; they go from 0 to 10"):
            tokenizer_of(SPELLINGS, end_token)


def test_text_is_split_into_the_longest_tokens():
    tokenizer = tokenizer_of(SPELLINGS, END)
    assert tokenizer.tokenize_str("12+(3*412)") == [9, 5, 7, 3, 6, 4, 9, 8]
    assert tokenizer.tokenize_str("1") == [1]
    assert END not in tokenizer.tokenize_str("1end")
