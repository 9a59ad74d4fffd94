"""Automata over tokens: which continuations a regular or a bracketed language allows.

Legend: B batch, S states, V vocabulary, T tokens, N a length in tokens, G stack symbols, D the depth of a stack.

An automaton here is a table. Regular expressions and the algebra of finite automata are automata-lib's. What it
describes is compiled to a dense table. States are numbered in the order in which a search from the start finds them,
so equal minimal automata have equal tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mingpt.prefix import check_tokens

if TYPE_CHECKING:
    from automata.fa.dfa import DFA as Description

_SYMBOLS = 0xF0000
"""automata-lib reads characters: token v is the private character with this number plus v."""


@dataclass(frozen=True, eq=False)
class DFA:
    """A deterministic finite automaton that reads tokens; state 0 is its start.

    Attributes:
        next: (S, V) of int64, the state after a token; every state has one for every token.
        is_accepting: (S,) of bool.

    Raises:
        ValueError: for other shapes, or a state that is not in the table.
    """

    next: Tensor
    is_accepting: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.next.shape), tuple(self.is_accepting.shape)
        if self.next.ndim != 2 or shapes[1] != shapes[0][:1] or not self.next.numel():
            raise ValueError("next and is_accepting must be (S, V) and (S,), got {} and {}".format(*shapes))
        if self.next.min() < 0 or self.next.max() >= len(self.next):
            raise ValueError(f"next must hold states from 0 to {len(self.next) - 1}")

    @property
    def vocab_size(self) -> int:
        """V, how many tokens it knows."""
        return self.next.shape[1]

    @classmethod
    def from_regex(cls, expression: str, vocab_size: int, names: Sequence[str] | None = None) -> DFA:
        """Compile a regular expression over tokens.

        Args:
            expression: tokens by number or name, with spaces where they would run together, and ``|``, ``*``, ``+``,
                ``?``, ``{n}``, ``{n,m}``, ``&`` for "and also", parentheses, ``.`` for any token, ``[1 3-5]`` for one
                of several and ``[^1 3-5]`` for one of the others. A range may have spaces, ``1 - 3`` is ``1-3``, and
                must not descend. A name that is not a word is quoted, within brackets too: ``"("``, ``[^"+"]``.
            vocab_size: V.
            names: V names of the tokens, their numbers without it; those of one letter may run together.

        Raises:
            ValueError: if the expression does not parse or names an unknown token.
        """
        from automata.base.exceptions import RegexException
        from automata.fa.dfa import DFA as Description
        from automata.fa.nfa import NFA

        if names is not None and len(names) != vocab_size:
            raise ValueError(f"{len(names)} names for a vocabulary of {vocab_size}; give one for each token")
        symbols = set(map(_symbol, range(vocab_size)))
        try:
            nfa = NFA.from_regex(_in_symbols(expression, vocab_size, names), input_symbols=symbols)
        except RegexException as error:
            reason = re.sub(r"<\w+: (.*?)>", r"\1", str(error))  # automata-lib says <UnionToken: |>
            raise ValueError(f"the regular expression {expression!r} does not parse: {reason}") from None
        return _compile(Description.from_nfa(nfa, minify=True))

    def __and__(self, other: DFA) -> DFA:
        """What both accept."""
        return _compile(_describe(self) & self._described(other))

    def __or__(self, other: DFA) -> DFA:
        """What either accepts."""
        return _compile(_describe(self) | self._described(other))

    def _described(self, other: DFA) -> Description:
        if self.vocab_size != other.vocab_size:
            raise ValueError(f"automata over {self.vocab_size} and {other.vocab_size} tokens cannot be combined")
        return _describe(other)

    def __invert__(self) -> DFA:
        """What this one refuses."""
        return _compile(~_describe(self))

    def completable(self, n_tokens: int) -> Tensor:
        """(N + 1, S) of bool: whether acceptance is exactly 0, ..., N tokens away from each state."""
        is_next = torch.zeros(len(self.next), len(self.next)).scatter_(1, self.next, 1.0)  # (S, S)
        away = [self.is_accepting.float()]
        for _ in range(n_tokens):
            away.append((is_next @ away[-1]).clamp(max=1.0))
        return torch.stack(away) > 0

    def accepts(self, tokens: Tensor) -> Tensor:
        """(B, T) of int64 to (B,) of bool; a token that it does not know is a ValueError."""
        check_tokens(tokens, self.vocab_size)
        state = torch.zeros(len(tokens), dtype=torch.int64)
        for token in tokens.unbind(dim=1):
            state = self.next[state, token]
        return self.is_accepting[state]


STAY, POP = 0, -1
"""What a move of a PDA does to its stack; a positive number pushes that symbol."""


@dataclass(frozen=True, eq=False)
class PDA:
    """A deterministic pushdown automaton that reads a token with every move; state 0 is its start.

    What it does depends on its state, the token, and the symbol on top of the stack: 1 to G, or 0 where the stack is
    empty. It accepts in an accepting state with an empty stack.

    Attributes:
        next: (S, G + 1, V) of int64, the state after a move, -1 where there is none.
        move: (S, G + 1, V) of int64: STAY, POP, or the symbol to push.
        is_accepting: (S,) of bool.
        depth: D, how many symbols the stack can hold; what needs more is refused.

    Raises:
        ValueError: for other shapes, or a state, symbol or depth that makes no sense.
    """

    next: Tensor
    move: Tensor
    is_accepting: Tensor
    depth: int = 16

    def __post_init__(self) -> None:
        shapes = [tuple(each.shape) for each in (self.next, self.move, self.is_accepting)]
        if self.next.ndim != 3 or shapes[1:] != [shapes[0], shapes[0][:1]] or not self.next.numel():
            expected = "next and move must be (S, G + 1, V) and is_accepting (S,)"
            raise ValueError("{}, got {}, {}, {}".format(expected, *shapes))
        n_states, n_tops, _ = self.next.shape
        is_pop_of_nothing = (self.move[:, 0] == POP) & (self.next[:, 0] >= 0)
        beyond = self.next.max() >= n_states or self.move.max() >= n_tops or self.move.min() < POP
        if beyond or is_pop_of_nothing.any() or self.depth < 1:
            known = f"{n_states} states, {n_tops - 1} stack symbols and depth = {self.depth}"
            raise ValueError(f"a move goes beyond them or pops from an empty stack, or the depth is below 1: {known}")

    @property
    def vocab_size(self) -> int:
        """V, how many tokens it knows."""
        return self.next.shape[2]

    @classmethod
    def balanced(cls, pairs: Sequence[tuple[int, int]], vocab_size: int, depth: int = 16) -> PDA:
        """Balanced brackets, any number of them: the Dyck language of (opening, closing) pairs of tokens.

        Raises:
            ValueError: if a bracket is no token, or two are the same.
        """
        brackets = torch.tensor(pairs)
        check_tokens(brackets, vocab_size)
        if len(brackets.unique()) < brackets.numel():
            raise ValueError(f"brackets must be different tokens, got {list(pairs)}")
        following = torch.full((1, len(pairs) + 1, vocab_size), -1)
        move = torch.full_like(following, STAY)
        for symbol, (opening, closing) in enumerate(pairs, start=1):
            following[0, :, opening], move[0, :, opening] = 0, symbol
            following[0, symbol, closing], move[0, symbol, closing] = 0, POP
        return cls(following, move, torch.tensor([True]), depth)

    def accepts(self, tokens: Tensor) -> Tensor:
        """(B, T) of int64 to (B,) of bool; a token that it does not know is a ValueError."""
        check_tokens(tokens, self.vocab_size)
        stack = torch.zeros(len(tokens), self.depth + 1, dtype=torch.int64)
        state, level, is_alive = stack[:, 0], stack[:, 0], torch.ones(len(tokens), dtype=torch.bool)
        for token in tokens.unbind(dim=1):
            state, level, stack, is_allowed = pda_step(self.next, self.move, state, level, stack, token)
            is_alive = is_alive & is_allowed
        return is_alive & (level == 0) & self.is_accepting[state]

    def completable(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """When a symbol that was just pushed can be gone, and when all can end: in how many tokens exactly.

        Returns:
            Two tensors of float. One (D, S, G, S', N + 1) is 1 where from state S, with symbol G just pushed and room
            for 0, ..., D - 1 more, exactly so many tokens can lead to its removal, into state S'. The other (S, N + 1)
            is 1 where from state S with an empty stack they can lead to acceptance.
        """
        n_states, n_tops, _ = self.next.shape
        exists = self.next >= 0
        state, top, _ = exists.nonzero(as_tuple=True)
        # 1 where some token leads from S, with a top of 0 to G, to S': by popping, by staying, by pushing each symbol.
        moves = torch.zeros(n_states, n_tops, n_tops + 1, n_states)
        moves[state, top, self.move[exists] - POP, self.next[exists]] = 1.0
        pops, stays, pushes = moves[:, 1:, 0], moves[:, :, 1], moves[:, :, 2:]
        popped = torch.zeros(self.depth, n_states, n_tops - 1, n_states, n_tokens + 1)
        popped[..., 1:2] = pops[..., None]
        ended = F.pad(self.is_accepting.float()[:, None], (0, n_tokens))
        for n in range(1, n_tokens + 1):
            # What is pushed goes in i tokens, into state m; from there what is below it goes in the rest, n - 1 - i.
            popped[..., n] += torch.einsum("pgq,dqgs->dpgs", stays[:, 1:], popped[..., n - 1])
            first = torch.einsum("pghq,dqhmi->dpgmi", pushes[:, 1:], popped[:-1, ..., :n])
            popped[1:, ..., n] += torch.einsum("dpgmi,dmgsi->dpgs", first, popped[1:, ..., :n].flip(-1))
            first = torch.einsum("phq,qhmi->pmi", pushes[:, 0], popped[-1, ..., :n])
            ended[:, n] = stays[:, 0] @ ended[:, n - 1] + torch.einsum("pmi,mi->p", first, ended[:, :n].flip(-1))
            popped[..., n].clamp_(max=1.0)
            ended[:, n].clamp_(max=1.0)
        return popped, ended


def pda_step(
    following: Tensor, move: Tensor, state: Tensor, level: Tensor, stack: Tensor, token: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read one token in each row of a batch.

    Args:
        following: (S, G + 1, V), a PDA's ``next``.
        move: (S, G + 1, V), its ``move``.
        state: (B,) of int64.
        level: (B,) of int64, how many symbols are on the stack.
        stack: (B, D + 1) of int64, from the bottom up; the first is 0, the top of an empty stack.
        token: (B,) of int64.

    Returns:
        The next state, level and stack, and whether there was such a move, (B,) of bool; without one a row stays as it
        was.
    """
    rows = torch.arange(len(token), device=token.device)
    top = stack[rows, level]
    target, action = following[state, top, token], move[state, top, token]
    is_allowed = (target >= 0) & ((action <= 0) | (level < stack.shape[1] - 1))
    action = torch.where(is_allowed, action, STAY)
    level, stack = level + action.clamp(POP, 1), stack.clone()
    stack[rows, level] = torch.where(action > 0, action, stack[rows, level])
    return torch.where(is_allowed, target, state), level, stack, is_allowed


def _symbol(token: int) -> str:
    return chr(_SYMBOLS + token)


_NAME = r'(?:"[^"]*"|(?<![{,])\b\w+\b)'
"""A token; what follows a brace or a comma is a count."""
_BRACKETS = rf"\[\^?\s*(?:{_NAME}\s*(?:-\s*{_NAME}\s*)?)+\]"
_EXPRESSION = re.compile(rf"(?:{_NAME}|{_BRACKETS}|\{{\d*(?:,\d*)?\}}|[|*+?()&.]|\s)*")


def _in_symbols(expression: str, vocab_size: int, names: Sequence[str] | None) -> str:
    """Rewrite an expression in automata-lib's, each token as its symbol."""
    symbols = {name: _symbol(token) for token, name in enumerate(names or map(str, range(vocab_size)))}
    says = f"the regular expression {expression!r}"

    def in_symbols(match: re.Match[str]) -> str:
        name = match[0].strip('"')
        if name in symbols:
            return symbols[name]
        if names is not None and set(name) <= set(symbols):  # names of one letter that run together
            return "".join(symbols[letter] for letter in name)
        raise ValueError(f"{says} has {name!r}, which is no token" + ("" if names else f" from 0 to {vocab_size - 1}"))

    if rest := _EXPRESSION.sub("", expression, count=1):
        raise ValueError(f'{says} does not parse at {rest!r}; a name that is no word is quoted, "+"')
    translated = re.sub(r"\s", "", re.sub(_NAME, in_symbols, expression))
    if any(first > last for first, last in re.findall("(.)-(.)", translated)):
        raise ValueError(f"{says} has a descending range; write the lower token first")
    return translated


def _describe(dfa: DFA) -> Description:
    """A table as automata-lib describes it."""
    from automata.fa.dfa import DFA as Description

    symbols = list(map(_symbol, range(dfa.vocab_size)))
    return Description(
        states=set(range(len(dfa.next))),
        input_symbols=set(symbols),
        transitions={state: dict(zip(symbols, row, strict=True)) for state, row in enumerate(dfa.next.tolist())},
        initial_state=0,
        final_states=set(dfa.is_accepting.nonzero().flatten().tolist()),
    )


def _compile(description: Description) -> DFA:
    """The table of what automata-lib describes, states in the order in which a search from the start finds them."""
    complete = description.to_complete()
    symbols = sorted(complete.input_symbols)
    numbers, states, table = {complete.initial_state: 0}, [complete.initial_state], []
    for state in states:  # which grows on the way
        for symbol in symbols:
            if (target := complete.transitions[state][symbol]) not in numbers:
                numbers[target] = len(states)
                states.append(target)
        table.append([numbers[complete.transitions[state][symbol]] for symbol in symbols])
    return DFA(torch.tensor(table), torch.tensor([state in complete.final_states for state in states]))
