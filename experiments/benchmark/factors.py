"""Cotangents of the jobs: columns of the cross-entropy factor, gradients, Monte-Carlo mixtures.

``S[n]`` is a factor of sample n's loss Hessian, ``S[n] S[n]^T = (diag(p_n) - p_n p_n^T) / N``.
Component ``k = (n, c)`` is the column ``S[n, :, c]`` placed in row n of a zero ``[N, C]`` array.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def full_factor(F: Tensor) -> Tensor:
    """Symmetric-style factor with C columns, ``(diag(sqrt p) - p sqrt(p)^T) / sqrt(N)``."""
    p = F.softmax(1)
    root = p.sqrt()
    return (torch.diag_embed(root) - p[:, :, None] * root[:, None, :]) / len(F) ** 0.5


def short_factor(F: Tensor) -> Tensor:
    """Cholesky factor with C-1 columns (the last one of the C is zero), by remaining mass.

    With ``q_c = sum_{i >= c} p_i``: diagonal ``sqrt(p_c q_{c+1} / q_c)``, below it
    ``-p_i sqrt(p_c / (q_c q_{c+1}))``.
    """
    p = F.softmax(1)
    q = p.flip(1).cumsum(1).flip(1)
    here, after = q[:, :-1], q[:, 1:]
    diagonal = (p[:, :-1] * after / here).sqrt()
    scale = (p[:, :-1] / (here * after)).sqrt()
    S = (-p[:, :, None] * scale[:, None, :]).tril(-1)
    S.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return S / len(F) ** 0.5


FACTORS = {"c": full_factor, "c-1": short_factor}


@dataclass
class Columns:
    """``K`` cotangents ``[N, C]``: one-hot in the sample (``blocks``) or dense (``dense``)."""

    blocks: Tensor | None = None  # [N, C, columns per sample]
    dense: Tensor | None = None  # [K, N, C]

    @property
    def count(self) -> int:
        """Number of cotangents K."""
        if self.dense is not None:
            return len(self.dense)
        assert self.blocks is not None
        return self.blocks.shape[0] * self.blocks.shape[2]

    def chunk(self, start: int, stop: int) -> Tensor:
        """Cotangents ``start`` to ``stop`` as ``[k, N, C]``."""
        if self.dense is not None:
            return self.dense[start:stop]
        assert self.blocks is not None
        N, C, per_sample = self.blocks.shape
        ks = torch.arange(start, stop, device=self.blocks.device)
        n, c = ks // per_sample, ks % per_sample
        out = self.blocks.new_zeros(stop - start, N, C)
        out[torch.arange(len(ks), device=ks.device), n] = self.blocks[n, :, c]
        return out


def exact_columns(F: Tensor, factor: str) -> Columns:
    """All columns of the exact factor."""
    return Columns(blocks=FACTORS[factor](F.detach()))


def gradient_columns(F: Tensor, loss_fn: nn.Module, y: Tensor) -> Columns:
    """One cotangent per sample, the loss gradient at that sample's output."""
    leaf = F.detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(loss_fn(leaf, y), leaf)
    return Columns(blocks=g.unsqueeze(2))


def random_columns(F: Tensor, factor: str, samples: int, generator: torch.Generator) -> Columns:
    """``samples`` whole-batch Rademacher mixtures of the exact factor's columns, over sqrt(M)."""
    S = FACTORS[factor](F.detach())
    signs = torch.randint(0, 2, (samples, S.shape[0], S.shape[2]), generator=generator)
    signs = (2 * signs - 1).to(S)
    return Columns(dense=torch.einsum("ncs,mns->mnc", S, signs) / samples**0.5)
