"""Prefixes: what is trained in place of a prompt, the kinds there are, and how to start, convert and combine them.

Legend: B batch, T tokens, P prefix positions, C channels, H heads, D = C / H, L layers, V vocabulary, K prefixes.

A prefix is a KV cache that was trained. Whatever its kind, the content sees only one pair of keys and values a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mingpt.decoding.generation import CausalModel
    from mingpt.model import GPT

AXES = {"activation": ("L", "P", "C"), "key_value": ("L", "2", "P", "C"), "prompt": ("P", "C")}
"""The kinds of prefix, and the axes of one prefix of each."""

Record = list[tuple[str, Tensor]]
"""Activations in the order in which they were computed: ("attention", (B, H, T, T)) and
("attn_block_output", (B, T, C)) for each layer."""


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Check tokens (B, T); on other devices than a CPU their range is not, since a GPU would have to be waited for.

    Raises:
        ValueError: if they have another shape or dtype, or one is not from 0 to V - 1.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"tokens are integers of shape (B, T), got {tokens.dtype} of shape {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = (int(each) for each in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"tokens go from 0 to {vocab_size - 1} in this vocabulary, got {low} to {high}")


@contextmanager
def evaluation_mode(model: CausalModel) -> Iterator[None]:
    """Turn dropout off for a while, and restore the model's mode afterwards."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True, eq=False)
class Prefix:
    """One or several prefixes of one kind, and which of them each row of a batch has.

    Attributes:
        kind: "activation", what each layer's first LayerNorm sees at the prefix positions (Petrov et al. 2024);
            "key_value", each layer's keys and values themselves (Li & Liang 2021);
            "prompt", embeddings at the input only (Lester et al. 2021).
        values: K prefixes, (K, L, P, C), (K, L, 2, P, C) or (K, P, C) of a floating dtype.
        rows: (B,) of int64, the prefix of each row; None when each prefix has B / K consecutive rows.
        n_placeholders: how many first tokens of the input it stands for, P by default. The content's positions begin
            after them. A concatenation that stands where one prefix stood leaves the content at the positions it knows.

    Raises:
        ValueError: if the kind is unknown, or a tensor has another shape, dtype or device than these.
    """

    kind: str
    values: Tensor
    rows: Tensor | None = None
    n_placeholders: int = cast(int, None)  # an int from __post_init__ on

    def __post_init__(self) -> None:
        axes, values, rows = _axes_of(self.kind), self.values, self.rows
        if values.ndim != 1 + len(axes) or not values.is_floating_point():
            expected = f"{self.kind} prefixes have the shape (K, {', '.join(axes)}) for K prefixes and a floating dtype"
            raise ValueError(f"{expected}, got {tuple(values.shape)} of {values.dtype}")
        if rows is not None:
            is_right = rows.dtype == torch.int64 and rows.ndim == 1 and rows.device == values.device
            if not is_right or (rows.device.type == "cpu" and not ((rows >= 0) & (rows < len(values))).all()):
                expected = f"rows are int64 of shape (B,), from 0 to {len(values) - 1}, on {values.device}"
                raise ValueError(f"{expected}; got {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}: {rows}")
        if self.n_placeholders is None:
            object.__setattr__(self, "n_placeholders", self.n_positions)

    @property
    def n_positions(self) -> int:
        """P, how many positions the prefix takes."""
        return self.values.shape[-2]

    @property
    def n_prefixes(self) -> int:
        """K, how many prefixes there are."""
        return self.values.shape[0]

    def check(self, model: CausalModel, batch_size: int) -> None:
        """Check that the prefix fits a model and a batch.

        Raises:
            ValueError: naming the kind, the sizes or the rows that do not fit.
        """
        widths, n_layer, n_channels = model.prefix_widths, model.config.n_layer, self.values.shape[-1]
        if self.kind not in widths:
            raise ValueError(f"the model takes prefixes of kind {' or '.join(widths)}, got {self.kind}")
        if n_channels != widths[self.kind]:
            expected = f"the model has {widths[self.kind]} in a {self.kind} prefix"
            raise ValueError(f"the prefix has {n_channels} channels, {expected}")
        if self.kind != "prompt" and self.values.shape[1] != n_layer:
            raise ValueError(f"the prefix has {self.values.shape[1]} layers, the model has {n_layer}")
        if self.kind == "key_value" and self.values.shape[2] != 2:
            raise ValueError(f"a key_value prefix has keys and values on its axis of 2, got {tuple(self.values.shape)}")
        if self.rows is None and batch_size % self.n_prefixes:
            raise ValueError(f"{batch_size} rows cannot be shared out evenly to {self.n_prefixes} prefixes; give rows=")
        if self.rows is not None and self.rows.shape != (batch_size,):
            raise ValueError(f"rows has shape {tuple(self.rows.shape)}, expected ({batch_size},), one prefix a row")

    def prefix_of_row(self, n_rows: int) -> Tensor:
        """(B,) of int64, the prefix of each of ``n_rows`` rows."""
        if self.rows is not None:
            return self.rows
        return torch.arange(self.n_prefixes, device=self.values.device).repeat_interleave(n_rows // self.n_prefixes)

    def for_rows(self, indices: Tensor | slice, n_rows: int) -> Prefix:
        """The prefixes of some of ``n_rows`` rows, in the order of ``indices``; one prefix serves any rows."""
        return replace(self, rows=None if self.n_prefixes == 1 else self.prefix_of_row(n_rows)[indices])


def as_prefix(prefixes: Tensor | Prefix, model: CausalModel, batch_size: int) -> Prefix:
    """Read what a user gives as ``prefixes=``, and check that it fits the model and the batch.

    A plain tensor is an activation prefix (L, P, C), one per row (B, L, P, C), a key_value prefix (L, 2, P, C) or a
    soft prompt (P, C), as its shape says. ``Prefix(kind, values)`` says it in words. Which kinds there are, and how
    many channels C each has, says ``model.prefix_widths``.

    Raises:
        TypeError: if it is neither a tensor nor a Prefix.
        ValueError: if its shape fits none of them, or two, or not this model.
    """
    if isinstance(prefixes, Prefix):
        prefix = prefixes
    elif not isinstance(prefixes, Tensor):
        raise TypeError(f"prefixes must be a tensor or a Prefix, got {type(prefixes).__name__}")
    else:
        n_layer = model.config.n_layer
        has_rows = prefixes.ndim == 4 and "activation" in model.prefix_widths  # or it has layers, keys and values
        is_key_value = prefixes.shape[:2] == (n_layer, 2)
        if has_rows and is_key_value and batch_size == n_layer == 2:
            both = f"one per row and also key_value for {batch_size} rows, {n_layer} layers"
            advice = 'say Prefix("activation", p) or Prefix("key_value", p[None])'
            raise ValueError(f"a prefix of shape {tuple(prefixes.shape)} is {both}; {advice}")
        prefix = Prefix("activation", prefixes) if has_rows and not is_key_value else _single(prefixes)
        if prefix.n_prefixes not in (1, batch_size):
            raise ValueError(f"{len(prefixes)} prefixes for {batch_size} rows; give one, one per row, or Prefix(rows=)")
    prefix.check(model, batch_size)
    return prefix


def _single(values: Tensor) -> Prefix:
    """One prefix, of the kind that has its number of axes."""
    for kind, axes in AXES.items():
        if values.ndim == len(axes):
            return Prefix(kind, values[None])
    known = ", ".join(f"{kind} ({', '.join(axes)})" for kind, axes in AXES.items())
    raise ValueError(f"a prefix of shape {tuple(values.shape)} is of no known kind: {known}; one a row (B, L, P, C)")


def _axes_of(kind: str) -> tuple[str, ...]:
    if kind not in AXES:
        raise ValueError(f"unknown prefix kind {kind!r}; the kinds are {', '.join(AXES)}")
    return AXES[kind]


@torch.no_grad()
def as_key_value(model: GPT, prefix: Tensor | Prefix) -> Tensor:
    """The keys and values that one prefix of any kind becomes in this model, (L, 2, P, C)."""
    prefix = as_prefix(prefix, model, 1)
    with evaluation_mode(model):
        pairs = [pieces[0] for pieces in model.prefix_cache(prefix)]
    # (1, H, 1, P, D) each to (P, C)
    return torch.stack([torch.stack([each[0, :, 0].transpose(0, 1).flatten(1) for each in pair]) for pair in pairs])


# -------------------------------------------------------------------------------------------------- initialisation


@torch.no_grad()
def initial_prefix(
    model: GPT, n_positions: int, init: str | Sequence[int] = "padding", kind: str = "activation"
) -> Tensor:
    """A prefix to start training from. A clone of another prefix, or of an ``average``, is one as well.

    Args:
        model: the model that it is for; dropout is off meanwhile.
        n_positions: P.
        init: P tokens, for what the model sees at them: activations, keys and values, or embeddings, by the kind
            (Li & Liang 2021, section 7.4, start from the activations of real words). "padding" is P zeros, so training
            starts from the model as it is without a prefix. "random" is the standard normal distribution, as in the
            seed notebook.
        kind: of prefix, see ``Prefix``.

    Returns:
        (L, P, C), (L, 2, P, C) or (P, C) of float32 on the model's device, a leaf that requires gradients.

    Raises:
        ValueError: for another ``init`` or kind, or tokens that are not P or not in the vocabulary.
    """
    config, axes = model.config, _axes_of(kind)
    if init == "random":
        sizes = {"L": config.n_layer, "2": 2, "P": n_positions, "C": config.n_embd}
        return torch.randn([sizes[axis] for axis in axes]).to(model.device).requires_grad_()
    if isinstance(init, str) and init != "padding":
        raise ValueError(f"unknown init {init!r}; choose padding or random, or give {n_positions} tokens")
    tokens = [0] * n_positions if isinstance(init, str) else list(init)
    if len(tokens) != n_positions or not all(0 <= token < config.vocab_size for token in tokens):
        raise ValueError(f"init needs {n_positions} tokens from 0 to {config.vocab_size - 1}, got {tokens}")
    idx = torch.tensor([tokens], device=model.device)
    if kind == "prompt":
        return model.transformer.wte(idx)[0].requires_grad_()
    with evaluation_mode(model):
        activations = torch.stack(model.block_inputs(idx))[:, 0]
    return (as_key_value(model, activations) if kind == "key_value" else activations).requires_grad_()


# --------------------------------------------------------------------------------------------- algebra of prefixes


def concatenate(prefixes: Sequence[Tensor | Prefix], n_placeholders: int | None = None) -> Prefix:
    """Put prefixes one after the other: content attends to the positions of all of them.

    Args:
        prefixes: of one kind, single ones as tensors (L, P, C), (L, 2, P, C) or (P, C), or as K prefixes each.
        n_placeholders: how many first tokens of the input the result stands for, the sum of theirs by default. With the
            number of one of them the content stays at the positions it was trained at.

    Raises:
        ValueError: if there are none, or they differ in kind, in rows, or in a size other than P.
    """
    parts = _alike(prefixes, is_along_positions=True)
    if n_placeholders is None:
        n_placeholders = sum(part.n_placeholders for part in parts)
    return replace(parts[0], values=torch.cat([p.values for p in parts], dim=-2), n_placeholders=n_placeholders)


def interpolate(first: Tensor | Prefix, second: Tensor | Prefix, weight: float) -> Prefix:
    """The prefix on the line from the first, at ``weight`` 0, to the second, at 1; beyond them outside of that range.

    Raises:
        ValueError: if they differ in kind, shape, rows or placeholders.
    """
    one, other = _alike([first, second])
    return replace(one, values=torch.lerp(one.values, other.values, weight))


def average(prefixes: Sequence[Tensor | Prefix]) -> Prefix:
    """The elementwise mean of prefixes.

    Raises:
        ValueError: if there are none, or they differ in kind, shape, rows or placeholders.
    """
    parts = _alike(prefixes)
    return replace(parts[0], values=torch.stack([part.values for part in parts]).mean(dim=0))


def _alike(prefixes: Sequence[Tensor | Prefix], is_along_positions: bool = False) -> list[Prefix]:
    """Read prefixes, and check that they differ in their values only; ``is_along_positions`` allows another P too."""
    parts = [each if isinstance(each, Prefix) else _single(each) for each in prefixes]
    found = {"kind": [part.kind for part in parts]}
    found["rows"] = [str(part.rows if part.rows is None else part.rows.tolist()) for part in parts]
    if is_along_positions:
        found["shape but for P"] = [str((*part.values.shape[:-2], "P", part.values.shape[-1])) for part in parts]
    else:
        found["shape"] = [str(tuple(part.values.shape)) for part in parts]
        found["number of placeholders"] = [str(part.n_placeholders) for part in parts]
    for name, values in found.items():
        if len(set(values)) != 1:
            raise ValueError(f"prefixes, at least one, go together if all have the same {name}; got {values}")
    return parts
