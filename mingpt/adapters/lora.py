"""LoRA and its kin: low-rank or diagonal changes of linear layers. Unlike a prefix they can change attention.

Legend: K adapters, R rank, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mingpt.adapters.adapter import Adapter, grouped, on_output, per_row
from mingpt.model import GPT
from mingpt.utils import CfgNode, match_rules

if TYPE_CHECKING:
    from mingpt.training.batches import TaskDataset

MLP, ATTENTION = r"mlp\.c_", r"attn\.c_attn"


class LowRank(Adapter):
    """Low-rank updates of some of a model's linear layers: ``W x + (alpha / R) B A x``.

    It is beside the model, not in it. While it is attached the layers add its output to theirs; detached, the model is
    as it was; merged, the updates are in the weights, and it can be neither attached nor merged again. Several can be
    attached, to one layer too; they add up.

    Attributes:
        names: of the linear layers, in order.
        scale: alpha / R.
        is_merged: whether its updates are in the weights.

    Source: Hu et al. 2021, with its initialisation: A random, B zero, so that training starts from the model as it is.
    """

    def __init__(
        self,
        model: GPT,
        rank: int = 1,
        targets: str | Sequence[str] = MLP,
        alpha: float | None = None,
        n_placeholders: int = 0,
    ):
        """Create the matrices of one adapter.

        Args:
            model: has the linear layers.
            rank: R, at least 1.
            targets: a regular expression that is searched for in the layers' names, such as "mlp", or "." for all
                layers; or a list of full names.
            alpha: the scale's numerator, R by default.
            n_placeholders: see ``Adapter``.

        Raises:
            ValueError: for a regular expression or name that no layer matches, no targets, or a rank below 1.
        """
        super().__init__(model, n_placeholders)
        if not targets:
            raise ValueError(f'targets is {targets!r}; give a regular expression, "." for all layers, or their names')
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        patterns, is_match = ([targets], re.search) if isinstance(targets, str) else (targets, operator.eq)
        matched = match_rules(patterns, linear, "linear layer", is_match)
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, got {rank}")
        self._layers = {name: module for name, module in linear.items() if name in matched}
        self.names, self.scale = tuple(self._layers), (rank if alpha is None else alpha) / rank
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for layer in self._layers.values():
            bound = 1 / math.sqrt(layer.in_features)  # Kaiming's for a = sqrt(5), as in the authors' code
            a = torch.empty(1, rank, layer.in_features).uniform_(-bound, bound)
            self.a.append(a.to(layer.weight.device))
            self.b.append(torch.zeros(1, layer.out_features, rank, device=layer.weight.device))
        self.is_merged = False

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"layers": list(self.names), "scale": self.scale}

    def attach(self, numbers: Sequence[int] | None = None) -> None:
        """Let the layers add the updates' outputs to theirs.

        Raises:
            RuntimeError: if the LoRA is merged, as its updates would count twice.
        """
        if self.is_merged:
            raise RuntimeError("this LoRA is merged, its updates are in the model's weights; make or load a new one")
        super().attach(numbers)

    def hooks(self) -> Iterator[RemovableHandle]:
        for layer, a, b in zip(self._layers.values(), self.a, self.b, strict=True):

            def add(x: Tensor, output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return output + self.scale * grouped(grouped(x.to(output.dtype), self.own(a).mT), self.own(b).mT)

            yield on_output(layer, add)

    def adapted_weights(self) -> Iterator[tuple[nn.Linear, Tensor]]:
        """Each layer, and what its weight is with each adapter, (K, O, I)."""
        for layer, a, b in zip(self._layers.values(), self.a, self.b, strict=True):
            yield layer, layer.weight + self.scale * b @ a

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates of the one adapter to the weights, and detach: the model computes the same without it.

        Raises:
            RuntimeError: if the LoRA is merged already.
        """
        self.attach()
        for layer, adapted in self.adapted_weights():
            (weight,) = adapted
            layer.weight.copy_(weight)
        self.detach()
        self.is_merged = True


class LoRA(LowRank):
    """The same, attached from the beginning."""

    def __init__(self, model: GPT, *args: Any, **options: Any):
        """Create the matrices, see ``LowRank``, and attach them."""
        super().__init__(model, *args, **options)
        self.attach()


class TargetedLoRA(LowRank):
    """A LoRA of the layers that ``targets`` names, as a method."""

    targets: ClassVar[str]

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, size, self.targets, n_placeholders=dataset.prefix_padding)

    @classmethod
    def count(cls, config: CfgNode, size: int) -> int:
        per_layer = 10 * config.n_embd if cls.targets == MLP else 4 * config.n_embd  # I + O of the layers
        return config.n_layer * size * per_layer


class MLPLoRA(TargetedLoRA):
    """LoRA of the MLPs' two layers (Hu et al. 2021)."""

    targets = MLP


class AttentionLoRA(TargetedLoRA):
    """LoRA of the projection to queries, keys and values (Hu et al. 2021)."""

    targets = ATTENTION


class DoRA(MLPLoRA):
    """A LoRA of the direction, and the magnitude by itself: ``m (W + B A) / |W + B A|``, by rows (Liu et al. 2024).

    The norm gets no gradient, as in the paper's section 4.3.
    """

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, dataset, size)
        layers = self._layers.values()
        self.magnitude = nn.ParameterList([layer.weight.detach().norm(dim=1)[None] for layer in layers])

    @classmethod
    def count(cls, config: CfgNode, size: int) -> int:
        return super().count(config, size) + config.n_layer * 5 * config.n_embd

    def hooks(self) -> Iterator[RemovableHandle]:
        for layer, a, b, m in zip(self._layers.values(), self.a, self.b, self.magnitude, strict=True):

            def change(
                x: Tensor, output: Tensor, layer: nn.Linear = layer, a: Tensor = a, b: Tensor = b, m: Tensor = m
            ) -> Tensor:
                a, b = self.own(a), self.own(b)
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    norm = (layer.weight + self.scale * b @ a).norm(dim=2)  # (K, O)
                update = self.scale * grouped(grouped(x.to(output.dtype), a.mT), b.mT)
                bias = layer.bias.to(output.dtype)
                return (output - bias + update) * per_row(output, self.own(m) / norm) + bias

            yield on_output(layer, change)

    def adapted_weights(self) -> Iterator[tuple[nn.Linear, Tensor]]:
        for (layer, weight), magnitude in zip(super().adapted_weights(), self.magnitude, strict=True):
            yield layer, weight * (magnitude / weight.norm(dim=2))[..., None]


class VeRA(TargetedLoRA):
    """``W x + b * (B (d * A x))`` with trained vectors b and d over frozen random matrices (Kopiczko et al. 2024).

    A and B are the same in every layer, cut to its size, and drawn from a seed of their own; d begins at 0.1, b at 0.
    """

    targets = MLP
    shared_a: Tensor
    shared_b: Tensor

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, dataset, size)
        del self.a, self.b
        drawn, widest = torch.Generator().manual_seed(0), 4 * model.config.n_embd
        for name, shape in (("shared_a", (1, size, widest)), ("shared_b", (1, widest, size))):
            bound = math.sqrt(6 / shape[-1])  # Kaiming's uniform for a = 0, as in PEFT
            self.register_buffer(name, (2 * torch.rand(shape, generator=drawn) - 1).to(model.device) * bound)
        layers = list(self._layers.values())
        self.d = nn.ParameterList([torch.full((1, size), 0.1, device=model.device) for _ in layers])
        self.scale_out = nn.ParameterList([torch.zeros(1, each.out_features, device=model.device) for each in layers])

    @classmethod
    def count(cls, config: CfgNode, size: int) -> int:
        return config.n_layer * (2 * size + 5 * config.n_embd)

    def hooks(self) -> Iterator[RemovableHandle]:
        for layer, d, out in zip(self._layers.values(), self.d, self.scale_out, strict=True):

            def add(x: Tensor, output: Tensor, layer: nn.Linear = layer, d: Tensor = d, out: Tensor = out) -> Tensor:
                a, b = map(self.own, self._shared(layer))
                inner = grouped(x.to(output.dtype), a.mT) * per_row(output, self.own(d))
                return output + grouped(inner, b.mT) * per_row(output, self.own(out))

            yield on_output(layer, add)

    def _shared(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        return self.shared_a[..., : layer.in_features], self.shared_b[:, : layer.out_features]

    def adapted_weights(self) -> Iterator[tuple[nn.Linear, Tensor]]:
        for layer, d, out in zip(self._layers.values(), self.d, self.scale_out, strict=True):
            a, b = self._shared(layer)
            yield layer, layer.weight + out[..., None] * (b @ (d[..., None] * a))


class IA3(Adapter):
    """Vectors that scale keys, values and the MLP's hidden units, from 1 on (Liu et al. 2022); it has one size."""

    unit = None

    def __init__(self, model: GPT, dataset: TaskDataset, size: int = 1):
        super().__init__(model, dataset.prefix_padding)
        width, device = model.config.n_embd, model.device
        self.keys_values = nn.ParameterList([torch.ones(1, 2 * width, device=device) for _ in model.blocks])
        self.hidden = nn.ParameterList([torch.ones(1, 4 * width, device=device) for _ in model.blocks])

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return config.n_layer * 6 * config.n_embd

    def hooks(self) -> Iterator[RemovableHandle]:
        for block, keys_values, hidden in zip(self.model.blocks, self.keys_values, self.hidden, strict=True):

            def scale_keys_values(_: Tensor, output: Tensor, own: Tensor = keys_values) -> Tensor:
                width = self.model.config.n_embd
                return torch.cat([output[..., :width], output[..., width:] * per_row(output, self.own(own))], dim=-1)

            def scale_hidden(_: Tensor, output: Tensor, own: Tensor = hidden) -> Tensor:
                return output * per_row(output, self.own(own))

            yield on_output(block.attn.c_attn, scale_keys_values)
            yield on_output(block.mlp.gelu, scale_hidden)
