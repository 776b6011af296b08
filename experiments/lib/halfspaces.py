"""Learning halfspaces with Gaussian inputs, and gradient descent in length and direction (Kohler et al. 2019).

z = -y x is Gaussian with mean u and E[z zᵀ] = S; the loss is f(w̃) = E φ(zᵀ w̃), with the softplus as φ (logistic
regression). Only m = uᵀ w̃ and s² = w̃ᵀ S w̃ - m² enter, so expectations are one-dimensional quadratures. Stein's lemma:
∇f = c₁ u + c₂ S w̃ with c₁ = E φ' - E φ'' (uᵀ w̃) and c₂ = E φ''.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache
def gauss_hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[nodes]`` of expectations over a standard normal."""
    x, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.as_tensor(x), torch.as_tensor(weights / math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class Halfspace:
    """The problem, by u ``[d]`` and S ``[d, d]``; uᵀ S⁻¹ u < 1, or S would be no second moment."""

    u: Tensor
    S: Tensor
    nodes: int = 60

    def __post_init__(self) -> None:
        share = float(self.u @ torch.linalg.solve(self.S, self.u))
        if share >= 1:
            raise ValueError(f"uᵀ S⁻¹ u = {share:.3g}; S is the second moment of z with mean u only if it is below 1.")

    def expectation(self, function: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
        """E function(zᵀ w)."""
        x, weights = gauss_hermite(self.nodes)
        mean = self.u @ w
        return weights @ function(mean + (w @ self.S @ w - mean**2).sqrt() * x)

    def loss(self, w: Tensor) -> Tensor:
        """f(w)."""
        return self.expectation(torch.nn.functional.softplus, w)

    def coefficients(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """c₁ and c₂."""
        second = self.expectation(lambda t: torch.sigmoid(t) * torch.sigmoid(-t), w)
        return self.expectation(torch.sigmoid, w) - second * (self.u @ w), second

    def gradient(self, w: Tensor) -> Tensor:
        """∇f(w)."""
        first, second = self.coefficients(w)
        return first * self.u + second * (self.S @ w)

    def samples(self, n: int) -> Tensor:
        """Random z ``[n, d]``."""
        low = torch.linalg.cholesky(self.S - torch.outer(self.u, self.u))
        return self.u + torch.randn(n, len(self.u)) @ low.T

    def length(self, w: Tensor) -> Tensor:
        """‖w‖_S."""
        return (w @ self.S @ w).sqrt()

    def at(self, w: Tensor, gamma: Tensor | float) -> Tensor:
        """w̃ = γ w/‖w‖_S."""
        return gamma * w / self.length(w)

    def slope(self, w: Tensor, gamma: Tensor | float) -> Tensor:
        """∂f/∂γ at (w, γ): E φ'(γ t) t with t = zᵀ w/‖w‖_S, which grows with γ, in the quadrature too."""
        return self.expectation(lambda t: torch.sigmoid(gamma * t) * t, w / self.length(w))

    def direction_gradient(self, w: Tensor, gamma: Tensor | float) -> Tensor:
        """∇_w f(γ w/‖w‖_S): orthogonal to w."""
        g = self.gradient(self.at(w, gamma))
        return gamma / self.length(w) * (g - (g @ w) / (w @ self.S @ w) * (self.S @ w))


def bisection(problem: Halfspace, w: Tensor, steps: int, ends: tuple[float, float]) -> float:
    """γ with ∂f/∂γ = 0 between the ends, to (b - a)/2^(steps + 1); the middle of the last interval."""
    low, high = ends
    for _ in range(steps):
        middle = (low + high) / 2
        if float(problem.slope(w, middle)) > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def gdnp(
    problem: Halfspace, w: Tensor, steps: int, bisections: int = 45, ends: tuple[float, float] = (-16.0, 16.0)
) -> tuple[list[Tensor], list[float]]:
    """Gradient descent in normalised parametrisation: a step in the direction, then γ by bisection.

    The step is s = -‖w‖_S³/(L γ h) with h = c₁ (uᵀ w), along ∇_w f; where h = 0 the direction stays.

    Returns:
        w and γ at t = 0 ... steps.
    """
    largest = torch.linalg.eigvalsh(problem.S)[-1]
    directions, lengths = [w], [bisection(problem, w, bisections, ends)]
    for _ in range(steps):
        gamma = lengths[-1]
        h = problem.coefficients(problem.at(w, gamma))[0] * (problem.u @ w)
        if float(h * gamma) != 0:
            step = -(problem.length(w) ** 3) / (largest * gamma * h)
            w = w - step * problem.direction_gradient(w, gamma)
        directions.append(w)
        lengths.append(bisection(problem, w, bisections, ends))
    return directions, lengths


# --- one hidden layer of tanh ---------------------------------------------------------------------


@dataclass(frozen=True)
class TanhLayer:
    """f(W) = E softplus(Σ_i θ_i tanh(zᵀ w_i)), W ``[d, m]``: one hidden layer of tanh on halfspace data.

    tanh is odd, so that -y F(x) = F(z).
    """

    data: Halfspace
    theta: Tensor
    nodes: int = 24

    def loss(self, W: Tensor) -> Tensor:
        """By quadrature over the m-dimensional Gaussian Wᵀ z."""
        x, weights = gauss_hermite(self.nodes)
        m = W.shape[1]
        grid = torch.cartesian_prod(*[x] * m).view(-1, m)
        weight = torch.cartesian_prod(*[weights] * m).view(-1, m).prod(1)
        covariance = self.data.S - torch.outer(self.data.u, self.data.u)
        inputs = self.data.u @ W + grid @ torch.linalg.cholesky(W.T @ covariance @ W).T
        return weight @ torch.nn.functional.softplus(torch.tanh(inputs) @ self.theta)

    def sampled_gradients(self, W: Tensor, z: Tensor) -> Tensor:
        """Gradients towards the first unit, one per sample of z: ``[n, d]``."""
        hidden = torch.tanh(z @ W)
        outer = torch.sigmoid(hidden @ self.theta) * self.theta[0] * (1 - hidden[:, 0] ** 2)
        return outer[:, None] * z


def outside(vectors: Tensor, span: Tensor) -> Tensor:
    """What of the vectors ``[..., d]`` lies outside the span of the columns of ``[d, k]``."""
    Q = torch.linalg.qr(span).Q
    return vectors - vectors @ Q @ Q.T
