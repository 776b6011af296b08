"""What counts as rounding: every tolerance that depends on the dtype."""

from __future__ import annotations

import torch

# The promise of the package: relative error of a tensor, in its largest entry
EXACT = {torch.float32: 1e-4, torch.float64: 1e-11}
# What rounding may leave of a passing comparison where digits cancel; another map differs by more
ROUGHLY = {torch.float32: 1e-2, torch.float64: 1e-6}
# Per-sample scaling by powers of two commutes with rounding: what is left, entry by entry, is coupling
COUPLED = {torch.float32: 1e-6, torch.float64: 1e-14}
# A user's pair or formula against autograd
FORMULA = {torch.float32: 1e-3, torch.float64: 1e-8}
# What S Sᵀ may miss of a Hessian by autograd, relative to its block; a negative eigenvalue is missed by more
CONVEX = {torch.float32: 1e-4, torch.float64: 1e-10}
# A sum of squares below this part of its terms is computed again: ulp / KEPT is about 1e-5 and 2e-12
KEPT = {torch.float32: 1e-2, torch.float64: 1e-4}
ROUNDING = 10  # two ways whose difference is this many times the movement under rounding alone agree
LANCZOS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}  # ‖G e - λ e‖ / λ; the eigenvalue's error is its square
CG_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative error of a solution, but for rounding
CG_STEPS = 20  # times the rank of a matrix: conjugate gradients take once that without rounding, a few times with it
INSIDE = 32.0  # ulp of a vector: a part outside of a range below this is the vector's own rounding
ROW_ROUNDING = 8.0  # ulp of V: singular values below this part of the largest are rounding of its rows
WORST = 1e-3  # estimated relative error of a solve above which it is refused


def ulp(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number of this dtype."""
    return torch.finfo(dtype).eps


def within_range(t: torch.Tensor) -> bool:
    """Whether products of several entries of ``t [..., column]`` stay in the dtype's range, column by column."""
    high, low = torch.finfo(t.dtype).max ** 0.2, torch.finfo(t.dtype).max ** -0.3
    top = t.abs().flatten(0, -2).amax(0) if t.numel() else t.new_ones(1)
    return bool(((top == 0) | ((top < high) & (top > low))).all())


def full_precision(like: torch.Tensor) -> torch.autocast:
    """A block whose products keep the dtype of their factors, whatever autocast is on around it."""
    return torch.autocast(like.device.type, enabled=False)
