"""Models, prefixes and adapters on disk: what is written beside the weights, and what is checked when they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mingpt.adapters import METHODS, Adapter
from mingpt.datasets import CustomDataset
from mingpt.model import GPT
from mingpt.prefix import Prefix, as_prefix
from mingpt.storage.checkpoint import (
    check_finite,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    verify,
    verify_shapes,
    weights_hash,
)
from mingpt.storage.files import parsing
from mingpt.text import TextDataset


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
    with parsing(path, "a model"):
        config.update_from(description["config"], str(path))
        if config.n_layer > len(tensors):
            raise ValueError(f"n_layer is {config.n_layer}, and there are {len(tensors)} tensors")
        with torch.device("meta"):  # without memory: whatever the file says, no more is taken than it has tensors for
            verify_shapes(GPT(config), tensors, path)
        model = GPT(config)
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
    prefix = as_prefix(prefix, model, 1)
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
    with parsing(path, "a prefix for this model"):
        own = description["prefix"]
        prefix = Prefix(own["kind"], tensors["values"].to(model.device), n_placeholders=own["n_placeholders"])
        prefix.check(model, prefix.n_prefixes)
        if own["n_placeholders"] > model.config.block_size:
            raise ValueError(f"it stands for {own['n_placeholders']} tokens, the model reads {model.config.block_size}")
    check_finite(tensors, path)
    verify(path, {"model": description.get("model")}, {"model": model_hash or weights_hash(model)})
    return prefix, description


def load_prefixes(folder: str | Path, model: GPT) -> dict[str, Prefix]:
    """Read every prefix of a folder, ``<name>.safetensors`` each, by name."""
    paths, model_hash = sorted(Path(folder).glob("*.safetensors")), weights_hash(model)
    return {path.stem: load_prefix(path, model, model_hash)[0] for path in paths}


def save_adapter(
    path: str | Path,
    adapter: Adapter,
    method: str,
    size: int,
    data: CustomDataset | TextDataset,
    number: int = 0,
    **description: Any,
) -> None:
    """Write one adapter of any method, for one model.

    Args:
        path: the file.
        adapter: K of them.
        method: its name in ``mingpt.adapters.METHODS``.
        size: that it was made with.
        data: that it was made for.
        number: which of the K.
        description: JSON values to keep with it.
    """
    own = {"kind": "adapter", "method": method, "size": size, "data": data.describe()}
    tensors = {name: tensor[number : number + 1] for name, tensor in adapter.state_dict().items()}
    save_checkpoint(path, tensors, own | {"model": weights_hash(adapter.model)} | description)


def load_adapter(
    path: str | Path, model: GPT, data: CustomDataset | TextDataset | None = None
) -> tuple[Adapter, dict[str, Any]]:
    """Read an adapter, detached from the model and on its device, and its description.

    Args:
        path: the file.
        model: that the adapter is for.
        data: that it was made for, by default what the file describes; text with the tokenizer of a file is given.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, holds no adapter of a method of this package, or is for another model or
            other data.
    """
    tensors, description = load_checkpoint(path, kind="adapter", model=weights_hash(model))
    with parsing(path, "an adapter for this model"):
        method, size = METHODS[description["method"]], description["size"]
        n_numbers = sum(tensor.numel() for tensor in tensors.values())
        if method.count(model.config, size) > n_numbers:
            raise ValueError(f"an adapter of size {size} has more than {n_numbers} numbers")
        described = description["data"]
        if data is None:
            data = (TextDataset if "tokenizer" in described else CustomDataset).from_description(described)
        else:
            verify(path, {"data": described}, {"data": data.describe()})
        adapter = cast(Callable[..., Adapter], method)(model, data, size)
    load_weights(adapter, tensors, path)
    adapter.detach()
    return adapter.to(model.device), description
