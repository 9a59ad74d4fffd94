"""The decode loop, greedy, sampled or by beams.

Legend: B batch, T tokens of the prompt, P prefix positions, V vocabulary, W beams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mingpt.decoding.logits_processors import Constraint, Context, FunctionProcessor, LogitsProcessor, Processors
from mingpt.kv_cache import Cache, KVCache, n_positions
from mingpt.prefix import Prefix, Record, as_prefix, check_tokens
from mingpt.utils import CfgNode


@runtime_checkable
class CausalModel(Protocol):
    """What prefixes, the decode loop, evaluation and plans need of a model.

    It is a ``GPT``, or a ``CausalLM`` around a model of transformers. Its config has n_layer and vocab_size. The
    methods are those of ``GPT``. A ``KVCache`` that a model gives is kept, and the model writes to it; pieces are
    copied into one first.
    """

    config: CfgNode
    block_size: int
    training: bool
    __call__: Any

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def prefix_widths(self) -> Mapping[str, int]:
        """How many channels a prefix of each kind has that the model takes."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Turn dropout on or off."""
        ...

    def generate(self, *args: Any, **options: Any) -> Tensor:
        """Continue prompts, see ``generate`` in this module."""
        ...

    def prefix_cache(self, prefix: Prefix) -> Cache:
        """The KV cache of K prefixes, or of B rows with ``prefix.rows``."""
        ...

    def forward_cached(
        self, tokens: Tensor, kv_cache: Cache | None = None, *, n_last: int | None = None, start: int | None = None
    ) -> tuple[Tensor, Cache]:
        """The logits of tokens after a KV cache, and the cache with these tokens in it."""
        ...


@torch.no_grad()
def generate(
    model: CausalModel,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    do_sample: bool = False,
    top_k: int | None = None,
    prefixes: Tensor | Prefix | None = None,
    activations_record: Record | None = None,
    logits_processors: Processors = (),
    *,
    seed: int | None = None,
    row_numbers: Sequence[int] | None = None,
    stop_token: int | Sequence[int] | None = None,
    forbidden_mass_record: list[Tensor] | None = None,
) -> Tensor:
    """Continue prompts token by token, greedily or by sampling.

    The KV cache keeps what was read, so each token is read once. A prompt that outgrows ``block_size`` is cropped to
    its last ``block_size`` tokens, as in minGPT. Their positions move then, and all of them are read again.
    Rows that have met the stop token leave the batch. Where constraints leave one token to every row, it is taken
    without asking the model, unless there are other processors, which see every step.

    Args:
        model: a GPT or another ``CausalModel``, usually in ``eval()`` mode.
        idx: (B, T) of int64, the prompts; with a prefix the first P tokens are placeholders.
        max_new_tokens: how many tokens to add.
        temperature: what the logits are divided by when sampling, after the processors. At 0 the likeliest token is
            taken, as without ``do_sample``.
        do_sample: draw each token from the distribution instead of taking the likeliest.
        top_k: draw from the k likeliest tokens (Fan et al. 2018) and those as likely as the last of them. Neither it
            nor ``temperature`` changes which token is the likeliest, so greedy decoding only checks them.
        prefixes: see ``mingpt.prefix.as_prefix``.
        activations_record: a list that receives the activations of all tokens but the last, in one pass.
        logits_processors: see ``mingpt.decoding.logits_processors``; also functions (tokens, logits) -> logits, and
            those of transformers.
        seed: of sampling, drawn from torch's global generator by default. A row's draws are a function of it and the
            row's number, whatever else is in the batch.
        row_numbers: B of them, where the batch is a part of something longer; 0, 1, ... by default.
        stop_token: a row ends with it and is filled up with it; of several, with any, and is filled up with the first.
        forbidden_mass_record: a list that receives, for each step, (B, number of constraints): the probability that
            each constraint forbids, of the logits that it gets; not a number for rows that have ended.

    Returns:
        (B, T + max_new_tokens) of int64, prompts and continuations.

    Raises:
        ValueError: for a prompt, temperature or top_k that makes no sense, where the logits are not numbers, and where
            the processors leave a row no token.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature is 0 or more and top_k 1 or more, got {temperature} and {top_k}")
    if not do_sample or temperature == 0:
        seed = None
    elif seed is None:
        seed = int(torch.randint(2**62, ()))
    batch, n_prompt = idx.shape[0], idx.shape[-1]
    numbers = torch.as_tensor(range(batch) if row_numbers is None else row_numbers, dtype=torch.int64).to(idx.device)
    if numbers.shape != (batch,):
        raise ValueError(f"{numbers.numel()} row_numbers for {batch} rows; give one for each")
    rows = Decoding(model, idx, max_new_tokens, prefixes, logits_processors)
    several = stop_token if isinstance(stop_token, Sequence) else () if stop_token is None else (stop_token,)
    stop_tokens = idx.new_tensor(several)
    tokens = torch.cat([idx, idx.new_full((batch, max_new_tokens), several[0] if several else 0)], dim=1)
    for step in range(max_new_tokens if batch else 0):
        chosen = rows.single_choice() if forbidden_mass_record is None else None
        if chosen is None:
            logits = rows.process_logits(rows.next_logits(), forbidden_mass_record)
            if seed is not None:
                logits = logits / temperature
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                    logits = logits.masked_fill(logits < least, float("-inf"))
            rows.require_choice(logits.amax(dim=-1), is_sampled=seed is not None)
            chosen = logits.argmax(dim=-1) if seed is None else _draw(logits, uniform(seed, step, numbers[rows.origin]))
        rows.append(chosen)
        tokens[rows.origin, n_prompt + step] = chosen
        if len(stop_tokens):
            goes_on = torch.isin(chosen, stop_tokens, invert=True).nonzero().flatten()
            if len(goes_on) < len(chosen):
                rows.select(goes_on)
            if not len(goes_on):
                break
    if activations_record is not None and max_new_tokens and batch:
        model(tokens[:, :-1][:, -model.block_size :], prefixes=prefixes, activations_record=activations_record)
    return tokens


@torch.no_grad()
def beam_search(
    model: CausalModel,
    idx: Tensor,
    max_new_tokens: int,
    n_beams: int,
    *,
    prefixes: Tensor | Prefix | None = None,
    logits_processors: Processors = (),
    stop_token: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Search for the likeliest continuations, keeping the W best beginnings at every step.

    Args:
        model: a GPT or another ``CausalModel``, usually in ``eval()`` mode.
        idx: (B, T) of int64, the prompts; see ``generate``.
        max_new_tokens: how many tokens to add.
        n_beams: W.
        prefixes: see ``mingpt.prefix.as_prefix``.
        logits_processors: they process log-probabilities, as in transformers. The probability that a constraint forbids
            is not given to the other tokens, so a score is the model's own.
        stop_token: a continuation ends with it and is filled up with it, at no cost.

    Returns:
        (B, W, T + max_new_tokens) of int64, the best first; and their scores (B, W), the sums of the log-probabilities
        in nats, minus infinity where there are fewer than W continuations.

    Raises:
        ValueError: as ``generate``; a beginning that nothing may follow is dropped while there are others.
    """
    if n_beams < 1:
        raise ValueError(f"n_beams must be at least 1, got {n_beams}")
    batch = len(idx)
    rows = Decoding(model, idx, max_new_tokens, prefixes, logits_processors)
    scores = torch.zeros(batch, 1, device=idx.device)
    for step in range(max_new_tokens):
        log_p = rows.process_logits(F.log_softmax(rows.next_logits(), dim=-1))
        if stop_token is not None and step:
            has_ended = rows.tokens[:, -1] == stop_token
            log_p = log_p.masked_fill(has_ended[:, None], float("-inf"))
            log_p[has_ended, stop_token] = 0
        width, n_tokens = scores.shape[1], log_p.shape[1]
        sums = (scores[:, :, None] + log_p.view(batch, width, n_tokens)).flatten(1)
        sums = F.pad(sums, (0, max(0, n_beams - sums.shape[1])), value=float("-inf"))
        scores, place = sums.topk(n_beams, dim=1)
        rows.require_choice(scores[:, :1].repeat_interleave(width, dim=0)[:, 0])
        place = torch.where(scores.isneginf(), place[:, :1], place)  # a missing beam repeats the best one
        first = width * torch.arange(batch, device=idx.device)[:, None]
        rows.select((first + place // n_tokens).flatten())
        rows.append((place % n_tokens).flatten())
    tokens = rows.tokens.view(batch, -1, rows.tokens.shape[1])
    scores = F.pad(scores, (0, n_beams - scores.shape[1]), value=float("-inf"))  # one beam if no token was added
    return tokens.expand(-1, n_beams, -1), scores


class Decoding:
    """Rows that are being decoded: their tokens, their KV cache, and their processors' states.

    Attributes:
        context: what the processors know; its ``tokens`` are the rows so far, (B, T) of int64.
        origin: (B,) of int64, which prompt each of them continues.
    """

    def __init__(
        self, model: CausalModel, idx: Tensor, n_new: int, prefixes: Tensor | Prefix | None, processors: Processors
    ):
        """Check that the prompts can be continued, and make the processors' states."""
        vocab_size = model.config.vocab_size
        check_tokens(idx, vocab_size)
        batch, n_prompt = idx.shape
        if n_new < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {n_new}")
        self.prefix = None if prefixes is None else as_prefix(prefixes, model, batch)
        n_prefix = 0 if self.prefix is None else self.prefix.n_placeholders
        if min(n_prompt, model.block_size) <= n_prefix:
            sizes = f"a prompt of {n_prompt} tokens and block_size = {model.block_size}"
            raise ValueError(f"{n_prefix} prefix positions leave nothing to continue in {sizes}")
        self.model, self.origin = model, torch.arange(batch, device=idx.device)
        self.processors = [p if isinstance(p, LogitsProcessor) else FunctionProcessor(p) for p in processors]
        self.context = Context(idx, n_prompt, n_new, vocab_size, n_prefix)
        self._n_rows, self._n_read = batch, 0
        self._cache: list[KVCache] | None = None
        self._allowed: dict[int, Tensor] | None = None
        self._states = [processor.init(self.context) for processor in self.processors] if n_new else []

    @property
    def tokens(self) -> Tensor:
        """(B, T) of int64, the rows so far."""
        return self.context.tokens

    def next_logits(self) -> Tensor:
        """The model's logits (B, V) of float32 for the next token, after reading what it has not read yet."""
        model, window = self.model, self.tokens[:, -self.model.block_size :]
        if self._cache is None or self.tokens.shape[1] > model.block_size:
            shared, n_shared = self._shared(window)
            logits, cache = model.forward_cached(window[:, n_shared:], shared, n_last=1, start=n_shared)
            room = min(self.context.n_prompt + self.context.n_new, model.block_size) + n_positions(shared) - n_shared
            self._cache = [each if isinstance(each, KVCache) else KVCache(each, len(window), room) for each in cache]
        else:
            logits, _ = model.forward_cached(window[:, self._n_read :], self._cache, n_last=1, start=self._n_read)
        self._n_read = window.shape[1]
        return logits[:, -1].float()

    def process_logits(self, logits: Tensor, forbidden_mass_record: list[Tensor] | None = None) -> Tensor:
        """The logits (B, V) after all processors."""
        allowed = self._ask()
        # Not a number where a row has ended.
        forbidden_mass = logits.new_full((self._n_rows, len(allowed)), float("nan"))
        for number, processor in enumerate(self.processors):
            if number not in allowed:
                self._states[number], logits = processor.process(self._states[number], logits, self.context)
                continue
            if forbidden_mass_record is not None:
                mass = 1 - (F.softmax(logits, dim=-1) * allowed[number]).sum(dim=-1)
                forbidden_mass[self.origin, list(allowed).index(number)] = mass
            logits = logits.masked_fill(~allowed[number], float("-inf"))
        if forbidden_mass_record is not None:
            forbidden_mass_record.append(forbidden_mass)
        return logits

    def require_choice(self, best: Tensor, is_sampled: bool = False) -> None:
        """Check the best score that each row can still have, (B,).

        Raises:
            ValueError: if one is minus infinity or not a number, or infinite where its softmax is needed, with its row,
                its step and the processors.
        """
        is_stuck = ~best.isfinite() if is_sampled else best.isnan() | best.isneginf()
        if is_stuck.any():
            row = int(is_stuck.nonzero()[0])
            so_far = self.tokens[row, self.context.n_prompt :].tolist()
            why = "the processors forbid every token" if best[row].isneginf() else f"its best logit is {best[row]}"
            where = f"row {int(self.origin[row])} at step {len(so_far)}, after {so_far}"
            names = [type(processor).__name__ for processor in self.processors]
            raise ValueError(f"nothing may follow in {where}: {why}; processors: {', '.join(names)}")

    def single_choice(self) -> Tensor | None:
        """The next tokens (B,), if constraints leave each row only one and no processor has to see the logits."""
        allowed = self._ask()
        if not allowed or not all(isinstance(each, Constraint) for each in self.processors):
            return None
        only = reduce(torch.logical_and, allowed.values())
        return only.int().argmax(dim=-1) if bool((only.sum(dim=-1) == 1).all()) else None

    def append(self, chosen: Tensor) -> None:
        """Take the next token of every row, (B,)."""
        self.context = replace(self.context, tokens=torch.cat([self.tokens, chosen[:, None]], dim=1))
        self._allowed = None

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``, (B',) of int64."""
        self.context, self.origin = replace(self.context, tokens=self.tokens[rows]), self.origin[rows]
        for cache in self._cache or []:
            cache.select(rows)
        states = zip(self.processors, self._states, strict=True)
        self._states = [processor.reorder(state, rows) for processor, state in states]

    def _ask(self) -> dict[int, Tensor]:
        """What each constraint allows to follow, (B, V) of bool, by its place; each is asked once a step."""
        if self._allowed is None:
            self._allowed = {}
            for number, processor in enumerate(self.processors):
                if isinstance(processor, Constraint):
                    self._states[number], self._allowed[number] = processor.allowed(self._states[number], self.context)
        return self._allowed

    def _shared(self, window: Tensor) -> tuple[Cache | None, int]:
        """The KV cache of all first tokens that are a prefix's, or the same in every row, and how many they are."""
        if self.prefix is not None:
            return self.model.prefix_cache(self.prefix.for_rows(self.origin, self._n_rows)), self.prefix.n_placeholders
        # In training mode every row has a dropout mask of its own.
        n_shared = 0 if self.model.training else common_prefix_length(window)
        return self.model.forward_cached(window[:1, :n_shared])[1] if n_shared else None, n_shared


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token (B,) from the softmax of each row of logits (B, V) where its number in [0, 1) falls, (B,)."""
    cumulative = F.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    # The first token whose sum is above the number: never one of probability 0, which adds nothing to the sum.
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return token[:, 0].clamp(max=logits.shape[-1] - 1)


def uniform(seed: int, step: int, numbers: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), each a function of (seed, step, its row's number) and of nothing else.

    Args:
        seed: any integer, modulo 2^64.
        step: of the generation.
        numbers: (B,) of int64, the rows' numbers.

    Returns:
        (B,) of float64, on the device of ``numbers``.

    Source: SplitMix64 (Steele et al. 2014). The seed's stream gives each step a seed, whose stream gives each row a
    number.
    """
    stream = _splitmix(numbers.new_tensor((seed + 2**63) % 2**64 - 2**63), numbers.new_tensor(step))
    return ((_splitmix(stream, numbers) >> 11) & (2**53 - 1)).double() * 2.0**-53


def _splitmix(seed: Tensor, number: Tensor) -> Tensor:
    """The number-th output of SplitMix64 from a seed, int64; products of int64 are modulo 2^64."""
    z = seed + (number + 1) * (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ (z >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)  # >> keeps the sign, which & removes
    z = (z ^ (z >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return z ^ (z >> 31 & 2**33 - 1)


def common_prefix_length(tokens: Tensor) -> int:
    """How many first tokens all rows of (B, T) share, at most T - 1: they need reading once only."""
    is_same = (tokens[:, :-1] == tokens[:1, :-1]).all(dim=0)
    return int(is_same.cumprod(dim=0).sum())
