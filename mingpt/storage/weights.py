"""Models and prefixes on disk: what to write beside the weights, and what to check when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mingpt.lora import LoRA
from mingpt.model import GPT
from mingpt.storage import checkpoint
from mingpt.storage.checkpoint import CheckpointError, require_equal


def save_model(path: str | Path, model: GPT, **description: Any) -> None:
    """Write a model.

    Args:
        path: the file.
        model: whose weights and configuration are written.
        description: JSON values to keep with it, such as data, recipe and metrics.
    """
    weights = model.state_dict()
    checkpoint.save_checkpoint(path, weights, {"kind": "model", "config": model.config.to_dict(), **description})


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, dict[str, Any]]:
    """Read a model, in evaluation mode, and its description.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged or is not a model of this package.
    """
    tensors, description = checkpoint.load_checkpoint(path)
    require_equal(path, "kind", description.get("kind"), "model")
    config = GPT.get_default_config()
    known = config.to_dict()
    for key in description["config"]:
        if key not in known:
            raise CheckpointError(f"{path}: field 'config.{key}' is not known to this version")
    config.merge_from_dict(description["config"] | {"model_type": None})
    try:
        model = GPT(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: field 'config' does not make a model: {error}") from None
    checkpoint.load_weights(model, tensors, path)
    return model.to(device).eval(), description


def save_prefixes(path: str | Path, prefixes: Mapping[str, Tensor], model: GPT, **description: Any) -> None:
    """Write prefixes by name, for one model.

    Args:
        path: the file.
        prefixes: (L, P, C), (L, 2, P, C) or (P, C) each, by the name of its task.
        model: the model that they are for; its weights_hash is written, so that they are not used with another.
        description: JSON values to keep with them.
    """
    checkpoint.save_checkpoint(
        path, prefixes, {"kind": "prefixes", "tasks": list(prefixes), "model": weights_hash(model), **description}
    )


def load_prefixes(path: str | Path, model: GPT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read prefixes, on the model's device and in the order in which they were written, and their description.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, holds no prefixes, or they are for another model.
    """
    tensors, description = checkpoint.load_checkpoint(path)
    require_equal(path, "kind", description.get("kind"), "prefixes")
    for name, tensor in tensors.items():
        if tensor.ndim > 2:  # a prompt has no layers
            require_equal(path, f"{name}.n_layer", tensor.shape[0], model.config.n_layer)
        require_equal(path, f"{name}.n_embd", tensor.shape[-1], model.config.n_embd)
    require_equal(path, "model", description["model"], weights_hash(model))
    return {name: tensors[name].to(model.device) for name in description["tasks"]}, description


def save_lora(path: str | Path, lora: LoRA, model: GPT, **description: Any) -> None:
    """Write a LoRA for one model, whose weights_hash is written too; ``description`` is kept with it."""
    layers = {"layers": list(lora.names), "scale": lora.scale}
    checkpoint.save_checkpoint(
        path, lora.state_dict(), {"kind": "lora", "model": weights_hash(model), **layers, **description}
    )


def load_lora(path: str | Path, model: GPT) -> tuple[LoRA, dict[str, Any]]:
    """Read a LoRA, attached to the model, and its description.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, holds no LoRA, or it is for another model.
    """
    tensors, description = checkpoint.load_checkpoint(path)
    require_equal(path, "kind", description.get("kind"), "lora")
    require_equal(path, "model", description["model"], weights_hash(model))
    rank = len(tensors["a.0"])
    lora = LoRA(model, rank, description["layers"], alpha=description["scale"] * rank)
    lora.load_state_dict(tensors)
    return lora, description


def weights_hash(model: GPT) -> str:
    """A checksum of the model's weights."""
    return checkpoint.checksum(model.state_dict())
