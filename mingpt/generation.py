"""The decode loop, over any model that maps (tokens, past) to (logits, past).

Legend: B batch, T tokens of the prompt, P prefix positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mingpt.past import LayerCache, Past
from mingpt.prefix import Prefix, as_prefix

if TYPE_CHECKING:
    from mingpt.model import GPT, Record

LogitsFunction = Callable[[Tensor, Tensor], Tensor]
"""(tokens so far (B, t), logits (B, V)) to logits (B, V)."""


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    do_sample: bool = False,
    top_k: int | None = None,
    prefixes: Tensor | Prefix | None = None,
    activations_record: Record | None = None,
    logits_processors: Iterable[LogitsFunction] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts token by token, greedily or by sampling.

    Keys and values of what was read are kept, so each token is read once. A prompt that outgrows ``block_size`` is
    cropped to its last ``block_size`` tokens, as minGPT does; their positions move then, and all of them are read anew.

    Args:
        model: a GPT, usually in ``eval()`` mode.
        idx: (B, T) of int64, the prompts; with a prefix the first P tokens are placeholders.
        max_new_tokens: how many tokens to add.
        temperature: what the logits are divided by.
        do_sample: draw each token from the distribution instead of taking the likeliest.
        top_k: leave only the k likeliest tokens to draw from.
        prefixes: see ``mingpt.prefix.as_prefix``.
        activations_record: a list that receives the activations of all tokens but the last, in one pass.
        logits_processors: functions (tokens, logits) -> logits, applied in this order before the temperature.
        generator: the source of random numbers when sampling.

    Returns:
        (B, T + max_new_tokens) of int64, prompts and continuations.

    Raises:
        ValueError: for a prompt, temperature or top_k that makes no sense.
    """
    batch, n_prompt = idx.shape
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if temperature <= 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; for the likeliest token use do_sample=False"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    config = model.config
    prefix = None if prefixes is None else as_prefix(prefixes, config.n_layer, config.n_embd, batch)
    n_prefix = 0 if prefix is None else prefix.n_positions
    if n_prompt <= n_prefix:
        raise ValueError(f"the prompt has {n_prompt} tokens, of which {n_prefix} are the prefix's: nothing to continue")

    if n_prefix >= model.block_size:
        raise ValueError(f"{n_prefix} prefix positions leave no content in block_size = {model.block_size}")
    processors = tuple(logits_processors)
    tokens = idx
    prefix_past = None if prefix is None else model.past_of_prefix(prefix)
    past, n_read = None, 0
    for _ in range(max_new_tokens):
        window = tokens[:, -model.block_size :]
        if past is None or tokens.shape[1] > model.block_size:
            n_read = n_prefix if prefix_past is not None else _n_shared(window)
            shared = prefix_past or model.extend(window[:1, :n_read])[1]
            past = _new_cache(shared, batch, min(n_prompt + max_new_tokens, model.block_size))
        logits, past = model.extend(window[:, n_read:], past, n_last=1)
        n_read = window.shape[1]
        logits = logits[:, -1].float()  # (B, V)
        for process in processors:
            logits = process(tokens, logits)
        logits = logits / temperature
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if do_sample:
            chosen = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)
        else:
            chosen = logits.argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    if activations_record is not None and max_new_tokens:
        model(tokens[:, :-1][:, -model.block_size :], prefixes=prefixes, activations_record=activations_record)
    return tokens


def _new_cache(past: Past, batch_size: int, n_positions: int) -> list[LayerCache]:
    """A cache for each layer, begun with a past."""
    caches = [LayerCache(batch_size, n_positions) for _ in past]
    for cache, (keys, values) in zip(caches, past, strict=True):
        cache.append(keys, values)
    return caches


def _n_shared(tokens: Tensor) -> int:
    """How many first tokens all rows of (B, T) share, at most T - 1: they need reading once only."""
    is_same = (tokens[:, :-1] == tokens[:1, :-1]).all(dim=0)
    return int(is_same.cumprod(dim=0).sum())
