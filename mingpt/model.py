"""The GPT language model, all of it in this file.

Legend: B batch, T tokens, P prefix positions, S positions of the past, C channels, H heads, D = C / H, L layers,
V vocabulary.

There is one attention path: content tokens attend to themselves, causally, and to a ``past`` of keys and values that
came from somewhere else. A learned prefix, the zeros that stand for one, the tokens generated so far: all are a past.

Sources: GPT-2 (Radford et al. 2019); the names and the presets are those of minGPT (Karpathy 2020).
"""

from __future__ import annotations

import logging
import math
from functools import reduce
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mingpt.decoding import generation
from mingpt.kv_cache import Cache, KeysValues, KVCache, LayerCache, by_row, n_positions
from mingpt.prefix import Prefix, activation_cache, as_prefix, key_value_cache
from mingpt.utils import CfgNode, nearest

logger = logging.getLogger("mingpt")

Record = list[tuple[str, Tensor]]
"""Activations in the order in which they were computed: ("attention", (B, H, T, T)) and
("attn_block_output", (B, T, C)) for each layer."""

PRESETS = {
    "openai-gpt": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 117M parameters
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
    "gopher-44m": {"n_layer": 8, "n_head": 16, "n_embd": 512},
    "gpt-mini": {"n_layer": 6, "n_head": 6, "n_embd": 192},
    "gpt-micro": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "gpt-nano": {"n_layer": 3, "n_head": 3, "n_embd": 48},
}
"""minGPT's names for sizes."""


TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""OpenAI's weights for x @ W; nn.Linear keeps the transpose."""


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention of content over a past and, causally, over itself."""

    def __init__(self, config: CfgNode):
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.register_load_state_dict_pre_hook(_drop_mask_buffers)

    def _split_heads(self, x: Tensor, n_parts: int, n_groups: int) -> Tensor:
        """Cut (B, T, n_parts * C) into (n_parts, G, H, B / G, T, D)."""
        batch, n_tokens, _ = x.shape
        parts = x.view(n_groups, batch // n_groups, n_tokens, n_parts, self.n_head, self.n_embd // self.n_head)
        return parts.permute(3, 0, 4, 1, 2, 5)

    def keys_values(self, x: Tensor) -> KeysValues:
        """The keys and values of ``x`` (G, T, C), which the rows of a group share: (G, H, 1, T, D) each."""
        _, keys, values = self._split_heads(self.c_attn(x), 3, len(x))
        return keys, values

    def forward(
        self, x: Tensor, past: LayerCache | None = None, mask: Tensor | None = None, n_last: int | None = None
    ) -> tuple[Tensor, LayerCache, Tensor | None]:
        """Attend.

        Args:
            x: (B, T, C) the content.
            past: keys and values of S earlier positions.
            mask: (T, S + T) of bool, true where a token must not look, or None where it may look everywhere.
            n_last: how many last tokens look at all, T' of them; all T by default.

        Returns:
            The output (B, T', C), the past of what may follow, and the attention weights (G, H, B / G, T', S + T),
            None after a cache.
        """
        qkv, n_last = self.c_attn(x), n_last or x.shape[1]
        mask = None if mask is None else mask[-n_last:]
        if isinstance(past, KVCache):
            queries, keys, values = self._split_heads(qkv, 3, len(x)).squeeze(3)  # (B, H, T, D)
            keys, values = past.append(keys, values)
            may_look = None if mask is None else ~mask
            mixed = F.scaled_dot_product_attention(queries[:, :, -n_last:], keys, values, may_look).transpose(1, 2)
            return self._project(mixed), past, None
        # Written out: at these lengths the fused kernel is twice as slow on a CPU, its backward pass six times.
        n_groups = len(past[0][0]) if past else 1
        queries, keys, values = self._split_heads(qkv, 3, n_groups).contiguous()  # (G, H, N, T, D)
        queries, past = queries[..., -n_last:, :], [*(past or []), (keys, values)]
        scores = torch.cat([_product(queries, keys.mT) for keys, _ in past], dim=-1) / math.sqrt(queries.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32)  # (G, H, N, T', S + T)
        parts = self.attn_dropout(weights.to(values.dtype)).split([keys.shape[3] for keys, _ in past], dim=-1)
        mixed = reduce(torch.add, (_product(part, values) for part, (_, values) in zip(parts, past, strict=True)))
        return self._project(mixed.permute(0, 2, 3, 1, 4)), past, weights

    def _project(self, mixed: Tensor) -> Tensor:
        """(..., T, H, D) to (B, T, C)."""
        return self.resid_dropout(self.c_proj(mixed.reshape(-1, mixed.shape[-3], self.n_embd)))


def _product(rows: Tensor, matrices: Tensor) -> Tensor:
    """Multiply (G, H, N, T, I) with (G, H, N, I, O), or with (G, H, 1, I, O) that the rows of a group share."""
    if matrices.shape[2] == rows.shape[2]:
        return rows @ matrices
    return (rows.flatten(2, 3) @ matrices.squeeze(2)).unflatten(2, rows.shape[2:4])


class MLP(nn.Module):
    """The position-wise network of a block."""

    def __init__(self, config: CfgNode):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.gelu = nn.GELU(config.gelu_approximate)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: CfgNode):
        super().__init__()
        self.ln_1 = nn.Identity() if config.skip_layer_norm else nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        past: LayerCache | None = None,
        mask: Tensor | None = None,
        record: Record | None = None,
        n_last: int | None = None,
    ) -> tuple[Tensor, LayerCache]:
        """(B, T, C) to (B, T', C), with the past of what may follow; see CausalSelfAttention."""
        out, new_cache = self.attend(x, past, mask, record, n_last)
        x = x[:, -out.shape[1] :] + out
        return x + self.mlp(self.ln_2(x)), new_cache

    def keys_values(self, x: Tensor) -> KeysValues:
        """What attention would see of ``x`` (G, T, C): keys and values, (G, H, 1, T, D) each."""
        return self.attn.keys_values(self.ln_1(x))

    def attend(
        self,
        x: Tensor,
        past: LayerCache | None,
        mask: Tensor | None,
        record: Record | None = None,
        n_last: int | None = None,
    ) -> tuple[Tensor, LayerCache]:
        """The block's first half: what attention adds to the residual stream ``x``."""
        out, new_cache, weights = self.attn(self.ln_1(x), past, mask, n_last)
        if record is not None and weights is not None:
            record.append(("attention", weights.detach().transpose(1, 2).flatten(0, 1).cpu()))
            record.append(("attn_block_output", out.detach().float().cpu()))
        return out, new_cache


class Transformer(nn.Module):
    """The embeddings, the blocks and the last LayerNorm: a holder, so that the weights have minGPT's names."""

    def __init__(self, config: CfgNode):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)


class GPT(nn.Module):
    """A GPT language model that reads tokens after a past."""

    @staticmethod
    def get_default_config() -> CfgNode:
        """A configuration to fill in: either ``model_type`` or all of n_layer, n_head and n_embd, and both sizes.

        ``gelu_approximate`` is as in torch.nn.GELU: "tanh" is GPT-2's, "none" the exact one, a third of its time on a
        CPU. ``init`` is "gpt2", or "zero_residual": each block begins as the identity, since the projections into the
        residual stream are zero (Goyal et al. 2017), and what feeds them keeps the variance (LeCun et al. 1998).
        """
        return CfgNode(
            model_type="gpt",
            n_layer=None,
            n_head=None,
            n_embd=None,
            vocab_size=None,
            block_size=None,
            embd_pdrop=0.1,
            resid_pdrop=0.1,
            attn_pdrop=0.1,
            skip_layer_norm=False,
            gelu_approximate="tanh",
            init="gpt2",
        ).close()

    def __init__(self, config: CfgNode):
        """Build the model with random weights.

        Args:
            config: see ``get_default_config``; it is copied, never changed.

        Raises:
            ValueError: if a size is missing, given twice, or impossible.
        """
        super().__init__()
        self.config = config = _complete_config(config)
        self.block_size = config.block_size
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_init_weights)
        is_gpt2 = config.init == "gpt2"
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2 scales the projections into the residual stream
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer) if is_gpt2 else 0.0)
            elif name.endswith(("c_attn.weight", "c_fc.weight")) and not is_gpt2:
                nn.init.normal_(parameter, mean=0.0, std=1 / math.sqrt(config.n_embd))
        logger.info("number of parameters: %.2fM", self.n_parameters / 1e6)

    @property
    def n_parameters(self) -> int:
        """How many parameters there are, without the output head, as GPTs are counted."""
        return sum(p.numel() for p in self.transformer.parameters())

    @property
    def blocks(self) -> list[Block]:
        """The transformer's blocks, in order."""
        return cast(list[Block], list(self.transformer.h))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        prefixes: Tensor | Prefix | None = None,
        activations_record: Record | None = None,
        n_shared: int = 0,
        n_scored: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the token after each token.

        Args:
            idx: (B, T) tokens; with a prefix the first P are placeholders that are not looked at.
            targets: (B, T) the tokens to predict, -1 where none is scored.
            prefixes: see ``mingpt.prefix.as_prefix``.
            activations_record: a list that receives each layer's attention weights and attention outputs, with the
                prefix positions included: zero there for kinds of prefix that have no queries of their own.
            n_shared: how many first tokens are the same in every row; they are computed once for the batch.
            n_scored: how many last tokens predict something; the last layer skips the others.

        Returns:
            The logits (B, T, V), or (B, n_scored, V), zero at prefix positions, where nothing is predicted; and the
            mean cross-entropy in nats over the scored targets, None without targets.

        Raises:
            ValueError: if there are more tokens than ``block_size``, or the prefix does not fit.
        """
        batch, n_tokens = idx.shape
        if n_tokens > self.block_size:
            raise ValueError(f"{n_tokens} tokens do not fit into block_size = {self.block_size}")
        prefix = None if prefixes is None else as_prefix(prefixes, self.config.n_layer, self.config.n_embd, batch)
        n_cached = n_shared if prefix is None else prefix.n_placeholders
        if n_cached >= n_tokens:
            raise ValueError(f"{n_cached} prefix positions leave no content in {n_tokens} tokens")
        record: Record | None = None if activations_record is None else []
        n_unscored = 0
        if prefix is not None:
            past, n_unscored = self.prefix_cache(prefix), n_cached
            before = past[0][0][0].new_zeros(1, n_cached, self.config.vocab_size)
        elif n_cached and record is None:
            before, past = self.forward_cached(idx[:1, :n_cached])
        else:
            before, past, n_cached = None, None, 0
        logits, _ = self.forward_cached(idx[:, n_cached:], past, record=record, n_last=n_scored, start=n_cached)
        if n_scored is not None:
            n_unscored, targets = 0, None if targets is None else targets[:, -n_scored:]
        elif before is not None:
            logits = torch.cat([before.expand(batch, -1, -1), logits], dim=1)
        loss = None
        if targets is not None:
            scored, goal = logits[:, n_unscored:].flatten(0, 1), targets[:, n_unscored:].flatten()
            loss = F.cross_entropy(scored.float(), goal, ignore_index=-1)
        if activations_record is not None and record is not None:
            activations_record += record if prefix is None else self._with_prefix_rows(prefix, record)
        return logits, loss

    def prefix_cache(self, prefix: Prefix) -> Cache:
        """The keys and values that content attends to after K prefixes, (K or B, H, 1, P, D) each in every layer."""
        if prefix.kind == "activation":
            past = activation_cache(self.blocks, prefix.values)
        elif prefix.kind == "key_value":
            past = key_value_cache(prefix.values, self.config.n_head)
        else:
            past = by_row(self.forward_cached(None, embeddings=prefix.values)[1])
        return prefix.select(past)

    def forward_cached(
        self,
        tokens: Tensor | None,
        past: Cache | None = None,
        embeddings: Tensor | None = None,
        record: Record | None = None,
        n_last: int | None = None,
        start: int | None = None,
    ) -> tuple[Tensor, Cache]:
        """Read tokens after a past: the one way through the network.

        Args:
            tokens: (B, T) the content, or None with ``embeddings`` (B, T, C) in the place of the tokens' own.
            past: the keys and values of the S positions before it.
            record: receives the content's attention weights (B, H, T, S + T) and attention outputs (B, T, C).
            n_last: how many last tokens to give logits of, all by default; the last layer does not look for the others.
            start: the first token's position, S by default.

        Returns:
            The logits of the content (B, T, V), or (B, n_last, V), and the past of what may follow it.
        """
        n_cached = n_positions(past)
        start = n_cached if start is None else start
        x = self.transformer.wte(tokens) if embeddings is None else embeddings
        n_tokens = x.shape[1]
        x = self.transformer.drop(x + self.transformer.wpe(torch.arange(start, start + n_tokens, device=x.device)))
        if torch.is_autocast_enabled(x.device.type):  # the residual stream too, or each layer would cast it twice
            x = x.to(torch.get_autocast_dtype(x.device.type))
        mask = causal_mask(n_tokens, n_cached, x.device) if n_tokens > 1 else None
        new_cache = []
        for layer, block in enumerate(self.blocks):
            is_last = layer == self.config.n_layer - 1
            x, layer_cache = block(x, None if past is None else past[layer], mask, record, n_last if is_last else None)
            new_cache.append(layer_cache)
        return self.lm_head(self.transformer.ln_f(x)), new_cache

    def _with_prefix_rows(self, prefix: Prefix, record: Record) -> Record:
        """Complete a record of the content, (B, H, T - P, T), to one of all positions, (B, H, T, T)."""
        own: Record = []
        if prefix.kind == "prompt":
            self.forward_cached(None, embeddings=prefix.values, record=own)
        elif prefix.kind == "activation":
            mask = causal_mask(prefix.n_positions, 0, prefix.values.device)
            for layer, block in enumerate(self.blocks):
                block.attend(prefix.values[:, layer], None, mask, own)
        whole: Record = []
        for place, (name, content) in enumerate(record):
            padded = F.pad(content, (0, 0, prefix.n_positions, 0))
            if own:
                rows = own[place][1][prefix.owners(len(content)).cpu()]
                padded[..., : prefix.n_positions, : rows.shape[-1]] = rows
            whole.append((name, padded))
        return whole

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        do_sample: bool = False,
        top_k: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue prompts; see ``mingpt.decoding.generation.generate``, which this calls with itself as the model."""
        return generation.generate(
            self, idx, max_new_tokens, temperature=temperature, do_sample=do_sample, top_k=top_k, **options
        )

    def configure_optimizers(self, train_config: CfgNode) -> torch.optim.Optimizer:
        """minGPT's optimizer: AdamW with weight decay on the weights of linear layers only.

        Args:
            train_config: has learning_rate, betas and weight_decay.
        """
        decayed = {id(m.weight) for m in self.modules() if isinstance(m, nn.Linear)}
        groups = [
            {"params": [p for p in self.parameters() if id(p) in decayed], "weight_decay": train_config.weight_decay},
            {"params": [p for p in self.parameters() if id(p) not in decayed], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=tuple(train_config.betas))

    @classmethod
    def from_pretrained(cls, model_type: str) -> GPT:
        """Load OpenAI's GPT-2 through transformers: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl".

        Raises:
            ValueError: for another name.
        """
        names = [name for name in PRESETS if name.startswith("gpt2")]
        if model_type not in names:
            raise ValueError(f"no pretrained model {model_type!r}; there are {', '.join(names)}")
        from transformers import GPT2LMHeadModel

        return cls.from_huggingface(GPT2LMHeadModel.from_pretrained(model_type))

    @classmethod
    def from_huggingface(cls, other: Any) -> GPT:
        """Copy a transformers ``GPT2LMHeadModel`` into a GPT with the same logits.

        Raises:
            ValueError: if the other model's architecture differs from GPT-2's in a way that this one lacks.
        """
        theirs = other.config
        for name, supported in (
            ("activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu")),
            ("layer_norm_epsilon", (1e-5,)),
            ("n_inner", (None, 4 * theirs.n_embd)),
            ("scale_attn_weights", (True,)),
            ("scale_attn_by_inverse_layer_idx", (False,)),
        ):
            if getattr(theirs, name) not in supported:
                raise ValueError(f"GPT-2 with {name} = {getattr(theirs, name)!r} is not supported, only {supported}")
        config = cls.get_default_config()
        config.model_type = None
        names = ("n_layer", "n_head", "n_embd", "vocab_size", "embd_pdrop", "resid_pdrop", "attn_pdrop")
        config.merge_from_dict({name: getattr(theirs, name) for name in names} | {"block_size": theirs.n_positions})
        config.gelu_approximate = "none" if theirs.activation_function == "gelu" else "tanh"
        model = cls(config)
        weights = {
            name: tensor.t() if name.endswith(TRANSPOSED) else tensor for name, tensor in other.state_dict().items()
        }
        model.load_state_dict(weights)
        return model.to(other.device).train(other.training)


def _complete_config(config: CfgNode) -> CfgNode:
    """A copy of the configuration with its sizes filled in and checked."""
    config = config.copy()
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    if config.model_type is not None:
        if any(size is not None for size in sizes.values()):
            raise ValueError(
                f"give model_type or n_layer, n_head and n_embd, not both, got {config.model_type!r} and {sizes}"
            )
        if config.model_type not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(
                f"unknown model_type {config.model_type!r}{nearest(config.model_type, PRESETS)}. Known: {known}"
            )
        config.merge_from_dict(PRESETS[config.model_type])
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"the model needs {name}, a positive integer, got {value!r}")
    for name, known in (("gelu_approximate", ("tanh", "none")), ("init", ("gpt2", "zero_residual"))):
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(config, name)!r}")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd = {config.n_embd} is not a multiple of n_head = {config.n_head}")
    return config


def causal_mask(n_tokens: int, n_cached: int, device: torch.device) -> Tensor:
    """(T, S + T) of bool, true where a token would look at a later one."""
    return torch.ones(n_tokens, n_cached + n_tokens, dtype=torch.bool, device=device).triu(n_cached + 1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _drop_mask_buffers(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """minGPT and older transformers keep the causal mask among the weights; here it is not a weight."""
    for name in ("bias", "masked_bias"):
        state_dict.pop(prefix + name, None)
