"""The low-rank GGN against the dense matrix."""

import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from backpack import backpack
from cases import ARCHITECTURES, LOSSES, MODELS
from threadpoolctl import threadpool_info
from torch import nn

import bncurv
from bncurv import LowRankGGN, SlowPathWarning, curvature, reference
from bncurv.budget import Budget
from bncurv.lowrank import gram, one_blas_thread

EXACT = [*MODELS, *ARCHITECTURES, *LOSSES]
SOME = [c for c in EXACT if c.name in ("residual_cnn", "unet", "dcgan", "mlp_bn", "densenet")]


def flat_rows(fields):
    return torch.cat([t.reshape(len(t), -1) for t in fields.values()], 1)


def low_rank(case, method="auto", **options):
    model, loss_fn, X, y = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        return curvature(model, loss_fn, (X, y), LowRankGGN(**options), method=method).ggn


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_spectrum(case, method):
    ggn, G = low_rank(case, method), reference.ggn(*case.build())
    want = torch.linalg.eigvalsh(G).flip(0)
    got = ggn.eigenvalues
    assert len(got) == ggn.rank == int((want > ggn.cutoff).sum())
    assert float((got - want[: len(got)]).abs().max()) <= 1e-9 * float(want[0])
    assert bool((got.diff() <= 0).all())
    assert torch.allclose(ggn.trace, G.trace(), rtol=1e-12)
    assert torch.allclose(ggn.frobenius_norm, G.norm(), rtol=1e-10)
    E = flat_rows(ggn.eigenvectors())
    reliable = int((got > 1e-10 * got[0]).sum())
    assert float((E[:reliable] @ E[:reliable].T - torch.eye(reliable)).abs().max()) < 1e-5
    assert float(ggn.residuals(reliable).max()) <= 1e-8 * float(got[0])


@pytest.mark.parametrize("case", SOME, ids=str)
def test_matrix_functions(case):
    ggn, G = low_rank(case), reference.ggn(*case.build())
    eye = torch.eye(len(G), dtype=G.dtype)
    v, W = torch.randn(len(G), dtype=G.dtype), torch.randn(len(G), 3, dtype=G.dtype)
    for vector in (v, W):
        assert torch.allclose(ggn @ vector, G @ vector, rtol=1e-9, atol=1e-12)
        assert torch.allclose(ggn.solve(vector, 0.1), torch.linalg.solve(G + 0.1 * eye, vector), rtol=1e-8, atol=1e-10)
    as_dict = ggn @ ggn.unflatten(v)
    assert as_dict.keys() == ggn.shapes.keys()
    assert torch.allclose(ggn.flatten(as_dict), G @ v, rtol=1e-9, atol=1e-12)
    assert torch.allclose(ggn.logdet(0.3), torch.logdet(G + 0.3 * eye), rtol=1e-10)
    assert np.allclose(ggn.to_scipy() @ v.numpy(), (G @ v).numpy())
    values = scipy.sparse.linalg.eigsh(ggn.to_scipy(), k=1, return_eigenvectors=False)
    assert np.allclose(values[-1], float(ggn.eigenvalues[0]), rtol=1e-8)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_directional_derivatives_and_newton(case):
    model, loss_fn, X, y = case.build()
    ggn, G = low_rank(case), reference.ggn(model, loss_fn, X, y)
    e = flat_rows(ggn.eigenvectors(5))
    components = reference.component_gradients(model, loss_fn, X, y)
    g = flat_rows(components)
    assert torch.allclose(ggn.slopes(5), g @ e.T, rtol=1e-8, atol=1e-12)
    assert torch.allclose(ggn.curvatures(5).sum(0), ggn.eigenvalues[:5], rtol=1e-8)
    J = flat_rows(reference.jacobian(model, X))
    H = reference.loss_hessian(loss_fn, model(X).detach(), y)
    rows = len(J) // len(X)
    one = J[:rows].T @ H[:rows, :rows] @ J[:rows]
    assert torch.allclose(ggn.curvatures(5)[0], torch.einsum("di,ij,dj->d", e, one, e), rtol=1e-7, atol=1e-12)

    def flat(step):
        return torch.cat([t.flatten() for t in step.values()])

    eye = torch.eye(len(G), dtype=G.dtype)
    full = -torch.linalg.solve(G + 0.2 * eye, g.sum(0))
    assert torch.allclose(flat(ggn.newton_step(0.2)), full, rtol=1e-8, atol=1e-10)
    lam, gamma = ggn.eigenvalues[:3], e[:3] @ g.sum(0)
    top = -(gamma / (lam + 0.2)) @ e[:3]
    assert torch.allclose(flat(ggn.newton_step(0.2, 3)), top, rtol=1e-8, atol=1e-12)
    criterion = ggn.newton_step(lambda lam: torch.full_like(lam, 0.2), lambda lam: range(len(lam) - 3, len(lam)))
    assert torch.allclose(flat(criterion), top, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_top(case):
    full, top = low_rank(case), low_rank(case, top=2, matrix_free=False)
    assert torch.allclose(top.eigenvalues, full.eigenvalues[:2], rtol=1e-9)
    assert float(top.residuals().max()) <= 1e-8 * float(top.eigenvalues[0])


def test_sample_covariance():
    ggn = low_rank(next(c for c in MODELS if c.name == "mlp_bn"))
    draws = ggn.sample(0.5, 60000, torch.Generator().manual_seed(0))
    x = flat_rows(draws)
    want = ggn.solve(torch.eye(ggn.dim, dtype=ggn.dtype), 0.5)
    assert float((x.T @ x / len(x) - want).norm()) <= 0.06 * float(want.norm())


def test_top_in_the_context_keeps_v():
    case = next(c for c in MODELS if c.name == "residual_cnn")
    model, loss_fn, X, y = case.build()
    ggn = LowRankGGN(top=2)
    bncurv.extend(model), bncurv.extend(loss_fn)
    with backpack(ggn):
        loss_fn(model(X), y).backward()
    assert torch.allclose(ggn.result.eigenvalues, low_rank(case).eigenvalues[:2], rtol=1e-9)
    assert torch.allclose(ggn.result.trace, low_rank(case).trace)


def test_groups():
    case = next(c for c in MODELS if c.name == "residual_cnn")
    G, names = reference.ggn(*case.build()), low_rank(case).names
    sizes = low_rank(case).shapes
    layers = low_rank(case, groups="layer")
    start = 0
    blocks = {}
    for name in names:
        size = sizes[name].numel()
        blocks.setdefault(name.rpartition(".")[0], []).extend(range(start, start + size))
        start += size
    assert layers.keys() == blocks.keys()
    for group, index in blocks.items():
        want = torch.linalg.eigvalsh(G[index][:, index]).flip(0)[: layers[group].rank]
        assert torch.allclose(layers[group].eigenvalues, want, rtol=1e-7, atol=1e-12 * float(want[0]))
    named = low_rank(case, groups={"first": names[:2], "rest": names[2:]})
    assert named["first"].names == names[:2]
    with pytest.raises(ValueError, match="group 'a' names .*nonsense"):
        low_rank(case, groups={"a": ["nonsense"]})


def test_extend_gesture():
    case = next(c for c in MODELS if c.name == "residual_cnn")
    model, loss_fn, X, y = case.build()
    ggn = LowRankGGN()
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = ggn.result
    bncurv.extend(model), bncurv.extend(loss_fn)
    with backpack(ggn):
        loss_fn(model(X), y).backward()
    assert torch.allclose(ggn.result.eigenvalues, low_rank(case).eigenvalues, rtol=1e-9)


def test_mean_over_batches():
    case = next(c for c in MODELS if c.name == "mlp_bn")
    model, loss_fn, X, y = case.build()
    half = len(X) // 2
    batches = [(X[:half], y[:half]), (X[half:], y[half:])]
    ggn = curvature(model, loss_fn, batches, LowRankGGN()).ggn
    G = sum(reference.ggn(model, loss_fn, *b) for b in batches) / 2
    assert torch.allclose(ggn @ torch.eye(len(G), dtype=G.dtype), G, rtol=1e-9, atol=1e-13)
    grad = sum(torch.cat([t.flatten() for t in reference.gradient(model, loss_fn, *b).values()]) for b in batches) / 2
    assert torch.allclose(ggn.gradient, grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_rank_facts(loss):
    """theory.md F22, D16: hidden BatchNorm loses no rank, N (C - 1) with cross-entropy and N C with squared error."""
    torch.manual_seed(0)
    n, c = 16, 5
    model = nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, c)).double()
    X = torch.randn(n, 12).double()
    y = torch.randint(c, (n,)) if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(n, c).double()
    ggn = curvature(model, loss, (X, y), LowRankGGN()).ggn
    assert ggn.rank == n * (c - 1 if isinstance(loss, nn.CrossEntropyLoss) else c)


def test_noise_directions_are_refused():
    ggn = low_rank(next(c for c in MODELS if c.name == "residual_cnn"))
    with pytest.raises(ValueError, match=f"{ggn.rank + 1} eigenvectors asked for.*Ask for at most {ggn.rank}"):
        ggn.eigenvectors(ggn.rank + 1)


def test_bad_arguments():
    ggn = low_rank(next(c for c in MODELS if c.name == "residual_cnn"))
    for call in (
        lambda: ggn.solve(torch.zeros(ggn.dim).double(), 0.0),
        lambda: ggn.logdet(-1.0),
        lambda: ggn.sample(0),
    ):
        with pytest.raises(ValueError, match="expected a positive number"):
            call()
    with pytest.raises(ValueError, match="vector has shape"):
        ggn @ torch.zeros(3).double()
    with pytest.raises(ValueError, match="top="):
        LowRankGGN(top=0)
    with pytest.raises(ValueError, match="groups="):
        LowRankGGN(groups="module")
    case = next(c for c in MODELS if c.name == "residual_cnn")
    with pytest.raises(ValueError, match="LowRankGGN needs .* GiB"):
        low_rank(case, memory=1000)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_matrix_free(case):
    full, free = low_rank(case), low_rank(case, top=3, matrix_free=True)
    G = reference.ggn(*case.build())
    v = torch.randn(len(G), 2, dtype=G.dtype)
    assert isinstance(free, bncurv.MatrixFreeGGN)
    assert torch.allclose(free @ v, G @ v, rtol=1e-9, atol=1e-12)
    assert torch.allclose(free.eigenvalues, full.eigenvalues[:3], rtol=1e-9)
    assert float(free.residuals().max()) <= 1e-8 * float(free.eigenvalues[0])
    assert torch.allclose(free.solve(v, 0.3), full.solve(v, 0.3), rtol=1e-6, atol=1e-8)
    assert torch.allclose(free.slopes(2).sum(0).abs(), full.slopes(2).sum(0).abs(), rtol=1e-5, atol=1e-8)
    assert torch.allclose(free.curvatures(2), full.curvatures(2), rtol=1e-5, atol=1e-8)
    assert torch.allclose(free.gradient, full.gradient, rtol=1e-9, atol=1e-12)
    for refused in (
        lambda: free.trace,
        lambda: free.logdet(1.0),
        lambda: free.sample(1.0),
        lambda: free.frobenius_norm,
    ):
        with pytest.raises(NotImplementedError, match="needs all rows of V"):
            refused()


def test_matrix_free_over_batches_is_the_default_for_top(monkeypatch):
    monkeypatch.setattr("bncurv.lowrank_quantity.USUAL", Budget(small=0))
    case = next(c for c in MODELS if c.name == "mlp_bn")
    model, loss_fn, X, y = case.build()
    half = len(X) // 2
    batches = [(X[:half], y[:half]), (X[half:], y[half:])]
    ggn = curvature(model, loss_fn, batches, LowRankGGN(top=2)).ggn
    G = sum(reference.ggn(model, loss_fn, *b) for b in batches) / 2
    assert isinstance(ggn, bncurv.MatrixFreeGGN)
    assert torch.allclose(ggn.eigenvalues, torch.linalg.eigvalsh(G).flip(0)[:2], rtol=1e-9)


@pytest.mark.parametrize("small_first", [False, True])
def test_small_rows_are_kept_and_the_first_batch_decides(monkeypatch, small_first):
    case = next(c for c in MODELS if c.name == "mlp_bn")
    model, loss_fn, X, y = case.build()
    assert not isinstance(curvature(model, loss_fn, (X, y), LowRankGGN(top=2)).ggn, bncurv.MatrixFreeGGN)
    sizes = [2, len(X) - 2] if small_first else [len(X) - 2, 2]
    entries = sum(p.numel() for p in model.parameters()) * X.element_size()
    between = entries * model(X)[0].numel() * len(X) / 2  # bytes of V for half of the samples
    monkeypatch.setattr("bncurv.lowrank_quantity.USUAL", Budget(small=int(between)))
    batches = list(zip(X.split(sizes), y.split(sizes), strict=True))
    ggn = curvature(model, loss_fn, batches, quantity := LowRankGGN(top=2)).ggn
    G = sum(len(b[0]) * reference.ggn(model, loss_fn, *b) for b in batches) / len(X)
    assert isinstance(ggn, bncurv.MatrixFreeGGN) == (not small_first)
    assert torch.allclose(ggn.eigenvalues, torch.linalg.eigvalsh(G).flip(0)[:2], rtol=1e-9)
    monkeypatch.undo()
    assert not isinstance(curvature(model, loss_fn, (X, y), quantity).ggn, bncurv.MatrixFreeGGN)


def test_matrix_free_is_refused_in_the_context():
    case = next(c for c in MODELS if c.name == "mlp_bn")
    model, loss_fn, X, y = case.build()
    bncurv.extend(model), bncurv.extend(loss_fn)
    with pytest.raises(ValueError, match="needs the network's graph"), backpack(LowRankGGN(top=2, matrix_free=True)):
        loss_fn(model(X), y).backward()


@pytest.mark.parametrize("free", [False, True])
def test_density(free):
    case = next(c for c in MODELS if c.name == "mlp_bn")
    ggn, G = low_rank(case, top=3, matrix_free=free), reference.ggn(*case.build())
    nodes, weights = ggn.density(probes=400, generator=torch.Generator().manual_seed(0))
    assert float(weights.sum()) == pytest.approx(1)
    assert float((weights * nodes).sum() * len(G)) == pytest.approx(float(G.trace()), rel=0.1)
    assert float((weights * nodes**2).sum() * len(G)) == pytest.approx(float(G.square().sum()), rel=0.2)


def test_double_backward_through_an_extended_model_is_pytorchs():
    case = next(c for c in MODELS if c.name == "residual_cnn")
    hessian_products = []
    for prepare in (lambda m: m, bncurv.extend):
        model, loss_fn, X, y = case.build()
        params = list(prepare(model).parameters())
        grads = torch.autograd.grad(loss_fn(model(X), y), params, create_graph=True)
        hessian_products.append(torch.autograd.grad(sum((g * g.detach()).sum() for g in grads), params))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*hessian_products, strict=True))


def scipys_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["prefix"] == "libscipy_openblas"]


@pytest.mark.parametrize("size", [0, 1, 2, 5, 16, 37])
def test_gram(size):
    """Half of it is computed, the other half mirrored."""
    parts = [torch.randn(size, width, dtype=torch.float64) for width in (3, 1, 50)]
    whole = torch.cat(parts, 1)
    got = gram(parts)
    assert torch.equal(got, got.T)
    torch.testing.assert_close(got, whole @ whole.T, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not scipys_threads(), reason="scipy's BLAS is not that of its wheel")
def test_scipys_threads_are_as_before():
    """One during the Lanczos iterations and the conjugate gradients, afterwards as many as before, also on an error."""
    before = scipys_threads()
    with pytest.raises(ZeroDivisionError), one_blas_thread():
        assert set(scipys_threads()) == {1}
        raise ZeroDivisionError
    assert scipys_threads() == before
