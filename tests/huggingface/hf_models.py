"""Small random models of transformers' architectures, and PEFT's adapters for them.

No two sizes are equal where the architecture allows it, so a confusion of axes is an error.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

L, P, T, V = 3, 4, 7, 19
_COMMON = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": L, "num_attention_heads": 4}
_COMMON |= {"max_position_embeddings": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_GATED = _COMMON | {"intermediate_size": 20, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 24, "n_layer": L, "n_head": 4, "n_positions": 40, "vocab_size": V, "bos_token_id": None}

ARCHITECTURES = {
    "gpt2": _GPT2 | {"eos_token_id": None, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "llama": _GATED | {"tie_word_embeddings": True},
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 8},
    "mistral": _GATED | {"sliding_window": 6},
    "gemma": _GATED | {"head_dim": 8},
    "gemma2": _GATED | {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 3.0},
    "gemma3_text": _GATED | {"head_dim": 8, "sliding_window": 6},
    "gpt_neox": _COMMON | {"intermediate_size": 20, "rotary_pct": 0.5},
}
"""The sizes of each, by transformers' ``model_type``. Windows of 6 cut prefixes of 4 off from the last of 7 tokens."""


def random_hf_model(architecture: str = "llama", seed: int = 0, std: float = 0.3, **changes):
    """A model in evaluation mode, all of whose weights are random and none of them tiny."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **(ARCHITECTURES[architecture] | changes))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name or "ln_" in name else noise)
    return model.eval()


def with_peft_prefix(model, values: torch.Tensor):
    """PEFT's prefix tuning around a model, with the values (L, 2, P, H * D) of ours, and its table that is trained."""
    from peft import PrefixTuningConfig, get_peft_model

    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=values.shape[-2]))
    table = adapted.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(values.permute(2, 0, 1, 3).flatten(1))
    return adapted.eval(), table


def with_peft_prompt(model, values: torch.Tensor):
    """PEFT's prompt tuning around a model, with the values (P, C) of ours, and its table that is trained."""
    from peft import PromptTuningConfig, get_peft_model

    adapted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(values)))
    table = adapted.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(values)
    return adapted.eval(), table


def tokens(n_rows: int = 3, n_tokens: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def with_placeholders(x: torch.Tensor, n: int = P) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]).expand(-1, n), x], dim=1)


def random_values(
    lm, n_prefixes: int = 1, n_positions: int = P, kind: str = "key_value", seed: int = 2
) -> torch.Tensor:
    """Values of K prefixes for a CausalLM."""
    config = lm.config
    shape = (L, 2, n_positions, config.n_embd) if kind == "key_value" else (n_positions, config.hidden_size)
    return torch.randn(n_prefixes, *shape, generator=torch.Generator().manual_seed(seed))
