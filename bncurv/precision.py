"""What counts as rounding: every tolerance that depends on the dtype."""

from __future__ import annotations

import torch

LANCZOS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}  # ‖G e - λ e‖ / λ; the eigenvalue's error is its square
CG_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}  # ‖(G + δ) x - v‖ / ‖v‖


def ulp(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number of this dtype."""
    return torch.finfo(dtype).eps
