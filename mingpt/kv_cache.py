"""The KV cache: keys and values of earlier positions, which is all that content sees of them.

Legend: B batch, G groups of N consecutive rows (B = G * N), S cached positions, T new positions, H heads, D channels of
a head, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of some positions: (G, H, N, S, D) each, or (G, H, 1, S, D) where the rows of a group share them.

The heads come before the rows, so one product a head serves all queries of a group. With 16 prefixes of 200 positions a
training step takes 1.7 to 1.9 times as long when every row has its own copy; with 10 positions it takes the same.
"""


class KVCache:
    """One layer's keys and values while a batch is decoded, with room for all positions from the start.

    Appending writes into that room, so nothing is copied for a new token, and shapes stay the same. Attention is over
    all of the room, since a product with the filled part, which is not contiguous, would copy it. Gradients do not pass
    through it.
    """

    def __init__(self, cache: LayerKV, batch_size: int, n_positions: int):
        """Copy a cache for ``batch_size`` rows, and leave room up to ``n_positions``."""
        first, _ = pieces_of(cache)[0]
        self._keys = first.new_zeros(batch_size, first.shape[1], 1, n_positions, first.shape[-1])
        self._values = torch.zeros_like(self._keys)
        self.n_filled = 0
        for piece in pieces_of(cache):
            # (G, H, N or 1, S, D) to (B, H, 1, S, D)
            rows = [each.transpose(1, 2).expand(-1, batch_size // len(each), -1, -1, -1) for each in piece]
            keys, values = (each.flatten(0, 1)[:, :, None] for each in rows)
            self.append(keys, values)

    @property
    def pieces(self) -> list[KeysValues]:
        """All of the room as one piece, (B, H, 1, n_positions, D) each: every row is a group. What is free is zero."""
        return [(self._keys, self._values)]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys and values of T further positions, (B, H, 1, T, D) each."""
        start, self.n_filled = self.n_filled, self.n_filled + keys.shape[-2]
        self._keys[..., start : self.n_filled, :] = keys
        self._values[..., start : self.n_filled, :] = values

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``, (B',) of int64."""
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)


LayerKV = Sequence[KeysValues] | KVCache
"""One layer's KV cache: pieces in the order of their positions, or the buffer of a batch that is being decoded."""

Cache = Sequence[LayerKV]
"""The LayerKV of every layer in order."""


def pieces_of(cache: LayerKV) -> Sequence[KeysValues]:
    """A layer's keys and values in the order of their positions."""
    return cache.pieces if isinstance(cache, KVCache) else cache


def n_filled(cache: LayerKV) -> int:
    """S, how many positions a layer's KV cache holds."""
    return cache.n_filled if isinstance(cache, KVCache) else sum(keys.shape[-2] for keys, _ in cache)


def n_positions(kv_cache: Cache | None) -> int:
    """S, how many positions a KV cache holds."""
    return n_filled(kv_cache[0]) if kv_cache else 0
