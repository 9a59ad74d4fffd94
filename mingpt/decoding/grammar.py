"""Grammars over text, by llguidance (the extra ``grammar``): a Lark grammar, a regular expression or a JSON schema.

Legend: B batch, V vocabulary.

Where the automata of ``mingpt.decoding.automata`` read tokens, a grammar reads characters, whatever the tokenizer makes of them.
It does not count the tokens that remain: the text is whole if its end token came before they were spent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mingpt.decoding.logits_processors import Constraint, Context, State


class GrammarConstraint(Constraint):
    """The output's text, up to the end token, is in the language of a grammar; after the end token comes only itself.

    Its state is one of llguidance's matchers for each row, a tuple of B. A matcher is copied before it reads a token,
    which takes about two microseconds, so an earlier state stays as it was.
    """

    def __init__(self, grammar: str, tokenizer: Any):
        """Check a grammar; ``from_lark``, ``from_regex`` and ``from_json_schema`` make one.

        Args:
            grammar: as llguidance writes it.
            tokenizer: what ``tokenizer_of`` gives, or another ``llguidance.LLTokenizer``.

        Raises:
            ValueError: if the grammar does not parse.
        """
        import llguidance

        self.grammar, self.tokenizer = grammar, tokenizer
        self._executor = llguidance.LLExecutor()
        self._check(llguidance.LLMatcher(tokenizer, grammar))

    @classmethod
    def from_lark(cls, grammar: str, tokenizer: Any) -> GrammarConstraint:
        """Of a grammar in Lark's syntax, whose first rule is ``start``."""
        import llguidance

        return cls(llguidance.LLMatcher.grammar_from_lark(grammar), tokenizer)

    @classmethod
    def from_regex(cls, expression: str, tokenizer: Any) -> GrammarConstraint:
        """Of a regular expression over characters."""
        import llguidance

        return cls(llguidance.LLMatcher.grammar_from_regex(expression), tokenizer)

    @classmethod
    def from_json_schema(cls, schema: dict[str, Any] | str, tokenizer: Any) -> GrammarConstraint:
        """Of JSON that a schema describes."""
        import llguidance

        return cls(llguidance.LLMatcher.grammar_from_json_schema(schema), tokenizer)

    def init(self, context: Context) -> State:
        """A matcher for each row.

        Raises:
            ValueError: if the tokenizer has more tokens than the model.
        """
        import llguidance

        if self.tokenizer.vocab_size > context.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model has {context.vocab_size}"
            )
        first = llguidance.LLMatcher(self.tokenizer, self.grammar)
        return {"matchers": tuple(first.deep_copy() for _ in context.tokens)}

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
        return {"matchers": matchers}, torch.from_numpy(allowed).bool().to(context.device)

    def reorder(self, state: State, rows: Tensor) -> State:
        return {"matchers": tuple(state["matchers"][row] for row in rows.tolist())}

    def _check(self, matcher: Any) -> None:
        if matcher.is_error():
            raise ValueError(f"the grammar cannot go on: {matcher.get_error().strip()}")


def tokenizer_of(spellings: Sequence[str], end_token: int, encode: Callable[[str], list[int]] | None = None) -> Any:
    """Tell llguidance what each token of a vocabulary spells.

    Args:
        spellings: V strings; an empty one is never allowed.
        end_token: the token that ends a text; what it spells does not matter.
        encode: text to tokens; by default the longest token first.

    Returns:
        An ``llguidance.LLTokenizer``. For a fast tokenizer of transformers, ``llguidance.hf.from_tokenizer`` makes one.
    """
    import llguidance

    class Vocabulary:
        """What llguidance's TokenizerWrapper asks for."""

        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id, self.special_token_ids = end_token, None, [end_token]
            self.tokens = [b"<end>" if v == end_token else text.encode() for v, text in enumerate(spellings)]

        def __call__(self, text: str) -> list[int]:
            return encode(text) if encode else _longest_first(text, spellings)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))


def _longest_first(text: str, spellings: Sequence[str]) -> list[int]:
    tokens, place = [], 0
    order = sorted(range(len(spellings)), key=lambda token: -len(spellings[token]))
    while place < len(text):
        fitting = (token for token in order if spellings[token] and text.startswith(spellings[token], place))
        if (token := next(fitting, None)) is None:
            break  # no token spells the rest
        tokens.append(token)
        place += len(spellings[token])
    return tokens
