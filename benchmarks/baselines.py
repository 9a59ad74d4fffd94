"""What the package is compared with: other ways to do the same work on a model of the same size.

Legend: B batch, T tokens, P prefix positions, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mingpt.training.precision import autocast


class EncoderModel(nn.Module):
    """A causal language model out of torch's own layers: the plain way to write one."""

    def __init__(self, config: Any):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        layer = nn.TransformerEncoderLayer(
            config.n_embd,
            config.n_head,
            4 * config.n_embd,
            dropout=0.0,
            activation=lambda x: F.gelu(x, approximate=config.gelu_approximate),
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, config.n_layer, norm=nn.LayerNorm(config.n_embd), enable_nested_tensor=False
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to (B, T, V)."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return self.lm_head(self.layers(x, mask, is_causal=True))


def encoder_step(config: Any, precision: str, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A pretraining step of ``EncoderModel`` with AdamW, in a loop as one writes it first."""
    model = EncoderModel(config)
    return _step(model, model.parameters(), precision, x, y)


def huggingface_step(config: Any, precision: str, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A pretraining step of transformers' GPT-2 with AdamW."""
    model = _gpt2(config)
    return _step(lambda tokens: model(tokens, use_cache=False).logits, model.parameters(), precision, x, y)


def peft_step(config: Any, precision: str, n_positions: int, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A step of PEFT's prefix tuning of transformers' GPT-2; PEFT puts the prefix in front of the content itself."""
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(_gpt2(config), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n_positions))
    trained = [p for p in model.parameters() if p.requires_grad]
    content, targets = x[:, n_positions:], y[:, n_positions:]
    return _step(lambda tokens: model(input_ids=tokens).logits, trained, precision, content, targets)


def huggingface_decode(config: Any, precision: str, prompts: Tensor, n_new: int) -> Callable[[], object]:
    """Greedy decoding by transformers' generate, with its cache."""
    model = _gpt2(config).eval()
    mask = torch.ones_like(prompts)

    def decode() -> object:
        with torch.no_grad(), autocast(precision, "cpu"):
            return model.generate(
                prompts, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False
            )

    return decode


def _gpt2(config: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size + 1,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu" if config.gelu_approximate == "none" else "gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _step(forward: Callable, parameters: Any, precision: str, x: Tensor, y: Tensor) -> Callable[[], object]:
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(precision, "cpu"):
            logits = forward(x)
        F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step
