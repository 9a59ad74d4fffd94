"""The GPT language model, all of it in this file.

Legend: B batch, T tokens, P prefix positions, S cached positions, C channels, H heads, D = C / H, L layers,
V vocabulary, K prefixes, G groups of N consecutive rows (B = G * N).

There is one attention path: content tokens attend to themselves, causally, and to a KV cache. A trained prefix, the
padding that stands for one and the tokens generated so far all become keys and values in that cache.

Sources: GPT-2 (Radford et al. 2019); the names and the presets are those of minGPT (Karpathy 2020).
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mingpt.decoding import generation
from mingpt.kv_cache import Cache, KeysValues, KVCache, LayerKV, n_filled, n_positions, pieces_of
from mingpt.prefix import AXES, Prefix, Record, as_prefix, check_tokens
from mingpt.utils import CfgNode, nearest

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


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
    """Multi-head self-attention of content over a KV cache and, causally, over itself."""

    def __init__(self, config: CfgNode):
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.register_load_state_dict_pre_hook(_drop_mask_buffers)

    def queries_keys_values(self, x: Tensor, n_groups: int) -> Tensor:
        """Project (B, T, C) to queries, keys and values, (3, G, H, N, T, D)."""
        batch, n_tokens, _ = x.shape
        heads = self.c_attn(x).view(n_groups, batch // n_groups, n_tokens, 3, self.n_head, self.n_embd // self.n_head)
        return heads.permute(3, 0, 4, 1, 2, 5)

    def forward(self, x: Tensor, kv_cache: LayerKV = (), n_last: int | None = None) -> tuple[Tensor, LayerKV, Tensor]:
        """Attend to the cached positions and to the content, each token to none after it.

        Args:
            x: (B, T, C) the content.
            kv_cache: keys and values of S earlier positions. A KVCache is written to; a list is not.
            n_last: how many last tokens get an output, T' of them; all T by default.

        Returns:
            The output (B, T', C), the cache of all S + T positions, and the attention weights (G, H, N, T', S + T).
        """
        # Written out: at these lengths torch's fused kernel is slower on a CPU, its backward pass six times.
        cached = pieces_of(kv_cache)
        queries, keys, values = self.queries_keys_values(x, len(cached[0][0]) if cached else 1).contiguous()
        queries = queries[..., -(n_last or x.shape[1]) :, :]  # (G, H, N, T', D)
        if isinstance(kv_cache, KVCache):
            kv_cache.append(keys, values)
        else:
            kv_cache = [*cached, (keys, values)]
        pieces = pieces_of(kv_cache)
        scores = torch.cat([_product(queries, keys.mT) for keys, _ in pieces], dim=-1) / math.sqrt(queries.shape[-1])
        (n_queries, n_keys), n_seen = scores.shape[-2:], n_filled(kv_cache)
        if n_queries > 1 or n_keys > n_seen:
            is_later = torch.ones(n_queries, n_keys, dtype=torch.bool, device=x.device).triu(n_seen - n_queries + 1)
            scores = scores.masked_fill(is_later, float("-inf"))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32)  # (G, H, N, T', S + T)
        parts = self.attn_dropout(weights.to(values.dtype)).split([keys.shape[-2] for keys, _ in pieces], dim=-1)
        mixed = reduce(torch.add, (_product(part, values) for part, (_, values) in zip(parts, pieces, strict=True)))
        mixed = mixed.permute(0, 2, 3, 1, 4).reshape(len(x), n_queries, self.n_embd)  # (B, T', C)
        return self.resid_dropout(self.c_proj(mixed)), kv_cache, weights[..., :n_seen]


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

    def forward(self, x: Tensor, kv_cache: LayerKV, record: Record | None, n_last: int) -> tuple[Tensor, LayerKV]:
        """Run attention and the MLP, see ``CausalSelfAttention.forward``.

        Args:
            x: (B, T, C) the residual stream.
            kv_cache, n_last: as attention takes them.
            record: receives the attention weights (B, H, T', S + T) and the attention output (B, T', C).

        Returns:
            The residual stream (B, T', C) and the cache of all S + T positions.
        """
        out, new_cache, weights = self.attn(self.ln_1(x), kv_cache, n_last)
        if record is not None:
            record.append(("attention", weights.detach().transpose(1, 2).flatten(0, 1).cpu()))
            record.append(("attn_block_output", out.detach().float().cpu()))
        x = x[:, -out.shape[1] :] + out
        return x + self.mlp(self.ln_2(x)), new_cache

    def keys_values(self, x: Tensor) -> KeysValues:
        """The keys and values of ``x`` (G, T, C), which the rows of a group share: (G, H, 1, T, D) each."""
        _, keys, values = self.attn.queries_keys_values(self.ln_1(x), len(x))
        return keys, values


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
    """A GPT language model that reads tokens after a KV cache."""

    @staticmethod
    def get_default_config() -> CfgNode:
        """A configuration to fill in: either ``model_type`` or all of n_layer, n_head and n_embd, and both sizes.

        ``gelu_approximate`` is as in torch.nn.GELU: "tanh" is GPT-2's, "none" the exact one, a third of its time on a
        CPU. ``init`` is "gpt2", or "zero_residual": each block begins as the identity, since the projections into the
        residual stream are zero (Goyal et al. 2017), and what feeds them keeps the variance (LeCun et al. 1998).
        """
        sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "vocab_size", "block_size"))
        dropouts = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.1)
        others = {"skip_layer_norm": False, "gelu_approximate": "tanh", "init": "gpt2"}
        return CfgNode(model_type="gpt", **sizes, **dropouts, **others).close()

    def __init__(self, config: CfgNode):
        """Build the model with random weights.

        Args:
            config: see ``get_default_config``; it is copied, never changed.

        Raises:
            ValueError: if a size is missing, given twice, or impossible.
        """
        super().__init__()
        self.config = config = _complete_config(config)
        self.block_size, self.prefix_widths = config.block_size, dict.fromkeys(AXES, config.n_embd)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        is_gpt2 = config.init == "gpt2"
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2 scales the projections into the residual stream
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer) if is_gpt2 else 0.0)
            elif name.endswith(("c_attn.weight", "c_fc.weight")) and not is_gpt2:
                nn.init.normal_(parameter, mean=0.0, std=1 / math.sqrt(config.n_embd))

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
        n_last: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the token after each token.

        Args:
            idx: (B, T) tokens; with a prefix the first P are placeholders that are not looked at.
            targets: (B, T) the tokens to predict, -1 where none is scored.
            prefixes: see ``mingpt.prefix.as_prefix``.
            activations_record: a list that receives each layer's attention weights and attention outputs, with the
                prefix positions included. They are zero there for a key_value prefix, which has no queries.
            n_shared: how many first tokens are the same in every row; they are computed once for the batch.
            n_last: how many last tokens get logits, all by default; the last layer skips the others.

        Returns:
            The logits (B, T, V), or (B, n_last, V), zero at prefix positions, where nothing is predicted; and the
            mean cross-entropy in nats over the scored targets, None without targets.

        Raises:
            ValueError: if ``idx`` is not (B, T), its tokens are not integers from 0 to V - 1 (checked on a CPU), there
                are more than ``block_size``, or the prefix does not fit.
        """
        check_tokens(idx, self.config.vocab_size)
        batch, n_tokens = idx.shape
        prefix = None if prefixes is None else as_prefix(prefixes, self, batch)
        n_cached = n_shared if prefix is None else prefix.n_placeholders
        if n_cached >= n_tokens:
            raise ValueError(f"{n_cached} prefix positions leave no content in {n_tokens} tokens")
        record: Record | None = None if activations_record is None else []
        kv_cache, shared_logits = None, None
        if prefix is not None:
            kv_cache = self.prefix_cache(prefix)
        elif record is None and n_shared:
            shared_logits, kv_cache = self.forward_cached(idx[:1, :n_shared])
        else:
            n_cached = 0
        logits, _ = self.forward_cached(idx[:, n_cached:], kv_cache, record=record, n_last=n_last, start=n_cached)
        if shared_logits is not None and n_last is None:
            logits = torch.cat([shared_logits.expand(batch, -1, -1), logits], dim=1)
        loss = None
        if targets is not None:
            goal = targets[:, -logits.shape[1] :].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), goal, ignore_index=-1)
        if prefix is not None and n_last is None:
            logits = F.pad(logits, (0, 0, n_cached, 0))
        if activations_record is not None and record is not None:
            activations_record += record if prefix is None else self._with_prefix_positions(prefix, record)
        return logits, loss

    def prefix_cache(self, prefix: Prefix) -> list[list[KeysValues]]:
        """The keys and values that K prefixes become in every layer.

        An activation prefix becomes c_attn(ln_1(prefix[l])) in layer l (Petrov et al. 2024, section 3). A key_value
        prefix is split into heads. A prompt is run through the model.

        Returns:
            For each layer one pair of keys and values, (K, H, 1, P, D) each, or (B, H, 1, P, D) with ``prefix.rows``.

        Raises:
            ValueError: if the prefix is on another device than the model.
        """
        values = prefix.values
        if values.device != self.device:
            raise ValueError(f"the prefix is on {values.device}, the model on {self.device}; move one of them")
        if prefix.kind == "activation":
            pairs = [block.keys_values(values[:, layer]) for layer, block in enumerate(self.blocks)]
        elif prefix.kind == "key_value":
            heads = values.unflatten(-1, (self.config.n_head, -1)).unsqueeze(-3).transpose(-4, -2)  # ... H, 1, P, D
            pairs = [(layer[:, 0], layer[:, 1]) for layer in heads.unbind(dim=1)]
        else:
            cached = self.forward_cached(values)[1]  # (1, H, K, P, D) each
            pairs = [(keys.transpose(0, 2), own.transpose(0, 2)) for keys, own in (pieces_of(c)[0] for c in cached)]
        if prefix.rows is None:
            return [[pair] for pair in pairs]
        # Not keys[rows]: on a CPU the backward pass of indexing takes nine times as long as index_select's.
        return [[(keys.index_select(0, prefix.rows), own.index_select(0, prefix.rows))] for keys, own in pairs]

    def forward_cached(
        self,
        tokens: Tensor,
        kv_cache: Cache | None = None,
        record: Record | None = None,
        n_last: int | None = None,
        start: int | None = None,
    ) -> tuple[Tensor, Cache]:
        """Run tokens through the network after a KV cache. Everything else calls this.

        Args:
            tokens: (B, T) the content, or embeddings (B, T, C) in the place of the tokens' own.
            kv_cache: the keys and values of the S positions before it.
            record: receives the content's attention weights (B, H, T, S + T) and attention outputs (B, T, C); in the
                last layer only those of the ``n_last`` tokens.
            n_last: how many last tokens get logits, all by default; the last layer skips the others.
            start: the first token's position, S by default.

        Returns:
            The logits of the content (B, T, V), or (B, n_last, V), and the KV cache with the content in it.

        Raises:
            ValueError: if ``tokens`` is not (B, T), or its positions go beyond ``block_size``.
        """
        x = tokens if tokens.is_floating_point() else self.transformer.wte(tokens)
        if x.ndim != 3:
            raise ValueError(f"tokens have the shape (B, T), got {tuple(tokens.shape)}")
        start = n_positions(kv_cache) if start is None else start
        n_tokens = x.shape[1]
        if start + n_tokens > self.block_size:
            raise ValueError(f"{start + n_tokens} tokens do not fit into block_size = {self.block_size}")
        x = self.transformer.drop(x + self.transformer.wpe(torch.arange(start, start + n_tokens, device=x.device)))
        if torch.is_autocast_enabled(x.device.type):  # the residual stream too, or each layer would cast it twice
            x = x.to(torch.get_autocast_dtype(x.device.type))
        new_cache: list[LayerKV] = []
        for layer, block in enumerate(self.blocks):
            n_out = n_last if n_last and layer == self.config.n_layer - 1 else n_tokens
            x, layer_cache = block(x, kv_cache[layer] if kv_cache else (), record, n_out)
            new_cache.append(layer_cache)
        return self.lm_head(self.transformer.ln_f(x)), new_cache

    def block_inputs(self, idx: Tensor, prefixes: Tensor | Prefix | None = None) -> list[Tensor]:
        """What each block sees of the content, (B, T, C) or (B, T - P, C) each, see ``forward``."""
        inputs: list[Tensor] = []
        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.enter_context(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
            self(idx, prefixes=prefixes)
        return inputs[-self.config.n_layer :]  # a prompt goes through the blocks before the content

    def _with_prefix_positions(self, prefix: Prefix, record: Record) -> Record:
        """Complete a record of the content, (B, H, T - P, T), to one of all positions, (B, H, T, T)."""
        own: Record = []
        if prefix.kind == "prompt":
            self.forward_cached(prefix.values, record=own)
        elif prefix.kind == "activation":
            for layer, block in enumerate(self.blocks):
                block(prefix.values[:, layer], (), own, prefix.n_positions)
        full = [(name, F.pad(content, (0, 0, prefix.n_positions, 0))) for name, content in record]
        for (_, padded), (_, seen) in zip(full, own, strict=False):  # a key_value prefix has none
            rows = prefix.prefix_of_row(len(padded)).cpu()
            padded[..., : prefix.n_positions, : seen.shape[-1]] = seen[rows]
        return full

    # A function of (model, idx, ...), so that help() and editors show all of its parameters here too.
    generate = generation.generate

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
    def from_huggingface(cls, other: GPT2LMHeadModel) -> GPT:
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
        names = ("n_layer", "n_head", "n_embd", "vocab_size", "embd_pdrop", "resid_pdrop", "attn_pdrop")
        gelu = "none" if theirs.activation_function == "gelu" else "tanh"
        config = cls.get_default_config()
        config.merge_from_dict({name: getattr(theirs, name) for name in names})
        config.merge_from_dict({"model_type": None, "block_size": theirs.n_positions, "gelu_approximate": gelu})
        model = cls(config)
        weights = other.state_dict()
        model.load_state_dict({name: w.t() if name.endswith(TRANSPOSED) else w for name, w in weights.items()})
        return model.to(other.device).train(other.training)


def _complete_config(config: CfgNode) -> CfgNode:
    """A copy of the configuration with its sizes filled in, in the place of ``model_type``, and checked."""
    config = config.copy()
    if (preset := config.model_type) is not None:
        if (config.n_layer, config.n_head, config.n_embd) != (None, None, None):
            raise ValueError(f"give n_layer, n_head and n_embd or model_type, not both; model_type is {preset!r}")
        if preset not in PRESETS:
            raise ValueError(f"unknown model_type {preset!r}{nearest(preset, PRESETS)}. Known: {', '.join(PRESETS)}")
        config.merge_from_dict(PRESETS[preset] | {"model_type": None})
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


def _drop_mask_buffers(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """minGPT and older transformers keep the causal mask among the weights; here it is not a weight."""
    for name in ("bias", "masked_bias"):
        state_dict.pop(prefix + name, None)
