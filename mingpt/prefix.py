"""Prefixes: what is learned in place of a prompt, and the keys and values each kind hands to attention.

Legend: B batch, P prefix positions, C channels, H heads, D = C / H, L layers, K prefixes.

A prefix is a key/value cache that was learned. Whatever its kind, the content never sees more of it than one pair of
keys and values a layer, its ``past``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mingpt.past import Past

_SHAPES = {"activation": "(L, P, C)", "key_value": "(L, 2, P, C)", "prompt": "(P, C)"}


@dataclass(frozen=True)
class Prefix:
    """One or several prefixes of one kind, and which of them each row of a batch has.

    Attributes:
        kind: "activation", what each layer's first LayerNorm sees at the prefix positions (Petrov et al. 2024);
            "key_value", each layer's keys and values themselves (Li & Liang 2021);
            "prompt", embeddings at the input only (Lester et al. 2021).
        values: K prefixes, (K, L, P, C), (K, L, 2, P, C) or (K, P, C) of a floating dtype.
        rows: (B,) of int64, the prefix of each row; None when each prefix has B / K consecutive rows.
    """

    kind: str
    values: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in _SHAPES:
            raise ValueError(f"unknown prefix kind {self.kind!r}; the kinds are {', '.join(_SHAPES)}")
        n_axes = {"activation": 4, "key_value": 5, "prompt": 3}[self.kind]
        if self.values.ndim != n_axes:
            raise ValueError(
                f"{self.kind} prefixes have the shape (K, {_SHAPES[self.kind][1:]} for K prefixes, "
                f"got {tuple(self.values.shape)}"
            )

    @property
    def n_positions(self) -> int:
        """P, how many positions the prefix takes."""
        return self.values.shape[-2]

    @property
    def n_prefixes(self) -> int:
        """K, how many prefixes there are."""
        return self.values.shape[0]

    def check(self, n_layer: int, n_embd: int, batch_size: int) -> None:
        """Check that the prefix fits a model and a batch.

        Raises:
            ValueError: naming the size that does not fit.
        """
        if self.values.shape[-1] != n_embd:
            raise ValueError(f"the prefix has {self.values.shape[-1]} channels, the model has {n_embd}")
        if self.kind != "prompt" and self.values.shape[1] != n_layer:
            raise ValueError(f"the prefix has {self.values.shape[1]} layers, the model has {n_layer}")
        if self.kind == "key_value" and self.values.shape[2] != 2:
            raise ValueError(f"a key_value prefix has keys and values on its axis of 2, got {tuple(self.values.shape)}")
        if self.rows is None and batch_size % self.n_prefixes:
            raise ValueError(f"{batch_size} rows cannot be shared out evenly to {self.n_prefixes} prefixes; give rows=")
        if self.rows is not None and self.rows.shape != (batch_size,):
            raise ValueError(f"rows has shape {tuple(self.rows.shape)}, expected ({batch_size},), one prefix a row")

    def select(self, past: Past) -> Past:
        """Give each row its own prefix's past: (K, H, 1, P, D) to (B, H, 1, P, D), unchanged without ``rows``."""
        if self.rows is None:
            return past
        # Not keys[rows]: on a CPU the backward pass of indexing takes nine times as long as index_select's.
        return [[(keys.index_select(0, self.rows), values.index_select(0, self.rows))] for ((keys, values),) in past]

    def owners(self, batch_size: int) -> Tensor:
        """(B,) of int64, the prefix of each row."""
        if self.rows is not None:
            return self.rows
        return torch.arange(self.n_prefixes, device=self.values.device).repeat_interleave(batch_size // self.n_prefixes)


def as_prefix(prefixes: Tensor | Prefix, n_layer: int, n_embd: int, batch_size: int) -> Prefix:
    """Read what a user gives as ``prefixes=``, and check that it fits the model and the batch.

    A plain tensor is an activation prefix (L, P, C), one per row (B, L, P, C), a key_value prefix (L, 2, P, C) or a
    soft prompt (P, C), whichever its shape says; ``Prefix(kind, values)`` says it in words.

    Raises:
        TypeError: if it is neither a tensor nor a Prefix.
        ValueError: if its shape fits none of them, or two, or not this model.
    """
    if isinstance(prefixes, Prefix):
        prefix = prefixes
    elif not isinstance(prefixes, Tensor):
        raise TypeError(f"prefixes must be a tensor or a Prefix, got {type(prefixes).__name__}")
    elif prefixes.ndim == 3:
        prefix = Prefix("activation", prefixes[None])
    elif prefixes.ndim == 2:
        prefix = Prefix("prompt", prefixes[None])
    elif prefixes.ndim == 4:
        is_per_row = prefixes.shape[:2] == (batch_size, n_layer)
        is_key_value = prefixes.shape[:2] == (n_layer, 2)
        if is_per_row and is_key_value:
            raise ValueError(
                f"a prefix of shape {tuple(prefixes.shape)} is one per row and also key_value for {batch_size} rows, "
                f'{n_layer} layers; say Prefix("activation", p) or Prefix("key_value", p[None])'
            )
        prefix = Prefix("key_value", prefixes[None]) if is_key_value else Prefix("activation", prefixes)
        if prefix.n_prefixes not in (1, batch_size):
            raise ValueError(
                f"{prefix.n_prefixes} prefixes for {batch_size} rows; give one, one per row, or a Prefix with rows"
            )
    else:
        raise ValueError(
            f"a prefix of shape {tuple(prefixes.shape)} is of no known kind: activation (L, P, C), one per row "
            "(B, L, P, C), key_value (L, 2, P, C), prompt (P, C)"
        )
    prefix.check(n_layer, n_embd, batch_size)
    return prefix


def activation_past(blocks: Iterable[Any], values: Tensor) -> Past:
    """Turn activation prefixes (K, L, P, C) into the keys and values that each layer's content attends to.

    Args:
        blocks: the model's transformer blocks, with ``keys_values``.
        values: (K, L, P, C) what each block's first LayerNorm sees at the prefix positions.

    Returns:
        For each layer keys and values, (K, H, 1, P, D) each.

    Source: Petrov et al. 2024, section 3: layer l's keys and values at the prefix are c_attn(ln_1(prefix[l])).
    """
    return [[block.keys_values(values[:, layer])] for layer, block in enumerate(blocks)]


def key_value_past(values: Tensor, n_head: int) -> Past:
    """Split key_value prefixes (K, L, 2, P, C) into heads: for each layer keys and values, (K, H, 1, P, D) each."""
    n_prefixes, _, _, n_positions, n_embd = values.shape
    heads = values.view(n_prefixes, -1, 2, n_positions, 1, n_head, n_embd // n_head).transpose(3, 5)
    return [[(layer[:, 0], layer[:, 1])] for layer in heads.unbind(dim=1)]  # of (K, H, 1, P, D)


@torch.no_grad()
def initial_prefix(
    model: Any, n_positions: int, how: str = "padding", generator: torch.Generator | None = None
) -> Tensor:
    """An activation prefix to start training from.

    Args:
        model: the GPT that it is for.
        n_positions: P.
        how: "padding" takes what each block sees at P padding tokens, so that training starts from the model as it is
            without a prefix; "random" is the standard normal distribution, as the seed notebook has it.
        generator: the source of random numbers.

    Returns:
        (L, P, C) of float32 on the model's device, a leaf that requires gradients.

    Raises:
        ValueError: for another ``how``.
    """
    config = model.config
    if how == "random":
        shape = (config.n_layer, n_positions, config.n_embd)
        return torch.randn(shape, generator=generator).to(model.device).requires_grad_()
    if how != "padding":
        raise ValueError(f"unknown initialisation {how!r}; choose padding or random")
    seen: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for block in model.blocks]
    try:
        model.extend(torch.zeros(1, n_positions, dtype=torch.int64, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen).requires_grad_()
