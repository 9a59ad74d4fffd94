"""Methods that train a prefix: what the content attends to in the place of its padding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mingpt.adapters.adapter import Adapter
from mingpt.model import GPT
from mingpt.prefix import Prefix, as_key_value, initial_prefix
from mingpt.utils import CfgNode

if TYPE_CHECKING:
    from mingpt.training.batches import TaskDataset


class PrefixAdapter(Adapter):
    """K prefixes of any kind, as they are."""

    unit = "positions"

    def __init__(self, model: GPT, prefix: Prefix):
        """Train the values of ``prefix`` in place."""
        super().__init__(model, prefix.n_placeholders)
        self._prefix, self.values = replace(prefix, rows=None), nn.Parameter(prefix.values.detach())

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"kind": self._prefix.kind}

    def prefix(self) -> Prefix:
        return replace(self._prefix, values=self.own(self.values))


def _fresh(model: GPT, dataset: TaskDataset, size: int, kind: str, init: str) -> Prefix:
    values = initial_prefix(model, size, init, kind).detach()
    return Prefix(kind, values[None], n_placeholders=dataset.prefix_padding)


class SoftPrompt(PrefixAdapter):
    """Embeddings in the place of the padding's (Lester et al. 2021)."""

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, _fresh(model, dataset, size, "prompt", "padding"))

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return size * config.n_embd


class ActivationPrefix(PrefixAdapter):
    """What every layer's first LayerNorm sees (Petrov et al. 2024), from what it sees at the padding."""

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, _fresh(model, dataset, size, "activation", "padding"))

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return config.n_layer * size * config.n_embd


class KeyValuePrefix(PrefixAdapter):
    """Every layer's keys and values (Li & Liang 2021), from random ones."""

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, _fresh(model, dataset, size, "key_value", "random"))

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return 2 * config.n_layer * size * config.n_embd


class PartlyTrainedPrefix(Adapter):
    """A key_value prefix of which a mask (1, L, 2, P, C) says what is trained; the rest stays as it began."""

    unit = "positions"

    def __init__(self, model: GPT, init: Tensor, is_trained: Tensor, n_placeholders: int):
        super().__init__(model, n_placeholders)
        self.index: Tensor
        self.init: Tensor
        self.register_buffer("init", init.detach()[None])
        self.register_buffer("index", is_trained.expand(init.shape).flatten().nonzero().T)
        self.values = nn.Parameter(init.detach().flatten()[self.index])

    def prefix(self) -> Prefix:
        init, index, values = self.own(self.init), self.own(self.index), self.own(self.values)
        full = init.flatten(1).scatter(1, index, values).view_as(init)
        return Prefix("key_value", full, n_placeholders=self.n_placeholders)


class ValuePrefix(PartlyTrainedPrefix):
    """Values of its own over keys that are drawn once and shared by all adapters: does a prefix need keys?"""

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        init = initial_prefix(model, size, "random", "key_value").detach()
        drawn = torch.Generator().manual_seed(0)
        init[:, 0] = torch.randn(init[:, 0].shape, generator=drawn).to(init.device)
        super().__init__(model, init, torch.tensor([False, True])[:, None, None], dataset.prefix_padding)

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return config.n_layer * size * config.n_embd


class UpperLayersPrefix(PartlyTrainedPrefix):
    """A key_value prefix in the upper half of the layers; the lower half attends to the padding, as before."""

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        init = initial_prefix(model, size, "padding", "key_value").detach()
        is_trained = (torch.arange(len(init)) >= len(init) // 2).view(-1, 1, 1, 1)
        init[is_trained.flatten()] = torch.randn_like(init[is_trained.flatten()])
        super().__init__(model, init, is_trained, dataset.prefix_padding)

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return 2 * (config.n_layer - config.n_layer // 2) * size * config.n_embd


class Cartridge(PartlyTrainedPrefix):
    """A key_value prefix that begins as the cache of solved examples, cut to its size; the first position stays.

    As PEFT's ``CARTRIDGE`` (Eyuboglu et al. 2025), which begins as the cache of the text that it compresses. Its loss
    there imitates a model that reads the text; here, where the model cannot learn from context, it is the task's.
    """

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        tokens = torch.from_numpy(dataset.context(size))
        init = as_key_value(model, Prefix("prompt", model.transformer.wte.weight[tokens.to(model.device)][None]))
        super().__init__(model, init, torch.arange(size)[:, None] > 0, dataset.prefix_padding)

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return 2 * config.n_layer * (size - 1) * config.n_embd


class Reparametrization(Adapter):
    """A small network that makes key_value prefixes while they are trained: ``init + W2 tanh(W1 e + b1) + b2``.

    Each of K prefixes has its own network and embeddings ``e``. After training only its output is kept. W2 and b2 begin
    at zero, so training begins at ``init``. W1 begins with variance 1 / C and ``e`` with variance 1 / P, so the hidden
    layer begins where tanh is almost linear.

    Source: Li & Liang 2021, section 4.3, who have no ``init``; the network is PEFT's ``prefix_projection``.
    """

    unit = "positions"
    init: Tensor

    def __init__(self, model: GPT, init: Tensor, n_placeholders: int | None = None):
        """Make the networks, with hidden layers of C units.

        Args:
            model: that the prefixes are for.
            init: K key_value prefixes, (K, L, 2, P, C).
            n_placeholders: P by default.

        Raises:
            ValueError: if ``init`` has another number of axes.
        """
        n_prefixes, n_layer, _, n_positions, n_embd = Prefix("key_value", init).values.shape
        super().__init__(model, n_positions if n_placeholders is None else n_placeholders)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape).to(init.device) / shape[-2] ** 0.5)

        self.register_buffer("init", init.detach().clone())
        self.embedding = normal(n_prefixes, n_positions, n_embd)
        self.w1, self.b1 = normal(n_prefixes, n_embd, n_embd), nn.Parameter(init.new_zeros(n_prefixes, 1, n_embd))
        self.w2 = nn.Parameter(init.new_zeros(n_prefixes, n_embd, n_layer * 2 * n_embd))
        self.b2 = nn.Parameter(init.new_zeros(n_prefixes, 1, n_layer * 2 * n_embd))

    def prefix(self) -> Prefix:
        embedding, w1, b1, w2, b2, init = map(self.own, (self.embedding, self.w1, self.b1, self.w2, self.b2, self.init))
        update = (embedding @ w1 + b1).tanh() @ w2 + b2  # (K, P, L * 2 * C)
        n_layer, _, n_positions, n_embd = init.shape[1:]
        values = init + update.view(-1, n_positions, n_layer, 2, n_embd).permute(0, 2, 3, 1, 4)
        return Prefix("key_value", values, n_placeholders=self.n_placeholders)


class ReparametrizedPrefix(Reparametrization):
    """A key_value prefix that a network makes, see ``Reparametrization``, from the padding's keys and values."""

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        init = initial_prefix(model, size, "padding", "key_value").detach()
        super().__init__(model, init[None], dataset.prefix_padding)

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        width, n_out = config.n_embd, 2 * config.n_layer * config.n_embd
        return size * width + width * (width + 1) + (width + 1) * n_out
