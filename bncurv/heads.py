"""Several outputs as one: a tuple, list or dict of tensors ``[N, ...]`` is one tensor ``[N, E]``, entries side by side.

The loss takes the structure apart again. So its factor S covers all heads at once, also where a loss joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.loss_calls import as_module
from bncurv.losses import find_loss, name_of
from bncurv.nested import mapped, tensors


class OnHeads(nn.Module):
    """A loss of a structured output, as a loss of the one tensor.

    Args:
        loss_fn: called with the structure and the target.
        structure: the model's output.
    """

    def __init__(self, loss_fn: Callable, structure: Any) -> None:
        super().__init__()
        self.loss_fn, self._structure, self.__name__ = loss_fn, structure, name_of(loss_fn)

    def forward(self, output: Tensor, target: Any) -> Tensor:
        """The loss; ``output [N, E]``."""
        heads = iter(output.split([t[0].numel() for t in tensors(self._structure)], 1))
        return self.loss_fn(mapped(lambda t: next(heads).reshape(-1, *t.shape[1:]), self._structure), target)


def as_one(output: Any, loss_fn: Callable) -> tuple[Any, Callable]:
    """Output and loss; of several heads, for a loss that is none of PyTorch's, one tensor and the loss of that.

    Raises:
        TypeError: for heads that are no floating-point tensors with the samples first.
    """
    pytorchs = find_loss(as_module(loss_fn)) or isinstance(loss_fn, nn.modules.loss._Loss)
    if pytorchs or not isinstance(output, tuple | list | Mapping):
        return output, loss_fn
    heads = list(tensors(output))
    if not heads or not all(t.is_floating_point() and t.dim() and len(t) == len(heads[0]) and len(t) for t in heads):
        kinds = [f"{tuple(t.shape)} ({str(t.dtype).removeprefix('torch.')})" for t in heads]
        raise TypeError(
            f"the model returns {type(output).__name__} of tensors {', '.join(kinds) or '(none)'}; expected "
            "floating-point tensors [N, ...], each with the samples first. Wrap the model so that it returns what the "
            "loss needs, and no more."
        )
    structure = mapped(lambda t: t.detach(), output)
    return torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in heads], 1), OnHeads(loss_fn, structure)
