"""Constraints on what may be generated: permutations and sorted rows, and the languages of automata.

Legend: B batch, V vocabulary, S an automaton's states, G its stack symbols, D its stack's depth, N tokens to generate.

Those of automata look ahead: a token is allowed only if what it leads to can be completed in exactly the tokens that
remain. So whatever is chosen, the generation ends inside the language.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mingpt.decoding.automata import DFA, PDA, POP
from mingpt.decoding.logits_processors import Constraint, Context, State


class MultisetConstraint(Constraint):
    """The output is a permutation of the prompt's last tokens, of as many as are generated.

    Its state is how often each token is left to be used.
    """

    def init(self, context: Context) -> State:
        """Count.

        Raises:
            ValueError: if the prompt is shorter than what is to be generated.
        """
        if context.n_new > context.n_prompt:
            raise ValueError(f"{context.n_new} tokens cannot be a permutation of a prompt of {context.n_prompt}")
        given = context.tokens[:, -context.n_new :]
        counts = given.new_zeros(len(given), context.vocab_size)
        return {"counts": counts.scatter_add(1, given, torch.ones_like(given))}

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        counts = state["counts"]
        if context.step:
            last = context.tokens[:, -1:]
            counts = counts.scatter_add(1, last, torch.full_like(last, -1))
        return {"counts": counts}, counts > 0


class MonotoneConstraint(Constraint):
    """The output's tokens never fall, or never rise."""

    def __init__(self, is_descending: bool = False):
        self.is_descending = is_descending

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        tokens = torch.arange(context.vocab_size, device=context.device)
        if context.step == 0:
            return state, torch.ones_like(tokens, dtype=torch.bool).expand(len(context.tokens), -1)
        last = context.tokens[:, -1:]
        return state, tokens <= last if self.is_descending else tokens >= last


class RegularConstraint(Constraint):
    """The output is in the language of a finite automaton, whole.

    Its state is each row's, and the automaton's tables, which all rows share.
    """

    def __init__(self, dfa: DFA):
        self.dfa = dfa

    def init(self, context: Context) -> State:
        """Find which tokens can be completed, for each number of tokens that remain.

        Raises:
            ValueError: if nothing of the needed length is accepted, or the vocabulary is another.
        """
        dfa, n_new = self.dfa, context.n_new
        _check(dfa.vocab_size, context)
        away = dfa.completable(n_new)  # (N + 1, S)
        if not away[n_new, 0]:
            raise ValueError(f"the automaton accepts nothing of {n_new} tokens; {_lengths(dfa.completable(64)[:, 0])}")
        distinct, place = away[:n_new].unique(dim=0, return_inverse=True)
        allowed = distinct[:, dfa.next].flatten(0, 1)  # (one for each of them and each state, V)
        return {
            "state": context.tokens.new_zeros(len(context.tokens)),
            "next": dfa.next.to(context.device),
            "allowed": allowed.to(context.device),
            "first": tuple((place.flip(0) * len(dfa.next)).tolist()),  # where a step's states are among the allowed
        }

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        own, step = state["state"], context.step
        if step:
            own = state["next"][own, context.tokens[:, -1]]
        return state | {"state": own}, state["allowed"].index_select(0, own + state["first"][step])

    def reorder(self, state: State, rows: Tensor) -> State:
        return state | {"state": state["state"].index_select(0, rows)}


class PushdownConstraint(Constraint):
    """The output is in the language of a pushdown automaton, whole.

    Beside the stack of symbols each row keeps, for every level of it, after which numbers of tokens what is on the
    stack up to there can have been completed. A symbol that is pushed combines what is below it with the automaton's
    table of when such a symbol can be gone; so one look at the top says what can be completed.
    """

    def __init__(self, pda: PDA):
        self.pda = pda

    def init(self, context: Context) -> State:
        """Lay out the stacks.

        Raises:
            ValueError: if nothing of the needed length is accepted, or the vocabulary is another.
        """
        pda, n_new, batch = self.pda, context.n_new, len(context.tokens)
        _check(pda.vocab_size, context)
        popped, ended = pda.completable(n_new)
        if not ended[0, n_new]:
            raise ValueError(f"the automaton accepts nothing of {n_new} tokens; {_lengths(pda.completable(64)[1][0])}")
        n_states, n_symbols = popped.shape[1:3]
        # What a move leads to, as a number: nothing, or a state after a move that stays, pops or pushes a symbol.
        kinds = torch.where(pda.move == POP, n_symbols + 1, pda.move)
        effects = torch.where(pda.next < 0, 0, 1 + kinds * n_states + pda.next)
        shared = {"next": pda.next, "move": pda.move, "effects": effects, "popped": popped}
        levels = torch.zeros(batch, pda.depth + 1, n_states, n_new + 1, device=context.device)
        levels[:, 0] = ended.to(context.device)
        zeros = context.tokens.new_zeros(batch, pda.depth + 1)
        own = {"state": zeros[:, 0].clone(), "level": zeros[:, 0].clone(), "stack": zeros, "levels": levels}
        return own | {name: tensor.to(context.device) for name, tensor in shared.items()}

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        if context.step:
            state = self._moved(state, context.tokens[:, -1])
        rows, level = torch.arange(len(context.tokens), device=context.device), state["level"]
        n_left = context.n_new - context.step - 1
        here, below = state["levels"][rows, level], state["levels"][rows, (level - 1).clamp(min=0)]  # (B, S, N + 1)
        room = self.pda.depth - level - 1  # after a push
        popped = state["popped"][room.clamp(min=0), ..., : n_left + 1]  # (B, S, G, S', i), then the rest in n_left - i
        pushed = torch.einsum("bsgqi,bqi->bgs", popped, here[..., : n_left + 1].flip(-1))
        pushed = pushed * (room >= 0)[:, None, None]
        possible = torch.cat(
            [torch.zeros_like(pushed[:, 0, :1]), here[..., n_left], pushed.flatten(1), below[..., n_left]], dim=1
        )
        effects = state["effects"][state["state"], state["stack"][rows, level]]  # (B, V)
        return state, possible.gather(1, effects) > 0

    def _moved(self, state: State, token: Tensor) -> State:
        """The state after a token."""
        rows, level = torch.arange(len(token), device=token.device), state["level"]
        place = (state["state"], state["stack"][rows, level], token)
        following, action = state["next"][place], state["move"][place]
        moved = level + action.clamp(POP, 1)
        is_push, symbol = action > 0, action.clamp(min=1)
        here = state["levels"][rows, level]  # (B, S, N + 1)
        n = torch.arange(here.shape[-1], device=token.device)
        rest = here[..., (n - n[:, None]).clamp(min=0)] * (n >= n[:, None])  # (B, S', i, N + 1), shifted by i
        room = (self.pda.depth - moved).clamp(max=self.pda.depth - 1)
        popped = state["popped"][room, :, symbol - 1]  # (B, S, S', i)
        pushed = torch.einsum("bsqi,bqin->bsn", popped, rest).clamp(max=1.0)
        stack, levels = state["stack"].clone(), state["levels"].clone()
        stack[rows, moved] = torch.where(is_push, symbol, stack[rows, moved])
        levels[rows, moved] = torch.where(is_push[:, None, None], pushed, levels[rows, moved])
        return state | {"state": following, "level": moved, "stack": stack, "levels": levels}

    def reorder(self, state: State, rows: Tensor) -> State:
        own = ("state", "level", "stack", "levels")
        return state | {name: state[name].index_select(0, rows) for name in own}


def _check(vocab_size: int, context: Context) -> None:
    if vocab_size != context.vocab_size:
        raise ValueError(f"the automaton knows {vocab_size} tokens, the model has {context.vocab_size}")


def _lengths(is_accepted: Tensor) -> str:
    """Say which lengths there are, of (N + 1,)."""
    lengths = is_accepted.nonzero().flatten().tolist()
    if not lengths:
        return f"it accepts nothing of up to {len(is_accepted) - 1} tokens at all"
    return f"what it accepts has {', '.join(map(str, lengths[:6]))}{', ...' if len(lengths) > 6 else ''} tokens"
