"""(G + δ I)⁻¹ and its kin over twelve decades of damping, against sixty digits."""

import copy

import mpmath
import pytest
import torch
from torch import nn

from bncurv import LowRankGGN, curvature
from bncurv.lowrank import LowRank

DAMPINGS = [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 100.0]
SHAPES = {"wide": (5, 11), "tall": (11, 5), "square": (7, 7)}
mpmath.mp.dps = 60


def matrix(t):
    return mpmath.matrix(t.double().tolist())


def rows(shape, smallest, dtype):
    """V with singular values 1 … ``smallest``, [K, D]."""
    torch.manual_seed(0)
    rank = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in shape)
    return ((left * torch.logspace(0, torch.tensor(smallest).log10(), rank)) @ right.T).to(dtype)


def low_rank(V, w):
    """Of two parameters, one of them a scalar."""
    return LowRank({"a": V[:, 1:], "b": V[:, 0]}, w, samples=torch.arange(len(V)))


def exact(V, right, damping):
    """(VᵀV + δ)⁻¹ right, columns of ``right [D, m]``."""
    A = matrix(V).T * matrix(V) + mpmath.mpf(damping) * mpmath.eye(V.shape[1])
    columns = [mpmath.lu_solve(A, right[:, i]) for i in range(right.cols)]
    return torch.tensor([[float(x) for x in c] for c in columns], dtype=torch.float64).T


def error(got, want):
    return float(((got.double() - want).norm(dim=0) / want.norm(dim=0)).max())


def flat(ggn, step):
    return ggn.flatten(step)[:, None]


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("smallest", [0.1, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_sides_outside_the_range_and_mixed(dtype, shape, smallest, damping):
    V = rows(SHAPES[shape], smallest, dtype)
    V = torch.cat([V[:, -1:], V[:, :-1]], 1)
    ggn, u = low_rank(V, torch.randn(len(V), dtype=dtype)), torch.randn(V.shape[1], 3, dtype=dtype)
    u[:, 1] = V.T @ torch.randn(len(V), dtype=dtype) + 1e-3 * u[:, 1]
    order = [*range(1, V.shape[1]), 0]  # "a" before "b"
    got = ggn.solve(u[order], damping)
    want = exact(V, matrix(u), damping)[order]
    tolerance = {torch.float32: 3e-7, torch.float64: 1e-12}[dtype]
    assert error(got, want) <= tolerance


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("smallest", [0.1, 1e-2, 1e-7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_in_the_range(dtype, shape, smallest, damping):
    """newton_step knows the weights of V's rows; solve has the gradient's rounding times its condition number."""
    V, w = rows(SHAPES[shape], smallest, dtype), torch.randn(SHAPES[shape][0], dtype=dtype)
    ggn = LowRank({"a": V}, w, samples=torch.arange(len(V)))
    want = exact(V, matrix(V).T * matrix(w), damping)
    ulp = torch.finfo(dtype).eps
    lost = 4e-6 if dtype == torch.float32 else 0.0  # singular values below 8 ulp are taken for rounding
    bound = 10 * ulp * (1 + (smallest**2 + damping) ** -0.5) + lost / damping**0.5
    assert error(-flat(ggn, ggn.newton_step(damping)), want) <= bound
    inside = 10 * ulp * (1 + 1 / (max(smallest, lost) ** 2 + damping)) + lost / damping**0.5
    assert error(ggn.solve(ggn.gradient[:, None], damping), want) <= inside


def network(loss_fn, samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    y = torch.randint(4, (samples,)) if isinstance(loss_fn, nn.CrossEntropyLoss) else torch.randn(samples, 4)
    return model, loss_fn, torch.randn(samples, 6), y


def wide(model, loss_fn, X, y):
    """The same in float64."""
    return copy.deepcopy(model).double(), loss_fn, X.double(), y.double() if y.is_floating_point() else y


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("samples", [8, 60], ids=["wide", "tall"])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["ce", "mse"])
def test_float32_networks_step_as_float64_ones(loss_fn, samples, damping):
    """With BatchNorm's null directions, and at K > D with residuals; several right sides, steps along directions."""
    problem = network(loss_fn, samples)
    single, double = (curvature(m, f, (X, y), LowRankGGN()).ggn for m, f, X, y in (problem, wide(*problem)))
    assert (single.components > single.dim) == (samples == 60)
    assert single.rank < min(single.components, single.dim) or samples == 8
    steps = [{}, {"directions": 3}, {"directions": single.rank}, {"directions": lambda values: range(4)}]
    for options in steps:
        got, want = (flat(g, g.newton_step(damping, **options)) for g in (single, double))
        assert error(got, want) <= 3e-6
    got, want = (flat(g, g.newton_step(lambda values: damping + values)) for g in (single, double))
    assert error(got, want) <= 3e-6
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(double.dim, 3, generator=generator, dtype=torch.float64)
    assert error(single.solve(v.float(), damping), double.solve(v, damping)) <= 3e-6
    assert float(single.logdet(damping)) == pytest.approx(float(double.logdet(damping)), rel=1e-6)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_root_and_determinant(shape, damping):
    """Also in float32: (G + δ I)^(-1/2) applied twice is the inverse."""
    for dtype, tolerance in ((torch.float32, 1e-9), (torch.float64, 1e-7)):
        V = rows(SHAPES[shape], 1e-3, dtype)
        ggn = LowRank({"a": V}, torch.ones(len(V), dtype=dtype), samples=torch.arange(len(V)))
        eye = torch.eye(V.shape[1], dtype=torch.float64)
        root = ggn._damped.root(eye, damping)
        assert error(root @ root, exact(V, matrix(eye), damping)) <= tolerance
        determinant = mpmath.log(mpmath.det(matrix(V).T * matrix(V) + damping * mpmath.eye(V.shape[1])))
        assert float(ggn.logdet(damping)) == pytest.approx(
            float(determinant), rel=1e-6 if dtype == torch.float32 else 1e-9
        )


def test_no_curvature_at_all():
    ggn = LowRank({"a": torch.zeros(3, 4)}, torch.ones(3), samples=torch.arange(3))
    v = torch.randn(4)
    assert ggn.rank == 0 and ggn.cutoff == 0 and ggn.unit_vectors().shape == (4, 0)
    assert torch.allclose(ggn.solve(v, 0.5), 2 * v)
    assert not ggn.newton_step(0.5)["a"].any() and not ggn.newton_step(lambda values: 1 + values)["a"].any()


def test_a_damping_below_what_float64_resolves_is_refused():
    V = rows((5, 11), 1e-3, torch.float64)
    V[4] = V[3]
    ggn = low_rank(V, torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64))
    for call in (lambda: ggn.solve(torch.randn(11, dtype=torch.float64), 1e-25), lambda: ggn.newton_step(1e-25)):
        with pytest.raises(RuntimeError, match="the damping is too small for float64.*largest eigenvalue is 1.*e"):
            call()


@pytest.mark.parametrize("shape, smallest", [("wide", 1e-7), ("tall", 1e-6)])
def test_far_below_the_largest_eigenvalue(shape, smallest):
    """Refinement goes on as long as it must: one step leaves 1e-7."""
    V, w = rows(SHAPES[shape], smallest, torch.float64), torch.randn(SHAPES[shape][0], dtype=torch.float64)
    ggn, v = LowRank({"a": V}, w, samples=torch.arange(len(V))), torch.randn(V.shape[1], 1, dtype=torch.float64)
    want = exact(V, matrix(V).T * matrix(w), 1e-13)
    assert error(-flat(ggn, ggn.newton_step(1e-13)), want) <= 3e-9
    assert error(ggn.solve(v, 1e-13), exact(V, matrix(v), 1e-13)) <= 1e-9


def test_rows_that_combine_to_zero():
    """Their weights are told apart from the gradient's as long as float64 can."""
    V = rows((5, 11), 0.1, torch.float64)
    V[4] = V[2] + V[3]
    w = torch.tensor([1.0, 0, 1, 1, -1], dtype=torch.float64)
    ggn = LowRank({"a": V}, w, samples=torch.arange(5))
    want = exact(V, matrix(V).T * matrix(w), 1e-9)
    assert error(-flat(ggn, ggn.newton_step(1e-9)), want) <= 1e-6
    with pytest.raises(RuntimeError, match="the damping is too small for float64"):
        ggn.newton_step(1e-15)


def test_several_right_sides_of_different_kinds():
    V = rows((5, 11), 0.1, torch.float32)
    ggn = LowRank({"a": V}, torch.ones(5), samples=torch.arange(5))
    v = torch.stack([V.T @ torch.ones(5), torch.randn(11), torch.zeros(11)], 1)
    together, apart = ggn.solve(v, 1e-4), [ggn.solve(c, 1e-4) for c in v.T]
    assert torch.allclose(together, torch.stack(apart, 1), rtol=1e-6)
    assert ggn.solve(v[:, :0], 1e-4).shape == (11, 0)
