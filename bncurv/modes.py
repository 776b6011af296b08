"""In which modes of PyTorch a forward pass runs: what can be put into its graph, and what cannot."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def checkpointing() -> bool:
    """Whether ``torch.utils.checkpoint`` runs this code, for the first or the second time."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None


def recomputes() -> bool:
    """Whether saved tensors are packed here and made again in the backward pass (checkpoints, offloading)."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.7 and newer
    return hooks(True) is not None if hooks else checkpointing()


def plain_wanted(x: Tensor, *affine: Tensor | None) -> str | None:
    """Where a BatchNorm must run ungated: PyTorch differentiates it otherwise than by one recorded graph.

    Inside ``torch.utils.checkpoint`` the second run must save the same tensors; ``torch.func`` transforms (asked for
    as `torch.autograd.Function` does) and forward-mode differentiation have rules for PyTorch's own BatchNorm only.
    """
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    if any(unpack_dual(t).tangent is not None for t in (x, *affine) if t is not None):
        return "forward-mode differentiation"
    return "torch.utils.checkpoint" if checkpointing() else None


def free() -> bool:
    """Whether operations may be put in: no second run that must save the same, no transform of torch.func."""
    return not (torch._C._are_functorch_transforms_active() or recomputes())
