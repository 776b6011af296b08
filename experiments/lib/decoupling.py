"""Length and direction apart: least squares and the Rayleigh quotient under BatchNorm.

Population quantities (Kohler et al. 2019, Cai et al. 2019): S = E[x xᵀ] with eigenvalues in [μ, L], u = E[-y x],
‖w‖_S² = wᵀ S w. A BatchNorm unit is γ wᵀx/‖w‖_S; w̃ = γ w/‖w‖_S. With γ at its optimum, least squares is the
minimisation of ρ(w) = -(uᵀw)²/(wᵀ S w), whose minimum is ρ* = -uᵀ S⁻¹ u.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def spd(eigenvalues: Tensor) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues))).Q
    return Q * eigenvalues @ Q.T


@dataclass(frozen=True)
class LeastSquares:
    """E[(y - xᵀ w̃)²] by its moments S ``[d, d]`` and u ``[d]``."""

    S: Tensor
    u: Tensor

    @property
    def ends(self) -> tuple[float, float]:
        """μ and L."""
        eigenvalues = torch.linalg.eigvalsh(self.S)
        return float(eigenvalues[0]), float(eigenvalues[-1])

    @property
    def optimum(self) -> Tensor:
        """w̃* = -S⁻¹ u."""
        return -torch.linalg.solve(self.S, self.u)

    def rho(self, w: Tensor) -> Tensor:
        """ρ(w)."""
        return -((self.u @ w) ** 2) / (w @ self.S @ w)

    def gap(self, w: Tensor) -> Tensor:
        """ρ(w) - ρ*, without cancellation: ‖w̃ - w̃*‖_S² at γ's optimum."""
        off = -(self.u @ w) / (w @ self.S @ w) * w - self.optimum
        return off @ self.S @ off

    def gradient(self, w: Tensor) -> Tensor:
        """∇ρ(w)."""
        return -2 * ((self.u @ w) * self.u + self.rho(w) * (self.S @ w)) / (w @ self.S @ w)

    def step(self, w: Tensor) -> Tensor:
        """Gradient step of length ‖w‖_S²/(2 L |ρ(w)|), for which the rate is proved."""
        return w - (w @ self.S @ w) / (2 * self.ends[1] * self.rho(w).abs()) * self.gradient(w)

    def plain_step(self, w: Tensor) -> Tensor:
        """Gradient descent without BatchNorm, step 1/L on half the loss."""
        return w - (self.u + self.S @ w) / self.ends[1]

    def plain_gap(self, w: Tensor) -> Tensor:
        """Loss above its minimum."""
        return (w - self.optimum) @ self.S @ (w - self.optimum)


def reduced(H: Tensor, w: Tensor) -> Tensor:
    """Cai's H* = H - H w wᵀ H/(wᵀ H w): what BatchNorm leaves of the covariance H; one eigenvalue is 0."""
    return H - torch.outer(H @ w, H @ w) / (w @ H @ w)


def with_covariance(H: Tensor, n: int) -> Tensor:
    """Random inputs ``[n, d]`` of mean 0 and covariance exactly H (over n)."""
    X = torch.randn(n, len(H))
    X = X - X.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(X.T @ X / n)).T
    return X @ whitening @ torch.linalg.cholesky(H).T


def rayleigh_step(B: Tensor, A: Tensor, w: Tensor) -> Tensor:
    """Gradient ascent on wᵀ B w/wᵀ A w with the best step: the maximum over span{w, gradient}."""
    rho = (w @ B @ w) / (w @ A @ w)
    g = B @ w - rho * (A @ w)
    if float(g.norm()) <= 1e-14 * float((B @ w).norm()):
        return w
    plane = torch.linalg.qr(torch.stack([w, g], 1)).Q
    low = torch.linalg.inv(torch.linalg.cholesky(plane.T @ A @ plane))
    vectors = torch.linalg.eigh(low @ plane.T @ B @ plane @ low.T).eigenvectors
    best = plane @ low.T @ vectors[:, -1]
    return best / best.norm()


def bn_descent(
    H: Tensor, target: Tensor, w: Tensor, lr: Tensor, steps: int, enough: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradient descent on J(a, w) = E[(y - a xᵀw/σ)²]/2 with a at its optimum in every step, σ² = wᵀ H w.

    Args:
        H: covariance of x ``[d, d]``; y = xᵀ target, so that min J = 0.
        target: ``[d]``.
        w: starting points ``[k, d]``.
        lr: learning rates ``[k]``, one per starting point.
        steps: at most so many.
        enough: stop when all values of J are below this share of their first ones.

    Returns:
        w at the end ``[k, d]``, and J before each step and at the end ``[steps + 1, k]``.
    """
    values: list[Tensor] = []
    covariance = H @ target
    for _ in range(steps + 1):
        Hw = w @ H
        variance = (w * Hw).sum(1, keepdim=True)
        scale = (w @ covariance)[:, None] / variance  # a/σ
        off = scale * w - target
        values.append(((off @ H) * off).sum(1) / 2)
        if len(values) > steps or bool((values[-1] <= enough * values[0]).all()):
            break
        w = w + lr[:, None] * scale * (covariance - scale * Hw)
    return w, torch.stack(values)


def plain_change(H: Tensor, start: Tensor, target: Tensor, lr: float, steps: int = 2000) -> float:
    """Distance to the optimum after so many steps of plain gradient descent, relative to the first."""
    off = start - target
    for _ in range(steps):
        off = off - lr * (H @ off)
    return float(off.norm() / (start - target).norm())
