"""Models, prefixes and LoRAs on disk: what is written beside the weights, and what is checked when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mingpt.adapters import LoRA
from mingpt.model import GPT
from mingpt.prefix import Prefix, as_prefix
from mingpt.storage.cache import verify
from mingpt.storage.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint, weights_hash


def save_model(path: str | Path, model: GPT, **description: Any) -> None:
    """Write a model's weights and configuration.

    Args:
        path: the file.
        model: any GPT.
        description: JSON values to keep with it, such as its cache_key and metrics.
    """
    save_checkpoint(path, model.state_dict(), {"kind": "model", "config": model.config.to_dict(), **description})


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, dict[str, Any]]:
    """Read a model, in evaluation mode, and its description.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged or is not a model of this package.
    """
    tensors, description = load_checkpoint(path, kind="model")
    config = GPT.get_default_config()
    try:
        config.update_from(description["config"], str(path))
        model = GPT(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: field 'config' does not make a model: {error}") from None
    load_weights(model, tensors, path)
    return model.to(device).eval(), description


def save_prefix(path: str | Path, prefix: Tensor | Prefix, model: GPT, **description: Any) -> None:
    """Write a prefix, or K of one kind, for one model.

    Args:
        path: the file.
        prefix: see ``mingpt.prefix.as_prefix``; which rows of a batch have it is not kept.
        model: that the prefix is for; the hash of its weights is written, so that it is not used with another.
        description: JSON values to keep with it, such as its task, its cache_key and metrics.
    """
    prefix = as_prefix(prefix, model.config.n_layer, model.config.n_embd, 1)
    own = {"kind": "prefix", "prefix": {"kind": prefix.kind, "n_placeholders": prefix.n_placeholders}}
    save_checkpoint(path, {"values": prefix.values}, own | {"model": weights_hash(model)} | description)


def load_prefix(path: str | Path, model: GPT, model_hash: str | None = None) -> tuple[Prefix, dict[str, Any]]:
    """Read a prefix, on the model's device, and its description.

    Args:
        path: the file.
        model: that the prefix is for.
        model_hash: the hash of the model's weights, where the caller has it already.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, holds no prefix, or is for another model.
    """
    tensors, description = load_checkpoint(path, kind="prefix")
    try:
        own = description["prefix"]
        prefix = Prefix(own["kind"], tensors["values"].to(model.device), n_placeholders=own["n_placeholders"])
        prefix.check(model.config.n_layer, model.config.n_embd, prefix.n_prefixes)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: it does not hold a prefix for this model: {error}") from None
    verify(path, {"model": description.get("model")}, {"model": model_hash or weights_hash(model)})
    return prefix, description


def load_prefixes(folder: str | Path, model: GPT) -> dict[str, Prefix]:
    """Read every prefix of a folder, ``<name>.safetensors`` each, by name."""
    paths, model_hash = sorted(Path(folder).glob("*.safetensors")), weights_hash(model)
    return {path.stem: load_prefix(path, model, model_hash)[0] for path in paths}


def save_lora(path: str | Path, lora: LoRA, model: GPT, **description: Any) -> None:
    """Write a LoRA for one model, with the hash of its weights; ``description`` is kept with it."""
    own = {"kind": "lora", "layers": list(lora.names), "scale": lora.scale, "model": weights_hash(model)}
    save_checkpoint(path, lora.state_dict(), own | description)


def load_lora(path: str | Path, model: GPT) -> tuple[LoRA, dict[str, Any]]:
    """Read a LoRA, attached to the model, and its description.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, holds no LoRA, or is for another model.
    """
    tensors, description = load_checkpoint(path, kind="lora", model=weights_hash(model))
    try:
        rank = tensors["a.0"].shape[-2]
        lora = LoRA(model, rank, description["layers"], alpha=description["scale"] * rank)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: it does not hold a LoRA for this model: {error}") from None
    load_weights(lora, tensors, path)
    return lora, description
