"""The paper's two statements measured on any model of transformers, and how far attention moves in the layers above.

Legend: B rows, T content tokens, P prefix positions, S keys, H heads, D channels of a head, L layers.

Attention goes through one function in transformers' registry (``AttentionInterface``), so nothing is known here of an
architecture. With the same queries and keys, both statements of ``mingpt.analysis.theory`` hold wherever each score is
a function of its own query and key, and a softmax over the scores follows. So they do with grouped queries, rotary
positions, soft-capped scores and sliding windows. What differs there from the paper as it is written:

- Under a sliding window a token sees only those prefix positions that its window reaches. It pays the others nothing,
  and a layer's cache no longer has the positions that no content reaches.
- Soft-capping keeps scores within a bound, so a prefix can never take all of the attention: its share has a bound below
  1, and more attention needs more positions.
- Attention sinks, a score without a key, take a share as well. Models with them are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mingpt.analysis.theory import BiasSubspace, Invariance
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.prefix import Prefix, as_prefix, evaluation_mode

_NAME = "mingpt_measured"  # in transformers' registry
_LEAST = 1e-30  # the least share of attention from which float32 still tells the parts, as in theory
_LARGEST = {"deviation", "movement", "error", "magnitude", "rank"}  # of several batches; others are added


class Measurement(NamedTuple):
    """What an adapter does to attention.

    Attributes:
        invariance: how relative attention differs on the same queries and keys; None without a prefix.
        bias: what the prefix adds to each head's output; None without a prefix.
        direction: (L, H, D) of float64, unit vectors along which the biases are largest; zero without a bias.
        direction_share: (L, H) their share of the biases' squared length, 0 to 1.
        movement: (L, H) the largest difference of a content token's relative attention from that in the base model's
            run over the same tokens at the same positions, 0 to 1. In the first layer it is 0 with a prefix; above,
            queries and keys have changed.
        distance: (L, H) the same as a mean over tokens of the total variation distance, 0 to 1.
    """

    invariance: Invariance | None
    bias: BiasSubspace | None
    direction: Tensor | None
    direction_share: Tensor | None
    movement: Tensor
    distance: Tensor

    def named(self) -> dict[str, Tensor]:
        """All tensors that there are, by name."""
        parts = [each._asdict() for each in (self.invariance, self.bias) if each is not None]
        own = {name: each for name, each in self._asdict().items() if isinstance(each, Tensor)}
        return {name: each for part in (*parts, own) for name, each in part.items()}

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor]) -> Measurement:
        """The measurement that has these tensors; a KeyError where one is missing."""
        moved = tensors["movement"], tensors["distance"]
        if "share" not in tensors:
            return cls(None, None, None, None, *moved)
        invariance = Invariance(*(tensors[name] for name in Invariance._fields))
        bias = BiasSubspace(*(tensors[name] for name in BiasSubspace._fields))
        return cls(invariance, bias, tensors["direction"], tensors["direction_share"], *moved)


@torch.no_grad()
def measure(
    lm: CausalLM,
    x: Tensor,
    prefix: Tensor | Prefix | None = None,
    base: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batch_size: int = 4,
) -> Measurement:
    """Measure what an adapter does to attention, layer by layer and head by head. Dropout is off meanwhile.

    Args:
        lm: the model, with its adapter where that is no prefix.
        x: (B, P + T) of int64, rows as ``lm`` reads them; with a prefix the first P are placeholders.
        prefix: one for all rows, see ``CausalLM.forward``.
        base: gives a context in which ``lm`` is without its adapter, such as PEFT's ``disable_adapter``.
        batch_size: rows at a time; a batch keeps (L, rows, H, T, T) numbers.

    Returns:
        See ``Measurement``; its tensors are on the CPU.

    Raises:
        ValueError: for several prefixes, rows that do not fit, or a model whose attention cannot be measured.

    Source: Petrov et al. 2024, equations 6 and 7.
    """
    prefix = None if prefix is None else as_prefix(prefix, lm, len(x))
    if prefix is not None and prefix.n_prefixes != 1:
        raise ValueError(f"the measurement is of one prefix, got {prefix.n_prefixes}; take them one by one")
    start = 0 if prefix is None else prefix.n_placeholders
    batches: list[list[dict[str, Tensor]]] = []
    with evaluation_mode(lm), _recorded_attention(lm.model):
        prefix = None if prefix is None else lm.as_key_value(prefix)  # here, so that a prompt's own run is not recorded
        with (recorder := _Recorder([])).active():
            lm(x[:1, :1])
        if len(recorder.weights) != lm.config.n_layer:
            found = f"{len(recorder.weights)} of {lm.config.n_layer} layers"
            raise ValueError(f"{lm.config.architecture} takes its attention from transformers' registry in {found}")
        for rows in x.split(batch_size):
            with (recorder := _Recorder([])).active(), base():
                positions = torch.arange(start, rows.shape[1], device=x.device)[None]
                lm.model(rows[:, start:], position_ids=positions, use_cache=False)
            with (recorder := _Recorder(recorder.weights)).active():
                lm(rows, prefixes=prefix, n_last=1)
            batches.append(recorder.layers)
    layers = [reduce(_add_up, same) for same in zip(*batches, strict=True)]
    return _measurement({name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})


def _add_up(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.maximum(v, other[k]) if k in _LARGEST else v + other[k] for k, v in one.items()}


def _measurement(sums: dict[str, Tensor]) -> Measurement:
    """Of the layers' sums and maxima, (L, ...) each."""
    count, movement = sums["count"][:, None], sums["movement"]
    distance = sums["distance"] / count
    if "share" not in sums:
        return Measurement(None, None, None, None, movement, distance)
    energy, directions = torch.linalg.eigh(sums["gram"])  # (L, H, D) ascending, (L, H, D, D)
    energy = energy.clamp(min=0).flip(-1)
    total = energy.sum(dim=-1)
    sign = torch.where((directions[..., -1] * sums["bias"]).sum(dim=-1) < 0, -1.0, 1.0)  # along the mean bias
    bias = BiasSubspace(
        error=sums["error"],
        magnitude=sums["magnitude"],
        out_of_span=sums["outside"].sqrt() / total.sqrt().clamp(min=1e-300),
        rank=sums["rank"],
        effective_rank=(energy.cumsum(dim=-1) < 0.99 * total[..., None]).sum(dim=-1) + 1,
        attention_perplexity=(sums["entropy"] / count).exp(),
    )
    direction = directions[..., -1] * torch.where(total > 0, sign, 0)[..., None]
    share = energy[..., 0] / total.clamp(min=1e-300)
    return Measurement(Invariance(sums["deviation"], sums["share"] / count), bias, direction, share, movement, distance)


# ------------------------------------------------------------------------------------- the attention function

_active: ContextVar[Any] = ContextVar("recorder", default=None)


@contextmanager
def _recorded_attention(model: Any) -> Iterator[None]:
    """Have a model compute its attention by ``_attention``; the registry keeps the function under its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention written out, as transformers calls it: query (B, H, T, D), keys and values (B, H or fewer, S, D)."""
    if s_aux is not None:
        raise ValueError("models with attention sinks cannot be measured: a score without a key takes a share too")
    key, value = (each.float().repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    scores = query.float() @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1)  # (B, H, T, S)
    output = (weights @ value).transpose(1, 2)  # (B, T, H, D)
    if recorder := _active.get():
        recorder.add(module, scores, weights, value, output)
    return output.to(query.dtype).contiguous(), None


class _Recorder:
    """Receives every layer's attention of one batch, in the order of the layers, and keeps sums and maxima."""

    def __init__(self, base: list[Tensor]):
        self.base = base  # each layer's weights in the run without the adapter, (B, H, T, T)
        self.weights: list[Tensor] = []
        self.layers: list[dict[str, Tensor]] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def add(self, module: Any, scores: Tensor, weights: Tensor, values: Tensor, output: Tensor) -> None:
        if not self.base:
            self.weights.append(weights)
            return
        n_tokens = scores.shape[-2]
        n_prefix = scores.shape[-1] - n_tokens
        base = self.base[len(self.layers)]
        to_prefix, content = weights[..., :n_prefix], weights[..., n_prefix:]
        left = content.sum(dim=-1, keepdim=True)
        relative = content / left
        change = (relative - base).abs().where(left > _LEAST, 0)
        found = {"count": torch.tensor(weights.shape[0] * n_tokens), "movement": change.amax(dim=(0, 2, 3))}
        found["distance"] = change.sum(dim=(0, 2, 3)) / 2
        self.layers.append(found)
        if not n_prefix:
            return
        without = torch.softmax(scores[..., n_prefix:], dim=-1)
        difference = (relative - without).abs().where(left > _LEAST, 0)
        share = to_prefix.sum(dim=-1, keepdim=True)
        bias = to_prefix @ values[..., :n_prefix, :]  # (B, H, T, D)
        recomposed = (1 - share) * (without @ values[..., n_prefix:, :]) + bias
        spread = (to_prefix / share.clamp(min=_LEAST)).where(share > _LEAST, 0)
        found |= {
            "deviation": difference.amax(dim=(0, 2, 3)),
            "share": share.sum(dim=(0, 2, 3)),
            "entropy": -torch.xlogy(spread, spread).sum(dim=(0, 2, 3)),
        }
        biases = bias.transpose(0, 1).flatten(1, 2).double()  # (H, B * T, D)
        _, sizes, directions = torch.linalg.svd(values[0, :, :n_prefix].double(), full_matrices=False)
        is_spanned = sizes > 1e-6 * sizes[:, :1]  # beyond float32's rounding
        inside = biases @ (directions * is_spanned[..., None]).mT @ directions
        found |= {"rank": is_spanned.sum(dim=1), "gram": biases.mT @ biases, "bias": biases.sum(dim=1)}
        found["outside"] = (biases - inside).square().sum(dim=(1, 2))
        self._compare_outputs(module, (recomposed.transpose(1, 2) - output).flatten(2), found)

    def _compare_outputs(self, module: Any, difference: Tensor, found: dict[str, Tensor]) -> None:
        """Send the recomposed output through the output projection too, the first part called after attention."""

        def compare(projection: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for handle in handles:
                handle.remove()
            recomposed = projection.forward(inputs[0] + difference.to(inputs[0].dtype))
            found["error"] = (recomposed - output).abs().max()
            found["magnitude"] = output.abs().max()

        handles = [child.register_forward_hook(compare) for child in module.children()]
