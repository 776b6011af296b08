"""What a mini-batch weighs among several: as if all samples had been one batch.

A loss that averages divides by something: samples, entries, the class weights of the targets that count. The mean over
the union of two mini-batches is then (w₁ L₁ + w₂ L₂) / (w₁ + w₂); a loss that sums adds up. PyTorch's own losses know
their w. Of any other it is read off the loss itself, evaluated at two mini-batches joined: there the first one's
gradient is w₁/(w₁ + w₂) of what it was, the second one's w₂/(w₁ + w₂), and of a sum both are what they were. If neither
holds, the loss is no mean and no sum over samples. A loss that divides by what counts, but at least by 1, gives zero
for a mini-batch where nothing does: its weight is then zero.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from bncurv.loss_at_batch import LossAtBatch
from bncurv.nested import mapped, tensors
from bncurv.precision import ulp


class Weights:
    """Weights of mini-batches, in the order in which they come."""

    def __init__(self) -> None:
        self._unit: LossAtBatch | None = None

    def of(self, loss: LossAtBatch) -> float | None:
        """The next mini-batch's weight; ``None`` of a loss that sums, infinity if all earlier ones weigh nothing.

        A single mini-batch may have any loss: it weighs 1, and nothing is asked of it before there is a second.

        Raises:
            ValueError: if a loss' weights cannot be told.
        """
        if loss.plain:
            return loss.divisor
        if self._unit is None:
            self._unit = loss
            return 1.0
        if loss.taken_as_a_whole:
            raise ValueError(_neither(loss.name, "its Hessian is not block-diagonal over samples (it compares them)"))
        pair = self._unit, loss
        with contextlib.suppress(RuntimeError):  # of PyTorch's, where a loss has tensors of another dtype inside
            pair = self._unit.in_float64(), loss.in_float64()
        weight = _relative(*pair)
        if weight == math.inf:
            self._unit = loss
        return weight


def _relative(first: LossAtBatch, second: LossAtBatch) -> float | None:
    """Weight of the second mini-batch in units of the first one's."""
    shapes, others = ([_shape(t) for t in tensors((loss.output, loss.target))] for loss in (first, second))
    if shapes != others:
        raise ValueError(
            f"{first.name}: to see what mini-batches of it weigh, bncurv joins them, but output and target have the "
            f"shapes {', '.join(shapes)} in one and {', '.join(others)} in another. Pass mini-batches of equal shapes, "
            "or one at a time."
        )
    for shift in (0, 1):  # where the gradient vanishes, at the outputs of the neighbours instead
        one, two = (loss.output.roll(shift, 0) for loss in (first, second))
        g1, g2 = first.gradient_at(one, first.target), first.gradient_at(two, second.target)
        if g1.any() or g2.any():
            return _ratio(first, (one, first.target, g1), (two, second.target, g2))
    raise ValueError(
        f"{first.name}: its gradient vanishes on mini-batches, so that what they weigh cannot be told. Pass one at a "
        "time, or use one of CrossEntropyLoss, MSELoss, BCEWithLogitsLoss."
    )


def _shape(t: Tensor) -> str:
    return f"[N, *{tuple(t.shape[1:])}]" if t.dim() else "[]"


def _joined(one: Any, two: Any, samples: tuple[int, int]) -> Any:
    """Targets of two mini-batches as one; what has another length than they is the first one's."""
    rest = tensors(two)

    def join(t: Tensor) -> Tensor:
        other = next(rest)
        return torch.cat([t, other]) if t.dim() and (len(t), len(other)) == samples else t

    return mapped(join, one)


Known = tuple[Tensor, Any, Tensor]  # output, target, gradient there


def _ratio(loss: LossAtBatch, first: Known, second: Known) -> float | None:
    """w₂ / w₁; ``None`` of a sum."""
    (one, y1, g1), (two, y2, g2) = first, second
    sizes = len(one), len(two)
    b1, b2 = loss.gradient_at(torch.cat([one, two]), _joined(y1, y2, sizes)).split(sizes)
    at, y, g = max(first, second, key=lambda known: float(known[2].norm()))
    target = _joined(y, y, (len(at), len(at)))
    twice = loss.gradient_at(torch.cat([at, at]), target)  # a mean and a sum differ here, whatever w is
    if _agree([twice], [torch.cat([g, g])]) and _agree([b1, b2], [g1, g2]):
        return None
    s2 = _multiple(b2, g2, math.nan)
    s1 = _multiple(b1, g1, 1 - s2)
    s2 = 1 - s1 if math.isnan(s2) else s2
    if not (_agree([2 * twice], [torch.cat([g, g])]) and _agree([b1, b2], [s1 * g1, (1 - s1) * g2])):
        why = (
            "its gradient at two mini-batches joined is no multiple of theirs (it compares samples, takes a function "
            "of their mean, or draws random numbers?)"
        )
        raise ValueError(_neither(loss.name, why))
    if s1 <= 10 * ulp(g1.dtype):
        return math.inf
    return max(s2, 0.0) / s1


def _neither(name: str, why: str) -> str:
    return (
        f"{name} is neither a mean nor a sum over samples of a function of that sample's output and target: {why}. "
        "Over several mini-batches there is no such loss; pass one at a time."
    )


def _multiple(actual: Tensor, of: Tensor, otherwise: float) -> float:
    """The factor between two tensors, or something else if the second is zero."""
    size = float(of.double().square().sum())
    return float((actual.double() * of).sum()) / size if size else otherwise


def _agree(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Each with its own norm as the measure, down to the rounding of the largest."""
    largest = max(float(e.norm()) for e in expected)
    eps = ulp(actual[0].dtype)
    return all(
        bool((a - e).norm() <= eps**0.5 * e.norm() + 100 * eps * largest) for a, e in zip(actual, expected, strict=True)
    )
