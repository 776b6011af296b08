"""`LowRank` itself: Lanczos on the rows, orthonormal eigenvectors, steps along directions, draws, samples of a row."""

import gc
import weakref

import pytest
import torch
from torch import nn

from bncurv import GGN, LowRankGGN, MatrixFreeGGN, curvature
from bncurv.budget import Budget
from bncurv.lowrank import LowRank, rows
from bncurv.lowrank.matrix import RowMatrix, orthonormal

NETS = {"wide": 8, "tall": 40}  # samples: K ≤ D and K > D


def problem(samples, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return model, nn.CrossEntropyLoss(), (torch.randn(samples, 4, dtype=dtype), torch.randint(3, (samples,)))


def low_rank(samples, dtype=torch.float64, **options):
    return curvature(*problem(samples, dtype), LowRankGGN(**options)).ggn


def rounding(e):
    return float((e.T @ e - torch.eye(e.shape[1], dtype=e.dtype)).abs().max()) / torch.finfo(e.dtype).eps


def test_two_final_classes():
    assert issubclass(LowRank, GGN) and issubclass(MatrixFreeGGN, GGN) and not issubclass(MatrixFreeGGN, LowRank)
    with pytest.raises(TypeError, match="abstract"):
        GGN({}, 0, torch.zeros(1), None)


@pytest.mark.parametrize("samples", NETS.values(), ids=NETS)
def test_lanczos_on_the_rows(samples, monkeypatch):
    full, calls, eigenpairs = low_rank(samples), [], rows.eigenpairs
    monkeypatch.setattr(rows, "DIRECT_SIZE", 0)
    monkeypatch.setattr(rows, "eigenpairs", lambda *args: calls.append(args[1]) or eigenpairs(*args))
    top = low_rank(samples, top=3, matrix_free=False)
    assert (full.components > full.dim) == (samples == 40)
    assert torch.allclose(top.eigenvalues, full.eigenvalues[:3], rtol=1e-9)
    assert torch.allclose(top.unit_vectors().abs(), full.unit_vectors(3).abs(), rtol=1e-6, atol=1e-8)
    assert calls == [min(full.components, full.dim)]
    assert float(top.residuals().max()) <= 1e-8 * float(top.eigenvalues[0])
    for damping in (0.1, lambda values: values + 1):
        step, want = top.newton_step(damping, 2), full.newton_step(damping, 2)
        assert torch.allclose(top.flatten(step), full.flatten(want), rtol=1e-6, atol=1e-9)
    assert "_fine" not in vars(top)  # the small matrix is not decomposed
    assert top.flatten(top.newton_step(0.1)).equal(full.flatten(full.newton_step(0.1)))  # the whole space


@pytest.mark.parametrize("top, iterative", [(1, True), (4, True), (5, False), (None, False), (99, False)])
def test_a_large_part_of_the_spectrum_is_decomposed_directly(top, iterative, monkeypatch):
    monkeypatch.setattr(rows, "DIRECT_SIZE", 15)
    ggn = low_rank(NETS["wide"], top=top, matrix_free=False)
    assert ggn.components == 16 and ggn._iterative == iterative
    assert ggn.rank == min(top or 99, low_rank(NETS["wide"]).rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_eigenvectors_are_orthonormal_down_to_the_cutoff(dtype, seed):
    """The settings of ViViT's tests, with eigenvalues of all sizes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 5), nn.Sigmoid()).to(dtype)
    batch = torch.rand(5, 7, dtype=dtype), torch.rand(5, 5, dtype=dtype)
    ggn = curvature(model, nn.MSELoss(), batch, LowRankGGN()).ggn
    assert rounding(ggn.unit_vectors()) <= 16
    assert torch.allclose(ggn.unit_vectors()[:, :3], ggn.unit_vectors(3), atol=1e-6)
    assert float(ggn.residuals().max()) <= 8 * ggn.cutoff


@pytest.mark.parametrize("smallest", [1e-3, 1e-5])
def test_eigenvectors_near_the_cutoff(smallest):
    """Singular values close together near the square root of an ulp: Gram-Schmidt makes their vectors orthogonal."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 12))[0] for n in (12, 40))
    V = (left * torch.tensor([1.0, 0.5] + [smallest] * 10)) @ right.T
    ggn = LowRank({"a": V}, torch.ones(12), samples=torch.arange(12))
    assert rounding(ggn.unit_vectors()) <= 16
    e = ggn.unit_vectors()
    assert float((ggn @ e - e * ggn.eigenvalues).norm(dim=0).max()) <= 2 * ggn.cutoff


KEPT = {  # directions=, and their indices, 0 for the largest eigenvalue
    "all": (None, range(16)),
    "leading": (2, range(2)),
    "criterion": (lambda ascending: [0, len(ascending) - 1], [15, 0]),
    "none": (lambda ascending: [], []),
}
DAMPINGS = {
    "tensor": lambda values: torch.arange(1.0, 1 + len(values)).double(),
    "callable": lambda values: 0.1 + values**2,
    "constant": lambda values: torch.full_like(values, 0.1),
}


@pytest.mark.parametrize("mixing", [0.01, 100.0])
def test_orthonormal_is_gram_schmidt(mixing):
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(9, 4).double())[0] * torch.tensor([1, -1, -1, 1])
    R = torch.eye(4).double() + mixing * torch.randn(4, 4).double().triu(1)
    assert torch.allclose(orthonormal(Q @ R), Q, rtol=0, atol=1e-10)
    assert rounding(orthonormal(Q @ R)) <= 16
    assert orthonormal(Q[:, :0]).shape == (9, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 12), (12, 5)], ids=NETS)
def test_products_in_blocks(shape, dtype, monkeypatch):
    """Rows are converted to float64 block by block."""
    monkeypatch.setattr("bncurv.lowrank.matrix.USUAL", Budget(row=3 * 8 * 4))
    torch.manual_seed(0)
    V = torch.randn(shape, dtype=dtype)
    matrix, wide = RowMatrix({"a": V[:, :3].view(-1, 3, 1), "b": V[:, 3], "c": V[:, 4:]}), V.double()
    v, u = (torch.randn(n, 2, dtype=torch.float64) for n in (shape[1], shape[0]))
    small = wide @ wide.T if shape == (5, 12) else wide.T @ wide
    assert torch.allclose(matrix.up(v), wide @ v) and torch.allclose(matrix.down(u), wide.T @ u)
    assert torch.allclose(matrix.gram(torch.float64), small)
    assert torch.allclose(matrix.gram(dtype), small.to(dtype), rtol=1e-5, atol=1e-5)
    assert matrix.up(v.to(dtype)).dtype == matrix.down(u[:, 0].to(dtype)).dtype == dtype


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("directions", KEPT)
def test_newton_steps_along_directions(directions, damping):
    """By the formula: -Σ_d γ_d / (λ_d + δ_d) e_d."""
    ggn, (directions, index) = low_rank(NETS["wide"]), KEPT[directions]
    e, values, gamma = ggn.unit_vectors()[:, index], ggn.eigenvalues[index], ggn.slopes().sum(0)[index]
    delta = DAMPINGS[damping](values)
    given = {"tensor": delta, "callable": DAMPINGS[damping], "constant": 0.1}[damping]
    got = ggn.flatten(ggn.newton_step(given, directions))
    assert torch.allclose(got, -e @ (gamma / (values + delta)), rtol=1e-8, atol=1e-12)


def test_a_constant_damping_may_be_a_tensor():
    ggn = low_rank(NETS["wide"])
    want = ggn.flatten(ggn.newton_step(0.25))
    assert torch.equal(ggn.flatten(ggn.newton_step(torch.tensor(0.25))), want)
    v = torch.randn(ggn.dim).double()
    assert torch.equal(ggn.solve(v, torch.tensor(0.25)), ggn.solve(v, 0.25))


MISTAKES = {
    "too many": (lambda g: g.newton_step(0.1, g.rank + 1), r"17 eigenvectors asked for, but .* Ask for at most 16"),
    "none": (lambda g: g.eigenvectors(0), "0 eigenvectors asked for"),
    "index": (lambda g: g.newton_step(0.1, lambda v: [16]), r"gave the indices \[16\]; expected some of 0 … 15"),
    "negative index": (lambda g: g.newton_step(0.1, lambda v: [-1]), r"indices \[-1\]; expected some of 0 … 15"),
    "length": (lambda g: g.newton_step(torch.ones(3), 2), r"damping has shape \(3,\); expected one value for each"),
    "zero": (lambda g: g.newton_step(0), "damping=0; expected a positive number"),
    "one negative": (lambda g: g.newton_step(lambda v: v - 99, 2), r"damping=\[.*\]; expected positive numbers"),
    "nan": (lambda g: g.solve(torch.ones(g.dim).double(), float("nan")), "damping=nan; expected a positive number"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call(low_rank(NETS["wide"]))


@pytest.mark.parametrize("samples", NETS.values(), ids=NETS)
def test_draws(samples):
    """Independent from call to call, repeatable under a seed or a generator, with the covariance (G + δ I)⁻¹."""
    ggn = low_rank(samples)

    def draw(generator=None, count=2):
        return torch.cat([t.flatten(1) for t in ggn.sample(0.3, count, generator).values()], 1)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.allclose(first, second)
    assert torch.equal(draw(torch.Generator().manual_seed(5)), draw(torch.Generator().manual_seed(5)))
    assert ggn.sample(0.3, 4)["0.weight"].shape == (4, 5, 4)
    x = draw(torch.Generator().manual_seed(0), 40000)
    want = ggn.solve(torch.eye(ggn.dim, dtype=ggn.dtype), 0.3)
    assert float((x.T @ x / len(x) - want).norm()) <= 0.05 * float(want.norm())
    e = ggn.unit_vectors(1)[:, 0]  # the direction that is pulled in most
    assert float((x @ e).var()) == pytest.approx(1 / (float(ggn.eigenvalues[0]) + 0.3), rel=0.05)


@pytest.mark.parametrize("saturated", [False, True])
def test_mini_batches_with_different_numbers_of_columns(saturated):
    """Images of different sizes: the rows of a sample are its own, and the gradients sum to the loss'."""
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1)
    sizes = [(2, 4), (3, 2)]  # samples, width
    data = [(torch.randn(n, 2, w, w), torch.randint(3, (n, w, w))) for n, w in sizes]
    if saturated:
        data[1][0].mul_(1e3)
    ggn = curvature(model, nn.CrossEntropyLoss(reduction="sum"), data, LowRankGGN()).ggn
    assert (ggn._weights is None) == saturated
    assert ggn.components == 2 * 16 * 2 + 3 * 4 * 2
    e = ggn.unit_vectors(2)
    got, slopes = ggn.curvatures(2), ggn.slopes(2)
    start = 0
    for X, y in data:
        one = curvature(model, nn.CrossEntropyLoss(reduction="sum"), (X, y), LowRankGGN()).ggn
        stop = start + len(X)
        assert torch.allclose(got[start:stop].sum(0), ((one @ e) * e).sum(0), rtol=1e-4, atol=1e-4)
        assert torch.allclose(slopes[start:stop].sum(0), one.gradient @ e, rtol=1e-4, atol=1e-3)
        start = stop
    loss = sum(nn.functional.cross_entropy(model(X), y, reduction="sum") for X, y in data)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert torch.allclose(ggn.gradient, want, rtol=1e-4, atol=1e-3)


def test_a_gradient_outside_the_factors_range():
    """Saturated outputs in float32: no curvature left, but a gradient."""
    torch.manual_seed(0)
    model, X, y = nn.Linear(4, 3), 1e3 * torch.randn(8, 4), torch.randint(3, (8,))
    ggn = curvature(model, nn.CrossEntropyLoss(), (X, y), LowRankGGN()).ggn
    loss = nn.functional.cross_entropy(model(X), y)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert ggn._weights is None and float(want.norm()) > 1
    assert torch.allclose(ggn.gradient, want, rtol=1e-5)
    step = ggn.flatten(ggn.newton_step(2.0))
    assert torch.allclose(ggn @ step + 2 * step, -want, rtol=1e-4, atol=1e-3)
    along = ggn.flatten(ggn.newton_step(lambda values: values + 1))
    e = ggn.unit_vectors()
    assert torch.allclose(along, -e @ ((e.T @ want) / (2 * ggn.eigenvalues + 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e-17, 1e17, 1e18])
@pytest.mark.parametrize("shape", [(5, 12), (12, 5)], ids=NETS)
def test_squares_outside_of_float32s_range(shape, scale):
    """Eigenvalues and vectors as accurate as the rows, as long as float32 can hold them."""
    torch.manual_seed(0)
    V = torch.randn(shape, dtype=torch.float64)
    ggn = LowRank({"a": (scale * V).float()}, torch.ones(len(V)), samples=torch.arange(len(V)))
    want = torch.linalg.svdvals(V)
    held = scale**2 * want**2 > 1e-37
    assert torch.allclose(ggn._values[held].double(), scale**2 * want[held] ** 2, rtol=1e-4)
    assert float(ggn.trace) == pytest.approx(float((scale**2 * want**2).sum()), rel=1e-5, abs=1e-44)
    assert float(ggn.frobenius_norm) == pytest.approx(float(scale**2 * (want**4).sum().sqrt()), rel=1e-5, abs=1e-44)
    if scale > 1:
        assert ggn.rank == 5 and rounding(ggn.unit_vectors()) <= 16


@pytest.mark.parametrize("use", ["product", "solve"])
def test_vectors_that_require_grad(use):
    """Parameters themselves, say."""
    ggn = low_rank(NETS["wide"])
    v = {name: torch.randn(p).double().requires_grad_() for name, p in ggn.shapes.items()}
    f = {"product": lambda v: ggn @ v, "solve": lambda v: ggn.solve(v, 0.1)}[use]
    want = f({name: t.detach() for name, t in v.items()})
    assert all(torch.equal(got.detach(), want[name]) for name, got in f(v).items())


def test_another_default_device():
    ggn, v = low_rank(NETS["wide"]), torch.ones(53).double()
    with torch.device("meta"):
        assert (ggn @ v).device == ggn.solve(v, 0.1).device == ggn.eigenvalues.device == v.device
        assert ggn.newton_step(0.1, 2)["0.weight"].device == ggn.sample(0.1)["0.weight"].device == v.device
        assert ggn.density(3, 1)[0].device == ggn.slopes(2).device == v.device


def test_weights_need_the_samples():
    with pytest.raises(ValueError, match=r"weights of V's rows; pass samples too"):
        LowRank({"a": torch.ones(2, 3)}, torch.ones(2))


def test_nothing_keeps_the_rows_alive():
    """No circle of references: V goes when the last name of it goes."""
    ggn = low_rank(NETS["wide"])
    ggn.solve(torch.ones(ggn.dim).double(), 0.1), ggn.eigenvectors(2)
    reference = weakref.ref(ggn._V)
    gc.disable()
    try:
        del ggn
        assert reference() is None
    finally:
        gc.enable()
