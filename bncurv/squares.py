"""Σ_k V[k]² of a layer's weight from its factors, without correcting a row of V.

A row is a sum of products (letters: heads of ``engine.py`` and ``layers/base.py``)

    V[(n, c), o, i] = Σ_s δ[c, n, o, s] x[n, s, i]  +  Σ_q A[n, c, q] P[q, o, i]  +  Σ_m a[n, c, m, o] p[m, o, i]

and the sum of its squares needs matrix products over (n, s) or q instead of all (n, c):

    Σ_k V² = Σ_k (Σ_s δ x)²  +  Σ_q P[q] (2 W[q] + (Z P)[q] + 2 Σ_m Y[q, m] p[m])  +  Σ_m p[m] (2 w[m] + Σ_m' z[m, m'] p[m'])
    W[q] = Σ_n,s (Σ_c A[q] δ) x   w[m] = Σ_n,s (Σ_c a[m] δ) x   Z = Σ_k A Aᵀ   Y[q, m] = Σ_k A[q] a[m]   z = Σ_k a aᵀ

The first term is Σ_n (Σ_c δ²) x² where there is one position s. Where these terms cancel, so that the sum has lost digits, the entries concerned are computed again from their rows.
"""  # noqa: E501

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from bncurv.blocks import Correction
from bncurv.budget import USUAL, Budget, chunks
from bncurv.precision import KEPT


def sum_squares(left: Tensor, right: Tensor, correction: Correction, budget: Budget = USUAL) -> Tensor:
    """Σ_k V[k]², ``[o, i]``.

    Args:
        left: δ ``[c, n, o, s]``.
        right: x ``[n, s, i]``.
        correction: A, P and the direct pairs, P and p in the shape ``[..., o, i]`` or one that flattens to it.
        budget: how much is made at once.
    """
    o, i = left.shape[2], right.shape[2]
    direct = [(a, p.reshape(-1, o, i)) for a, p in correction.direct]
    if direct[1:]:  # a layer below several BatchNorms: all their moments are one m
        direct = [(torch.cat([a for a, _ in direct], 2), torch.cat([p for _, p in direct]))]
    total = _own(left, right, budget.row)
    terms = total.clone()  # what would be left if nothing cancelled
    for a, p in direct:
        w = torch.einsum("ncmo,cnos->mons", a, left).flatten(2) @ right.flatten(0, 1)
        z = torch.einsum("ncmo,ncko->mko", a, a)
        total += (p * (2 * w + torch.einsum("mko,koi->moi", z, p))).sum(0)
        terms += torch.einsum("mmo,moi->oi", z, p.square())
    if correction.A is not None and correction.P is not None:
        _add_directions(total, terms, left, right, correction.A, correction.P.reshape(-1, o, i), direct, budget.block)
    lost = (total < KEPT[total.dtype] * terms).flatten().nonzero()[:, 0]
    for f in lost.split(max(1, 8 * budget.row // (left.element_size() * left[:, :, 0].numel()))):
        total.view(-1)[f] = _entries(left, right, correction, f).square().sum((0, 1))
    return total


def _own(left: Tensor, right: Tensor, most: int) -> Tensor:
    """Σ_k (Σ_s δ x)², some samples at a time."""
    if right.shape[1] == 1:
        return left[..., 0].square().sum(0).T @ right[:, 0].square()
    found = left.new_zeros(left.shape[2], right.shape[2])
    for n in chunks(len(right), max(1, most // (left.element_size() * len(left) * found.numel()))):
        rows = rearrange(left[:, n], "c n o s -> n (c o) s") @ right[n]
        found += rows.square_().view(-1, *found.shape).sum(0)
    return found


def _add_directions(
    total: Tensor,
    terms: Tensor,
    left: Tensor,
    right: Tensor,
    A: Tensor,
    P: Tensor,
    direct: list[tuple[Tensor, Tensor]],
    block: int,
) -> None:
    """Add everything with P to the sum and to the squares of its terms; some q at a time."""
    # [n, c, (o s)], [k, q], [q, (o i)]
    by_sample, columns, flat = left.transpose(0, 1).flatten(2), A.flatten(0, 1), P.flatten(1)
    half_Z = 0.5 * columns.T @ columns
    pairs = [(columns.T @ a[:, :, m].flatten(0, 1), p[m]) for a, p in direct for m in range(len(p))]
    each = flat.element_size() * max(flat.shape[1], by_sample.shape[0] * by_sample.shape[2])
    for q in chunks(len(P), max(1, block // each)):
        weights = rearrange(A[..., q].mT @ by_sample, "n q (o s) -> (q o) (n s)", s=right.shape[1])
        rest = (half_Z[q] @ flat).view(-1, right.shape[2]).addmm_(weights, right.flatten(0, 1)).view_as(P[q])
        for Y, p in pairs:
            rest.addcmul_(Y[q, :, None], p)
        total.add_(rest.mul_(P[q]).sum(0), alpha=2)
        terms += torch.tensordot(2 * half_Z.diagonal()[q], P[q].square(), 1)


def _entries(left: Tensor, right: Tensor, correction: Correction, f: Tensor) -> Tensor:
    """The entries ``f`` (flat) of the rows themselves, ``[n, c, f]``."""
    o, i = f // right.shape[2], f % right.shape[2]
    rows = torch.einsum("cnfs,nsf->ncf", left[:, :, o], right[..., i])
    if correction.A is not None and correction.P is not None:
        rows += correction.A @ correction.P.flatten(1)[:, f]
    for a, p in correction.direct:
        rows += (a[..., o] * p.flatten(1)[:, f]).sum(2)
    return rows
