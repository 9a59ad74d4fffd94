"""The past: keys and values of earlier positions, which is all that content sees of them.

Legend: B batch, G groups of N consecutive rows (B = G * N), S past positions, T new positions, H heads, D channels of
a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of some positions: (G, H, N, S, D) each, or (G, H, 1, S, D) where the rows of a group share them.

The heads come before the rows so that all queries of a group meet what they share in one product a head.
"""


class KVCache:
    """One layer's keys and values of a batch that is being decoded, with room for all positions from the start.

    Appending writes into that room, where a tuple of tensors would be copied for every token; so it is for decoding
    only, and gradients do not pass through it.
    """

    def __init__(self, past: list[KeysValues], batch_size: int, n_positions: int):
        """Copy a past for ``batch_size`` rows, and leave room up to ``n_positions``."""
        _, n_head, _, _, head_size = past[0][0].shape
        self._keys = past[0][0].new_empty(batch_size, n_head, n_positions, head_size)
        self._values = self._keys.new_empty(self._keys.shape)
        self.n_filled = 0
        for keys, values in past:
            start, self.n_filled = self.n_filled, self.n_filled + keys.shape[3]
            for room, piece in ((self._keys, keys), (self._values, values)):
                # (G, N, H, S, D) of the room takes (G, N or 1, H, S, D)
                room.unflatten(0, (len(piece), -1))[:, :, :, start : self.n_filled] = piece.transpose(1, 2)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take keys and values of T further positions, (B, H, T, D), and return all so far, (B, H, S + T, D)."""
        start, self.n_filled = self.n_filled, self.n_filled + keys.shape[2]
        self._keys[:, :, start : self.n_filled] = keys
        self._values[:, :, start : self.n_filled] = values
        return self._keys[:, :, : self.n_filled], self._values[:, :, : self.n_filled]

    def select(self, rows: Tensor) -> None:
        """Have row i be what row ``rows[i]`` was, (B',) of int64."""
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)


LayerCache = list[KeysValues] | KVCache
"""One layer's past: pieces in the order of their positions, or a cache."""

Cache = list[Any]
"""The LayerCache of every layer in order."""


def by_row(past: Cache) -> Cache:
    """Make each row of a past that B rows have read a group of its own, which further rows can share."""
    return [
        [tuple(each.transpose(1, 2).flatten(0, 1)[:, :, None] for each in piece) for piece in layer] for layer in past
    ]


def n_positions(past: Cache | None) -> int:
    """S, how many positions a past holds."""
    if not past:
        return 0
    first: LayerCache = past[0]
    return first.n_filled if isinstance(first, KVCache) else sum(keys.shape[3] for keys, _ in first)
