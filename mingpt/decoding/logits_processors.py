"""Logits processors: what may change the next token's logits, with a state that goes from step to step.

Legend: B batch, T tokens so far, V vocabulary.

A processor is configuration only. Its state is made by ``init``, belongs to the decode loop, goes through ``process``
at every step, and follows its rows through ``reorder``. So one processor serves any number of generations at a time,
and none can reach another's state. transformers' own processors work here too, see ``FunctionProcessor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = dict[str, Any]
"""Tensors with the batch first, whose shapes and dtypes stay the same; what all rows share stands under "shared"."""

LogitsFunction = Callable[[Tensor, Tensor], Tensor]
"""(tokens so far (B, T), logits (B, V)) to logits (B, V)."""


@dataclass(frozen=True, eq=False)
class Context:
    """What a processor may know.

    Attributes:
        tokens: (B, T) of int64, the prompts and what was generated.
        n_prompt: how many of them are the prompt's.
        n_new: how many will have been generated in the end.
        vocab_size: V.
        n_placeholders: how many first tokens of the prompt stand for a prefix and are no content.
    """

    tokens: Tensor
    n_prompt: int
    n_new: int
    vocab_size: int
    n_placeholders: int = 0

    @property
    def step(self) -> int:
        """How many tokens were generated."""
        return self.tokens.shape[1] - self.n_prompt


class LogitsProcessor:
    """The base class. A subclass defines ``process``, and also ``init`` if it has a state."""

    def init(self, context: Context) -> State:
        """The state before the first token, in its final shapes."""
        return {}

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        """Return the next state and the processed logits, from the state and the logits (B, V) of float32.

        Neither is written to: a new tensor takes the place of one that changes.
        """
        raise NotImplementedError

    def reorder(self, state: State, rows: Tensor) -> State:
        """The state after row i has become what row ``rows[i]`` was."""
        return {name: value if name == "shared" else value.index_select(0, rows) for name, value in state.items()}


class Constraint(LogitsProcessor):
    """A processor that forbids tokens, whatever their logits; so it can be asked before the model is."""

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        """Take the state and return the next one and which tokens may follow, (B, V) of bool."""
        raise NotImplementedError

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        """Leave only what is allowed."""
        state, allowed = self.allowed(state, context)
        return state, logits.masked_fill(~allowed, float("-inf"))


class FunctionProcessor(LogitsProcessor):
    """A function (tokens, logits) -> logits, or one of transformers' LogitsProcessor objects, as a processor.

    It gets the content's tokens, without a prefix's placeholders, and logits of its own to write to. A number of prompt
    tokens that it is configured with counts the content only. What it remembers is its own affair: an object that does
    serves one generation only.
    """

    def __init__(self, function: LogitsFunction):
        """Take a function.

        Raises:
            TypeError: if it cannot be called.
        """
        if not callable(function):
            raise TypeError(f"neither a LogitsProcessor nor a function (tokens, logits) -> logits: {function!r}")
        self.function = function

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        return state, self.function(context.tokens[:, context.n_placeholders :], logits.clone())


Processors = Iterable[LogitsProcessor | LogitsFunction]
"""What a user gives as ``logits_processors=``."""
