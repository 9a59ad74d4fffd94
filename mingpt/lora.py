"""LoRA: a trainable low-rank matrix beside a frozen one. Unlike a prefix it can change where attention looks.

Legend: R rank, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mingpt.utils import match_rules


class LoRA(nn.Module):
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
        self, model: nn.Module, rank: int = 1, targets: str | Sequence[str] = r"mlp\.c_", alpha: float | None = None
    ):
        """Create the matrices, and attach them.

        Args:
            model: has the linear layers.
            rank: R, at least 1.
            targets: a regular expression that is searched for in the layers' names, such as "mlp", or "." for all
                layers; or a list of full names.
            alpha: the scale's numerator, R by default.

        Raises:
            ValueError: for a regular expression or name that no layer matches, no targets, or a rank below 1.
        """
        super().__init__()
        if not targets:
            raise ValueError(f'targets is {targets!r}; give a regular expression, "." for all layers, or their names')
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        patterns, is_match = ([targets], re.search) if isinstance(targets, str) else (targets, operator.eq)
        matched = match_rules(patterns, linear, "linear layer", is_match)
        layers = {name: module for name, module in linear.items() if name in matched}
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, got {rank}")
        self.names, self.scale = tuple(layers), (rank if alpha is None else alpha) / rank
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            bound = 1 / math.sqrt(layer.in_features)  # Kaiming's for a = sqrt(5), as in the authors' code
            a = torch.empty(rank, layer.in_features).uniform_(-bound, bound)
            self.a.append(a.to(layer.weight.device))
            self.b.append(torch.zeros(layer.out_features, rank, device=layer.weight.device))
        self._layers = list(layers.values())
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.is_merged = False
        self.attach()

    def attach(self) -> None:
        """Let the layers add the updates' outputs to theirs; a second call does nothing.

        Raises:
            RuntimeError: if the LoRA is merged, as its updates would count twice.
        """
        if self.is_merged:
            raise RuntimeError("this LoRA is merged, its updates are in the model's weights; make or load a new one")
        if self._hooks:
            return
        for layer, a, b in zip(self._layers, self.a, self.b, strict=True):

            def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return output + self.scale * ((inputs[0] @ a.to(output.dtype).T) @ b.to(output.dtype).T)

            self._hooks.append(layer.register_forward_hook(add))

    def detach(self) -> None:
        """Leave the layers as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates to the weights, and detach: the model computes the same without this LoRA.

        Raises:
            RuntimeError: if the LoRA is merged already.
        """
        self.attach()
        for layer, a, b in zip(self._layers, self.a, self.b, strict=True):
            layer.weight += self.scale * b @ a
        self.detach()
        self.is_merged = True

    @property
    def n_parameters(self) -> int:
        """How many trainable parameters it has."""
        return sum(parameter.numel() for parameter in self.parameters())
