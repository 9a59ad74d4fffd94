"""Models of transformers and adapters of PEFT, read from folders. Nothing is fetched, and nothing is unpickled.

Legend: P prefix positions, C channels of the residual stream, H key/value heads, D channels of a head, L layers.
"""

from __future__ import annotations

import copy
import filecmp
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mingpt.huggingface.causal_lm import CausalLM
from mingpt.prefix import Prefix
from mingpt.storage.checkpoint import check_finite
from mingpt.storage.files import CheckpointError, parsing, read_json
from mingpt.storage.huggingface import prefix_of_table

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter of PEFT for a ``CausalLM``.

    Attributes:
        method: PEFT's name, such as "PREFIX_TUNING".
        base: what the adapter says it was trained for, a name or a folder; None where it says nothing.
        prefix: of prefix tuning, cartridges and prompt tuning, what to give as ``prefixes=``.
        peft_model: of all other methods, the ``PeftModel``, which has changed the model's layers in place.
    """

    method: str
    base: str | None
    prefix: Prefix | None = None
    peft_model: Any = None

    def disabled(self) -> AbstractContextManager[Any]:
        """A context in which the model's layers are those of the base model."""
        return nullcontext() if self.peft_model is None else self.peft_model.disable_adapter()

    def base_model(self, lm: CausalLM) -> CausalLM:
        """The model without its adapter, with layers of its own. Their weights are those of ``lm``, in the same memory.

        Raises:
            ValueError: if PEFT cannot take the adapter off.
        """
        model = lm.model if self.peft_model is None else self.peft_model
        model = copy.deepcopy(model, {id(each): each for each in model.parameters()})
        if self.peft_model is not None:
            if not hasattr(model, "unload"):
                raise ValueError(f"PEFT cannot take an adapter of {self.method} off its model")
            model.delete_adapter(model.active_adapter)  # else modules that it trained as a whole would stay
            model = model.unload()
        return CausalLM(model)


def load_causal_lm(folder: str | Path, device: torch.device | str = "cpu") -> CausalLM:
    """Read a model that transformers wrote into a folder, in float32 and evaluation mode.

    Raises:
        CheckpointError: if the folder has no such model, or not all of its weights.
        ValueError: if its layers do not all cache keys and values.
    """
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; expected a folder that transformers' save_pretrained wrote")
    with parsing(folder, "a causal language model of transformers"), without_progress_bar():
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        read: Any = AutoModelForCausalLM.from_pretrained
        model, found = read(str(folder), output_loading_info=True, **options)
        if found["missing_keys"]:
            raise ValueError(f"{len(found['missing_keys'])} weights are missing, such as {min(found['missing_keys'])}")
    return CausalLM(model.to(device).eval())


def load_peft(folder: str | Path, lm: CausalLM) -> PeftAdapter:
    """Read a PEFT adapter: prefix tuning, a cartridge and prompt tuning as a ``Prefix``, others as a ``PeftModel``.

    That an adapter belongs to the model shows in its sizes, in the layers that it names, and in the weights of the
    model that it names as its base, where that is another folder on this disk.

    Raises:
        CheckpointError: if the folder has no adapter, or one of another architecture, size or base.
    """
    folder = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name}; expected a folder that PEFT's save_pretrained wrote")
    with parsing(folder, "an adapter of PEFT for this model"):
        return _read(folder, lm)


def _read(folder: Path, lm: CausalLM) -> PeftAdapter:
    import peft
    from safetensors.torch import load_file

    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    base, method = config.base_model_name_or_path, str(getattr(config.peft_type, "value", config.peft_type))
    _check_base(base, lm)
    if not config.is_prompt_learning:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PEFT's calls to transformers
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(lm.model, str(folder), local_files_only=True)
        return PeftAdapter(method, base, peft_model=adapted.eval())
    if method not in ("PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING"):
        raise ValueError(
            f"its method is {method}; of prompt methods prefix tuning, cartridges and prompt tuning are read"
        )
    weights = load_file(folder / _WEIGHTS)
    check_finite(weights, folder)
    table = weights["prompt_embeddings"]
    return PeftAdapter(method, base, _prefix(table.to(lm.device, torch.float32), method == "PROMPT_TUNING", lm))


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """A context in which transformers shows no bar for the files that it reads or writes."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _prefix(table: Tensor, is_prompt: bool, lm: CausalLM) -> Prefix:
    """PEFT's table, (P, C) of a prompt or (P, L * 2 * H * D), as a Prefix."""
    config = lm.config
    width = config.hidden_size if is_prompt else config.n_layer * 2 * config.n_embd
    if table.ndim != 2 or table.shape[1] != width:
        sizes = f"{config.n_layer} layers, {config.n_kv_head} key/value heads of {config.head_size} channels"
        raise ValueError(
            f"its shape is {tuple(table.shape)}; this {config.architecture} of {sizes} and {config.hidden_size} "
            f"channels needs {width} numbers a position"
        )
    if is_prompt:
        return Prefix("prompt", table[None])
    return prefix_of_table(table, config.n_layer)


def _check_base(base: str | None, lm: CausalLM) -> None:
    """Refuse an adapter whose base is another model in a folder on this disk."""
    own = Path(lm.model.name_or_path)
    if not base or not (other := Path(base)).is_dir() or not own.is_dir() or own.samefile(other):
        return
    kind = read_json(other / "config.json").get("model_type")
    if kind != lm.config.architecture:
        raise ValueError(f"its base is {base}, of type {kind}, and {own} is of type {lm.config.architecture}")
    names = sorted({path.name for folder in (own, other) for path in folder.glob("*.safetensors")})
    if filecmp.cmpfiles(own, other, names, shallow=False)[0] != names:
        raise ValueError(f"its base is {base}, whose weights are not those of {own}")
