"""What a mini-batch weighs among several: as if all samples had been one batch.

A loss that averages divides by something: samples, entries, the class weights of the targets that count. The mean over
the union of two mini-batches is then (w₁ L₁ + w₂ L₂) / (w₁ + w₂); a loss that sums adds up. PyTorch's own losses know
their w. Of any other it is read off the loss itself, evaluated at two mini-batches joined: there the first one's
gradient is w₁/(w₁ + w₂) of what it was, the second one's w₂/(w₁ + w₂), and of a sum both are what they were. If neither
holds, the loss is no mean and no sum over samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bncurv.loss_at_batch import LossAtBatch
from bncurv.precision import ulp


class Weights:
    """Weights of mini-batches, in the order in which they come."""

    def __init__(self) -> None:
        self._first: LossAtBatch | None = None

    def of(self, loss: LossAtBatch) -> float | None:
        """The next mini-batch's weight; ``None`` of a loss that sums.

        A single mini-batch may have any loss: it weighs 1, and nothing is asked of it before there is a second.

        Raises:
            ValueError: if a loss' weights cannot be told.
        """
        if loss.plain:
            return loss.divisor
        if self._first is None:
            self._first = loss
            return 1.0
        return _relative(self._first, loss)


def _relative(first: LossAtBatch, second: LossAtBatch) -> float | None:
    """Weight of the second mini-batch in units of the first one's."""
    shapes = [tuple(t.shape[1:]) for t in (first.output, first.target, second.output, second.target)]
    if shapes[:2] != shapes[2:]:
        raise ValueError(
            f"{first.name}: to see what mini-batches of it weigh, bncurv joins them, but output and target have the "
            f"shapes [N, *{shapes[0]}], [N, *{shapes[1]}] in one and [N, *{shapes[2]}], [N, *{shapes[3]}] in another. "
            "Pass mini-batches of equal shapes, or one at a time."
        )
    for shift in (0, 1):  # where the gradient vanishes, at the outputs of the neighbours instead
        one, two = (loss.output.roll(shift, 0) for loss in (first, second))
        g1, g2 = first.gradient_at(one, first.target), second.gradient_at(two, second.target)
        if not (g1.any() or g2.any()):
            continue
        both = first.gradient_at(torch.cat([one, two]), torch.cat([first.target, second.target]))
        own, at, target = (g1, one, first.target) if g1.norm() >= g2.norm() else (g2, two, second.target)
        twice = first.gradient_at(torch.cat([at, at]), torch.cat([target, target]))
        if _agree(twice, torch.cat([own, own])) and _agree(both, torch.cat([g1, g2])):
            return None
        if _agree(2 * twice, torch.cat([own, own])):
            b1, b2 = both.split([len(g1), len(g2)])
            s2 = _multiple(b2, g2, math.nan)
            s1 = _multiple(b1, g1, 1 - s2)
            s2 = 1 - s1 if math.isnan(s2) else s2
            if s1 > 0 and s2 > -ulp(both.dtype) and _agree(both, torch.cat([g1 * s1, g2 * (1 - s1)])):
                return max(s2 / s1, 0.0)
        raise ValueError(
            f"{first.name} is neither a mean nor a sum over samples of a function of that sample's output and target: "
            "its gradient at two mini-batches joined is no multiple of theirs (it compares samples, or takes a "
            "function of their mean?). Over several mini-batches there is no such loss; pass one at a time."
        )
    raise ValueError(
        f"{first.name}: its gradient vanishes on mini-batches, so that what they weigh cannot be told. Pass one at a "
        "time, or use one of CrossEntropyLoss, MSELoss, BCEWithLogitsLoss."
    )


def _multiple(actual: Tensor, of: Tensor, otherwise: float) -> float:
    """The factor between two tensors, or something else if the second is zero."""
    size = float(of.double().square().sum())
    return float((actual.double() * of).sum()) / size if size else otherwise


def _agree(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= ulp(actual.dtype) ** 0.5 * expected.norm())
