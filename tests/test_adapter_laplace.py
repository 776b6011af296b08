"""bncurv.adapters.laplace: what laplace-torch gets is the dense matrix of train mode, by its own conventions."""

import doctest

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bncurv import reference

laplace = pytest.importorskip("laplace")
adapter = pytest.importorskip("bncurv.adapters.laplace")
pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
LIKELIHOODS = ["classification", "regression"]
STRUCTURES = ["diag", "full", "lowrank"]


def problem(likelihood, norm=True, samples=12):
    """A small network, in eval mode as laplace-torch leaves it, and its data."""
    norms = [nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5)] if norm else [nn.Tanh()]
    model = nn.Sequential(nn.Linear(3, 4), *norms, nn.Linear(4, 3))
    targets = torch.randint(3, (samples,)) if likelihood == "classification" else torch.randn(samples, 3)
    return model.eval(), TensorDataset(torch.randn(samples, 3), targets)


def fitted(model, data, likelihood, structure, batch_size=12, subset="all", backend=None, **options):
    """A Laplace approximation and its H as a matrix or a diagonal."""
    backend = backend or adapter.BncurvGGN
    if structure == "lowrank":
        la = adapter.LowRankLaplace(model, likelihood, backend_kwargs=options)
    else:
        la = laplace.Laplace(model, likelihood, subset, structure, backend=backend, backend_kwargs=options)
    la.fit(DataLoader(data, batch_size=batch_size))
    return la, la.H[0] * la.H[1] @ la.H[0].T if structure == "lowrank" else la.H


def dense(model, data, likelihood, params=None):
    """G of the summed loss with BatchNorm in train mode; and the loss."""
    model[1].train()
    X, y = data.tensors
    loss_fn = nn.CrossEntropyLoss(reduction="sum") if likelihood == "classification" else HALF
    G, loss = reference.ggn(model, loss_fn, X, y, params), loss_fn(model(X), y)
    model[1].eval()
    return G, loss


def HALF(f, y):
    return 0.5 * (f - y).square().sum()


def of_structure(G, structure):
    return G.diag() if structure == "diag" else G


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_train_mode(likelihood, structure):
    model, data = problem(likelihood)
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    la, H = fitted(model, data, likelihood, structure)
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(t, buffers[name]) for name, t in model.named_buffers())
    G, loss = dense(model, data, likelihood)
    torch.testing.assert_close(H, of_structure(G, structure), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(la.loss, loss.detach(), rtol=1e-12, atol=0)
    assert la(data.tensors[0][:2]) is not None


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_conventions_are_those_of_laplace(likelihood, structure):
    """Without BatchNorm, over several mini-batches: H, evidence and predictions are those of its own back-end."""
    model, data = problem(likelihood, norm=False)
    la, H = fitted(model, data, likelihood, structure, batch_size=5)
    own = laplace.curvature.GGNInterface
    want, G = fitted(model, data, likelihood, "full" if structure == "lowrank" else structure, 5, backend=own)
    torch.testing.assert_close(H, G, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(la.log_marginal_likelihood(), want.log_marginal_likelihood())
    for got, expected in zip(predicted(la, data), predicted(want, data), strict=True):
        torch.testing.assert_close(got, expected)


def predicted(la, data):
    return la._glm_predictive_distribution(data.tensors[0][:4])


def test_mini_batches_add():
    model, data = problem("classification")
    _, H = fitted(model, data, "classification", "full", batch_size=6)
    halves = [TensorDataset(*(t[part] for t in data.tensors)) for part in (slice(6), slice(6, 12))]
    G = sum(dense(model, half, "classification")[0] for half in halves)
    torch.testing.assert_close(H, G, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_last_layer(structure):
    model, data = problem("classification")
    _, H = fitted(model, data, "classification", structure, subset="last_layer")
    G, _ = dense(model, data, "classification", ["4.weight", "4.bias"])
    torch.testing.assert_close(H, of_structure(G, structure), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_subnetwork(structure):
    model, data = problem("regression")
    chosen = torch.tensor([0, 5, 17, 30])
    backend = adapter.BncurvGGN(model, "regression", subnetwork_indices=chosen)
    _, H = getattr(backend, structure)(*data.tensors)
    G = dense(model, data, "regression")[0][chosen][:, chosen]
    torch.testing.assert_close(H, of_structure(G, structure), rtol=1e-10, atol=1e-10)


def test_leading_eigenpairs():
    model, data = problem("classification")
    la, _ = fitted(model, data, "classification", "lowrank", low_rank=2)
    want = torch.linalg.eigvalsh(dense(model, data, "classification")[0])[-2:].flip(0)
    torch.testing.assert_close(la.H[1], want)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_empirical_fisher(likelihood):
    """Without BatchNorm that of laplace-torch; with it Σ g_n g_nᵀ of the per-component gradients."""
    model, data = problem(likelihood, norm=False)
    backends = adapter.BncurvEF, laplace.curvature.EFInterface
    both = [fitted(model, data, likelihood, "full", 5, backend=backend)[1] for backend in backends]
    torch.testing.assert_close(*both)
    model, data = problem(likelihood)
    backend = adapter.BncurvEF(model, likelihood)
    diagonal = backend.diag(*data.tensors)[1]
    model[1].train()
    g = reference.component_gradients(model, backend.lossfunc, *data.tensors)
    want = backend.factor * torch.cat([t.square().sum(0).flatten() for t in g.values()])
    torch.testing.assert_close(diagonal, want, rtol=1e-10, atol=1e-10)


def test_modules_by_name():
    """With none in training mode it is laplace-torch's own matrix, that of eval mode."""
    model, data = problem("classification")
    _, H = fitted(model, data, "classification", "full", train=[])
    _, G = fitted(model, data, "classification", "full", backend=laplace.curvature.GGNInterface)
    torch.testing.assert_close(H, G)
    with pytest.raises(ValueError, match=r"train= names \['bn'\], no modules of Sequential; it has \['0', '1'"):
        adapter.BncurvGGN(model, "classification", train=["1", "bn"])


def test_modes_come_back_after_an_error():
    model, data = problem("classification", samples=1)
    with pytest.raises(ValueError):
        adapter.BncurvGGN(model, "classification").diag(*data.tensors)
    assert not any(m.training for m in model.modules())


def test_kron_is_refused():
    model, data = problem("classification")
    with pytest.raises(NotImplementedError, match="BncurvGGN has no Kronecker factors .*'diag' or 'full', or"):
        fitted(model, data, "classification", "kron")


def test_docstring():
    assert doctest.testmod(adapter).failed == 0
