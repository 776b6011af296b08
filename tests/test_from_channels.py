"""One channel's way back through the layer directly below a BatchNorm, against autograd."""

import pytest
import torch
from cases import Net, float64
from test_exact import assert_close
from test_layers import Bilinear
from torch import Tensor, nn

from bncurv import DiagGGNExact, curvature, reference, register_layer
from bncurv.layers import LAYERS, Layer
from bncurv.statistics_passes import StatisticsPasses

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NAMES = {nn.Conv1d: torch.conv1d, nn.Conv2d: torch.conv2d, nn.Conv3d: torch.conv3d, nn.Linear: nn.functional.linear}
OPTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 2, "padding": 3},  # further than the kernel reaches
    {"kernel_size": 3, "stride": 2},  # the last column is seen by no window
    {"kernel_size": 2, "stride": 3, "padding": 1},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 3},
    {"kernel_size": 4, "padding": "same"},  # not the same on both sides
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 3, "groups": 4},
]


def assert_pulled(layer: nn.Module, x: Tensor, channels: list[int]) -> None:
    arguments = {"input": x.requires_grad_(), "weight": layer.weight}
    if not isinstance(layer, nn.Linear):
        arguments |= {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
    y = layer(x)
    delta = torch.randn(len(channels), len(x), *y.shape[2:])
    with torch.no_grad():
        got = LAYERS[NAMES[type(layer)]].from_channels(arguments, delta, torch.tensor(channels))
    for q, o in enumerate(channels):
        whole = torch.zeros_like(y)
        whole[:, o] = delta[q]
        (want,) = torch.autograd.grad(y, x, whole, retain_graph=True)
        assert got[q].shape == want.shape
        torch.testing.assert_close(got[q], want, rtol=1e-13, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("small", [64, 0], ids=["matrix", "correlation"])
@pytest.mark.parametrize("dims", CONV)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_convolutions(options, dims, small, monkeypatch):
    monkeypatch.setattr("bncurv.layers.windows.SMALL_MAP", small * 10)
    with float64(0):
        layer = CONV[dims](4, 8, **options)
        assert_pulled(layer, torch.randn(3, 4, *(8, 7, 9)[:dims]), [0, 5, 7, 5])


def test_linear():
    with float64(0):
        assert_pulled(nn.Linear(4, 6), torch.randn(3, 4), [5, 0, 0])


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_passes_start_below_the_direct_layer(chunk_size, monkeypatch):
    """No pass for a BatchNorm's statistics goes through the layer that feeds it."""
    crossed: list[bool] = []
    own = StatisticsPasses._start

    def noted(self, j, q):
        output, cotangents = own(self, j, q)
        crossed.append(self._structure.direct[j] is not None)
        assert output == self._sites[self._structure.direct[j]].call.below[0]
        return output, cotangents

    monkeypatch.setattr(StatisticsPasses, "_start", noted)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.BatchNorm2d(6),
                        nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))  # fmt: skip
    X, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
    curvature(net, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), method="coupled", chunk_size=chunk_size)
    assert len(crossed) == (1 if chunk_size is None else 12 // chunk_size)


def test_missing_method_is_named():
    """A user's layer whose channels lead must say how one of them goes back."""

    class Lazy(Layer):
        def left(self, role, arguments, delta):
            return delta

        def right(self, role, arguments, x):
            return x

    with pytest.raises(NotImplementedError, match="Lazy.channels_lead is true, so it must define from_channels"):
        Lazy().from_channels({}, torch.zeros(1), torch.zeros(1))


def test_layer_of_two_learnt_inputs_takes_the_whole_pass():
    """Where channels lead but the cotangent goes back to two inputs, a direction passes the layer itself."""

    class Leading(Bilinear):
        def channels_lead(self, output):
            return True

    net = Net(
        lambda net, x: net.out(net.bn(net.mix(net.first(x), net.second(x))).relu()),
        first=nn.Linear(4, 3),
        second=nn.Linear(4, 2),
        mix=nn.Bilinear(3, 2, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )
    net = net.double()
    X, y, loss_fn = torch.randn(6, 4).double(), torch.randint(3, (6,)), nn.CrossEntropyLoss()
    register_layer(nn.functional.bilinear, Leading())
    try:
        res = curvature(net, loss_fn, (X, y), DiagGGNExact(), method="coupled")
    finally:
        del LAYERS[nn.functional.bilinear]
    assert_close(res.diag_ggn_exact, reference.ggn_diagonal(net, loss_fn, X, y))
