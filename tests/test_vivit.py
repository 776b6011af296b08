"""Without coupling, the low-rank GGN is ViViT's (Dangel, Tatzel & Hennig 2022), side by side.

ViViT 1.0.0 calls ``Tensor.symeig``, which today's PyTorch has no more: one line brings it back for the test.
"""

import pytest
import torch
from backpack import backpack
from backpack import extend as backpack_extend
from torch import nn
from vivit import EighComputation, EigvalshComputation

from bncurv import LowRankGGN, curvature

pytestmark = pytest.mark.usefixtures("symeig")


@pytest.fixture
def symeig(monkeypatch):
    def symeig(self, eigenvectors=False):
        return torch.linalg.eigh(self) if eigenvectors else (torch.linalg.eigvalsh(self), None)

    monkeypatch.setattr(torch.Tensor, "symeig", symeig, raising=False)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4)).double()
    return model, nn.CrossEntropyLoss(), torch.randn(7, 6).double(), torch.randint(4, (7,))


def vivit(computation, groups):
    model, loss_fn, X, y = network()
    backpack_extend(model), backpack_extend(loss_fn)
    names = {n: p for n, p in model.named_parameters()}
    found = [{"params": [names[n] for n in group], **extra} for group, extra in groups]
    hook = computation.get_extension_hook(found)
    with backpack(computation.get_extension(), extension_hook=hook):
        loss_fn(model(X), y).backward()
    return [computation.get_result(group) for group in found]


def test_eigenvalues():
    model, loss_fn, X, y = network()
    names = [n for n, _ in model.named_parameters()]
    (theirs,) = vivit(EigvalshComputation(), [(names, {})])
    ours = curvature(model, loss_fn, (X, y), LowRankGGN()).ggn
    top = theirs.flip(0)
    assert torch.allclose(ours.eigenvalues, top[: ours.rank], rtol=1e-9, atol=1e-14)
    assert float(top[ours.rank :].abs().max()) <= 1e-13 * float(top[0])


def test_eigenvalues_of_layers():
    model, loss_fn, X, y = network()
    blocks = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    theirs = vivit(EigvalshComputation(), [(b, {}) for b in blocks])
    ours = curvature(model, loss_fn, (X, y), LowRankGGN(groups="layer")).ggn
    for block, values in zip(("0", "2"), theirs, strict=True):
        assert torch.allclose(ours[block].eigenvalues, values.flip(0)[: ours[block].rank], rtol=1e-9, atol=1e-14)


def test_eigenvectors_up_to_sign():
    model, loss_fn, X, y = network()
    names = [n for n, _ in model.named_parameters()]
    keep = {"criterion": lambda values: list(range(len(values) - 3, len(values)))}
    ((values, vectors),) = vivit(EighComputation(), [(names, keep)])
    ours = curvature(model, loss_fn, (X, y), LowRankGGN()).ggn
    theirs = torch.cat([v.flatten(1) for v in vectors], 1).flip(0)
    mine = torch.cat([v.flatten(1) for v in ours.eigenvectors(3).values()], 1)
    assert torch.allclose(values.flip(0), ours.eigenvalues[:3], rtol=1e-9)
    assert torch.allclose((theirs * mine).sum(1).abs(), torch.ones(3).double(), rtol=1e-9)
