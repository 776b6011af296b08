"""What one does with results: items, moves, flat vectors, files, loggers, notebooks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import labelled, mlp
from test_exact import assert_close
from torch import nn
from torch.nn.utils import parameters_to_vector

import bncurv
from bncurv import ComponentGrad, ComponentL2Grad, CouplingReport, DiagGGNExact, LowRankGGN, SqrtGGNExact, curvature

CE = nn.CrossEntropyLoss()
N, C = 9, 3


@pytest.fixture
def model() -> nn.Module:
    return mlp(4, 5, C).double()


@pytest.fixture
def res(model: nn.Module) -> bncurv.Results:
    X, y = labelled(N, 4, C=C)()
    quantities = DiagGGNExact(), ComponentGrad(), ComponentL2Grad(), SqrtGGNExact(), LowRankGGN(), CouplingReport()
    return curvature(model, CE, (X.double(), y), *quantities)


def test_a_mapping_of_fields(res):
    assert res["diag_ggn_exact"] is res.diag_ggn_exact and res.get("variance") is None
    assert list(res) == list(res.keys()) == list(res.fields) and len(res) == 6 and "ggn" in res
    assert res._ipython_key_completions_() == list(res) and set(res) <= set(dir(res))
    with pytest.raises(KeyError, match="these results hold coupling, diag_ggn_exact.*'variance' was not asked for"):
        res["variance"]
    with pytest.raises(AttributeError, match="'variance' was not asked for"):
        _ = res.variance


def test_flat_vectors_have_pytorchs_order(res, model):
    model.zero_grad()
    flat = res.flat("grad_component")
    assert flat.shape == (N, sum(p.numel() for p in model.parameters()))
    assert torch.equal(res.flat("diag_ggn_exact"), parameters_to_vector(res.diag_ggn_exact.values()))
    V = res.flat("sqrt_ggn_exact").flatten(0, 1)
    torch.testing.assert_close(V.square().sum(0), res.flat("diag_ggn_exact"))
    torch.testing.assert_close(flat.sum(0), res.ggn.gradient)
    for field in ("l2_component", "ggn", "coupling"):
        with pytest.raises(ValueError, match=f"'{field}' does not have an entry for each entry of a parameter"):
            res.flat(field)


def test_moved_and_cast(res):
    low = res.to(torch.float32)
    assert {t.dtype for t in low.diag_ggn_exact.values()} == {torch.float32} and low.ggn.dtype == torch.float32
    torch.testing.assert_close(low.ggn.eigenvalues[:5].double(), res.ggn.eigenvalues[:5], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(low.ggn.gradient.double(), res.ggn.gradient, rtol=1e-4, atol=1e-7)
    assert low.samples.dtype == torch.int64 and low.method == res.method
    assert_close(res.cpu().diag_ggn_exact, res.diag_ggn_exact)
    assert {t.device.type for t in res.to("meta").grad_component.values()} == {"meta"}


def test_saved_and_loaded(res, tmp_path):
    torch.save(res.to_dict(), tmp_path / "results.pt")
    again = torch.load(tmp_path / "results.pt", weights_only=True)
    assert again["method"] == res.method and again["passes"] == res.passes
    assert_close(again["fields"]["diag_ggn_exact"], res.diag_ggn_exact)
    assert torch.equal(again["fields"]["ggn"]["eigenvalues"], res.ggn.eigenvalues)
    assert again["fields"]["coupling"]["0"]["full_trace"] == res.coupling["0"].full_trace
    assert_close(pickle.loads(pickle.dumps(copy.deepcopy(res))).diag_ggn_exact, res.diag_ggn_exact)


@pytest.mark.parametrize("free", [False, True])
def test_ggn_saved_without_v(res, model, free, tmp_path):
    X, y = labelled(N, 4, C=C)()
    quantity = LowRankGGN(top=2, matrix_free=True)
    G = curvature(model, CE, (X.double(), y), quantity).ggn if free else res.ggn
    read = []
    for vectors in (0, 2, None):
        G.save(tmp_path / f"{vectors}.pt", vectors=vectors)
        read.append(torch.load(tmp_path / f"{vectors}.pt", weights_only=True))
    none, two, everything = read
    G.save(tmp_path / "ggn.pt")
    assert torch.load(tmp_path / "ggn.pt", weights_only=True)["eigenvectors"] == none["eigenvectors"] == {}
    assert torch.equal(none["eigenvalues"], G.eigenvalues)
    assert none["shapes"] == {name: list(shape) for name, shape in G.shapes.items()}
    assert_close(none["gradient"], G.unflatten(G.gradient))
    assert_close(two["eigenvectors"], G.eigenvectors(2))
    assert_close(everything["eigenvectors"], G.eigenvectors())
    assert not {"rows", "V"} & set(everything)
    with pytest.raises(ValueError, match=f"Ask for at most {G.rank}"):
        G.save(tmp_path / "ggn.pt", vectors=G.rank + 1)


def test_file_of_a_spectrum_is_small(tmp_path):
    """Without V [K, D]: a few times the parameters."""
    model, X, y = torch.nn.Linear(300, 20), torch.randn(40, 300), torch.randint(20, (40,))
    G = curvature(model, torch.nn.CrossEntropyLoss(), (X, y), LowRankGGN()).ggn
    G.save(tmp_path / "ggn.pt")
    assert (tmp_path / "ggn.pt").stat().st_size < 4 * 1.5 * G.dim < 4 * G.components * G.dim / 100


def test_scalars_for_a_logger(res):
    found = res.scalars()
    assert all(isinstance(value, float) for value in found.values())
    assert found["diag_ggn_exact/0.weight"] == float(res.diag_ggn_exact["0.weight"].sum())
    assert found["ggn/largest"] == float(res.ggn.eigenvalues[0]) and found["ggn/trace"] == float(res.ggn.trace)
    assert found["coupling/0/own_trace"] == res.coupling["0"].own_trace and found["passes"] == res.passes


def test_seen_in_a_notebook(res):
    shown = res._repr_html_()
    trace = f"{float(res.diag_ggn_exact['0.weight'].sum()):.3g}"
    assert '<td style="text-align:left">0.weight</td><td style="text-align:right">5×4</td>' in shown
    assert f">{trace}</td>" in shown and "Σ diag_ggn_exact" in shown and "LowRank(D=" in shown
    assert ">own_trace</th>" in shown and f">{res.coupling['0'].full_trace:.3g}</td>" in shown
    assert repr(res.coupling["0"]).startswith("LayerCoupling(own_trace=")


def test_low_rank_as_a_matrix(res, model):
    G = res.ggn
    assert G.shape == (G.dim, G.dim)
    assert_close(G.diagonal(), res.diag_ggn_exact)
    by_name = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    want = G @ by_name
    assert all(torch.equal(a, b) for a, b in zip(G @ list(by_name.values()), want.values(), strict=True))
    array = parameters_to_vector(by_name.values()).detach().numpy()
    product = G @ array
    assert isinstance(product, np.ndarray) and product.dtype == np.float64
    np.testing.assert_allclose(product, parameters_to_vector(want.values()).detach().numpy(), rtol=1e-12)
    assert (G @ array.astype(np.float32)).dtype == np.float32
    with pytest.raises(ValueError, match="vector is a list of 1; expected one tensor for each of the 6 parameters"):
        G @ [by_name["0.weight"]]


def test_matrix_free_says_what_it_cannot(model):
    X, y = labelled(N, 4, C=C)()
    free = curvature(model, CE, (X.double(), y), LowRankGGN(top=2, matrix_free=True))
    assert repr(free.ggn) == f"MatrixFreeGGN(D={free.ggn.dim}, K={N * (C - 1)}, parameters=6, top=2)"
    assert "largest eigenvalues" in free.ggn._repr_html_() and "trace" not in free.ggn.scalars()
    with pytest.raises(RuntimeError, match="can be neither moved nor cast"):
        free.to("cpu")
    with pytest.raises(AttributeError, match="diagonal needs all rows of V"):
        free.ggn.diagonal()
