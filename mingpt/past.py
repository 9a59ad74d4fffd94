"""The past: keys and values of earlier positions, which is all that content sees of them.

Legend: B batch, T new positions, S past positions, H heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]
"""One layer's keys and values, (1 or B, H, S, D) each."""


class LayerCache:
    """One layer's keys and values of a batch that is being decoded, with room for all positions from the start.

    Appending writes into that room, where a tuple of tensors would be copied for every token; so it is for decoding
    only, and gradients do not pass through it.
    """

    def __init__(self, batch_size: int, n_positions: int):
        self.batch_size, self.n_positions, self.n_filled = batch_size, n_positions, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Take keys and values of T further positions, (1 or B, H, T, D), and return all so far, (B, H, S + T, D)."""
        if self._keys is None or self._values is None:
            _, n_head, _, head_size = keys.shape
            self._keys = keys.new_empty(self.batch_size, n_head, self.n_positions, head_size)
            self._values = self._keys.new_empty(self._keys.shape)
        start, self.n_filled = self.n_filled, self.n_filled + keys.shape[2]
        self._keys[:, :, start : self.n_filled] = keys
        self._values[:, :, start : self.n_filled] = values
        return self._keys[:, :, : self.n_filled], self._values[:, :, : self.n_filled]


LayerPast = KeysValues | LayerCache
Past = list[Any]
"""The past of every layer in order: all KeysValues, or all LayerCache."""


def n_positions(past: Past | None) -> int:
    """S, how many positions a past holds."""
    if not past:
        return 0
    first = past[0]
    return first.n_filled if isinstance(first, LayerCache) else first[0].shape[2]
