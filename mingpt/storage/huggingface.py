"""To and from the Hugging Face world: models as GPT2LMHeadModel, adapters as PEFT's (extra ``hf``).

Legend: P prefix positions, C channels, L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mingpt.adapters import Adapter, LoRA
from mingpt.adapters.lora import IA3, DoRA, LowRank, VeRA
from mingpt.adapters.prefixes import Cartridge
from mingpt.model import GPT, TRANSPOSED
from mingpt.prefix import Prefix, as_key_value
from mingpt.storage.checkpoint import check_finite, load_weights
from mingpt.storage.files import parsing

_ROOT = "base_model.model."  # before the names of a model's tensors in PEFT's files
_COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "inference_mode": True}


def to_huggingface(model: GPT) -> Any:
    """Copy a GPT into a transformers ``GPT2LMHeadModel`` with the same logits; ``GPT.from_huggingface`` goes back.

    Raises:
        ValueError: for a model without its first LayerNorms, which GPT-2 cannot be.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    if config.skip_layer_norm:
        raise ValueError("skip_layer_norm = True is no GPT-2; only models with all LayerNorms can be exported")
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "embd_pdrop", "resid_pdrop", "attn_pdrop")
    options = {name: getattr(config, name) for name in names} | {"n_positions": config.block_size}
    options |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # there are no such tokens
    gelu = "gelu" if config.gelu_approximate == "none" else "gelu_new"
    other: Any = GPT2LMHeadModel(GPT2Config(**options, activation_function=gelu, tie_word_embeddings=False))
    weights = {name: tensor.t() if name.endswith(TRANSPOSED) else tensor for name, tensor in model.state_dict().items()}
    other.load_state_dict(weights)
    return other.to(model.device).train(model.training)


def export_peft(model: GPT, adapter: Tensor | Prefix | Adapter, folder: str | Path) -> None:
    """Write an adapter for PEFT: ``PeftModel.from_pretrained(to_huggingface(model), folder)``.

    PEFT's prefixes are keys and values: a prefix of another kind is written as the keys and values that it comes to.
    Its model puts them before the content, which has no padding then; with any other adapter the padding is read.

    Args:
        model: that the adapter was learned for.
        adapter: one prefix of any kind, see ``mingpt.prefix.as_prefix``, or an adapter of one.
        folder: new, or one to overwrite.

    Raises:
        ValueError: for a method that PEFT does not have, more than one adapter, or a prefix that stands for more or
            fewer tokens than it has positions, which PEFT does not know.
    """
    import peft
    from safetensors.torch import save_file

    if isinstance(adapter, Adapter):
        config, weights = _adapter_weights(model, adapter)
    else:
        config, weights = _prefix_weights(model, adapter)
    config.save_pretrained(str(folder))
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, Path(folder) / peft.utils.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _prefix_weights(model: GPT, prefix: Tensor | Prefix, kind: str = "PrefixTuningConfig") -> tuple[Any, dict]:
    import peft

    if isinstance(prefix, Prefix) and prefix.n_placeholders != prefix.n_positions:
        raise ValueError(
            f"the prefix has {prefix.n_positions} positions and {prefix.n_placeholders} placeholders; PEFT's "
            "content comes after all positions, so it cannot be exported"
        )
    values = as_key_value(model, prefix)
    n_layer, _, n_positions, n_embd = values.shape
    options = _COMMON | {"num_layers": n_layer, "num_attention_heads": model.config.n_head, "token_dim": n_embd}
    config = getattr(peft, kind)(num_virtual_tokens=n_positions, **options)
    return config, {"prompt_embeddings": values.detach().permute(2, 0, 1, 3).flatten(1)}  # (P, L * 2 * C)


def _adapter_weights(model: GPT, adapter: Adapter) -> tuple[Any, dict[str, Tensor]]:
    import peft

    if adapter.n_adapters > 1:
        raise ValueError(f"expected one adapter, got {adapter.n_adapters}; PEFT keeps each in a folder of its own")
    if type(adapter).hooks is Adapter.hooks:  # only a prefix
        kind = "CartridgeConfig" if isinstance(adapter, Cartridge) else "PrefixTuningConfig"
        return _prefix_weights(model, cast(Prefix, adapter.prefix()), kind)
    options: dict[str, Any] = _COMMON | {"fan_in_fan_out": True}
    own = {name: each[0] for name, each in adapter.state_dict().items()}
    if isinstance(adapter, IA3):
        weights = {}
        for layer in range(model.config.n_layer):
            block, keys_values = f"{_ROOT}transformer.h.{layer}.", own[f"keys_values.{layer}"]
            queries = keys_values.new_ones(model.config.n_embd)
            weights[f"{block}attn.c_attn.ia3_l"] = torch.cat([queries, keys_values])[:, None]
            weights[f"{block}mlp.c_proj.ia3_l"] = own[f"hidden.{layer}"][None]
        options |= {"target_modules": r".*(attn\.c_attn|mlp\.c_proj)", "feedforward_modules": r".*mlp\.c_proj"}
        return peft.IA3Config(**options), weights
    if not isinstance(adapter, LowRank):
        raise ValueError(f"PEFT has no {type(adapter).__name__}; save_adapter keeps it for this package")
    options["target_modules"] = list(adapter.names)
    weights = {theirs: own[name] for name, theirs in _peft_names(adapter).items()}
    if isinstance(adapter, VeRA):
        weights |= {"base_model.vera_A": own["shared_a"], "base_model.vera_B": own["shared_b"]}
        return peft.VeraConfig(r=len(own["d.0"]), **options), weights
    options |= {"lora_alpha": adapter.scale * len(own["a.0"]), "use_dora": isinstance(adapter, DoRA)}
    return peft.LoraConfig(r=len(own["a.0"]), **options), weights


def import_peft(folder: str | Path, model: GPT) -> Prefix | LoRA:
    """Read a PEFT adapter for a model: prefix tuning as a key_value prefix, LoRA as a LoRA, attached.

    Raises:
        ValueError: if it is another kind of adapter, or for another size of model.
    """
    with parsing(folder, "an adapter of PEFT for this model"):
        return _read_peft(folder, model)


def _read_peft(folder: str | Path, model: GPT) -> Prefix | LoRA:
    import peft

    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    weights = peft.load_peft_weights(str(folder), device="cpu")
    if config.peft_type == peft.PeftType.PREFIX_TUNING:
        if config.prefix_projection:
            raise ValueError("a prefix with prefix_projection is not supported, only its keys and values")
        table = weights["prompt_embeddings"]  # (P, L * 2 * C)
        n_layer, n_embd = model.config.n_layer, model.config.n_embd
        if table.ndim != 2 or table.shape[1] != 2 * n_layer * n_embd:
            raise ValueError(
                f"its shape is {tuple(table.shape)}, a model of {n_layer} layers and {n_embd} channels needs "
                f"{2 * n_layer * n_embd} numbers a position"
            )
        check_finite(weights, folder)
        return prefix_of_table(table.to(model.device), n_layer)
    if config.peft_type == peft.PeftType.LORA:
        names = {name.removeprefix(_ROOT).rpartition(".lora_")[0] for name in weights}
        is_linear = names <= {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if config.use_dora or config.use_rslora or config.rank_pattern or config.alpha_pattern or not is_linear:
            raise ValueError("only a plain LoRA of linear layers is supported, with one rank and alpha")
        if {config.r} != {len(each) for name, each in weights.items() if "lora_A" in name}:
            raise ValueError(f"the weights are not of rank {config.r}")
        lora = LoRA(model, config.r, sorted(names), config.lora_alpha)
        try:
            load_weights(lora, {name: weights[theirs][None] for name, theirs in _peft_names(lora).items()}, folder)
        except Exception:
            lora.detach()
            raise
        return lora
    raise ValueError(f"an adapter of type {config.peft_type}; prefix tuning and LoRA are supported")


def prefix_of_table(table: Tensor, n_layer: int) -> Prefix:
    """PEFT's table of a prefix, (P, L * 2 * H * D), as a key_value prefix."""
    values = table.unflatten(1, (n_layer, 2, -1)).permute(1, 2, 0, 3)
    return Prefix("key_value", values[None].contiguous())


def _peft_names(lora: LowRank) -> dict[str, str]:
    """What PEFT calls a LoRA's, a DoRA's or a VeRA's tensors, by their names in its ``state_dict``."""
    named = {
        "a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector",
        "d": "vera_lambda_d", "scale_out": "vera_lambda_b",
    }  # fmt: skip
    layers, known = [f"{_ROOT}{name}" for name in lora.names], {name.split(".")[0] for name in lora.state_dict()}
    return {
        f"{own}.{n}": f"{layer}.{theirs}"
        for n, layer in enumerate(layers)
        for own, theirs in named.items()
        if own in known
    }
