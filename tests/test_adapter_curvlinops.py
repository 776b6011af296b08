"""bncurv.adapters.curvlinops: the operator against the dense matrix, and under curvlinops' own estimators."""

import doctest

import pytest
import scipy.sparse.linalg
import torch
from cases import ARCHITECTURES, MODELS

import bncurv
from bncurv import reference

curvlinops = pytest.importorskip("curvlinops")
adapter = pytest.importorskip("bncurv.adapters.curvlinops")
CASES = [c for c in (*MODELS, *ARCHITECTURES) if c.name in ("mlp_bn", "residual_cnn")]


def operator(case, **options):
    """The adapter's operator and the dense G."""
    model, loss_fn, X, y = case.build()
    ggn = bncurv.curvature(model, loss_fn, (X, y), bncurv.LowRankGGN(**options)).ggn
    return adapter.as_linear_operator(ggn), reference.ggn(*case.build())


@pytest.mark.parametrize("options", [{}, {"top": 3, "matrix_free": True}], ids=["rows", "matrix-free"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case, options):
    A, G = operator(case, **options)
    shapes = list(A.ggn.shapes.values())
    assert A.shape == G.shape and A.adjoint() is A and (A.dtype, A.device) == (G.dtype, G.device)
    v, W = torch.randn(len(G), dtype=G.dtype), torch.randn(len(G), 2, dtype=G.dtype)
    for x in (v, W):
        torch.testing.assert_close(A @ x, G @ x, rtol=1e-10, atol=1e-12)
    parts = W.split([shape.numel() for shape in shapes])
    in_list = [part.reshape(*shape, 2) for part, shape in zip(parts, shapes, strict=True)]
    got = A @ in_list
    assert [g.shape[:-1] for g in got] == shapes
    torch.testing.assert_close(torch.cat([g.reshape(-1, 2) for g in got]), G @ W, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((2.0 * A + A) @ v, 3 * G @ v, rtol=1e-10, atol=1e-12)


def test_eigenvalues_through_scipy():
    A, G = operator(CASES[0])
    values = scipy.sparse.linalg.eigsh(A.to_scipy(), k=3, return_eigenvectors=False)
    torch.testing.assert_close(torch.as_tensor(values.copy()), torch.linalg.eigvalsh(G)[-3:], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "estimate",
    ["xdiag", "hutchinson_diag", "xtrace", "hutchpp_trace", "hutchinson_trace", "hutchinson_squared_fro"],
)
def test_estimators(estimate):
    """With the same random vectors they say of the operator what they say of the dense matrix."""
    found = []
    for matrix in operator(CASES[0]):
        torch.manual_seed(1)
        found.append(getattr(curvlinops, estimate)(matrix, 12))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


def test_spectral_density():
    A, G = operator(CASES[0])
    bounds = (0.0, float(A.ggn.eigenvalues[0]))
    grid, density = curvlinops.lanczos_approximate_spectrum(A, ncv=A.ggn.rank, boundaries=bounds)
    below = float(density[grid < 0.3 * grid[-1]].sum() / density.sum())
    assert below == pytest.approx(float((torch.linalg.eigvalsh(G) < 0.3 * grid[-1]).double().mean()), abs=0.15)


@pytest.mark.parametrize(
    ("wrong", "text"), [({"conv": None}, r"dict of the groups \['conv'\].*one group"), (3, "got int;")]
)
def test_what_is_no_ggn(wrong, text):
    with pytest.raises(TypeError, match=text):
        adapter.as_linear_operator(wrong)


def test_docstring():
    assert doctest.testmod(adapter).failed == 0
