"""The experiments' gradients of many batches, and what they call component, path, influence and frozen."""

from __future__ import annotations

import pytest
import torch
from lib import per_sample, systems
from torch import nn

pytestmark = pytest.mark.usefixtures("float64")
CE = nn.CrossEntropyLoss()


@pytest.fixture
def net() -> nn.Sequential:
    return systems.mlp([64, 5, 4, 10], activation=nn.Tanh).train()


def plain(net: nn.Module, X: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    g = torch.autograd.grad(CE(net(X), y), list(net.parameters()))
    return dict(zip((name for name, _ in net.named_parameters()), g, strict=True))


def test_gradients_of_many_batches_are_those_of_each(net: nn.Sequential):
    X, y = systems.digits(30)
    batches = per_sample.draw(30, 5, 8, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parts = list(per_sample.batch_gradients(net, CE, (X, y), batches, chunk=2))
    assert [len(part["0.weight"]) for part in parts] == [2, 2, 1]
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    for i, index in enumerate(batches):
        truth = plain(net, X[index], y[index])
        for name, value in truth.items():
            torch.testing.assert_close(parts[i // 2][name][i % 2], value)

    all_of_them = per_sample.flat({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    variances = per_sample.gradient_variance(net, CE, (X, y), batches)
    assert sum(variances.values()) == pytest.approx(float(all_of_them.var(0).sum()))


def test_four_objects(net: nn.Sequential):
    X, y = systems.digits(12)
    whole, found = plain(net, X, y), per_sample.four_objects(net, CE, (X, y))
    assert list(found["path"]) == ["0.weight", "3.weight", "6.weight"]
    for kind, gradients in found.items():
        summed = torch.allclose(gradients["0.weight"].sum(0), whole["0.weight"])
        assert summed == (kind != "frozen")
    peer = per_sample.backpack_gradients(net, CE, (X, y))["0.weight"]
    torch.testing.assert_close(found["path"]["0.weight"], peer)
    torch.testing.assert_close(found["component"]["0.weight"], per_sample.jacobian_rows(net, (X, y))["0.weight"])
    still = per_sample.four_objects(net.eval(), CE, (X, y))
    for gradients in still.values():
        torch.testing.assert_close(gradients["3.weight"], still["component"]["3.weight"])


def test_leave_one_out(net: nn.Sequential):
    X, y = systems.digits(40)
    truth = per_sample.leave_one_out(net, CE, (X, y))
    keep = torch.arange(40) != 7
    without = plain(net, X[keep], y[keep])
    for name, g in plain(net, X, y).items():
        torch.testing.assert_close(truth[name][7], g - 39 / 40 * without[name])
    influence = per_sample.four_objects(net, CE, (X, y))["influence"]
    assert systems.relative(per_sample.flat(influence), per_sample.flat(truth)) < 0.1


def test_bias_without_noise():
    """No BatchNorm, no bias; with it the squared bias falls as 1/B²."""
    data = systems.digits(100)
    for kind in ("none", "bn"):
        torch.manual_seed(0)
        net = systems.mlp([64, 8, 10], kind).train()
        found = {B: per_sample.squared_bias(net, CE, data, per_sample.draw(100, 600, B, B)) for B in (4, 16)}
        if kind == "none":
            assert all(abs(square) < 3 * error for square, error in found.values())
        else:
            assert all(square > 5 * error > 0 for square, error in found.values())
            assert 6 < found[4][0] / found[16][0] < 40
