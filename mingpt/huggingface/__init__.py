"""Prefixes on any causal language model of transformers (extra ``hf``).

``causal_lm`` gives such a model what our GPT has: prefixes, placeholders, a loss over targets. ``cache`` makes
transformers' cache of a prefix. ``measure`` measures the paper's statements on it. ``adapters`` reads models and PEFT's
adapters from folders, and ``analysis`` says what an adapter does to a model on a text (``mingpt analyze``).
``comparison`` says what demonstrations in the context, or a LoRA, reach of its gain.
"""

from mingpt.huggingface.adapters import PeftAdapter, load_causal_lm, load_peft
from mingpt.huggingface.analysis import Analysis, LogitEffect, analyze, read_rows
from mingpt.huggingface.causal_lm import CausalLM
from mingpt.huggingface.comparison import Comparison, compare
from mingpt.huggingface.measure import Measurement, measure

__all__ = [
    "Analysis", "CausalLM", "Comparison", "LogitEffect", "Measurement", "PeftAdapter", "analyze", "compare",
    "load_causal_lm", "load_peft", "measure", "read_rows",
]  # fmt: skip
