"""Results on disk: files that are whole or not there, and that say what they are of.

``files`` has atomic writes, checked JSON and the lock of a folder. ``checkpoint`` writes tensors with a JSON
description, verified to read. ``cache`` computes a result once, and reads it only where its cache key is the one asked
for. ``weights`` has models, prefixes and adapters. ``huggingface`` takes them to and from transformers and PEFT (the
extra ``hf``).
"""

from mingpt.storage.cache import cached, cached_json, verify
from mingpt.storage.checkpoint import load_checkpoint, save_checkpoint, weights_hash
from mingpt.storage.files import CheckpointError, LockedError, locked
from mingpt.storage.huggingface import export_peft, import_peft, to_huggingface
from mingpt.storage.weights import (
    load_adapter,
    load_model,
    load_prefix,
    load_prefixes,
    save_adapter,
    save_model,
    save_prefix,
)

__all__ = [
    "CheckpointError", "LockedError", "cached", "cached_json", "export_peft", "import_peft", "load_adapter",
    "load_checkpoint", "load_model", "load_prefix", "load_prefixes", "locked", "save_adapter", "save_checkpoint",
    "save_model", "save_prefix", "to_huggingface", "verify", "weights_hash",
]  # fmt: skip
