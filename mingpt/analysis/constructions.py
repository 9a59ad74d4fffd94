"""Transformers that do whatever their one virtual token says, built as GPTs of this package.

Legend: V vocabulary, N length, G gates, C channels.

Petrov et al. (2024, section 3) prove two things. There is a fixed transformer that generates any sequence, and one that
computes any function of a token; which one is chosen by a single virtual token. So a prefix can hold enough: where
learned prefixes fail, the pretrained weights are no such interpreter. These models follow the paper's constructions and
are smaller: one layer, one head, weights written down instead of learned, exact in float32.

The virtual token's value is a table of G rows, each a one-hot vector of V. All attention goes to it, so every position
has the table in its residual stream. Beside it is one of G gates: the position, or the token that is read there. The
MLP has a hidden unit for each entry of the table. It is on where both the entry and its row's gate are 1, and votes for
the entry's token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mingpt.model import GPT
from mingpt.prefix import Prefix

_SCORE = 100.0
"""The virtual token's attention score, where the content's is 0: what the content gets is below float32's rounding."""

_STEEP = 40.0
"""Twice a hidden unit's input where it is on, and minus that where it is off: GELU is the identity there, and zero."""


@torch.no_grad()
def sequence_interpreter(vocab_size: int, length: int) -> GPT:
    """A GPT that generates any of the V^N sequences, whichever its virtual token holds, after any one first token.

    Args:
        vocab_size: V.
        length: N.

    Returns:
        A GPT of block_size N + 1, whose prefixes ``virtual_tokens`` makes from rows (N,) of what to generate.

    Source: after theorem 1 of Petrov et al. 2024.
    """
    model = _interpreter(vocab_size, length, block_size=length + 1)
    model.transformer.wpe.weight[1:, :length] = torch.eye(length)  # position 0 is the virtual token's
    return model


@torch.no_grad()
def function_interpreter(vocab_size: int) -> GPT:
    """A GPT that answers any token x with f(x), where f is any of the V^V functions, whichever its virtual token holds.

    Args:
        vocab_size: V.

    Returns:
        A GPT of block_size 2, whose prefixes ``virtual_tokens`` makes from rows (V,) of f(0), f(1), ...

    Source: after theorem 2 of Petrov et al. 2024.
    """
    model = _interpreter(vocab_size, vocab_size, block_size=2)
    model.transformer.wte.weight[:, :vocab_size] = torch.eye(vocab_size)
    return model


def virtual_tokens(model: GPT, tables: Tensor) -> Prefix:
    """The virtual tokens that make an interpreter generate the tokens in tables.

    Args:
        model: of ``sequence_interpreter`` or ``function_interpreter``.
        tables: (K, G) of int64, a token for each gate.

    Returns:
        K key_value prefixes of one position, one for each row of a batch.

    Raises:
        ValueError: if the tables do not fit the model.
    """
    vocab_size, n_embd = model.config.vocab_size, model.config.n_embd
    n_gates = (n_embd - vocab_size) // (vocab_size + 1)
    if tables.ndim != 2 or tables.shape[1] != n_gates or not ((tables >= 0) & (tables < vocab_size)).all():
        found = f"{tuple(tables.shape)} from {tables.min()} to {tables.max()}"
        raise ValueError(f"the tables must be (K, {n_gates}) tokens from 0 to {vocab_size - 1}, got {found}")
    values = torch.zeros(len(tables), 1, 2, 1, n_embd)
    values[:, 0, 0, 0, 0] = _SCORE * n_embd**0.5  # the key, for queries that are 1 in channel 0
    rows = nn.functional.one_hot(tables, vocab_size).flatten(1)
    values[:, 0, 1, 0, n_gates : n_gates + rows.shape[1]] = rows.float()
    return Prefix("key_value", values)


def _interpreter(vocab_size: int, n_gates: int, block_size: int) -> GPT:
    """An interpreter without the embeddings that set its gates. Its channels are the gates, the table, the votes."""
    n_entries = n_gates * vocab_size
    n_embd = n_gates + n_entries + vocab_size
    config = GPT.get_default_config()
    config.merge_from_dict({"model_type": None, "n_layer": 1, "n_head": 1, "n_embd": n_embd, "skip_layer_norm": True})
    config.merge_from_dict({"vocab_size": vocab_size, "block_size": block_size})
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.zero_()
    block, entry = model.blocks[0], torch.arange(n_entries)
    block.attn.c_attn.bias[0] = 1.0  # every query; the content's keys and values are zero
    block.attn.c_proj.weight.copy_(torch.eye(n_embd))
    _invert_layernorm(block.ln_2, n_ones=1 + n_gates)
    block.mlp.c_fc.weight[entry, entry // vocab_size] = _STEEP
    block.mlp.c_fc.weight[entry, n_gates + entry] = _STEEP
    block.mlp.c_fc.bias.fill_(-1.5 * _STEEP)
    block.mlp.c_proj.weight[n_gates + n_entries + entry % vocab_size, entry] = 2 / _STEEP
    _invert_layernorm(model.transformer.ln_f, n_ones=2 + n_gates)
    model.lm_head.weight[:, n_gates + n_entries :] = torch.eye(vocab_size)
    return model


def _invert_layernorm(norm: nn.LayerNorm, n_ones: int) -> None:
    """Set a LayerNorm so that it does not change vectors of this many ones and zeros elsewhere.

    Their mean and variance are known, so its weight and bias can undo them.
    """
    mean = n_ones / norm.normalized_shape[0]
    norm.weight.fill_((mean - mean**2 + norm.eps) ** 0.5)
    norm.bias.fill_(mean)
