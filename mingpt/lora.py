"""LoRA: a learned low-rank matrix beside a frozen one, which unlike a prefix can change where attention looks.

Legend: R rank, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """Low-rank updates of some of a model's linear layers: ``W x + (alpha / R) B A x``.

    It is beside the model, not in it: while it is attached the layers add its output to theirs; detached, the model is
    as it was; merged, the updates are in the weights and the LoRA is spent. Several can be attached, they add up.

    Attributes:
        names: of the linear layers, in order.
        scale: alpha / R.

    Source: Hu et al. 2021, with its initialisation: A random, B zero, so that training starts from the model as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int = 1,
        targets: str | Sequence[str] = r"mlp\.c_",
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ):
        """Make the matrices, and attach them.

        Args:
            model: whose linear layers are meant.
            rank: R, at least 1.
            targets: a regular expression; layers in whose name it is found: "mlp" or "attn", one layer, or any of them.
                Or the names of layers.
            alpha: the scale's numerator, R by default.
            generator: the source of random numbers.

        Raises:
            ValueError: if no layer's name matches, or the rank is not positive.
        """
        super().__init__()
        pattern = targets if isinstance(targets, str) else "|".join(f"^{re.escape(name)}$" for name in targets)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and re.search(pattern, name)
        }
        if not layers:
            names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ValueError(f"no linear layer's name matches {targets!r}; there are {names[0]} ... {names[-1]}")
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, got {rank}")
        self.names, self.scale = tuple(layers), (rank if alpha is None else alpha) / rank
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            bound = 1 / math.sqrt(layer.in_features)  # Kaiming's for a = sqrt(5), as in the authors' code
            a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            self.a.append(a.to(layer.weight.device))
            self.b.append(torch.zeros(layer.out_features, rank, device=layer.weight.device))
        self._layers = list(layers.values())
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.attach()

    def attach(self) -> None:
        """Have the layers add the updates' outputs to theirs; a second call does nothing."""
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
        """Add the updates to the weights, and detach: the model computes the same without this LoRA."""
        for layer, update in zip(self._layers, self.updates(), strict=True):
            layer.weight += update
        self.detach()

    def updates(self) -> list[Tensor]:
        """What each layer's weight gains, (O, I) each."""
        return [self.scale * b @ a for a, b in zip(self.a, self.b, strict=True)]

    @property
    def n_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())
