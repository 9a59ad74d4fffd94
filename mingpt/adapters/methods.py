"""The methods that a study knows by name. A new one is a class in a file of its own, and one line here."""

from __future__ import annotations

from mingpt.adapters.adapter import Adapter
from mingpt.adapters.bitfit import BitFit
from mingpt.adapters.lora import IA3, AttentionLoRA, DoRA, MLPLoRA, VeRA
from mingpt.adapters.others import FullFineTuning, GatedPrefix, LoReFT, PrefixAndLoRA, PrefixTuningPlus
from mingpt.adapters.prefixes import (
    ActivationPrefix,
    Cartridge,
    KeyValuePrefix,
    ReparametrizedPrefix,
    SoftPrompt,
    UpperLayersPrefix,
    ValuePrefix,
)

METHODS: dict[str, type[Adapter]] = {
    "full": FullFineTuning,
    "lora-mlp": MLPLoRA,
    "lora-attention": AttentionLoRA,
    "dora": DoRA,
    "vera": VeRA,
    "ia3": IA3,
    "bitfit": BitFit,
    "loreft": LoReFT,
    "prompt": SoftPrompt,
    "activation": ActivationPrefix,
    "key_value": KeyValuePrefix,
    "key_value-mlp": ReparametrizedPrefix,
    "key_value-upper": UpperLayersPrefix,
    "value": ValuePrefix,
    "cartridge": Cartridge,
    "gated": GatedPrefix,
    "prefix-tuning+": PrefixTuningPlus,
    "prefix+lora": PrefixAndLoRA,
}
"""All methods, by the names that a study takes."""
