"""In which floating-point format the matrix products are computed."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """Turn "auto" into "bfloat16" where the hardware multiplies it natively, else into "float32".

    Raises:
        ValueError: for an unknown name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if kind == "cpu" else {}
        is_native = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return "bfloat16" if is_native else "float32"


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """A context in which matrix products are computed in ``precision`` ("auto", "float32" or "bfloat16")."""
    is_bfloat16 = resolve_precision(precision, device) == "bfloat16"
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=is_bfloat16)
