"""What a prefix does, measured and drawn.

``theory`` holds the paper's two statements against a model and a prefix; ``constructions`` are GPTs that one virtual
token programs; ``figures`` has every figure.
"""

from mingpt.analysis.constructions import function_interpreter, sequence_interpreter
from mingpt.analysis.theory import attention_invariance, bias_subspace

__all__ = [
    "attention_invariance", "bias_subspace", "function_interpreter", "sequence_interpreter",
]  # fmt: skip
