"""How tokens are chosen: the decode loop, processors with a state, and constraints.

``generation`` has the loop, greedy, sampled or by beams. ``logits_processors`` has the protocol that it calls.
``constraints`` are processors that forbid tokens; ``automata`` are the tables that some of them follow, and
``grammar`` holds those over text (the extra ``grammar``).
"""

from mingpt.decoding.automata import DFA, PDA
from mingpt.decoding.constraints import MonotoneConstraint, MultisetConstraint, PushdownConstraint, RegularConstraint
from mingpt.decoding.generation import beam_search, generate
from mingpt.decoding.grammar import GrammarConstraint
from mingpt.decoding.logits_processors import Constraint, Context, LogitsProcessor

__all__ = [
    "DFA", "PDA", "Constraint", "Context", "GrammarConstraint", "LogitsProcessor", "MonotoneConstraint",
    "MultisetConstraint", "PushdownConstraint", "RegularConstraint", "beam_search", "generate",
]  # fmt: skip
