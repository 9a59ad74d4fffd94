"""BitFit: only the biases of a model are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mingpt.adapters.adapter import Adapter, on_output, per_row
from mingpt.model import GPT
from mingpt.utils import CfgNode

if TYPE_CHECKING:
    from mingpt.training.batches import TaskDataset


class BitFit(Adapter):
    """A change of every bias, from zero (Ben Zaken et al. 2022); it has one size."""

    unit = None

    def __init__(self, model: GPT, dataset: TaskDataset, size: int = 1):
        super().__init__(model, dataset.prefix_padding)
        biases = {each: getattr(each, "bias", None) for each in model.modules()}
        self._biases = {layer: bias for layer, bias in biases.items() if isinstance(bias, Tensor)}
        self.changes = nn.ParameterList([torch.zeros_like(bias)[None] for bias in self._biases.values()])

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return (config.n_layer * (10 if config.skip_layer_norm else 11) + 1) * config.n_embd

    def hooks(self) -> Iterator[RemovableHandle]:
        for layer, change in zip(self._biases, self.changes, strict=True):

            def add(_: Tensor, output: Tensor, change: Tensor = change) -> Tensor:
                return output + per_row(output, self.own(change))

            yield on_output(layer, add)
