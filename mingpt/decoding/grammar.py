"""Grammars over text, by llguidance (the extra ``grammar``): a Lark grammar, a regular expression or a JSON schema.

Legend: B batch, V vocabulary.

Where the automata of ``mingpt.decoding.automata`` read tokens, a grammar reads characters, however the tokenizer splits
them. It does not count the tokens that remain: the text is complete if its end token came before they were spent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mingpt.decoding.logits_processors import Constraint, Context, State

if TYPE_CHECKING:
    from llguidance import GrammarFormat, LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerFast


class GrammarConstraint(Constraint):
    """The output's text, up to the end token, is in the language of a grammar; after the end token comes only itself.

    Its state is one of llguidance's matchers for each row, a tuple of B. A matcher is copied before it reads a token,
    which takes about two microseconds, so an earlier state stays as it was.
    """

    def __init__(self, form: GrammarFormat, grammar: str, tokenizer: LLTokenizer | PreTrainedTokenizerFast):
        """Check a grammar.

        Args:
            form: "lark", whose first rule is ``start``; "regex", a regular expression over characters; "json_schema",
                or another that ``llguidance.grammar_from`` reads.
            grammar: its text.
            tokenizer: what ``tokenizer_of`` gives, another ``llguidance.LLTokenizer``, or a fast tokenizer of
                transformers. llguidance reads the last for up to a second; ``llguidance.hf.from_tokenizer`` does so
                once for several grammars, or for end tokens other than the tokenizer's.

        Raises:
            ValueError: if there is no such form, the grammar does not parse, or the tokenizer is not a fast one.
        """
        import llguidance

        if not isinstance(tokenizer, llguidance.LLTokenizer):
            from llguidance.hf import from_tokenizer

            tokenizer = from_tokenizer(tokenizer)
        self.tokenizer, self._executor = tokenizer, llguidance.LLExecutor()
        self._start = llguidance.LLMatcher(tokenizer, _without_forcing(llguidance.grammar_from(form, grammar)))
        self._check(self._start)

    def init(self, context: Context) -> State:
        """A matcher for each row.

        Raises:
            ValueError: if the tokenizer has more tokens than the model.
        """
        if self.tokenizer.vocab_size > context.vocab_size:
            raise ValueError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {context.vocab_size}")
        return {"matchers": tuple(self._start.deep_copy() for _ in context.tokens)}

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        matchers = state["matchers"]
        if context.step:
            matchers = tuple(matcher.deep_copy() for matcher in matchers)
            for matcher, token in zip(matchers, context.tokens[:, -1].tolist(), strict=True):
                matcher.consume_token(token)
                self._check(matcher)
        bits = allocate_token_bitmask(len(matchers), context.vocab_size)
        numbered = [(matcher, row) for row, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, numbered, bits)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, : context.vocab_size]
        allowed[:, self.tokenizer.vocab_size :] = 0
        return {"matchers": matchers}, torch.from_numpy(allowed).bool().to(context.tokens.device)

    def reorder(self, state: State, rows: Tensor) -> State:
        return {"matchers": tuple(state["matchers"][row] for row in rows.tolist())}

    def _check(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            raise ValueError(f"the grammar cannot go on: {matcher.get_error().strip()}")


def _without_forcing(grammar: str) -> str:
    """A grammar of llguidance that allows every token whose text may follow.

    By default llguidance splits a text that is the only one to follow itself, and allows no other token. Up to 1.9.1
    that token can be one that does not fit, where the row has begun the text with a shorter one.
    """
    is_json = grammar.lstrip().startswith("{")
    whole = json.loads(grammar) if is_json else {"grammars": [{"lark_grammar": grammar}]}
    for part in whole["grammars"]:
        lark = part.get("lark_grammar") or f"start: %json {json.dumps(part.pop('json_schema'))}"
        part["lark_grammar"] = lark if "%llguidance" in lark else f'%llguidance {{"no_forcing": true}}\n{lark}'
    return json.dumps(whole)


def tokenizer_of(spellings: Sequence[str], end_token: int) -> LLTokenizer:
    """Tell llguidance what each token of a vocabulary spells; text is split into the longest tokens first.

    Args:
        spellings: V strings; an empty one is never allowed.
        end_token: the token that ends a text; what it spells does not matter.

    Raises:
        ValueError: if the end token is not one of the V tokens.
    """
    import llguidance

    if not 0 <= end_token < len(spellings):
        raise ValueError(f"there is no token {end_token} to end with; they go from 0 to {len(spellings) - 1}")

    class Vocabulary:
        """What llguidance's TokenizerWrapper asks for."""

        eos_token_id, bos_token_id, special_token_ids = end_token, None, (end_token,)
        tokens = tuple(b"<end>" if v == end_token else text.encode() for v, text in enumerate(spellings))

        def __call__(self, text: str) -> list[int]:
            return tokenizer.greedy_tokenize(text)

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))
    return tokenizer
