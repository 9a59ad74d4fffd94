"""What a prefix does, measured and drawn.

``theory`` measures the two statements of Petrov et al. (2024) on a model and a prefix. ``constructions`` are GPTs that
do whatever one virtual token says. ``figures`` has every figure.
"""

from mingpt.analysis.constructions import function_interpreter, sequence_interpreter, virtual_tokens
from mingpt.analysis.theory import attention_invariance, bias_subspace

__all__ = [
    "attention_invariance", "bias_subspace", "function_interpreter", "sequence_interpreter", "virtual_tokens",
]  # fmt: skip
