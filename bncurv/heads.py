"""Several outputs as one: a tuple, list or dict of tensors ``[N, ...]`` is one tensor ``[N, E]``, entries side by side.

The loss takes the structure apart again. So its factor S covers all heads at once, also where a loss joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bncurv.loss_calls import as_module
from bncurv.losses import find_loss, name_of


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
        heads = iter(output.split([t[0].numel() for t in _tensors(self._structure)], 1))
        return self.loss_fn(_map(lambda t: next(heads).reshape(-1, *t.shape[1:]), self._structure), target)


def as_one(output: Any, loss_fn: Callable) -> tuple[Any, Callable]:
    """Output and loss; of several heads, for a loss that is none of PyTorch's, one tensor and the loss of that.

    Raises:
        TypeError: for heads that are no floating-point tensors with the samples first.
    """
    pytorchs = find_loss(as_module(loss_fn)) or isinstance(loss_fn, nn.modules.loss._Loss)
    if pytorchs or not isinstance(output, tuple | list | Mapping):
        return output, loss_fn
    heads = list(_tensors(output))
    if not heads or not all(t.is_floating_point() and t.dim() and len(t) == len(heads[0]) and len(t) for t in heads):
        kinds = [f"{tuple(t.shape)} ({str(t.dtype).removeprefix('torch.')})" for t in heads]
        raise TypeError(
            f"the model returns {type(output).__name__} of tensors {', '.join(kinds) or '(none)'}; expected "
            "floating-point tensors [N, ...], each with the samples first. Wrap the model so that it returns what the "
            "loss needs, and no more."
        )
    structure = _map(lambda t: t.detach(), output)
    return torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in heads], 1), OnHeads(loss_fn, structure)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a structure, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _map(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The structure with ``f`` of its tensors, in order; what is no tensor stays."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        parts = {key: _map(f, part) for key, part in value.items()}
        return parts if type(value) is dict else type(value)(**parts)
    if isinstance(value, tuple | list):
        several = [_map(f, part) for part in value]
        return type(value)(*several) if hasattr(value, "_fields") else type(value)(several)
    return value
