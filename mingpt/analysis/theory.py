"""What a prefix can do to attention, measured: the two statements of Petrov et al. (2024) on any model and prefix.

Legend: B rows, T content tokens, P prefix positions, L layers, H heads, C channels, D = C / H.

For a fixed input, a prefix changes a layer's attention in two ways only (section 4.1, equations 5 to 7). It takes a
share of each token's attention for itself. The rest is scaled and otherwise stays as it was: *which* content a token
attends to, relative to other content, cannot change. And the prefix adds a bias to the output, out of the span of its
own values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mingpt.analysis.figures import head_heatmap
from mingpt.kv_cache import pieces_of
from mingpt.model import GPT, Block
from mingpt.prefix import AXES, Prefix, as_prefix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 1e-30
"""The least share of attention from which float32 still tells the parts, some digits above its smallest number."""


class Invariance(NamedTuple):
    """How attention among the content differs from that without the prefix, once the prefix's share is taken off.

    Attributes:
        deviation: (L, H) largest difference of two attention weights, a probability, 0 to 1. Theory says 0. A token
            that leaves the content less than 1e-30 is not counted: there is nothing in float32 to compare.
        share: (L, H) mean attention that content pays to the prefix, a probability, 0 to 1.
    """

    deviation: Tensor
    share: Tensor

    def figure(self, title: str = "Attention to the prefix") -> Figure:
        """The prefix's share by layer and head, and the largest deviation in words."""
        deviation = f"the rest deviates by at most {self.deviation.max().item():.0e}"
        return head_heatmap({f"attention paid to the prefix\n{deviation}": self.share}, title)


class BiasSubspace(NamedTuple):
    """What the prefix adds to each head's output.

    Attributes:
        error: (L,) largest difference between the layer's attention output and the one recomposed: what it is without a
            prefix, scaled, plus the bias; in units of the residual stream. Theory says 0.
        magnitude: (L,) the largest attention output, in the same units.
        out_of_span: (L, H) share of the biases' length outside the span of the prefix's values, 0 to 1. Theory says 0.
        rank: (L, H) dimensions that the prefix's values span, at most P and D.
        effective_rank: (L, H) dimensions that hold 99% of the biases' variance about zero, over all tokens.
        attention_perplexity: (L, H) how many prefix positions the attention is spread over, the exponential of its
            mean entropy, 1 to P.
    """

    error: Tensor
    magnitude: Tensor
    out_of_span: Tensor
    rank: Tensor
    effective_rank: Tensor
    attention_perplexity: Tensor

    def figure(self, title: str = "What a prefix could use, and what it uses") -> Figure:
        """What the prefix could use, and what it uses, by layer and head."""
        named = {"dimensions its values span": self.rank, "dimensions that hold 99% of its biases": self.effective_rank}
        return head_heatmap(named | {"prefix positions attended to": self.attention_perplexity}, title)


class _Layer(NamedTuple):
    """One layer's attention over the same input, with a prefix and without, on the CPU."""

    block: Block
    output: Tensor  # (B, T, C)
    weights: Tensor  # (B, H, T, P + T)
    weights_without: Tensor  # (B, H, T, T)
    prefix_values: Tensor  # (1, H, P, D)
    values: Tensor  # (B, H, T, D)


@torch.no_grad()
def attention_invariance(model: GPT, prefix: Tensor | Prefix, x: Tensor) -> Invariance:
    """Compare attention among the content with and without a prefix, layer by layer on the same input.

    Args:
        model: a GPT, in evaluation mode.
        prefix: see ``mingpt.prefix.as_prefix``.
        x: (B, P + T) of int64, rows as the model reads them with the prefix; the first P are placeholders.

    Returns:
        See ``Invariance``.

    Source: Petrov et al. 2024, equation 6.
    """
    deviation, share = [], []
    for layer in _layers(model, prefix, x):
        n_prefix = layer.weights.shape[-1] - layer.weights_without.shape[-1]
        content = layer.weights[..., n_prefix:]
        left = content.sum(dim=-1, keepdim=True)
        difference = (content / left - layer.weights_without).abs()
        deviation.append(difference.where(left > _LEAST, 0).amax(dim=(0, 2, 3)))
        share.append(layer.weights[..., :n_prefix].sum(dim=-1).mean(dim=(0, 2)))
    return Invariance(torch.stack(deviation), torch.stack(share))


@torch.no_grad()
def bias_subspace(model: GPT, prefix: Tensor | Prefix, x: Tensor) -> BiasSubspace:
    """Take each layer's attention output apart into the one without a prefix and the prefix's bias.

    Args:
        model, prefix, x: see ``attention_invariance``.

    Returns:
        See ``BiasSubspace``.

    Source: Petrov et al. 2024, equation 7: output = (1 - share) * output without the prefix + sum of A_ip W_V p.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in BiasSubspace._fields}
    for layer in _layers(model, prefix, x):
        n_prefix = layer.prefix_values.shape[-2]
        to_prefix = layer.weights[..., :n_prefix]  # (B, H, T, P)
        share = to_prefix.sum(dim=-1, keepdim=True)
        bias = to_prefix @ layer.prefix_values  # (B, H, T, D)
        mixed = (1 - share) * (layer.weights_without @ layer.values) + bias
        recomposed = layer.block.attn.c_proj(mixed.transpose(1, 2).flatten(2).to(x.device)).cpu()
        found["error"].append((recomposed - layer.output).abs().max())
        found["magnitude"].append(layer.output.abs().max())
        biases = bias.transpose(0, 1).flatten(1, 2).double()  # (H, B * T, D)
        values = layer.prefix_values.transpose(0, 1).flatten(1, 2).double()  # (H, P, D)
        _, sizes, directions = torch.linalg.svd(values, full_matrices=False)
        is_spanned = sizes > 1e-6 * sizes[:, :1]  # (H, min(P, D)), beyond float32's rounding
        found["rank"].append(is_spanned.sum(dim=1))
        inside = biases @ (directions * is_spanned[..., None]).mT @ directions
        found["out_of_span"].append((biases - inside).norm(dim=(1, 2)) / biases.norm(dim=(1, 2)).clamp(min=1e-300))
        energy = torch.linalg.svdvals(biases).square()
        found["effective_rank"].append((energy.cumsum(dim=1) < 0.99 * energy.sum(dim=1, keepdim=True)).sum(dim=1) + 1)
        spread = (to_prefix / share.clamp(min=_LEAST)).where(share > _LEAST, 0)
        entropy = -torch.xlogy(spread, spread).sum(dim=-1)
        found["attention_perplexity"].append(entropy.mean(dim=(0, 2)).exp())
    return BiasSubspace(**{name: torch.stack(values) for name, values in found.items()})


@torch.no_grad()
def random_case(
    seed: int, n_layer: int, n_head: int, head_size: int, n_positions: int, n_tokens: int, kind: str, gain: float = 1.0
) -> tuple[GPT, Prefix, Tensor]:
    """A GPT that nobody has trained, a prefix for it and rows to read: what the statements are checked on.

    Args:
        seed: of all that is drawn.
        n_layer, n_head, head_size: of the model, whose weights have a standard deviation of gain / sqrt(C).
        n_positions: P.
        n_tokens: T.
        kind: of the prefix, drawn from the standard normal distribution.
        gain: see above.

    Returns:
        The model, the prefix, and rows (3, P + T) of int64.
    """
    generator, n_embd = torch.Generator().manual_seed(seed), n_head * head_size
    config = GPT.get_default_config()
    config.merge_from_dict({"model_type": None, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd})
    config.merge_from_dict({"vocab_size": 11, "block_size": n_positions + n_tokens})
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.copy_(gain * torch.randn(parameter.shape, generator=generator) / n_embd**0.5)
    sizes = {"L": n_layer, "2": 2, "P": n_positions, "C": n_embd}
    values = torch.randn([1, *(sizes[axis] for axis in AXES[kind])], generator=generator)
    return model, Prefix(kind, values), torch.randint(11, (3, n_positions + n_tokens), generator=generator)


def _layers(model: GPT, prefix: Tensor | Prefix, x: Tensor) -> Iterator[_Layer]:
    """Run rows through the model with one prefix for all, and give each layer's attention."""
    prefix = as_prefix(prefix, model, len(x))
    if prefix.n_prefixes != 1:
        raise ValueError(f"the analysis is of one prefix, got {prefix.n_prefixes}; take them one by one")
    kv_cache = model.prefix_cache(prefix)
    for block, layer_cache, hidden in zip(model.blocks, kv_cache, model.block_inputs(x, prefix), strict=True):
        normed = block.ln_1(hidden)
        output, _, weights = block.attn(normed, layer_cache)
        _, own, without = block.attn(normed)
        grouped = (weights, without, layer_cache[0][1], pieces_of(own)[0][1])
        yield _Layer(block, output.cpu(), *(each.transpose(1, 2).flatten(0, 1).cpu() for each in grouped))
