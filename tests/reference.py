"""Slow, obviously right versions of what the package does fast.

Tests compare the two, and benchmarks time them: nothing here keeps a cache, shares work between rows, or calls the
package's own forward pass, decode loop or data generator. What is timed is what the ancestor did, with torch's own
functions for linear layers, LayerNorm and cross-entropy, so that it is slow for the ancestor's reasons only.

Legend: B batch, T tokens, P prefix positions, C channels, H heads, D = C / H, L layers, V vocabulary, N examples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mingpt.model import GPT

_N_AXES = {"activation": 3, "key_value": 4, "prompt": 2}  # of one prefix; one more axis in front is one per row


# ------------------------------------------------------------------------------------------------- the model


def random_model(seed: int = 0, std: float = 0.25, **changes: Any) -> GPT:
    """A small model to compare on, in evaluation mode: every weight random and none of them tiny.

    GPT-2's initialisation leaves attention almost uniform and LayerNorm's weights at one, where mistakes hide. No two
    of its sizes are equal, so a confusion of axes is an error.

    Args:
        seed: of the weights.
        std: of the weights and biases; LayerNorm's weights are around one.
        changes: to the configuration, L = 2, H = 4, C = 24, V = 11, block_size = 13, no dropout.
    """
    config = GPT.get_default_config()
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 24, "vocab_size": 11, "block_size": 13}
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    config.merge_from_dict({"model_type": None} | sizes | no_dropout | changes)
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_layer_norm = ".ln_" in name and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if is_layer_norm else noise)
    return model.eval()


def reference_forward(
    model: GPT,
    idx: Tensor,
    prefixes: Tensor | None = None,
    kind: str = "activation",
    record: list[tuple[str, Tensor]] | None = None,
) -> Tensor:
    """The naive splice: all positions, placeholders included, go through plain causal attention in every layer.

    Where the prefix goes is the one thing in which the kinds differ:

    * activation: in each layer the first P positions of what attention reads are replaced, before ``ln_1``;
      the residual stream goes on from what was there;
    * key_value: in each layer the first P keys and values are replaced;
    * prompt: the embeddings of the first P tokens are replaced, before the positions' embeddings are added.

    Args:
        model: whose weights and sizes are used; its dropout is applied where it is in training mode.
        idx: (B, T) tokens, of which the first P are placeholders.
        prefixes: activation (L, P, C), key_value (L, 2, P, C) or prompt (P, C), for all rows, or with an axis of B in
            front, one for each row.
        kind: "activation", "key_value" or "prompt".
        record: receives ("attention", (B, H, T, T)) and ("attn_block_output", (B, T, C)) of each layer.

    Returns:
        (B, T, V) logits; those of the P placeholders mean nothing.
    """
    config, weights = model.config, dict(model.named_parameters())
    n_rows, n_tokens = idx.shape
    n_head, n_channels = config.n_head, config.n_embd
    n_prefix = 0
    if prefixes is not None:
        n_prefix = prefixes.shape[-2]
        if prefixes.ndim == _N_AXES[kind]:
            prefixes = prefixes.expand(n_rows, *prefixes.shape)  # one for each row

    def splice(own: Tensor, replacement: Tensor) -> Tensor:  # (B, T, C), (B, P, C)
        return torch.cat([replacement, own[:, n_prefix:]], dim=1)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (n_channels,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def drop(x: Tensor, probability: float) -> Tensor:
        return F.dropout(x, probability, training=model.training)

    def heads(x: Tensor) -> Tensor:  # (B, T, C) to (B, H, T, D)
        return x.view(n_rows, n_tokens, n_head, n_channels // n_head).transpose(1, 2)

    is_later = torch.ones(n_tokens, n_tokens, device=idx.device).triu(diagonal=1) == 1
    x = weights["transformer.wte.weight"][idx]  # (B, T, C)
    if prefixes is not None and kind == "prompt":
        x = splice(x, prefixes)
    x = drop(x + weights["transformer.wpe.weight"][:n_tokens], config.embd_pdrop)
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        seen = x
        if prefixes is not None and kind == "activation":
            seen = splice(x, prefixes[:, layer])
        if not config.skip_layer_norm:
            seen = layer_norm(seen, f"{block}.ln_1")
        queries, keys, values = linear(seen, f"{block}.attn.c_attn").split(n_channels, dim=2)  # (B, T, C) each
        if prefixes is not None and kind == "key_value":
            keys, values = splice(keys, prefixes[:, layer, 0]), splice(values, prefixes[:, layer, 1])
        scores = heads(queries) @ heads(keys).transpose(2, 3) / math.sqrt(n_channels / n_head)  # (B, H, T, T)
        attention = F.softmax(scores.masked_fill(is_later, float("-inf")), dim=-1)
        mixed = drop(attention, config.attn_pdrop) @ heads(values)  # (B, H, T, D)
        mixed = mixed.transpose(1, 2).contiguous().view(n_rows, n_tokens, n_channels)
        out = drop(linear(mixed, f"{block}.attn.c_proj"), config.resid_pdrop)
        if record is not None:
            record.append(("attention", attention.detach()))
            record.append(("attn_block_output", out.detach()))
        x = x + out
        hidden = linear(layer_norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        # The Gaussian error linear unit, Hendrycks & Gimpel 2016: its approximation, or itself.
        is_approximate = config.gelu_approximate == "tanh"
        tanh = torch.tanh(math.sqrt(2.0 / math.pi) * (hidden + 0.044715 * hidden**3)) if is_approximate else None
        hidden = 0.5 * hidden * (1.0 + (torch.erf(hidden / math.sqrt(2.0)) if tanh is None else tanh))
        x = x + drop(linear(hidden, f"{block}.mlp.c_proj"), config.resid_pdrop)
    return layer_norm(x, "transformer.ln_f") @ weights["lm_head.weight"].t()


def reference_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of -log p(target), in nats, over the targets that are not -1: of (B, T, V) and (B, T)."""
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)


@torch.no_grad()
def reference_generate(
    model: GPT, idx: Tensor, max_new_tokens: int, prefixes: Tensor | None = None, kind: str = "activation"
) -> Tensor:
    """Continue prompts greedily; every token reads the whole sequence anew, cropped to its last ``block_size`` tokens.

    Args:
        model: a GPT in evaluation mode.
        idx: (B, T) prompts, of which the first P tokens are placeholders. Where a sequence is cropped, the placeholders
            are the first P tokens of what is left.
        max_new_tokens: how many tokens to add.
        prefixes, kind: see ``reference_forward``.

    Returns:
        (B, T + max_new_tokens) tokens.
    """
    tokens = idx
    for _ in range(max_new_tokens):
        window = tokens[:, -model.config.block_size :]
        logits = reference_forward(model, window, prefixes, kind)[:, -1]  # (B, V)
        tokens = torch.cat([tokens, logits.argmax(dim=1)[:, None]], dim=1)
    return tokens


# -------------------------------------------------------------------------------------------------- the data


def reference_is_test_row(row: list[int]) -> bool:
    """Whether an input row is of the test split: a polynomial modulo 2^64, mixed by SplitMix64's finalizer."""
    mask = 2**64 - 1
    h, weight = 0, 1
    for element in row:
        weight = weight * 0x9E3779B97F4A7C15 & mask
        h = h + element * weight & mask
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
    h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
    h = h ^ h >> 31
    return h % 4 == 0


def reference_example(task: Any, row: Tensor, prefix_padding: int) -> tuple[Tensor, Tensor]:
    """One example of one input row (length,): ``x`` and ``y``, (prefix_padding + 2 * length - 1,) of int64 each."""
    sequence = torch.cat([torch.zeros(prefix_padding, dtype=torch.int64), row, task(row)])
    x, y = sequence[:-1].clone(), sequence[1:].clone()
    y[: prefix_padding + len(row) - 1] = -1
    return x, y


def reference_rows(dataset: Any, indices: Any) -> tuple[Tensor, Tensor]:
    """Build examples one at a time, as the datasets of minGPT's descendants do.

    Each example draws candidate rows until one is of the wanted split, solves it, joins the parts and shifts them.

    Args:
        dataset: a CustomDataset, for its description; the rows are of the same distribution, not the same rows.
        indices: N of them.

    Returns:
        x and y, (N, prefix_padding + 2 * length - 1) of int64 each.
    """
    generator = torch.Generator()
    examples = []
    for index in indices:
        generator.manual_seed(dataset.seed * 2**32 + int(index))
        task = dataset.tasks[int(index) % len(dataset.tasks)]
        values = task.input_values(dataset.num_digits)
        while True:
            row = torch.randint(values.rest.low, values.rest.high + 1, (dataset.length,), generator=generator)
            row[0] = torch.randint(values.first.low, values.first.high + 1, (), generator=generator)
            if task.has_repeats and torch.rand((), generator=generator) < 0.5:
                # Many repeats: all of the row is drawn from its own first half, and the argument stays.
                n_distinct = max(1, dataset.length // 2)
                choice = torch.randint(n_distinct, (dataset.length,), generator=generator)
                choice[0] = 0
                row = row[choice]
            if reference_is_test_row(row.tolist()) == (dataset.split == "test"):
                break
        examples.append(reference_example(task, row, dataset.prefix_padding))
    return torch.stack([x for x, _ in examples]), torch.stack([y for _, y in examples])


# ---------------------------------------------------------------------------------------------- the training


def reference_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    grad_norm_clip: float,
    prefix: Tensor | None = None,
) -> Tensor:
    """One step of the ancestor's loop, in float32: the whole sequence, padding included, for every row.

    Args:
        model: a GPT.
        optimizer: over the tensors to train.
        x: (B, T) tokens.
        y: (B, T) targets, -1 where none is scored.
        grad_norm_clip: the largest norm of the gradient, over all that is trained.
        prefix: (L, P, C) an activation prefix.

    Returns:
        The loss before the step, a scalar.
    """
    loss = reference_loss(reference_forward(model, x, prefix), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, grad_norm_clip)
    optimizer.step()
    return loss.detach()


class ReferenceLoop:
    """The ancestor's training, a step at a time, of a model or of one activation prefix for it.

    ``loop = ReferenceLoop(model, config)`` and then ``loop.step(x, y)``, or ``loop.step(*reference_rows(...))`` with
    the ancestor's way to make data, once for each batch.
    """

    def __init__(self, model: GPT, config: Any, prefix: Tensor | None = None):
        """Get ready to train.

        Args:
            model: a GPT. With a prefix it is frozen from here on, and in evaluation mode.
            config: has learning_rate, betas, weight_decay and grad_norm_clip, as ``Trainer.get_default_config``.
            prefix: (L, P, C) a leaf tensor to train in place of the model; it is not decayed.
        """
        self.model, self.prefix, self.grad_norm_clip = model, prefix, config.grad_norm_clip
        if prefix is None:
            model.train()
            self.optimizer = model.configure_optimizers(config)
        else:
            model.eval().requires_grad_(False)
            self.optimizer = torch.optim.AdamW(
                [prefix.requires_grad_()], lr=config.learning_rate, betas=tuple(config.betas), weight_decay=0.0
            )

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on one batch, ``x`` and ``y`` (B, T); returns the loss before the step, a scalar."""
        return reference_step(self.model, self.optimizer, x, y, self.grad_norm_clip, self.prefix)
