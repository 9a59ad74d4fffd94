"""Automata over tokens: which continuations a regular or a bracketed language allows.

Legend: S states, V vocabulary, T tokens, N a length in tokens, G stack symbols, D the depth of a stack.

An automaton here is a table. Regular expressions and the algebra of finite automata are automata-lib's; what it
describes is compiled to a dense table, and its states are numbered in the order in which a search from the start finds
them, so equal minimal automata have equal tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SYMBOLS = 0xF0000
"""automata-lib reads characters: token v is the private character with this number plus v."""


@dataclass(frozen=True, eq=False)
class DFA:
    """A deterministic finite automaton that reads tokens; state 0 is its start.

    Attributes:
        next: (S, V) of int64, the state after a token; every state has one for every token.
        is_accepting: (S,) of bool.
    """

    next: Tensor
    is_accepting: Tensor

    def __post_init__(self) -> None:
        n_states = len(self.is_accepting)
        if self.next.ndim != 2 or len(self.next) != n_states or self.next.numel() == 0:
            raise ValueError(f"next must be ({n_states}, V) for {n_states} states, got {tuple(self.next.shape)}")
        if self.next.min() < 0 or self.next.max() >= n_states:
            raise ValueError(f"next must hold states from 0 to {n_states - 1}")

    @property
    def vocab_size(self) -> int:
        """V, how many tokens it knows."""
        return self.next.shape[1]

    @classmethod
    def from_regex(cls, expression: str, vocab_size: int, names: Sequence[str] | None = None) -> DFA:
        """Compile a regular expression over tokens.

        Args:
            expression: tokens, by number or name, with spaces where they would run together, and ``|``, ``*``, ``+``,
                ``?``, ``{n}``, ``{n,m}``, ``&`` for "and also", parentheses, ``.`` for any token, ``[1 3-5]`` for one
                of several and ``[^1 3-5]`` for one of the others. A name that is not a word is quoted: ``"("``.
            vocab_size: V.
            names: V names of the tokens, their numbers without it; those of one letter may run together.

        Raises:
            ValueError: if the expression does not parse or names a token that there is not.
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
            reason = re.sub(r"<\w+: (.*?)>", lambda match: match[1], str(error))
            reason = re.sub("[\U000f0000-\U0010ffff]", lambda match: str(ord(match[0]) - _SYMBOLS), reason)
            raise ValueError(f"the regular expression {expression!r} does not parse: {reason}") from None
        return _compile(Description.from_nfa(nfa, minify=True), vocab_size)

    @classmethod
    def from_transitions(
        cls,
        transitions: Mapping[Hashable, Mapping[int, Hashable]],
        start: Hashable,
        accepting: Sequence[Hashable],
        vocab_size: int,
    ) -> DFA:
        """Compile a table of states to tokens to states; a token that a state does not name is refused there.

        Raises:
            ValueError: for a state or token that there is not.
        """
        states = {start, *transitions}
        for moves in transitions.values():
            for token, target in moves.items():
                _check_token(token, vocab_size)
                if target not in states:
                    raise ValueError(f"a move leads to {target!r}, which has no transitions; give it {{}}")
        if unknown := [state for state in accepting if state not in states]:
            raise ValueError(f"the accepting state {unknown[0]!r} has no transitions; give it {{}}")
        every = {state: transitions.get(state, {}) for state in states}
        return _compile(_description(every, start, set(accepting), vocab_size).minify(), vocab_size)

    def minimized(self) -> DFA:
        """The automaton with the fewest states that accepts the same, the same one for equal languages."""
        return _compile(_describe(self).minify(), self.vocab_size)

    def __and__(self, other: DFA) -> DFA:
        """What both accept."""
        return self._combined(other, lambda a, b: a & b)

    def __or__(self, other: DFA) -> DFA:
        """What either accepts."""
        return self._combined(other, lambda a, b: a | b)

    def __invert__(self) -> DFA:
        """What this one refuses."""
        return _compile(~_describe(self), self.vocab_size)

    def _combined(self, other: DFA, operation: Callable[[Any, Any], Any]) -> DFA:
        if self.vocab_size != other.vocab_size:
            raise ValueError(f"automata over {self.vocab_size} and {other.vocab_size} tokens cannot be combined")
        return _compile(operation(_describe(self), _describe(other)), self.vocab_size)

    def ended_by(self, token: int) -> DFA:
        """What this one accepts, followed by any number of ``token``, which is an end and a filler.

        Raises:
            ValueError: if something that is accepted could contain the token.
        """
        _check_token(token, self.vocab_size)
        is_alive = self.completable(len(self.next)).any(dim=0)  # (S,)
        if (is_alive & is_alive[self.next[:, token]]).any():
            raise ValueError(f"token {token} cannot be the end: it also occurs in what the automaton accepts")
        n_states, ended = len(self.next), len(self.next)
        refused = ended + 1
        table = torch.cat([self.next, torch.full((2, self.vocab_size), refused)])
        table[:n_states, token] = torch.where(self.is_accepting, ended, refused)
        table[ended, token] = ended
        return DFA(table, torch.cat([self.is_accepting, torch.tensor([True, False])]))

    def spelled_by(self, spellings: Sequence[str], names: Sequence[str]) -> DFA:
        """Read longer tokens through this automaton: token v is the sequence of this one's tokens that it spells.

        Args:
            spellings: for each token of the new vocabulary, a string of this automaton's token names.
            names: V names of one character each, this automaton's tokens.

        Returns:
            A DFA over ``len(spellings)`` tokens; one that spells nothing, or an unknown character, is refused.
        """
        n_states, number = len(self.next), {name: token for token, name in enumerate(names)}
        refused, nothing, unknown = n_states, self.vocab_size, self.vocab_size + 1  # a state and two more tokens
        read = [[number.get(character, unknown) for character in spelling] or [unknown] for spelling in spellings]
        longest = max(map(len, read))
        steps = torch.tensor([each + [nothing] * (longest - len(each)) for each in read])  # (V', longest)
        stay = torch.arange(n_states + 1)[:, None]
        table = torch.cat([self.next, torch.full((1, self.vocab_size), refused)])
        table = torch.cat([table, stay, torch.full_like(stay, refused)], dim=1)
        states = stay.expand(-1, len(spellings))
        for step in steps.T:
            states = table[states, step]
        return DFA(states.contiguous(), torch.cat([self.is_accepting, torch.tensor([False])]))

    def completable(self, n_tokens: int) -> Tensor:
        """(N + 1, S) of bool: whether acceptance is exactly 0, ..., N tokens away from each state."""
        is_next = torch.zeros(len(self.next), len(self.next)).scatter_(1, self.next, 1.0)  # (S, S)
        away = [self.is_accepting.float()]
        for _ in range(n_tokens):
            away.append((is_next @ away[-1]).clamp(max=1.0))
        return torch.stack(away) > 0

    def accepts(self, tokens: Tensor) -> Tensor:
        """(..., T) of int64 to (...) of bool."""
        state = torch.zeros(tokens.shape[:-1], dtype=torch.int64)
        for token in tokens.unbind(dim=-1):
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
    """

    next: Tensor
    move: Tensor
    is_accepting: Tensor
    depth: int = 16

    def __post_init__(self) -> None:
        n_states, n_symbols = self.next.shape[0], self.next.shape[1] - 1
        if self.next.ndim != 3 or self.move.shape != self.next.shape or self.is_accepting.shape != (n_states,):
            raise ValueError(
                f"next, move and is_accepting must be (S, G + 1, V) twice and (S,), got {tuple(self.next.shape)}, "
                f"{tuple(self.move.shape)} and {tuple(self.is_accepting.shape)}"
            )
        if self.next.max() >= n_states or self.move.max() > n_symbols or self.move.min() < POP:
            raise ValueError(f"there are {n_states} states and {n_symbols} stack symbols, a move goes beyond them")
        if ((self.move[:, 0] == POP) & (self.next[:, 0] >= 0)).any():
            raise ValueError("a move pops from an empty stack; leave it out")
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")

    @property
    def vocab_size(self) -> int:
        """V, how many tokens it knows."""
        return self.next.shape[2]

    @classmethod
    def from_transitions(
        cls,
        transitions: Sequence[tuple[Hashable, int, int | None, Hashable, int]],
        start: Hashable,
        accepting: Sequence[Hashable],
        vocab_size: int,
        depth: int = 16,
    ) -> PDA:
        """Compile moves (state, token, top, new state, action).

        ``top`` is the symbol on the stack, 0 for an empty one, None for any; ``action`` is STAY, POP or a symbol.

        Raises:
            ValueError: if two moves contradict each other, or a state or token is not there.
        """
        names = list(dict.fromkeys([start, *(name for move in transitions for name in (move[0], move[3]))]))
        if unknown := [state for state in accepting if state not in names]:
            raise ValueError(f"no move leads to the accepting state {unknown[0]!r}")
        tops = [number for move in transitions for number in (move[2] or 0, move[4])]
        n_symbols = max([1, *tops])
        following = torch.full((len(names), n_symbols + 1, vocab_size), -1)
        actions = torch.zeros_like(following)
        for state, token, top, target, action in transitions:
            _check_token(token, vocab_size)
            first = 1 if action == POP and top is None else 0
            for symbol in range(first, n_symbols + 1) if top is None else (top,):
                place = (names.index(state), symbol, token)
                if following[place] >= 0:
                    raise ValueError(f"two moves from state {state!r} with token {token} and {symbol} on the stack")
                following[place], actions[place] = names.index(target), action
        return cls(following, actions, torch.tensor([name in accepting for name in names]), depth)

    @classmethod
    def balanced(cls, pairs: Sequence[tuple[int, int]], vocab_size: int, depth: int = 16) -> PDA:
        """Balanced brackets, any number of them: the Dyck language of (opening, closing) pairs of tokens."""
        moves: list[tuple[Hashable, int, int | None, Hashable, int]] = []
        for symbol, (opening, closing) in enumerate(pairs, start=1):
            moves += [("start", opening, None, "start", symbol), ("start", closing, symbol, "start", POP)]
        return cls.from_transitions(moves, "start", ["start"], vocab_size, depth)

    @classmethod
    def expressions(
        cls,
        digits: Sequence[int],
        operators: Sequence[int],
        brackets: tuple[int, int],
        vocab_size: int,
        depth: int = 16,
    ) -> PDA:
        """Arithmetic expressions: operands of one digit or in brackets, with an operator between two of them."""
        opening, closing = brackets
        moves: list[tuple[Hashable, int, int | None, Hashable, int]] = [
            *(("operand", digit, None, "after", STAY) for digit in digits),
            *(("after", operator, None, "operand", STAY) for operator in operators),
            ("operand", opening, None, "operand", 1),
            ("after", closing, 1, "after", POP),
        ]
        return cls.from_transitions(moves, "operand", ["after"], vocab_size, depth)

    def accepts(self, tokens: Tensor) -> Tensor:
        """(B, T) of int64 to (B,) of bool."""
        rows = torch.arange(len(tokens))
        state, level = torch.zeros(len(tokens), dtype=torch.int64), torch.zeros(len(tokens), dtype=torch.int64)
        stack = torch.zeros(len(tokens), self.depth + 1, dtype=torch.int64)
        is_alive = torch.ones(len(tokens), dtype=torch.bool)
        for token in tokens.unbind(dim=-1):
            top = stack[rows, level]
            following, action = self.next[state, top, token], self.move[state, top, token]
            is_alive &= (following >= 0) & ((action <= 0) | (level < self.depth))
            level = torch.where(is_alive, level + action.clamp(POP, 1), level)
            is_push = is_alive & (action > 0)
            stack[rows[is_push], level[is_push]] = action[is_push]
            state = torch.where(is_alive, following, state)
        return is_alive & (level == 0) & self.is_accepting[state]

    def completable(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """When a symbol that was just pushed can be gone, and when all can end: in how many tokens exactly.

        Returns:
            popped: (D, S, G, S', N + 1) of float, 1 where from state S, with symbol G just pushed and room for 0, ...,
                D - 1 more, exactly so many tokens can lead to its removal, into state S'.
            ended: (S, N + 1) of float, 1 where from state S with an empty stack they can lead to acceptance.
        """
        n_states, n_symbols = self.next.shape[0], self.next.shape[1] - 1
        popped = torch.zeros(self.depth, n_states, n_symbols, n_states, n_tokens + 1)
        ended = torch.zeros(n_states, n_tokens + 1)
        ended[:, 0] = self.is_accepting.float()
        moves = [
            sorted({(int(self.next[p, g, v]), int(self.move[p, g, v])) for v in range(self.vocab_size)} - {(-1, 0)})
            for p in range(n_states)
            for g in range(n_symbols + 1)
        ]
        for n in range(1, n_tokens + 1):
            for p in range(n_states):
                for following, action in moves[p * (n_symbols + 1)]:
                    if following < 0:
                        continue
                    if action > 0:  # (S', i) and (S', n - 1 - i)
                        first = popped[-1, following, action - 1, :, :n]
                        ended[p, n] += (first * ended[:, :n].flip(1)).sum()
                    else:
                        ended[p, n] += ended[following, n - 1]
                for g in range(n_symbols):
                    for following, action in moves[p * (n_symbols + 1) + g + 1]:
                        if following < 0:
                            continue
                        if action == POP:
                            popped[:, p, g, following, n] += float(n == 1)
                        elif action == STAY:
                            popped[:, p, g, :, n] += popped[:, following, g, :, n - 1]
                        else:  # the new symbol goes in i tokens, into state m; from there this one in the rest
                            first = popped[:-1, following, action - 1, :, :n]  # (D - 1, m, i)
                            rest = popped[1:, :, g, :, :n].flip(-1)  # (D - 1, m, S', i)
                            popped[1:, p, g, :, n] += torch.einsum("dmi,dmsi->ds", first, rest)
            popped[..., n].clamp_(max=1.0)
            ended[:, n].clamp_(max=1.0)
        return popped, ended


def _check_token(token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ValueError(f"there is no token {token}; they go from 0 to {vocab_size - 1}")


def _symbol(token: int) -> str:
    return chr(_SYMBOLS + token)


_LEXEMES = re.compile(r'\s+|"[^"]*"|\[\^?[^\]"]*\]|\w+|\{\d*(?:,\d*)?\}|[|*+?()&.]')


def _in_symbols(expression: str, vocab_size: int, names: Sequence[str] | None) -> str:
    """Rewrite an expression in automata-lib's, each token as its symbol."""
    numbers = {name: token for token, name in enumerate(names or map(str, range(vocab_size)))}

    def number_of(name: str) -> int:
        if name not in numbers:
            raise ValueError(
                f"the regular expression {expression!r} has {name!r}, which is no token"
                + ("" if names else f": they go from 0 to {vocab_size - 1}")
            )
        return numbers[name]

    pieces, place = [], 0
    while place < len(expression):
        match = _LEXEMES.match(expression, place)
        if match is None:
            raise ValueError(f"the regular expression {expression!r} does not parse at {expression[place:]!r}")
        lexeme, place = match.group(), match.end()
        if lexeme[0] == "[":
            members: set[int] = set()
            for first, last in re.findall(r"(\w+)(?:-(\w+))?", lexeme):
                members.update(range(number_of(first), number_of(last or first) + 1))
            chosen = sorted(set(range(vocab_size)) - members if lexeme[1] == "^" else members)
            if not chosen:
                raise ValueError(f"the regular expression {expression!r} has {lexeme}, which no token matches")
            pieces.append("(" + "|".join(map(_symbol, chosen)) + ")")
        elif lexeme[0] == '"' or lexeme[0].isalnum() or lexeme[0] == "_":
            name = lexeme.strip('"')
            are_letters = names is not None and name not in numbers and all(letter in numbers for letter in name)
            pieces += [_symbol(number_of(each)) for each in (name if are_letters else [name])]
        elif not lexeme.isspace():
            pieces.append(lexeme)
    return "".join(pieces)


def _describe(dfa: DFA) -> Any:
    """A table as automata-lib describes it."""
    transitions: dict[Hashable, dict[int, Hashable]] = {
        state: dict(enumerate(row)) for state, row in enumerate(dfa.next.tolist())
    }
    return _description(transitions, 0, set(dfa.is_accepting.nonzero().flatten().tolist()), dfa.vocab_size)


def _description(
    transitions: Mapping[Hashable, Mapping[int, Hashable]], start: Hashable, accepting: set[Any], vocab_size: int
) -> Any:
    """automata-lib's description; where a state does not name a token, it leads to one that refuses all."""
    from automata.fa.dfa import DFA as Description

    return Description(
        states=set(transitions),
        input_symbols=set(map(_symbol, range(vocab_size))),
        transitions={
            state: {_symbol(token): target for token, target in moves.items()} for state, moves in transitions.items()
        },
        initial_state=start,
        final_states=accepting,
        allow_partial=True,
    ).to_complete()


def _compile(description: Any, vocab_size: int) -> DFA:
    """The table of what automata-lib describes, states in the order in which a search from the start finds them."""
    complete = description.to_complete()
    symbols = [_symbol(token) for token in range(vocab_size)]
    found = {complete.initial_state: 0}
    rows = []
    for state in (order := [complete.initial_state]):
        row = [complete.transitions[state][symbol] for symbol in symbols]
        for target in row:
            if target not in found:
                found[target] = len(order)
                order.append(target)
        rows.append([found[target] for target in row])
    return DFA(torch.tensor(rows), torch.tensor([state in complete.final_states for state in order]))
