"""The systems of the sources that are not curvature: exact identities where theory has them."""

from __future__ import annotations

import math

import pytest
import torch
from lib import explosion, fisher, systems, transform
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("float64")


# --- explosion ------------------------------------------------------------------------------------


def test_gradient_norms_are_those_of_backward():
    X, y = systems.digits(8)
    net = explosion.residual(1, 6)
    found = explosion.gradient_norms(net, X, y)
    nn.functional.cross_entropy(net(X), y).backward()
    weights = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)]
    torch.testing.assert_close(found, torch.stack([w.grad.norm() for w in weights]))
    assert all(not layer._forward_hooks for layer in net.modules())


def test_homogeneity_hides_a_vanishing_signal_from_the_weights():
    """Without normalisation and biases <W, ∂L/∂W> is one number for all layers; towards the outputs PyTorch's
    initialisation shrinks gradients by √(1/6) per layer.
    """
    net = systems.mlp([64] * 13 + [1], "none", bias=False)
    X = torch.randn(32, 64)
    assert 0.9 < explosion.growth(explosion.gradient_norms(net, X)[:-1]) < 1.15
    rate = explosion.growth(explosion.gradient_norms(net, X, of="outputs")[:-1])
    assert abs(rate / math.sqrt(1 / 6) - 1) < 0.1


def test_growth_of_a_geometric_sequence():
    assert explosion.growth(torch.tensor([7.0, 8.0, 4.0, 2.0, 1.0, 7.0])) == pytest.approx(2)


def test_factors_of_a_batchnorm():
    """M of two samples is zero; the factors' product is the squared norm's ratio of the whole BatchNorm."""
    bn = nn.BatchNorm1d(3, eps=systems.TINY)
    scale, projection = explosion.bn_factors(nn.Sequential(bn), torch.randn(2, 3))
    assert float(projection) < 1e-20 < float(scale)
    X = 0.5 * torch.randn(20, 1)
    scale, projection = explosion.bn_factors(nn.Sequential(nn.BatchNorm1d(1, eps=systems.TINY)), X)
    torch.testing.assert_close(scale, 1 / X.var(0, correction=0))
    assert 0.5 < float(projection) < 1


def test_jacobian_values_of_one_batchnorm():
    bn, y = nn.BatchNorm1d(1, eps=0.1), torch.randn(9, 1)
    values = torch.linalg.svdvals(transform.jacobian(y[:, 0], 1.0, 0.1))
    torch.testing.assert_close(explosion.jacobian_values(bn, y), values, rtol=1e-10, atol=1e-14)


# --- Fisher matrix of wide networks ---------------------------------------------------------------


@pytest.mark.parametrize("case", [{}, {"hidden": True}, {"last": "bn"}, {"last": "mean"}, {"act": nn.Tanh}])
def test_largest_eigenvalue_of_the_fisher_matrix(case: dict):
    net, X = fisher.wide(6, 3, **case), torch.randn(5, 6)
    parameters = dict(net.named_parameters())

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(parameters, values, strict=True)), X)

    J = torch.autograd.functional.jacobian(outputs, tuple(parameters.values()))
    rows = torch.cat([j.flatten(2) for j in J], 2).flatten(0, 1)
    assert fisher.largest(net, X, 3) == pytest.approx(float(torch.linalg.svdvals(rows)[0] ** 2 / 5), rel=1e-10)
