"""Results on disk: files that are whole or not there, and that say what they are of.

``checkpoint`` writes tensors with a JSON description, atomic to write and verified to read. ``weights`` has models,
prefixes and LoRAs. ``huggingface`` takes them to and from transformers and PEFT (the extra ``hf``). ``runs`` lists the
folders of runs.
"""

from mingpt.storage.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mingpt.storage.huggingface import export_peft, import_peft, to_huggingface
from mingpt.storage.runs import RunStatus, default_run, list_runs, run_status
from mingpt.storage.weights import load_lora, load_model, load_prefixes, save_lora, save_model, save_prefixes

__all__ = [
    "CheckpointError", "RunStatus", "default_run", "export_peft", "import_peft", "list_runs", "load_checkpoint",
    "load_lora", "load_model", "load_prefixes", "run_status", "save_checkpoint", "save_lora", "save_model",
    "save_prefixes", "to_huggingface",
]  # fmt: skip
