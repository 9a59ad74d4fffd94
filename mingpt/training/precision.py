"""The floating-point format of a forward pass.

Parameters, gradients and optimizer states are float32 in either. In bfloat16, matrix products are computed in it, and
a GPT keeps its residual stream in it too.
"""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """Turn "auto" into "bfloat16" where the hardware multiplies it natively, else into "float32".

    Args:
        precision: one of PRECISIONS.
        device: whose hardware is asked; a CPU counts with AMX or AVX-512 instructions for bfloat16.

    Raises:
        ValueError: for an unknown name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    capabilities = torch.cpu.get_capabilities() if kind == "cpu" else {}
    is_native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    if kind == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_native else "float32"


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """A context whose forward passes are computed in ``precision``.

    Args:
        precision: "float32", "bfloat16" or "auto", see ``resolve_precision``.
        device: where they are computed.

    Raises:
        ValueError: for an unknown name.
    """
    is_bfloat16 = resolve_precision(precision, device) == "bfloat16"
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=is_bfloat16)
