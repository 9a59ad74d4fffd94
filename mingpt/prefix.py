"""Prefixes: what is learned in place of a prompt, and the keys and values each kind hands to attention.

Legend: B batch, P prefix positions, C channels, H heads, D = C / H, L layers, K prefixes.

A prefix is a key/value cache that was learned. Whatever its kind, the content never sees more of it than one pair of
keys and values a layer, its ``past``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mingpt.kv_cache import Cache

_SHAPES = {"activation": "(L, P, C)", "key_value": "(L, 2, P, C)", "prompt": "(P, C)"}
N_AXES = {kind: len(shape.split(",")) for kind, shape in _SHAPES.items()}
"""The kinds of prefix, and how many axes one prefix of each has."""


@dataclass(frozen=True)
class Prefix:
    """One or several prefixes of one kind, and which of them each row of a batch has.

    Attributes:
        kind: "activation", what each layer's first LayerNorm sees at the prefix positions (Petrov et al. 2024);
            "key_value", each layer's keys and values themselves (Li & Liang 2021);
            "prompt", embeddings at the input only (Lester et al. 2021).
        values: K prefixes, (K, L, P, C), (K, L, 2, P, C) or (K, P, C) of a floating dtype.
        rows: (B,) of int64, the prefix of each row; None when each prefix has B / K consecutive rows.
        places: how many first tokens of the input it stands for, P by default. The content's positions begin after
            them, so a concatenation that stands where one prefix stood leaves the content at the positions it knows.
    """

    kind: str
    values: Tensor
    rows: Tensor | None = None
    places: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _SHAPES:
            raise ValueError(f"unknown prefix kind {self.kind!r}; the kinds are {', '.join(_SHAPES)}")
        if self.values.ndim != 1 + N_AXES[self.kind]:
            raise ValueError(
                f"{self.kind} prefixes have the shape (K, {_SHAPES[self.kind][1:]} for K prefixes, "
                f"got {tuple(self.values.shape)}"
            )

    @property
    def n_positions(self) -> int:
        """P, how many positions the prefix takes."""
        return self.values.shape[-2]

    @property
    def n_placeholders(self) -> int:
        """How many first tokens of the input the prefix stands for."""
        return self.n_positions if self.places is None else self.places

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

    def select(self, past: Cache) -> Cache:
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


def activation_cache(blocks: Iterable[Any], values: Tensor) -> Cache:
    """Turn activation prefixes (K, L, P, C) into the keys and values that each layer's content attends to.

    Args:
        blocks: the model's transformer blocks, with ``keys_values``.
        values: (K, L, P, C) what each block's first LayerNorm sees at the prefix positions.

    Returns:
        For each layer keys and values, (K, H, 1, P, D) each.

    Source: Petrov et al. 2024, section 3: layer l's keys and values at the prefix are c_attn(ln_1(prefix[l])).
    """
    return [[block.keys_values(values[:, layer])] for layer, block in enumerate(blocks)]


def key_value_cache(values: Tensor, n_head: int) -> Cache:
    """Split key_value prefixes (K, L, 2, P, C) into heads: for each layer keys and values, (K, H, 1, P, D) each."""
    n_prefixes, _, _, n_positions, n_embd = values.shape
    heads = values.view(n_prefixes, -1, 2, n_positions, 1, n_head, n_embd // n_head).transpose(3, 5)
    return [[(layer[:, 0], layer[:, 1])] for layer in heads.unbind(dim=1)]  # of (K, H, 1, P, D)


@torch.no_grad()
def as_key_value(model: Any, prefix: Tensor | Prefix) -> Tensor:
    """One prefix of any kind as the keys and values it comes to in this model, (L, 2, P, C)."""
    prefix = as_prefix(prefix, model.config.n_layer, model.config.n_embd, 1)
    # (1, H, 1, P, D) each to (P, C)
    pieces = [[each[0, :, 0].transpose(0, 1).flatten(1) for each in layer[0]] for layer in model.prefix_cache(prefix)]
    return torch.stack([torch.stack(layer) for layer in pieces])


# ------------------------------------------------------------------------------------------- where training starts


@torch.no_grad()
def initial_prefix(
    model: Any,
    n_positions: int,
    how: str | Sequence[int] = "padding",
    generator: torch.Generator | None = None,
    kind: str = "activation",
) -> Tensor:
    """A prefix to start training from. Another prefix, or the ``average`` of some, is one as well: clone it.

    Args:
        model: the GPT that it is for.
        n_positions: P.
        how: P tokens, for what the model sees at them: activations, keys and values, or embeddings, as the kind has it
            (Li & Liang 2021, section 7.4, start from the activations of real words); "padding" is P zeros, so that
            training starts from the model as it is without a prefix; "random" is the standard normal distribution, as
            the seed notebook has it.
        generator: the source of random numbers.
        kind: of prefix, see ``Prefix``.

    Returns:
        (L, P, C), (L, 2, P, C) or (P, C) of float32 on the model's device, a leaf that requires gradients.

    Raises:
        ValueError: for another ``how`` or kind, or tokens that are not P or not in the vocabulary.
    """
    config = model.config
    if kind not in _SHAPES:
        raise ValueError(f"unknown prefix kind {kind!r}; the kinds are {', '.join(_SHAPES)}")
    if isinstance(how, str) and how == "random":
        sizes = {"L": config.n_layer, "2": 2, "P": n_positions, "C": config.n_embd}
        shape = [sizes[name] for name in _SHAPES[kind].strip("()").split(", ")]
        return torch.randn(shape, generator=generator).to(model.device).requires_grad_()
    if isinstance(how, str) and how != "padding":
        raise ValueError(f"unknown initialisation {how!r}; choose padding or random, or give {n_positions} tokens")
    tokens = [0] * n_positions if isinstance(how, str) else list(how)
    if len(tokens) != n_positions or not all(0 <= token < config.vocab_size for token in tokens):
        raise ValueError(f"a start needs {n_positions} tokens from 0 to {config.vocab_size - 1}, got {tokens}")
    read = torch.tensor([tokens], device=model.device)
    if kind == "prompt":
        return model.transformer.wte(read)[0].requires_grad_()
    seen: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for block in model.blocks]
    try:
        model.forward_cached(read)
    finally:
        for hook in hooks:
            hook.remove()
    activations = torch.stack(seen)
    return (as_key_value(model, activations) if kind == "key_value" else activations).requires_grad_()


class Reparametrization(nn.Module):
    """Key_value prefixes as a small network makes them while they are trained: ``start + W2 tanh(W1 e + b1) + b2``.

    Each of K prefixes has a network and embeddings ``e`` of its own. Once trained, the prefixes are what it gives, and
    the network is left behind. W2 and b2 begin at zero, so that training begins where ``start`` is.

    Source: Li & Liang 2021, section 4.3, who have no ``start``; the network is PEFT's ``prefix_projection``.
    """

    start: Tensor

    def __init__(self, start: Tensor, n_hidden: int | None = None, generator: torch.Generator | None = None):
        """Make the networks.

        Args:
            start: K key_value prefixes, (K, L, 2, P, C).
            n_hidden: the width of the hidden layer, C by default.
            generator: the source of random numbers.

        Raises:
            ValueError: if ``start`` has another number of axes.
        """
        super().__init__()
        n_prefixes, n_layer, _, n_positions, n_embd = Prefix("key_value", start).values.shape
        n_hidden = n_hidden or n_embd

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(start.device) / shape[-2] ** 0.5)

        self.register_buffer("start", start.detach().clone())
        self.embedding = normal(n_prefixes, n_positions, n_embd)
        self.w1, self.b1 = normal(n_prefixes, n_embd, n_hidden), nn.Parameter(start.new_zeros(n_prefixes, 1, n_hidden))
        self.w2 = nn.Parameter(start.new_zeros(n_prefixes, n_hidden, n_layer * 2 * n_embd))
        self.b2 = nn.Parameter(start.new_zeros(n_prefixes, 1, n_layer * 2 * n_embd))

    def forward(self) -> Tensor:
        """The prefixes, (K, L, 2, P, C)."""
        update = (self.embedding @ self.w1 + self.b1).tanh() @ self.w2 + self.b2  # (K, P, L * 2 * C)
        n_prefixes, n_layer, _, n_positions, n_embd = self.start.shape
        return self.start + update.view(n_prefixes, n_positions, n_layer, 2, n_embd).permute(0, 2, 3, 1, 4)


# --------------------------------------------------------------------------------------------- algebra of prefixes


def concatenate(prefixes: Sequence[Tensor | Prefix], places: int | None = None) -> Prefix:
    """Put prefixes one after the other: content attends to the positions of all of them.

    Args:
        prefixes: of one kind, single ones as tensors (L, P, C), (L, 2, P, C) or (P, C), or as K prefixes each.
        places: how many first tokens of the input the result stands for, all positions by default. With the places of
            one of them the content stays at the positions it was trained at.

    Raises:
        ValueError: if there are none, or they differ in kind or in a size other than P.
    """
    parts = _of_one_kind(prefixes)
    shapes = {part.values.shape[:-2] + part.values.shape[-1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"prefixes can differ in their positions only, got {[tuple(p.values.shape) for p in parts]}")
    return Prefix(parts[0].kind, torch.cat([part.values for part in parts], dim=-2), places=places)


def interpolate(first: Tensor | Prefix, second: Tensor | Prefix, weight: float) -> Prefix:
    """The prefix on the line from the first, at ``weight`` 0, to the second, at 1; beyond them outside of that range.

    Raises:
        ValueError: if they differ in kind or shape.
    """
    one, other = _of_one_shape([first, second])
    return Prefix(one.kind, torch.lerp(one.values, other.values, weight))


def average(prefixes: Sequence[Tensor | Prefix]) -> Prefix:
    """The mean of prefixes, number by number.

    Raises:
        ValueError: if there are none, or they differ in kind or shape.
    """
    parts = _of_one_shape(prefixes)
    return Prefix(parts[0].kind, torch.stack([part.values for part in parts]).mean(dim=0))


def _of_one_kind(prefixes: Sequence[Tensor | Prefix]) -> list[Prefix]:
    kinds = {n_axes: kind for kind, n_axes in N_AXES.items()}
    parts = [
        each if isinstance(each, Prefix) else Prefix(kinds.get(each.ndim, f"of {each.ndim} axes"), each[None])
        for each in prefixes
    ]
    if len({part.kind for part in parts}) != 1:
        raise ValueError(f"at least one prefix, all of one kind, are needed; got {[part.kind for part in parts]}")
    return parts


def _of_one_shape(prefixes: Sequence[Tensor | Prefix]) -> list[Prefix]:
    parts = _of_one_kind(prefixes)
    if len({part.values.shape for part in parts}) > 1:
        raise ValueError(f"the prefixes must have one shape, got {[tuple(part.values.shape) for part in parts]}")
    return parts
