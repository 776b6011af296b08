"""The systems of the sources that are not curvature: exact identities where theory has them."""

from __future__ import annotations

import math

import pytest
import torch
from lib import covariate_shift, decoupling, explosion, fisher, halfspaces, smoothness, systems, transform
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


# --- least squares, Rayleigh quotient -------------------------------------------------------------


def squares(d: int = 5) -> decoupling.LeastSquares:
    """A random problem of condition 9."""
    return decoupling.LeastSquares(decoupling.spd(torch.linspace(1, 9, d)), torch.randn(d))


def test_least_squares_identities():
    problem, w = squares(), torch.randn(5, requires_grad=True)
    S, u = problem.S, problem.u
    rho = problem.rho(w)
    assert problem.ends == pytest.approx((1, 9))
    gradient = problem.gradient(w.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(rho, w)[0])
    torch.testing.assert_close(problem.gap(w), rho + u @ torch.linalg.solve(S, u))
    dual = (w @ S @ w) * (gradient @ torch.linalg.solve(S, gradient)) / (4 * rho.abs())
    torch.testing.assert_close(dual, problem.gap(w), rtol=1e-10, atol=0)
    gamma = -(u @ w) / (w @ S @ w).sqrt()  # the best length
    v = gamma * w / (w @ S @ w).sqrt()
    torch.testing.assert_close(rho, 2 * u @ v + v @ S @ v)


def test_least_squares_steps():
    problem, w = squares(), torch.randn(5)
    expected = w - (w @ problem.S @ w) / (2 * 9 * problem.rho(w).abs()) * problem.gradient(w)
    torch.testing.assert_close(problem.step(w), expected)
    torch.testing.assert_close(problem.plain_step(problem.optimum), problem.optimum)
    assert problem.plain_gap(problem.plain_step(w)) < problem.plain_gap(w)


def test_covariance_and_what_batchnorm_leaves_of_it():
    H, w = decoupling.spd(torch.tensor([1.0, 2.0, 5.0])), torch.randn(3)
    X = decoupling.with_covariance(H, 7)
    torch.testing.assert_close(X.T @ X / 7, H)
    torch.testing.assert_close(X.mean(0), torch.zeros(3), rtol=0, atol=1e-12)
    reduced = decoupling.reduced(H, w)
    torch.testing.assert_close(reduced @ w, torch.zeros(3), rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(reduced)
    assert values[1] >= 1 - 1e-12 and values[2] <= 5 + 1e-12  # interlacing


def test_rayleigh_step_is_the_best_of_its_plane():
    A, B, w = decoupling.spd(torch.rand(4) + 1), decoupling.spd(torch.rand(4)), torch.randn(4)

    def quotient(v: Tensor) -> Tensor:
        return (v @ B @ v) / (v @ A @ v)

    after = decoupling.rayleigh_step(B, A, w)
    g = B @ w - quotient(w) * A @ w
    tried = max(float(quotient(w + t * g)) for t in torch.linspace(-50, 50, 2001))
    assert tried <= float(quotient(after)) + 1e-12 and tried == pytest.approx(float(quotient(after)), rel=1e-3)
    fixed = torch.linalg.eigh(B).eigenvectors[:, -1]
    assert decoupling.rayleigh_step(B, torch.eye(4), fixed).equal(fixed)


def test_bn_descent_is_gradient_descent():
    H, target, start = torch.diag(torch.tensor([1.0, 4.0])), torch.randn(2), torch.randn(2)
    X = decoupling.with_covariance(H, 9)
    w = start.clone().requires_grad_()
    y, normal = X @ target, X @ w / (X @ w).std(correction=0)
    loss = (y - (y @ normal.detach() / 9) * normal).square().mean() / 2
    end, J = decoupling.bn_descent(H, target, start[None], torch.tensor([0.3]), 1)
    assert float(J[0]) == pytest.approx(loss.item()) and len(J) == 2
    torch.testing.assert_close(end[0], start - 0.3 * torch.autograd.grad(loss, w)[0])
    H, target = torch.tensor([[2.0]]), torch.tensor([1.0])
    assert decoupling.plain_change(H, torch.tensor([3.0]), target, 0.25, 3) == pytest.approx(0.125)


# --- halfspaces -----------------------------------------------------------------------------------


def halfspace(d: int = 4) -> halfspaces.Halfspace:
    """Condition 3, uᵀ S⁻¹ u = 1/2."""
    S, u = decoupling.spd(torch.linspace(1, 3, d)), torch.randn(d)
    return halfspaces.Halfspace(u * (0.5 / (u @ torch.linalg.solve(S, u))).sqrt(), S)


def test_halfspace_gradients():
    data, w = halfspace(), (0.3 * torch.randn(4)).requires_grad_()
    torch.testing.assert_close(data.gradient(w), torch.autograd.grad(data.loss(w), w)[0], rtol=1e-8, atol=1e-10)
    gamma = torch.tensor(-1.3, requires_grad=True)
    by_w, by_gamma = torch.autograd.grad(data.loss(data.at(w, gamma)), (w, gamma))
    torch.testing.assert_close(data.slope(w, gamma), by_gamma, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(data.direction_gradient(w, gamma), by_w, rtol=1e-8, atol=1e-10)


def test_halfspace_samples_have_the_moments():
    data = halfspace()
    z = data.samples(200_000)
    torch.testing.assert_close(z.mean(0), data.u, rtol=0, atol=0.02)
    torch.testing.assert_close(z.T @ z / len(z), data.S, rtol=0, atol=0.06)
    with pytest.raises(ValueError, match="second moment"):
        halfspaces.Halfspace(2 * data.u, data.S)


def test_bisection_and_gdnp():
    data, w = halfspace(), torch.randn(4)
    gamma = halfspaces.bisection(data, w, 40, (-16.0, 16.0))
    assert abs(float(data.slope(w, gamma))) < 1e-9
    directions, lengths = halfspaces.gdnp(data, w, 1)
    squares = decoupling.LeastSquares(data.S, data.u)
    torch.testing.assert_close(directions[1], squares.step(w))  # the step is that of least squares
    assert len(lengths) == 2 and abs(float(data.slope(directions[1], lengths[1]))) < 1e-9


def test_one_hidden_layer():
    data = halfspace()
    layer = halfspaces.TanhLayer(data, torch.tensor([1.0, -0.5]))
    W = 0.3 * torch.randn(4, 2)
    free = W[:, 0].clone().requires_grad_()
    exact = torch.autograd.grad(layer.loss(torch.stack([free, W[:, 1]], 1)), free)[0]
    span = torch.cat([data.u[:, None], data.S @ W], 1)
    assert float(halfspaces.outside(exact, span).norm()) < 1e-6  # the quadrature's own error
    sampled = layer.sampled_gradients(W, data.samples(100_000))
    assert bool(((sampled.mean(0) - exact).abs() < 5 * sampled.std(0) / 100_000**0.5).all())
    torch.testing.assert_close(
        halfspaces.outside(torch.tensor([1.0, 2.0]), torch.tensor([[2.0], [0.0]])), torch.tensor([0.0, 2.0])
    )


# --- covariate shift ------------------------------------------------------------------------------


def test_gaussian_kl_and_moment_distance():
    x = torch.randn(50, 3)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    moved = 2 * x + 1
    assert covariate_shift.gaussian_kl(x, x) == pytest.approx(0, abs=1e-12)
    p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.0, 2.0)
    assert covariate_shift.gaussian_kl(x, moved) == pytest.approx(float(torch.distributions.kl_divergence(p, q)))
    assert covariate_shift.gaussian_kl(moved, x) == pytest.approx(float(torch.distributions.kl_divergence(q, p)))
    assert covariate_shift.moment_distance(moved, x) == pytest.approx(math.sqrt(2))
    dead, alive = torch.zeros(50, 1), torch.randn(50, 1)  # a unit without variance does not count
    for first, second in ((dead, alive), (alive, dead)):
        kl = covariate_shift.gaussian_kl(torch.cat([x, first], 1), torch.cat([moved, second], 1))
        assert kl == pytest.approx(covariate_shift.gaussian_kl(x, moved))


def test_preactivations_stand_behind_the_batchnorm():
    net, (X, _) = systems.mlp([64, 5, 10]).train(), systems.digits(20)
    (seen,) = covariate_shift.preactivations(net, X)
    torch.testing.assert_close(seen, net[:2](X))
    assert all(not m._forward_pre_hooks for m in net.modules())


def test_noisy_batchnorm():
    layer, x = covariate_shift.NoisyBatchNorm(4), torch.randn(30, 4)
    quiet = nn.BatchNorm1d(4)(x)
    one, two = layer(x), layer(x)
    scale = one.std(0) / quiet.std(0)
    assert bool(((scale >= 1) & (scale <= 1.5)).all()) and float(one.detach().mean(0).abs().max()) <= 0.5
    assert not one.equal(two)
    torch.testing.assert_close(one, scale * quiet + one.mean(0))
    assert layer.eval()(x).equal(layer(x))


@pytest.mark.parametrize("bn", [True, False])
def test_gradient_shift_is_a_step_of_descent(bn: bool):
    """It moves the network as one step does, and sees the layers below moved and the others not."""
    weights = [torch.randn(4, 64), torch.randn(4, 4), torch.randn(10, 4)]
    data = systems.digits(12)
    net, other = (covariate_shift.linear_net(weights, bn).train() for _ in range(2))
    assert len(net) == (5 if bn else 3) and net[-1].weight.equal(weights[2])
    cosines, changes = covariate_shift.gradient_shift(net, data, 0.01)
    last = nn.functional.cross_entropy(other(data[0]), data[1])
    G = torch.autograd.grad(last, other[-1].weight)[0]
    held = [p.detach().clone() for p in other[-1].parameters()]
    systems.train(other, data, 1, 0.01)
    torch.testing.assert_close(dict(net.named_parameters()), dict(other.named_parameters()))
    with torch.no_grad():
        for p, value in zip(other[-1].parameters(), held, strict=True):
            p.copy_(value)
    moved = torch.autograd.grad(nn.functional.cross_entropy(other(data[0]), data[1]), other[-1].weight)[0]
    assert len(cosines) == 2 and float(changes[-1]) == pytest.approx(float((G - moved).norm() / G.norm()))
    assert float(cosines[-1]) == pytest.approx(float(torch.cosine_similarity(G.flatten(), moved.flatten(), dim=0)))


def test_movement_of_a_network_that_stands_still():
    net, data = systems.mlp([64, 5, 10]).train(), systems.digits(40)
    assert covariate_shift.movement(net, data, 0.0, 2) == 0 < covariate_shift.movement(net, data, 0.1, 2)


def test_steps_to():
    net, data = systems.mlp([64, 16, 10]).train(), systems.digits(100)
    assert systems.steps_to(net, data, 0.0, 0.3, most=10) == 0
    assert systems.steps_to(net, data, 1.1, 0.3, most=10, batch_size=50) == 10
    net = systems.mlp([64, 16, 10]).train()
    steps = systems.steps_to(net, data, 0.9, 0.3, most=200, batch_size=50)
    assert 0 < steps < 200 and steps % 5 == 0 and systems.accuracy(net, data) >= 0.9


# --- smoothness -----------------------------------------------------------------------------------


def test_gradient_bound_is_reached():
    y, g = torch.randn(9), torch.randn(9)
    through = transform.jacobian(y, 1.7, 0.0) @ g
    assert float(smoothness.gradient_bound(g, y, 1.7)) == pytest.approx(float(through @ through))


def test_isometry_is_the_worst_input():
    X, v = smoothness.isometry(4, 7, 3.0), torch.randn(4)
    torch.testing.assert_close(X @ X.T, 9 * torch.eye(4), rtol=0, atol=1e-12)
    assert float((X.T @ v).norm()) == pytest.approx(3 * float(v.norm()))


def test_printed_weight_bound():
    y, g = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 3.0])  # ŷ = y, <g, ŷ> = -2, ‖g‖² = 10, mean 2
    assert float(smoothness.printed_weight_bound(g, y, 1.0, 2.0)) == pytest.approx(40**2 - 2 * 4 - 4 * 4)


def test_nearest_rescaling():
    target, start = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 5.0])
    assert smoothness.nearest_rescaling(target, start).tolist() == [1, 0]
    assert smoothness.nearest_rescaling(target, -start).tolist() == [0, 0]


def test_along_gradient():
    net, data = systems.mlp([64, 5, 10]).train(), systems.digits(30)
    before = [p.detach().clone() for p in net.parameters()]

    def loss_and_gradient() -> tuple[float, Tensor]:
        loss = nn.functional.cross_entropy(net(data[0]), data[1])
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    found = smoothness.along_gradient(net, data, [0.1, 0.5])
    assert all(p.equal(old) for p, old in zip(net.parameters(), before, strict=True))
    _, here = loss_and_gradient()
    seen = []
    for size in (0.1, 0.4):  # the second goes on in the first one's direction
        with torch.no_grad():
            for p, g in zip(net.parameters(), here.split([p.numel() for p in net.parameters()]), strict=True):
                p -= size * g.view_as(p)
        seen.append(loss_and_gradient())
    changes = [float((here - g).norm()) for _, g in seen]
    assert found["range"] == pytest.approx(abs(seen[0][0] - seen[1][0]))
    assert found["change"] == pytest.approx(max(changes))
    assert found["beta"] == pytest.approx(max(changes[0] / 0.1, changes[1] / 0.5) / float(here.norm()))
