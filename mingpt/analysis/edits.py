"""Prefixes without gradients: taken apart, shortened, and made from what the model itself has in its KV cache.

All are key_value prefixes of one model. Legend: B rows, T content tokens, P prefix positions, L layers, H heads, C
channels, D = C / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mingpt.analysis.theory import _layers
from mingpt.kv_cache import pieces_of
from mingpt.model import GPT
from mingpt.prefix import Prefix, as_key_value, initial_prefix


def swap_keys(prefix: Prefix, keys: Tensor, layers: Sequence[int] | None = None) -> Prefix:
    """A key_value prefix with its own values and other keys (L, P, C), in some layers or, by default, in all."""
    values, own = prefix.values.clone(), slice(None) if layers is None else list(layers)
    values[:, own, 0] = keys[own]
    return replace(prefix, values=values)


@torch.no_grad()
def cut_biases(model: GPT, prefix: Tensor | Prefix, x: Tensor, rank: int) -> Prefix:
    """Keep of each head's biases, what the prefix adds to its output, only the largest directions.

    The directions are those of the biases' singular vectors over the rows, and the values are projected onto them.

    Args:
        model: a GPT, in evaluation mode.
        prefix: one, see ``mingpt.prefix.as_prefix``.
        x: (B, P + T) of int64, rows as the model reads them with the prefix.
        rank: how many directions, from 0 to D.
    """
    cut = []
    for layer in _layers(model, prefix, x):
        values = layer.prefix_values[0]  # (H, P, D)
        biases = layer.weights[..., : values.shape[1]] @ values  # (B, H, T, D)
        directions = torch.linalg.svd(biases.transpose(0, 1).flatten(1, 2), full_matrices=False).Vh[:, :rank]
        cut.append(values @ directions.mT @ directions)
    return _with_values(as_key_value(model, prefix), cut, prefix)


@torch.no_grad()
def match_attention(model: GPT, prefix: Tensor | Prefix, x: Tensor, n_positions: int) -> Prefix:
    """Shorten a prefix: each head keeps the keys that it attends to most, and values are fitted to its outputs.

    The values are the least squares solution that gives the attention's output over the rows. The paper also fits a
    bias of each key's logits, which this model's attention does not have.

    Args:
        model, prefix, x: see ``cut_biases``.
        n_positions: of the result, from 1 to P.

    Source: Zweiger et al. 2026 (arXiv 2602.16284), with the keys of the largest root mean square attention.
    """
    pairs, keys, fitted = as_key_value(model, prefix), [], []
    for number, layer in enumerate(_layers(model, prefix, x)):
        weights, values = layer.weights.transpose(0, 1).flatten(1, 2), layer.prefix_values[0]  # (H, B * T, P + T)
        n_prefix, n_head = values.shape[1], len(values)
        to_prefix, left = weights[..., :n_prefix], weights[..., n_prefix:].sum(dim=-1, keepdim=True)
        chosen = to_prefix.square().mean(dim=1).topk(n_positions).indices  # (H, n_positions)
        content = (layer.weights[..., n_prefix:] @ layer.values).transpose(0, 1).flatten(1, 2)  # (H, B * T, D)
        kept = to_prefix.gather(2, chosen[:, None].expand(-1, to_prefix.shape[1], -1))
        total = kept.sum(dim=-1, keepdim=True) + left  # what the softmax is over, in units of the full one
        missing = to_prefix @ values + content - content / total
        fitted.append(torch.linalg.lstsq((kept / total).double(), missing.double(), driver="gelsd").solution.float())
        own = pairs[number, 0].unflatten(-1, (n_head, -1)).transpose(0, 1).cpu()  # (H, P, D)
        keys.append(own.gather(1, chosen[..., None].expand(-1, -1, own.shape[-1])))
    short = torch.zeros(len(keys), 2, n_positions, model.config.n_embd, device=pairs.device)
    short[:, 0] = torch.stack([each.transpose(0, 1).flatten(1) for each in keys]).to(pairs)
    return _with_values(short, fitted, prefix)


@torch.no_grad()
def steering_prefix(model: GPT, rows: Tensor, others: Tensor, n_positions: int, coefficient: float) -> Prefix:
    """The padding's keys and values, plus what rows that solve a task have more than others at their last tokens.

    Args:
        model: a GPT, in evaluation mode.
        rows: (B, T) of int64, inputs with the task's solutions.
        others: (B, T), the same inputs with other outputs.
        n_positions: P; the same difference is added at each.
        coefficient: of the difference.

    Source: Belitsky et al. 2025 (arXiv 2507.08799), who add it to the prompt's last token.
    """

    def mean(x: Tensor) -> Tensor:
        """(L, 2, C), at the last token."""
        cache = [pieces_of(layer)[0] for layer in model.forward_cached(x)[1]]  # (1, H, B, T, D) each
        return torch.stack([torch.stack([each[0, :, :, -1].mean(1).flatten() for each in pair]) for pair in cache])

    padding = initial_prefix(model, n_positions, kind="key_value").detach()
    return Prefix("key_value", (padding + coefficient * (mean(rows) - mean(others))[:, :, None])[None])


def _with_values(pairs: Tensor, values: Sequence[Tensor], prefix: Tensor | Prefix) -> Prefix:
    """Keys (L, 2, P, C) with each layer's values (H, P, D) in the place of theirs."""
    pairs = pairs.clone()
    pairs[:, 1] = torch.stack([each.transpose(0, 1).flatten(1) for each in values]).to(pairs)
    n_placeholders = prefix.n_placeholders if isinstance(prefix, Prefix) else pairs.shape[2]
    return Prefix("key_value", pairs[None], n_placeholders=n_placeholders)
