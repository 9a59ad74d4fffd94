"""Constraints on what may be generated: permutations and sorted rows, and the languages of automata.

Legend: B batch, V vocabulary, S an automaton's states, G its stack symbols, D its stack's depth, N tokens to generate.

Those of automata look ahead: a token is allowed only if what it leads to can be completed in exactly the tokens that
remain. So whatever is chosen, the generation ends inside the language.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mingpt.decoding.automata import DFA, PDA, POP, pda_step
from mingpt.decoding.logits_processors import Constraint, Context, State


class MultisetConstraint(Constraint):
    """The output is a permutation of the prompt's last tokens, of as many as are generated.

    A prefix's placeholders are not the prompt's content, so none of them is permuted; padding without a prefix is.
    Its state is how often each token is left to be used.
    """

    def init(self, context: Context) -> State:
        """Count.

        Raises:
            ValueError: if the prompt's content is shorter than what is to be generated.
        """
        n_new, n_content = context.n_new, context.n_prompt - context.n_placeholders
        if n_new > n_content:
            raise ValueError(f"{n_new} tokens cannot be a permutation of a prompt of {n_content}, placeholders aside")
        given = context.tokens[:, context.n_prompt - n_new :]
        counts = given.new_zeros(len(given), context.vocab_size)
        return {"counts": counts.scatter_add(1, given, torch.ones_like(given))}

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        counts = state["counts"]
        if context.step:
            last = context.tokens[:, -1:]
            counts = counts.scatter_add(1, last, torch.full_like(last, -1))
        return {"counts": counts}, counts > 0


class MonotoneConstraint(Constraint):
    """The output's tokens never fall, or never rise; the prompt's do not count."""

    def __init__(self, is_descending: bool = False):
        self.is_descending = is_descending

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        tokens = torch.arange(context.vocab_size, device=context.tokens.device)
        if context.step == 0:
            return state, torch.ones_like(tokens, dtype=torch.bool).expand(len(context.tokens), -1)
        last = context.tokens[:, -1:]
        return state, tokens <= last if self.is_descending else tokens >= last


class RegularConstraint(Constraint):
    """The whole output is in the language of a finite automaton.

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
        _check_vocabulary(dfa, context)
        away = dfa.completable(n_new)  # (N + 1, S)
        if not away[n_new, 0]:
            raise _nothing_accepted(n_new, dfa.completable(64)[:, 0])
        distinct, index = away[:n_new].unique(dim=0, return_inverse=True)
        allowed = distinct[:, dfa.next].flatten(0, 1)  # (one for each of them and each state, V)
        first = (index.flip(0) * len(dfa.next)).tolist()  # where a step's states are among the allowed
        device = context.tokens.device
        tables = {"next": dfa.next.to(device), "allowed": allowed.to(device), "first": first}
        return {"state": context.tokens.new_zeros(len(context.tokens)), "shared": tables}

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        own, tables, step = state["state"], state["shared"], context.step
        if step:
            own = tables["next"][own, context.tokens[:, -1]]
        return state | {"state": own}, tables["allowed"].index_select(0, own + tables["first"][step])


class PushdownConstraint(Constraint):
    """The whole output is in the language of a pushdown automaton.

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
        _check_vocabulary(pda, context)
        popped, ended = pda.completable(n_new)
        if not ended[0, n_new]:
            raise _nothing_accepted(n_new, pda.completable(64)[1][0])
        # What a move leads to, as a number: 0 for nothing, or a state after a move that pops, stays or pushes a symbol.
        effects = torch.where(pda.next < 0, 0, 1 + (pda.move - POP) * len(pda.next) + pda.next)
        tables = {"next": pda.next, "move": pda.move, "effects": effects, "popped": popped}
        levels = torch.zeros(batch, pda.depth + 1, *ended.shape, device=context.tokens.device)
        levels[:, 0] = ended.to(context.tokens.device)
        stack = context.tokens.new_zeros(batch, pda.depth + 1)
        own = {"state": stack[:, 0].clone(), "level": stack[:, 0].clone(), "stack": stack, "levels": levels}
        return own | {"shared": {name: tensor.to(context.tokens.device) for name, tensor in tables.items()}}

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        if context.step:
            state = self._moved(state, context.tokens[:, -1])
        rows, level = torch.arange(len(context.tokens), device=context.tokens.device), state["level"]
        n_left = context.n_new - context.step - 1
        here, below = state["levels"][rows, level], state["levels"][rows, (level - 1).clamp(min=0)]  # (B, S, N + 1)
        room = self.pda.depth - level - 1  # after a push
        # (B, S, G, S', i): what is pushed goes in i tokens, then the rest in n_left - i.
        popped = state["shared"]["popped"][room.clamp(min=0), ..., : n_left + 1]
        pushed = torch.einsum("bsgqi,bqi->bgs", popped, here[..., : n_left + 1].flip(-1))
        pushed = pushed * (room >= 0)[:, None, None]
        nothing = torch.zeros_like(pushed[:, 0, :1])
        possible = torch.cat([nothing, below[..., n_left], here[..., n_left], pushed.flatten(1)], dim=1)
        effects = state["shared"]["effects"][state["state"], state["stack"][rows, level]]  # (B, V)
        return state, possible.gather(1, effects) > 0

    def _moved(self, state: State, token: Tensor) -> State:
        """The state after a token."""
        tables, own = state["shared"], (state["state"], state["level"], state["stack"])
        following, level, stack, _ = pda_step(tables["next"], tables["move"], *own, token)
        rows, is_push = torch.arange(len(token), device=token.device), level > state["level"]
        here = state["levels"][rows, state["level"]]  # (B, S, N + 1)
        n = torch.arange(here.shape[-1], device=token.device)
        rest = here[..., (n - n[:, None]).clamp(min=0)] * (n >= n[:, None])  # (B, S', i, N + 1), shifted by i
        room, symbol = (self.pda.depth - level).clamp(max=self.pda.depth - 1), stack[rows, level].clamp(min=1)
        popped = tables["popped"][room, :, symbol - 1]  # (B, S, S', i)
        pushed = torch.einsum("bsqi,bqin->bsn", popped, rest).clamp(max=1.0)
        levels = state["levels"].clone()
        levels[rows, level] = torch.where(is_push[:, None, None], pushed, levels[rows, level])
        return state | {"state": following, "level": level, "stack": stack, "levels": levels}


def _check_vocabulary(automaton: DFA | PDA, context: Context) -> None:
    if automaton.vocab_size != context.vocab_size:
        raise ValueError(f"the automaton knows {automaton.vocab_size} tokens, the model has {context.vocab_size}")


def _nothing_accepted(n_new: int, is_accepted: Tensor) -> ValueError:
    """The error that says which lengths are accepted instead, from (N + 1,) of bool."""
    first = ", ".join(map(str, is_accepted.nonzero().flatten().tolist()[:6])) or f"none up to {len(is_accepted) - 1}"
    return ValueError(f"the automaton accepts nothing of {n_new} tokens; the first lengths that it accepts: {first}")
