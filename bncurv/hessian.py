"""The Hessian of any loss by autograd, H = ∇²_F L with respect to the model's output F, and its factor S.

One product H u is a backward pass through the gradient of the loss alone; nothing here runs the model. H is
block-diagonal over the finest of these partitions of F that it respects: single entries, positions with their entries
along the first axis or the last (``factor.py``), samples. Whether it does is no matter of trust: scaling the rows of u
by powers of two must scale those of H u and do nothing else (``certificate.py``). Then column j of all blocks at once
is H e_j, with a one in entry j of every position, and S comes from the blocks' eigenvectors. A block with an eigenvalue
below zero has no such factor: the loss is not convex in the output there. A loss that compares samples has
one block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from bncurv.certificate import leaks
from bncurv.factor import Factor, WholeFactor, by_output, by_position
from bncurv.precision import CONVEX, EXACT, ulp
from bncurv.probes import pattern
from bncurv.slow import user_level

LARGEST_BLOCK = 1024  # entries of the output that one block may hold
LARGEST_WHOLE = 2048  # entries of the whole batch' output, where the loss compares samples
BLOCK_BYTES = 2 * 2**30  # of all blocks
INSTEAD = (
    "Use CrossEntropyLoss, MSELoss or BCEWithLogitsLoss, or give its Hessian factor with bncurv.register_loss (README, "
    "'Extend it'). Quantities of the gradient alone (ComponentGrad, ComponentL2Grad, SumComponentGradSquared, "
    "ComponentVariance) take any loss."
)


class Hessian:
    """H at one output as a linear map, ``[n, *output] → [n, *output]``.

    Args:
        name: what messages call the loss.
        call: the loss as a function of the output.
        output: F.

    Attributes:
        gradient: ∂L/∂F.
        dtype: the narrowest floating-point dtype that the loss computes in.
        custom: names of custom autograd Functions in the loss.

    Raises:
        ValueError: where PyTorch cannot differentiate the loss twice.
    """

    def __init__(self, name: str, call: Callable[[Tensor], Tensor], output: Tensor) -> None:
        self.name, self._call = name, call
        with torch.enable_grad():
            self.output = output.detach().requires_grad_()
            value = call(self.output.clone())
            self._gradient = self._twice(lambda: torch.autograd.grad(value, self.output, create_graph=True)[0])
        self.gradient = self._gradient.detach()
        nodes = list(_nodes(value))
        kinds = {m.dtype for node in nodes for m in _metadata(node) if m.dtype.is_floating_point}
        self.dtype = max([output.dtype, *kinds], key=ulp)
        self.custom = sorted({node.name() for node in nodes if isinstance(node, BackwardCFunction)})

    def __call__(self, u: Tensor) -> Tensor:
        """H u."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(u)
        got = self._twice(
            lambda: torch.autograd.grad(self._gradient, self.output, u, retain_graph=True, allow_unused=True)[0]
        )
        return torch.zeros_like(u) if got is None else got

    def _twice(self, differentiate: Callable[[], Tensor]) -> Tensor:
        try:
            return differentiate()
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"{self.name} cannot be differentiated twice by PyTorch ({error}). {INSTEAD}") from error

    def gradient_at(self, output: Tensor) -> Tensor:
        """∂L/∂F at another output."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            return torch.autograd.grad(self._call(leaf.clone()), leaf)[0]

    def check(self) -> None:
        """Raise unless the loss is one fixed function, whose second derivative is autograd's."""
        if self.dtype not in EXACT:
            raise TypeError(
                f"{self.name} computes in {self.dtype} inside (autocast, or a cast in its code), which loses the "
                "digits that curvature needs. Use bncurv.curvature(..., precision='float32'), or take the cast out."
            )
        again = self.gradient_at(self.output)
        if not (again - self.gradient).norm() <= EXACT[self.dtype] * self.gradient.norm():
            raise ValueError(
                f"{self.name} gives another gradient when it is called again: it draws random numbers or keeps state. "
                "Its curvature is not defined; pass a loss that is one fixed function of output and target."
            )
        if self.custom:
            self._check_differences()

    def _check_differences(self) -> None:
        """A custom Function's backward may hide from autograd what it depends on: differences of gradients tell.

        Where they depend on the step (a kink, another scale) they tell nothing.
        """
        u = pattern(self.output.shape, self.output)
        step = ulp(self.dtype) ** (1 / 3) * u * self.output.detach().abs().clamp(min=1)
        want = self(step)
        whole, half = (self.gradient_at(self.output + s * step) - self.gradient_at(self.output - s * step)
                       for s in (1.0, 0.5))  # fmt: skip
        noise = 1e3 * ulp(self.dtype) * self.gradient.abs().amax()
        stable = (whole - 2 * half).abs() <= 1e-2 * whole.abs() + noise
        if bool((stable & ((whole / 2 - want).abs() > 0.1 * (whole.abs() + want.abs()) + noise)).any()):
            raise ValueError(
                f"{self.name}: autograd's second derivative is not that of its gradient, because of the custom "
                f"autograd Function {self.custom[0]}, whose backward depends on the output in a way that autograd "
                f"does not see. Write it in differentiable operations. {INSTEAD}"
            )


def _nodes(value: Tensor) -> Iterator[torch.autograd.graph.Node]:
    stack, seen = [value.grad_fn], set[torch.autograd.graph.Node]()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(below for below, _ in node.next_functions)


def _metadata(node: torch.autograd.graph.Node) -> list:
    found = node._input_metadata
    return list(found) if isinstance(found, list | tuple) else [found]


class Partition(NamedTuple):
    """Positions of e entries each, ``t`` in a sample; the entries along the first axis, or the last one."""

    t: int
    e: int
    last: bool = False


def _partitions(shape: torch.Size) -> list[Partition]:
    """From the finest on."""
    entries = shape[1:].numel()
    found = [Partition(entries, 1)]
    if len(shape) > 2:
        found += [Partition(entries // shape[1], shape[1]), Partition(entries // shape[-1], shape[-1], True)]
    return [*found, Partition(1, entries)]


def _respected(H: Hessian, u: Tensor, Hu: Tensor) -> Partition | None:
    """The finest partition over which H is block-diagonal; ``None`` if it couples samples."""
    layout = u.shape

    def rows(v: Tensor, p: Partition) -> Tensor:
        return by_position(v, p.e, p.last).reshape(-1, p.e)

    for p in _partitions(layout):

        def pull(v: Tensor, p: Partition = p) -> list[Tensor | None]:
            return [rows(H(by_output(v.view(-1, p.t, p.e), layout, p.last)), p)]

        if not leaks(pull, rows(u, p), [rows(Hu, p)], len(u) * p.t):
            return p
    return None


def _blocks(H: Hessian, p: Partition) -> Tensor:
    """All blocks, ``[n, t, e, e]``."""
    layout = H.output.shape
    blocks = H.output.new_empty(layout[0], p.t, p.e, p.e)
    for j in range(p.e):
        one = H.output.new_zeros(layout[0], p.t, p.e)
        one[..., j] = 1
        blocks[..., j] = by_position(H(by_output(one, layout, p.last)), p.e, p.last)
    return blocks


def _check_size(name: str, shape: torch.Size, p: Partition) -> None:
    need = shape[0] * p.t * p.e**2 * 8
    if p.e > LARGEST_BLOCK or need > BLOCK_BYTES:
        raise ValueError(
            f"{name}: its Hessian couples {p.e} output entries of a sample, {need / 2**30:.1f} GiB for {shape[0]} "
            f"samples; by autograd bncurv takes up to {LARGEST_BLOCK} entries and {BLOCK_BYTES / 2**30:.0f} GiB. "
            f"{INSTEAD}"
        )


def roots(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """S of positive semi-definite blocks ``[..., e, e] → [..., e, j]``; of others that of their nearest.

    With H = D C D, D² = diag H, the eigenvectors of C: entries of all sizes keep their digits. j is the largest rank.
    """
    d = blocks.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(d > 0, 1 / d, 0)
    values, vectors = torch.linalg.eigh(blocks * inverse[..., :, None] * inverse[..., None, :])
    rank = int((values > 16 * values.shape[-1] * ulp(dtype)).sum(-1).max()) if values.numel() else 0
    first = values.shape[-1] - rank
    return d[..., :, None] * vectors[..., first:] * values[..., None, first:].clamp(min=0).sqrt()


def _rounding(H: Hessian, p: Partition, u: Tensor) -> Tensor:
    """What rounding may leave in each block, ``[n, t]``: what cancels in H u shows at smaller outputs."""
    size = torch.zeros_like(u)
    for part in (1.0, 0.5, 0.25, 0.0):
        try:
            there = Hessian(H.name, H._call, H.output.detach() * part)(u).abs()
        except ValueError:
            continue
        size = torch.maximum(size, there.nan_to_num(0.0, 0.0, 0.0))
    return 2**8 * ulp(H.dtype) * by_position(size, p.e, p.last).amax(-1)


def _check_convex(H: Hessian, p: Partition, u: Tensor, blocks: Tensor, S: Tensor, where: str) -> float:
    """What of H is lost to rounding in S, relative; raise ValueError where it is more than that."""
    size = blocks.abs().amax((-2, -1))
    off = (S @ S.mT - blocks).abs().amax((-2, -1))
    wrong = off > CONVEX[H.dtype] * size
    if not bool(wrong.any()):
        return 0.0
    bad = (wrong & (off > _rounding(H, p, u))).nonzero()
    if len(bad):
        n, t = bad[0].tolist()
        values = torch.linalg.eigvalsh(blocks[n, t])
        raise ValueError(
            f"{H.name} is not convex in the model's output at {where.format(n)}: its Hessian there has the eigenvalue "
            f"{float(values[0]):.3g} (the largest is {float(values[-1]):.3g}), so it has no GGN. Use a convex loss; "
            "quantities of the gradient alone (ComponentGrad, ComponentL2Grad, SumComponentGradSquared, "
            "ComponentVariance) take any loss."
        )
    return float(off.max() / size.max())


def factor_by_autograd(H: Hessian, promised: float) -> Factor | WholeFactor:
    """S of a loss that is convex in the output, with warnings where that says little.

    Args:
        H: its Hessian.
        promised: relative error above which to warn.

    Raises:
        TypeError: for a loss that computes in half precision.
        ValueError: for a loss that is not, or is no fixed function; whose blocks are too large.

    Returns:
        The factor by positions; of a loss that compares samples that of the whole batch.
    """
    H.check()
    u = pattern(H.output.shape, H.output)
    Hu = H(u)
    p = _respected(H, u, Hu)
    if p is not None:
        _check_size(H.name, H.output.shape, p)
        return Factor(_root(H, p, u, Hu, promised, "sample {}"), H.output.shape, last=p.last)
    shape, entries = H.output.shape, H.output.numel()
    if entries > LARGEST_WHOLE:
        raise ValueError(
            f"{H.name} compares samples: its Hessian in the model's output is not block-diagonal over samples, and "
            f"that of the whole batch has {entries} rows; bncurv takes up to {LARGEST_WHOLE}. Use fewer samples, or a "
            "loss that is a sum or mean over samples; ComponentGrad, ComponentL2Grad, SumComponentGradSquared and "
            "ComponentVariance take any loss."
        )
    flat = Hessian(H.name, lambda output: H._call(output.view(shape)), H.output.detach().view(1, -1))
    S = _root(flat, Partition(1, entries), u.view(1, -1), Hu.view(1, -1), promised, "this batch")
    return WholeFactor(S[0, 0].T.reshape(-1, *shape))


def _root(H: Hessian, p: Partition, u: Tensor, Hu: Tensor, promised: float, where: str) -> Tensor:
    """S of all positions, ``[n, t, e, j]``."""
    with torch.no_grad():
        blocks = _blocks(H, p)
        if not bool(blocks.isfinite().all()):
            raise ValueError(
                f"{H.name}: its Hessian is not finite at this batch (a square root or logarithm of zero?), so it has "
                "no GGN there."
            )
        S = roots(blocks, H.dtype)
        lost = _check_convex(H, p, u, blocks, S, where)
    if not bool(S.any()):
        _warn(
            f"{H.name} has no curvature in the model's output at this batch (piecewise linear, or nothing counts), so "
            "its GGN is exactly zero. Of a model that ends in log_softmax, leave that out and use CrossEntropyLoss on "
            "the logits."
        )
    elif (lost := max(lost, _digits_lost(H, u, Hu))) > promised:
        _warn(
            f"{H.name}: PyTorch's second derivative has lost digits at this batch (relative error about "
            f"{lost:.0e}): its terms cancel, as where a softmax or sigmoid saturates, or part of it is computed in "
            "float32. Use CrossEntropyLoss, MSELoss or BCEWithLogitsLoss where they fit."
        )
    return S


def _digits_lost(H: Hessian, u: Tensor, Hu: Tensor) -> float:
    """Relative rounding error of H u: how much more float32 makes is how much more the dtype makes."""
    if ulp(H.dtype) > ulp(H.output.dtype):
        return ulp(H.dtype)
    try:
        rough = Hessian(H.name, H._call, H.output.detach().float())(u.float())
    except (RuntimeError, ValueError, TypeError):
        return 0.0
    apart = float((rough.to(Hu.dtype) - Hu).norm() / Hu.norm())
    return apart * ulp(H.dtype) / ulp(torch.float32) if apart == apart else 0.0


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=user_level())
