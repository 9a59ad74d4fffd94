"""What is trained beside a frozen model: an interface that prefixes, LoRAs and all other methods share.

Legend: K adapters, B rows, K groups of B / K consecutive rows each, T tokens, P prefix positions, C channels, L layers,
I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.utils import CfgNode


class Adapter(nn.Module):
    """K adapters of one frozen model. In a batch each is for one group of rows, so one batch can carry many tasks.

    Parameters and buffers have the axis of K in front. While it is attached, the model's layers add what the adapters
    change, and the content attends to ``prefix()`` in the place of its padding. Attached or not, the model's weights
    stay as they are.

    A method is a subclass with ``__init__(model, dataset, size)`` for one adapter, ``count``, and ``hooks`` or
    ``prefix`` or both. Its paper is named in its docstring.

    Attributes:
        model: that it is for.
        n_placeholders: how many first tokens of the input a prefix stands for.
    """

    unit: ClassVar[str | None] = "rank"
    """What ``size`` is: a "rank", a number of "positions", or None where there is one size."""

    def __init__(self, model: GPT, n_placeholders: int):
        super().__init__()
        self._model, self.n_placeholders = (model,), n_placeholders  # in a tuple, or it were a part of this module
        self._handles: list[RemovableHandle] = []
        self._numbers: Tensor | None = None

    @property
    def model(self) -> GPT:
        """The frozen model."""
        return self._model[0]

    @property
    def n_adapters(self) -> int:
        """K, how many adapters there are."""
        return len(next(self.parameters()))

    @property
    def n_parameters(self) -> int:
        """How many trainable parameters one adapter has."""
        return sum(parameter[0].numel() for parameter in self.parameters())

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        """How many trainable parameters an adapter of this size has, for a model of this configuration."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What it is beside its parameters, as JSON values."""
        return {"method": type(self).__name__, "n_placeholders": self.n_placeholders}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Add what the adapters change to the model's layers; none here."""
        return iter(())

    def prefix(self) -> Prefix | None:
        """What the content attends to: a trained prefix, or the padding as it is with each adapter; None without."""
        if not self.n_placeholders:
            return None
        padding = self.model.transformer.wte.weight[:1].expand(self.n_placeholders, -1)
        n_groups = self.n_adapters if self._numbers is None else len(self._numbers)
        return Prefix("prompt", padding.expand(n_groups, -1, -1))

    def own(self, tensor: Tensor) -> Tensor:
        """Of (K, ...) what the adapters of the groups have, (number of groups, ...)."""
        return tensor if self._numbers is None else tensor.index_select(0, self._numbers)

    def attach(self, numbers: Sequence[int] | None = None) -> None:
        """Add the adapters to the model; a second call changes which.

        Args:
            numbers: of the adapters, one for each group of rows; all in order by default.
        """
        self.detach()
        device = next(self.parameters()).device
        self._numbers = None if numbers is None else torch.tensor(list(numbers), device=device)
        self._handles = list(self.hooks())

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._numbers = None

    @contextmanager
    def attached(self, numbers: Sequence[int] | None = None) -> Iterator[Prefix | None]:
        """Attach for a while: ``with adapter.attached([3]) as prefix: evaluate(model, data, prefix)``."""
        was_attached, before = bool(self._handles), self._numbers
        self.attach(numbers)
        try:
            yield self.prefix()
        finally:
            self.detach()
            if was_attached:
                self.attach(None if before is None else before.tolist())

    def _tensors(self) -> dict[str, Tensor]:
        return dict(itertools.chain[tuple[str, Tensor]](self.named_parameters(), self.named_buffers()))

    def extend(self, others: Sequence[Self]) -> Self:
        """Put adapters of the same method and size behind these, along the axis of K; returns itself."""
        for name, tensor in self._tensors().items():
            tensor.data = torch.cat([tensor.data, *(each._tensors()[name].data for each in others)])
        return self


def grouped(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply the rows (B, T, I) of K groups with each group's own matrix, (K, I, O), to (B, T, O)."""
    return (x.reshape(len(matrices), -1, x.shape[-1]) @ matrices.to(x.dtype)).view(*x.shape[:-1], -1)


def per_row(x: Tensor, vectors: Tensor) -> Tensor:
    """Each group's vector (K, C) for its rows of x (B, T, ...): (B, 1, C) in the dtype of x."""
    return vectors.to(x.dtype).repeat_interleave(len(x) // len(vectors), dim=0)[:, None]


def on_output(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> RemovableHandle:
    """Replace a module's output by ``change(input, output)``."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return change(inputs[0], output)

    return module.register_forward_hook(hook)


def size_for(method: type[Adapter], config: CfgNode, n_parameters: int, n_placeholders: int) -> int:
    """The largest size that has at most ``n_parameters`` trainable parameters; 1 for a method of one size.

    Args:
        method: any.
        config: of the model, whose channels bound a rank.
        n_parameters: as asked.
        n_placeholders: the most positions.

    Raises:
        ValueError: if a size of 1 has more.
    """
    if method.unit is None:
        return 1
    most = n_placeholders if method.unit == "positions" else config.n_embd
    sizes = [size for size in range(1, most + 1) if method.count(config, size) <= n_parameters]
    if not sizes:
        raise ValueError(
            f"{method.__name__} has at least {method.count(config, 1)} trainable parameters, {n_parameters} were asked"
        )
    return sizes[-1]
