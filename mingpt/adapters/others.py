"""Methods that change what flows through the model: its representations, its attention's output, or all its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mingpt.adapters.adapter import Adapter, grouped, on_output, per_row
from mingpt.adapters.lora import MLPLoRA
from mingpt.adapters.prefixes import KeyValuePrefix
from mingpt.model import GPT, CausalSelfAttention
from mingpt.prefix import Prefix
from mingpt.utils import CfgNode

if TYPE_CHECKING:
    from mingpt.training.batches import TaskDataset


class LoReFT(Adapter):
    """``h + R^T (W h + b - R h)`` on every block's output, with orthonormal rows in R (Wu et al. 2024).

    The paper intervenes at some positions, here it is all of the content and the padding.
    """

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, dataset.prefix_padding)
        width, layers = model.config.n_embd, model.blocks
        self.basis, self.w, self.bias = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for _ in layers:
            self.basis.append(nn.init.orthogonal_(torch.empty(width, size))[None].to(model.device))
            self.w.append(((2 * torch.rand(1, size, width) - 1) / width**0.5).to(model.device))  # as nn.Linear
            self.bias.append(torch.zeros(1, size, device=model.device))

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return config.n_layer * size * (2 * config.n_embd + 1)

    def hooks(self) -> Iterator[RemovableHandle]:
        for block, basis, w, bias in zip(self.model.blocks, self.basis, self.w, self.bias, strict=True):
            with torch.autocast(self.model.device.type, enabled=False):
                q, r = torch.linalg.qr(self.own(basis).float())  # (K, C, R) with orthonormal columns
                # Householder's signs jump where a number of the basis crosses zero; a positive diagonal of r is smooth.
                rotation = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None]

            def edit(
                _: nn.Module, __: object, output: tuple, rotation: Tensor = rotation, w: Tensor = w, bias: Tensor = bias
            ) -> tuple:
                x, *rest = output
                change = grouped(x, self.own(w).mT) + per_row(x, self.own(bias)) - grouped(x, rotation)
                return (x + grouped(change, rotation.mT), *rest)

            yield block.register_forward_hook(edit)


class _BesideAttention(Adapter):
    """Adds ``extra(layer, queries)`` (B, H, T, D), a function of the content's queries, to the heads' output."""

    def extra(self, layer: int, queries: Tensor) -> Tensor:
        raise NotImplementedError

    def hooks(self) -> Iterator[RemovableHandle]:
        for layer, block in enumerate(self.model.blocks):

            def add(attention: CausalSelfAttention, inputs: tuple, output: tuple, layer: int = layer) -> tuple:
                out, *rest = output
                x, width = inputs[0][:, -out.shape[1] :], attention.n_embd
                queries = F.linear(x, attention.c_attn.weight[:width], attention.c_attn.bias[:width])
                heads = self.extra(layer, queries.unflatten(-1, (attention.n_head, -1)).transpose(1, 2))
                return (out + F.linear(heads.transpose(1, 2).flatten(2), attention.c_proj.weight), *rest)

            yield block.attn.register_forward_hook(add)


class PrefixTuningPlus(_BesideAttention):
    """``attention + phi(q)^T M`` with phi = elu and a matrix M for every head, from zero (Wang et al. 2025, v1).

    The prefix is out of the softmax, so it takes no attention from the content. It has one size.
    """

    unit = None

    def __init__(self, model: GPT, dataset: TaskDataset, size: int = 1):
        super().__init__(model, dataset.prefix_padding)
        n_head, width = model.config.n_head, model.config.n_embd // model.config.n_head
        zeros = torch.zeros(1, model.config.n_layer, n_head, width, width, device=model.device)
        self.memory = nn.Parameter(zeros)

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return config.n_layer * config.n_embd**2 // config.n_head

    def extra(self, layer: int, queries: Tensor) -> Tensor:
        memory = self.own(self.memory)[:, layer].to(queries.dtype)  # (K, H, D, D)
        return F.elu(queries) @ memory.repeat_interleave(len(queries) // len(memory), dim=0)


class GatedPrefix(_BesideAttention):
    """A key_value prefix with a softmax of its own, times tanh of a gate for every head that begins at zero.

    Source: LLaMA-Adapter (Zhang et al. 2023), there in the upper layers, here in all.
    """

    unit = "positions"

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, dataset.prefix_padding)
        config, device = model.config, model.device
        self.values = nn.Parameter(torch.randn(1, config.n_layer, 2, size, config.n_embd).to(device))
        self.gate = nn.Parameter(torch.zeros(1, config.n_layer, config.n_head, device=device))

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return config.n_layer * (2 * size * config.n_embd + config.n_head)

    def extra(self, layer: int, queries: Tensor) -> Tensor:
        n_rows, n_head = queries.shape[:2]
        own = self.own(self.values)[:, layer].unflatten(-1, (n_head, -1)).transpose(2, 3)  # (K, 2, H, P, D)
        own = own.to(queries.dtype).repeat_interleave(n_rows // len(own), dim=0)
        weights = F.softmax(queries @ own[:, 0].mT / queries.shape[-1] ** 0.5, dim=-1)
        gate = self.own(self.gate)[:, layer].tanh().to(queries.dtype)  # (K, H)
        return gate.repeat_interleave(n_rows // len(gate), dim=0)[..., None, None] * (weights @ own[:, 1])


class PrefixAndLoRA(Adapter):
    """A key_value prefix and a LoRA of the MLPs of rank 1 together."""

    unit = "positions"

    def __init__(self, model: GPT, dataset: TaskDataset, size: int):
        super().__init__(model, dataset.prefix_padding)
        self.key_value, self.lora = KeyValuePrefix(model, dataset, size), MLPLoRA(model, dataset, 1)

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        return KeyValuePrefix.count(config, size) + MLPLoRA.count(config, 1)

    def hooks(self) -> Iterator[RemovableHandle]:
        self.lora._numbers = self._numbers
        return self.lora.hooks()

    def prefix(self) -> Prefix:
        self.key_value._numbers = self._numbers
        return self.key_value.prefix()


class FullFineTuning(Adapter):
    """A change of every weight of the model, from zero; It has one size."""

    unit = None

    def __init__(self, model: GPT, dataset: TaskDataset, size: int = 1):
        super().__init__(model, dataset.prefix_padding)
        self._names, self._rows_per_group = [name for name, _ in model.named_parameters()], 1
        self.changes = nn.ParameterList([torch.zeros_like(p)[None] for p in model.parameters()])

    @staticmethod
    def count(config: CfgNode, size: int) -> int:
        width = config.n_embd
        block = (0 if config.skip_layer_norm else 2 * width) + 2 * width + 12 * width**2 + 9 * width
        return config.n_layer * block + (2 * config.vocab_size + config.block_size + 2) * width

    def prefix(self) -> Prefix:
        table = self.own(self.changes[self._names.index("transformer.wte.weight")])
        padding = (self.model.transformer.wte.weight[:1] + table[:, :1]).expand(-1, self.n_placeholders, -1)
        return Prefix("prompt", padding)

    def hooks(self) -> Iterator[RemovableHandle]:
        changes = dict(zip(self._names, self.changes, strict=True))
        for name, module in self.model.named_modules():
            weight, bias = changes.get(f"{name}.weight"), changes.get(f"{name}.bias")
            if weight is None:
                continue

            def change(
                x: Tensor,
                output: Tensor,
                module: nn.Module = module,
                weight: Tensor = weight,
                bias: Tensor | None = bias,
            ) -> Tensor:
                own = self.own(weight)
                if isinstance(module, nn.Embedding):
                    if x.ndim == 1:  # positions, the same in all rows: of the tokens just read, else of the padding
                        n_rows, self._rows_per_group = self._rows_per_group, 1
                        return output + own[:, x].repeat_interleave(n_rows, dim=0)
                    self._rows_per_group = len(x) // len(own)
                    groups = torch.arange(len(own), device=x.device).repeat_interleave(self._rows_per_group)
                    return output + own[groups[:, None], x]
                if isinstance(module, nn.LayerNorm):
                    update = F.layer_norm(x, x.shape[-1:]).to(output.dtype) * per_row(output, own)
                else:
                    update = grouped(x.to(output.dtype), own.mT)
                return output + update + (0 if bias is None else per_row(output, self.own(bias)))

            yield on_output(module, change)
