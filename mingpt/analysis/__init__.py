"""What a prefix does, measured and drawn.

``theory`` measures the two statements of Petrov et al. (2024) on a model and a prefix. ``constructions`` are GPTs that
do whatever one virtual token says. ``edits`` takes prefixes apart and makes them without gradients. ``figures`` and
``seed_figures`` have every figure.
"""

from mingpt.analysis.constructions import function_interpreter, sequence_interpreter, virtual_tokens
from mingpt.analysis.figures import attention_maps
from mingpt.analysis.theory import attention_invariance, bias_subspace, random_case

__all__ = [
    "attention_invariance", "attention_maps", "bias_subspace", "function_interpreter", "random_case",
    "sequence_interpreter", "virtual_tokens",
]  # fmt: skip
