"""Curvature of any loss: exact against plain autograd, zero with a word, or refused with the reason."""

import warnings
from pathlib import Path

import pytest
import torch
from cases import mlp
from loss_zoo import EXACT, NOT_CONVEX, ONCE, WHOLE, ZERO, ZOO, Entry, N, table
from test_exact import assert_close
from torch import Tensor, nn

from bncurv import DiagGGNExact, LowRankGGN, curvature, reference

SAYS = {
    NOT_CONVEX: "is not convex in the model's output at (sample .|this batch): .*eigenvalue.*no GGN.*take any loss",
    ONCE: "cannot be differentiated twice by PyTorch.*register_loss",
}


def built(one: Entry) -> tuple[nn.Module, object, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.set_default_dtype(torch.float64)
        try:
            model = nn.Sequential(mlp(4, 5, one.out), one.head())
            return model, one.loss(), torch.randn(N, 4), one.target(N, 4)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("one", [e for e in ZOO if e.verdict in (EXACT, WHOLE)], ids=str)
def test_exact(one: Entry) -> None:
    model, loss_fn, X, y = built(one)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module=__name__)
        method = "coupled" if one.verdict == EXACT else "auto"
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), LowRankGGN(), method=method)
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(model, loss_fn, X, y))
    G = reference.ggn(model, loss_fn, X, y)
    torch.testing.assert_close(res.ggn @ torch.ones(len(G)).double(), G.sum(1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("one", [e for e in ZOO if e.verdict == ZERO], ids=str)
def test_zero(one: Entry) -> None:
    model, loss_fn, X, y = built(one)
    with pytest.warns(UserWarning, match="no curvature in the model's output.*piecewise linear.*use CrossEntropyLoss"):
        res = curvature(model, loss_fn, (X, y), DiagGGNExact(), LowRankGGN())
    want = reference.ggn_diagonal(model, loss_fn, X, y)
    assert not any(t.any() for t in [*want.values(), *res.diag_ggn_exact.values(), res.ggn.eigenvalues])


@pytest.mark.parametrize("one", [e for e in ZOO if e.verdict in SAYS], ids=str)
def test_refused(one: Entry) -> None:
    model, loss_fn, X, y = built(one)
    with pytest.raises(ValueError, match=SAYS[one.verdict]):
        curvature(model, loss_fn, (X, y), DiagGGNExact())
    if one.verdict == NOT_CONVEX:
        assert torch.linalg.eigvalsh(reference.loss_hessian(loss_fn, model(X).detach(), y))[0] < -1e-6


def test_page_has_the_verdicts() -> None:
    text = (Path(__file__).parent.parent / "docs/losses.md").read_text()
    assert text.split("<!-- losses:begin -->\n")[1].split("<!-- losses:end -->")[0] == table()
