"""Logits processors: what may change the scores of the next token, and the state that it threads through a generation.

Legend: B batch, T tokens so far, V vocabulary.

A processor is configuration only. Its state is made by ``init``, belongs to the decode loop, goes through ``process``
at every step, and follows its rows through ``reorder``; so one processor serves any number of generations at a time,
and none can reach another's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Any]
"""Tensors with the batch first, whose shapes and dtypes stay the same. With a ``reorder`` of one's own there may be
other things, such as a table that all rows share."""

LogitsFunction = Callable[[Tensor, Tensor], Tensor]
"""(tokens so far (B, T), logits (B, V)) to logits (B, V)."""


@dataclass(frozen=True)
class Context:
    """What a processor may know; it can get more fields.

    Attributes:
        tokens: (B, T) of int64, the prompts and what was generated.
        n_prompt: how many of them are the prompt's.
        n_new: how many will have been generated in the end.
        vocab_size: V.
        generator: the generation's source of random numbers, if it was given one.
        n_placeholders: how many first tokens of the prompt stand for a prefix and are no content.
    """

    tokens: Tensor
    n_prompt: int
    n_new: int
    vocab_size: int
    generator: torch.Generator | None = None
    n_placeholders: int = 0

    @property
    def step(self) -> int:
        """How many tokens were generated."""
        return self.tokens.shape[1] - self.n_prompt

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.tokens.device


class LogitsProcessor:
    """A processor without a state; a subclass says what ``process`` does, and ``init`` where it has one."""

    def init(self, context: Context) -> State:
        """The state before the first token, in its final shapes."""
        return {}

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        """Take the state and the logits (B, V) of float32 at ``context``, and return both as they are next.

        Neither is written to: a new tensor takes the place of one that changes.
        """
        raise NotImplementedError

    def reorder(self, state: State, rows: Tensor) -> State:
        """The state after row i has become what row ``rows[i]`` was."""
        return {name: value.index_select(0, rows) for name, value in state.items()}


class Constraint(LogitsProcessor):
    """A processor that forbids tokens, whatever their logits; so it can be asked before the model is."""

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        """Take the state and return the next one and which tokens may follow, (B, V) of bool."""
        raise NotImplementedError

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        """Leave only what is allowed."""
        state, allowed = self.allowed(state, context)
        return state, logits.masked_fill(~allowed, float("-inf"))


class Stateless(LogitsProcessor):
    """A function (tokens, logits) -> logits as a processor."""

    def __init__(self, function: LogitsFunction):
        self.function = function

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        return state, self.function(context.tokens, logits)


class FromTransformers(Stateless):
    """One of transformers' LogitsProcessor objects, which sees the prompt and all that was generated.

    It gets logits of its own to write to. What it remembers itself between calls is its own affair: such an object
    serves one generation only.
    """

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        return state, self.function(context.tokens, logits.clone())


def as_processors(processors: Iterable[LogitsProcessor | LogitsFunction]) -> list[LogitsProcessor]:
    """Read what a user gives as ``logits_processors=``.

    Raises:
        TypeError: for what is neither a processor nor a function.
    """
    read = []
    for processor in processors:
        if isinstance(processor, LogitsProcessor) or all(
            callable(getattr(processor, name, None)) for name in ("init", "process", "reorder")
        ):
            read.append(processor)
        elif any(base.__module__.startswith("transformers.") for base in type(processor).__mro__):
            read.append(FromTransformers(processor))
        elif callable(processor):
            read.append(Stateless(processor))
        else:
            raise TypeError(
                "a logits processor has init, process and reorder, or is a function (tokens, logits) -> logits; "
                f"got {processor!r}"
            )
    return read


# ------------------------------------------------------------------------------------- the ones that everybody has


class Temperature(LogitsProcessor):
    """Divide the logits by a temperature: below 1 the likely becomes likelier."""

    def __init__(self, temperature: float):
        if temperature <= 0:
            raise ValueError(
                f"temperature must be positive, got {temperature}; for the likeliest token use do_sample=False"
            )
        self.temperature = temperature

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        return state, logits / self.temperature


class TopK(LogitsProcessor):
    """Leave the k likeliest tokens (Fan et al. 2018), and those as likely as the last of them."""

    def __init__(self, k: int):
        if k < 1:
            raise ValueError(f"top_k must be at least 1, got {k}")
        self.k = k

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        least = logits.topk(min(self.k, logits.shape[-1])).values[:, -1:]
        return state, logits.masked_fill(logits < least, float("-inf"))


class TopP(LogitsProcessor):
    """Leave the fewest likeliest tokens whose probabilities reach p together (Holtzman et al. 2020)."""

    def __init__(self, p: float):
        if not 0 < p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {p}")
        self.p = p

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        ordered, order = logits.sort(dim=-1)  # from the least likely on
        is_removed = F.softmax(ordered, dim=-1).cumsum(dim=-1) <= 1 - self.p
        is_removed[:, -1] = False
        return state, logits.masked_fill(torch.zeros_like(is_removed).scatter(1, order, is_removed), float("-inf"))


class MinP(LogitsProcessor):
    """Leave the tokens that are at least p times as probable as the likeliest (Nguyen et al. 2024)."""

    def __init__(self, p: float):
        if not 0 <= p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {p}")
        self.p = p

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        probabilities = F.softmax(logits, dim=-1)
        is_removed = probabilities < self.p * probabilities.amax(dim=-1, keepdim=True)
        return state, logits.masked_fill(is_removed, float("-inf"))


class RepetitionPenalty(LogitsProcessor):
    """Divide the positive logits of all tokens so far by a penalty, multiply the negative ones (Keskar et al. 2019)."""

    def __init__(self, penalty: float):
        if penalty <= 0:
            raise ValueError(f"the repetition penalty must be positive, got {penalty}")
        self.penalty = penalty

    def process(self, state: State, logits: Tensor, context: Context) -> tuple[State, Tensor]:
        own = logits.gather(1, context.tokens)
        own = torch.where(own < 0, own * self.penalty, own / self.penalty)
        return state, logits.scatter(1, context.tokens, own)


class ForcedTokens(Constraint):
    """Force tokens at steps of the generation: 0 is the first, -1 the last, as an end token wants it."""

    def __init__(self, tokens: Mapping[int, int]):
        self.tokens = dict(tokens)

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        step = context.step if context.step in self.tokens else context.step - context.n_new
        allowed = context.tokens.new_ones(len(context.tokens), context.vocab_size, dtype=torch.bool)
        if step in self.tokens:
            allowed = torch.zeros_like(allowed)
            allowed[:, self.tokens[step]] = True
        return state, allowed


class SuppressedTokens(Constraint):
    """Forbid tokens, in the whole generation or before its first ``until`` tokens."""

    def __init__(self, tokens: Sequence[int], until: int | None = None):
        self.tokens, self.until = list(tokens), until

    def allowed(self, state: State, context: Context) -> tuple[State, Tensor]:
        allowed = context.tokens.new_ones(len(context.tokens), context.vocab_size, dtype=torch.bool)
        if self.until is None or context.step < self.until:
            allowed[:, self.tokens] = False
        return state, allowed


class MinimumLength(SuppressedTokens):
    """Forbid an end token before so many tokens were generated."""

    def __init__(self, n_tokens: int, end_token: int):
        super().__init__([end_token], until=n_tokens)


def describe_row(processors: Sequence[LogitsProcessor], states: Sequence[State], row: int, n_rows: int) -> str:
    """Each processor's name and its state of one row, for a message."""

    def own(state: State) -> str:
        rows = {name: value for name, value in state.items() if isinstance(value, Tensor) and len(value) == n_rows}
        return ", ".join(f"{name} = {value[row].tolist()}" for name, value in rows.items() if value.ndim < 3)

    return "; ".join(f"{type(p).__name__}({own(state)})" for p, state in zip(processors, states, strict=True))
