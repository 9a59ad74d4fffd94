"""Prefixes as transformers' cache: the only file that knows the cache's classes.

Legend: B rows, K prefixes, P prefix positions, H key/value heads, D channels of a head, L layers.

Since transformers 4.56 a ``DynamicCache`` is a list of layers, each with ``keys``, ``values`` and ``update``. A layer
with a sliding window keeps its last positions only, and counts all of them for the mask. Since 5.24 models call their
argument and their output ``cache`` that were ``past_key_values`` before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mingpt.kv_cache import KeysValues, KVCache


def keyword(model: Any) -> str:
    """What a model of transformers calls the cache that it takes and returns."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def layer_pairs(cache: Any) -> list[KeysValues]:
    """Each layer's keys and values in a transformers cache, (B, H, P, D) each.

    Raises:
        ValueError: if there is no such cache, or a layer has none or others, as recurrent layers have.
    """
    pairs = [(getattr(each, "keys", None), getattr(each, "values", None)) for each in getattr(cache, "layers", [])]
    if not pairs or not all(isinstance(each, Tensor) and each.ndim == 4 for pair in pairs for each in pair):
        raise ValueError("not all layers of the model cache keys and values; choose another architecture")
    return pairs  # pyright: ignore[reportReturnType]


def full_cache() -> Any:
    """An empty cache that keeps all positions, also those beyond a sliding window."""
    from transformers import DynamicCache

    return DynamicCache()


def prefix_cache(pairs: Sequence[KeysValues], config: Any, n_rows: int, rows: Tensor | None = None) -> Any:
    """Make the cache that a batch attends to out of the keys and values of K prefixes. Gradients pass through it.

    One prefix for all rows is expanded, not copied. Attention then concatenates it with each row's content, as it does
    with any cache.

    Args:
        pairs: each layer's keys and values, (K, H, P, D) each.
        config: the transformers model's, which says what layers have a sliding window.
        n_rows: B.
        rows: (B,) of int64, the prefix of each row; without it each prefix has B / K consecutive rows.

    Returns:
        A ``transformers.DynamicCache`` for B rows.
    """
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=config)
    for number, (keys, values) in enumerate(pairs):
        cache.update(keys, values, number)
    return _share(cache, n_rows, rows)


class RowsCache(KVCache):
    """transformers' cache of the rows that are being decoded, all layers in one, as our decode loop holds it.

    The model appends to it.
    """

    def __init__(self, cache: Any, mask: Tensor | None = None):
        """Take a transformers cache.

        Args:
            cache: of S positions.
            mask: (B, S + T) of bool, 0 at padding, with the T tokens of the prompt, which are read at once; without
                it there is none.
        """
        self.cache, self.mask = cache, mask

    @property
    def n_filled(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How many positions were read, also where a sliding window keeps fewer."""
        return self.cache.get_seq_length()

    def expand(self, n_rows: int) -> None:
        """Have ``n_rows``, if there are fewer: each of K rows becomes B / K consecutive ones."""
        if self.n_filled and len(self.cache.layers[0].keys) != n_rows:
            _share(self.cache, n_rows, None)

    def mask_and_positions(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """For the next T tokens: the mask (B, S + T), and how many positions before each are no padding, (B, T)."""
        assert self.mask is not None
        mask = F.pad(self.mask, (0, self.n_filled + n_tokens - self.mask.shape[1]), value=True)
        return mask, (mask.cumsum(dim=1) - 1)[:, -n_tokens:]

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``, (B',) of int64."""
        self.cache.reorder_cache(rows)
        self.mask = None if self.mask is None else self.mask[rows]


def rows_cache(config: Any) -> RowsCache:
    """An empty one, whose layers keep what the model's windows reach."""
    from transformers import DynamicCache

    return RowsCache(DynamicCache(config=config))


def read_only(cache: Any) -> Any:
    """Have a cache forget what is added: each layer gives what it holds and the new positions, and stays as it is.

    So the same forward pass can be computed again from it, which gradient checkpointing does, and no layer keeps the
    content's keys and values.
    """
    for layer in cache.layers:
        layer.update = partial(_update_and_restore, layer)
    return cache


def _update_and_restore(layer: Any, *arguments: Any, **options: Any) -> KeysValues:
    before = dict(vars(layer))
    try:
        return type(layer).update(layer, *arguments, **options)
    finally:
        vars(layer).update(before)


def _share(cache: Any, n_rows: int, rows: Tensor | None) -> Any:
    for layer in cache.layers:
        layer.keys, layer.values = (_expanded(each, n_rows, rows) for each in (layer.keys, layer.values))
    return cache


def _expanded(tensor: Tensor, n_rows: int, rows: Tensor | None) -> Tensor:
    """(K, ...) to (B, ...)."""
    if rows is not None:
        return tensor.index_select(0, rows)
    if len(tensor) == 1:
        return tensor.expand(n_rows, -1, -1, -1)
    return torch.repeat_interleave(tensor, n_rows // len(tensor), dim=0)
