"""`curvature` leaves parameters and buffers of every kind, random states, modes and hooks as they were."""

import copy
import gc
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from backpack import backpack
from cases import float64
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bncurv import ComponentGrad, DiagGGNExact, curvature, extend, reference
from bncurv.quantities import Quantity

with float64(1):
    X, y = torch.randn(8, 4), torch.randint(3, (8,))


class Changing(nn.Module):
    """A net with one more buffer, and a forward that does something to it (or to the net)."""

    def __init__(self, change: Callable[[Any], Any], buffer: Any = None) -> None:
        super().__init__()
        with float64(0):
            self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        self.register_buffer("b", buffer, persistent=False)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return self.net(x)


def made_in_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def added_in_inference(m: Any) -> None:
    with torch.inference_mode():
        m.b.add_(1)


def nothing(m: Any) -> None:
    """Only there."""


def per_channel() -> Tensor:
    return torch.quantize_per_channel(torch.ones(3, 2), torch.ones(3), torch.zeros(3, dtype=torch.long), 0, torch.qint8)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "sparse, read": (lambda: torch.eye(8).to_sparse(), nothing),
    "sparse, values": (lambda: torch.eye(3).to_sparse(), lambda m: m.b._values().mul_(2)),
    "sparse, entries": (lambda: torch.eye(3).to_sparse(), lambda m: m.b.copy_(torch.ones(3, 3).to_sparse())),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), lambda m: m.b.values().mul_(2)),
    "csc": (lambda: torch.eye(3).to_sparse_csc(), lambda m: m.b.values().mul_(2)),
    "meta": (lambda: torch.ones(3, device="meta"), nothing),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8), lambda m: m.b.fill_(0)),
    "quantised, channels": (per_channel, lambda m: m.b.copy_(torch.zeros(3, 2))),
    "expanded": (lambda: torch.ones(3, 1).expand(3, 4), lambda m: m.b[:, 0].add_(1)),
    "overlapping": (lambda: torch.arange(5.0).unfold(0, 3, 1), lambda m: m.b[0].add_(1)),
    "every third": (lambda: torch.ones(9)[::3], lambda m: m.b.add_(1)),
    "transposed": (lambda: torch.ones(3, 4).T, lambda m: m.b.t_().add_(1)),
    "inference": (made_in_inference, nothing),
    "inference, changed": (made_in_inference, added_in_inference),
    "not a number": (lambda: torch.full((2,), torch.nan), lambda m: m.b.fill_(1)),
    "empty": (lambda: torch.ones(0), nothing),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda m: m.b.unbind()[0].add_(1)),
    "half": (lambda: torch.ones(3, dtype=torch.bfloat16), lambda m: m.b.add_(1)),
    "none": (lambda: None, lambda m: setattr(m, "b", torch.ones(2))),
    "replaced": (lambda: torch.ones(3), lambda m: setattr(m, "b", torch.zeros(3))),
    "other data": (lambda: torch.ones(3), lambda m: setattr(m.b, "data", torch.zeros(7))),
    "other storage": (lambda: torch.ones(3), lambda m: m.b.set_(torch.zeros(5))),
    "deleted": (lambda: torch.ones(3), lambda m: delattr(m, "b") if hasattr(m, "b") else None),
}


def bits(t: Any) -> Any:
    """The value of a tensor of any kind."""
    if t is None or t.is_meta:
        return None if t is None else t.shape
    if t.is_quantized:
        t = t.int_repr()
    parts = t.unbind() if t.is_nested else [t if t.layout == torch.strided else t.to_dense()]
    return [(p.dtype, p.tolist()) for p in (part.nan_to_num(7) for part in parts)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_every_kind(kind: str, fails: bool) -> None:
    make, change = KINDS[kind]
    model, found = Changing(change, buffer := make()), bits(buffer)
    means = model.net[1].running_mean.clone()
    if fails:
        model.net[3].register_forward_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact())
    else:
        curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact())
    assert model._buffers.keys() == {"b"} and model.b is buffer
    assert bits(buffer) == found and torch.equal(model.net[1].running_mean, means)


def test_aliased_and_tied_buffers() -> None:
    base = torch.arange(6.0)
    model = Changing(lambda m: (m.b.add_(1), m.other.mul_(3)), base[:4])
    model.register_buffer("other", base[2:])
    model.register_buffer("again", model.b)
    curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact())
    assert base.tolist() == [0, 1, 2, 3, 4, 5]
    assert model.again is model.b and model.b.data_ptr() == base.data_ptr()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "mode": lambda m: m.net[2].eval(),
    "parameter": lambda m: m.net[0].weight.data.clamp_(-0.01, 0.01),
    "parameter's data": lambda m: setattr(m.net[0].weight, "data", torch.zeros(5, 4).double()),
    "parameter replaced": lambda m: setattr(m.net[3], "bias", nn.Parameter(torch.ones(3).double())),
    "grad": lambda m: setattr(m.net[0].weight, "grad", torch.ones(5, 4).double()),
    "random numbers": lambda m: (random.random(), np.random.rand(), torch.rand(3)),
    "buffer registered": lambda m: m.register_buffer("new", torch.ones(2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_changes(name: str) -> None:
    model = Changing(CHANGES[name])
    model.net[0].bias.grad = torch.ones(5).double()
    told = pytest.raises(ValueError, match="'net.3.bias', but on tensors that are none of the model's parameters")
    with unchanged(model), told if name == "parameter replaced" else nullcontext():
        curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact(), ComponentGrad())


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
def test_embedding_with_a_largest_norm() -> None:
    """The forward pass rescales rows of a parameter; the curvature is that at the rescaled ones."""
    with float64(0):
        model = nn.Sequential(nn.Embedding(10, 5, max_norm=0.5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    rescaled = copy.deepcopy(model)
    i = torch.arange(8)
    rescaled(i)
    found = model[0].weight.detach().clone()
    got = curvature(model, nn.CrossEntropyLoss(), (i, y), DiagGGNExact()).diag_ggn_exact
    assert torch.equal(model[0].weight, found) and not torch.equal(rescaled[0].weight, found)
    assert_close(got, reference.ggn_diagonal(rescaled, nn.CrossEntropyLoss(), i, y))


def test_lazy_modules_are_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="'0.weight' is not initialised yet"):
        curvature(model, nn.CrossEntropyLoss(), (X.float(), y), DiagGGNExact())


class Interfering(torch.autograd.Function):
    """A backward that leaves a gradient at a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Any) -> Tensor:
        ctx.p = p
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.enable_grad():
            ctx.p[0].square().sum().backward()
        return g, None


def test_gradients_that_a_backward_pass_leaves() -> None:
    with float64(0):
        part, head = nn.Linear(4, 5), nn.Linear(5, 3)
    part.weight.grad = torch.ones_like(part.weight)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.head = part, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Interfering.apply(self.part(x), (part.weight,)))

    with unchanged(model := Net()), pytest.raises(RuntimeError, match="adds to .grad of 'part.weight'"):
        curvature(model, nn.CrossEntropyLoss(), (X, y), DiagGGNExact())


# --------------------------------------------------------------------- in BackPACK's gesture


class Checkpointed(nn.Module):
    """Recomputes a BatchNorm and, if asked, draws again without going back to the old random state."""

    def __init__(self, preserve: bool) -> None:
        super().__init__()
        self.preserve = preserve
        with float64(0):
            part = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3 if preserve else 0.0), nn.Tanh())
            self.part, self.head = part, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.preserve:
            return self.head(checkpoint(self.draw, x, use_reentrant=False, preserve_rng_state=False))
        return self.head(checkpoint(self.part, x, use_reentrant=False))

    def draw(self, x: Tensor) -> Tensor:
        torch.rand(3), random.random(), np.random.rand()
        return self.part(x)


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("preserve", [True, False])
def test_recomputed_parts_end_as_in_plain_training(preserve: bool) -> None:
    """Running statistics and random states after `backward()`, which recomputes once."""
    ends = []
    for quantities in ((), (DiagGGNExact(), ComponentGrad())):
        model, loss_fn = extend(Checkpointed(preserve)), extend(nn.CrossEntropyLoss())
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        with backpack(*quantities):
            loss_fn(model(X), y).backward()
        norm = model.part[1]
        assert norm.num_batches_tracked == 2
        drawn = torch.rand(2).tolist(), random.random(), np.random.rand()
        grads = [p.grad.tolist() for p in model.parameters()]
        ends.append([norm.running_mean.tolist(), norm.running_var.tolist(), drawn, grads])
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------ failed calls


class Failing(Quantity):
    field = "failing"

    def add(self, *args: Any) -> None:
        raise KeyError("mine")


class Noting(nn.Module):
    """Keeps a weak reference to what it saw."""

    def forward(self, x: Tensor) -> Tensor:
        output = x * 1
        self.seen = weakref.ref(output)
        return output


@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_a_failed_call_frees_its_graph(method: str) -> None:
    """Also while the exception, and with it the traceback, is kept, as notebooks do."""
    with float64(0):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), Noting(), nn.Linear(5, 3))
    gc.disable()
    try:
        with pytest.raises(KeyError, match="mine") as kept:
            curvature(model, nn.CrossEntropyLoss(), (X, y), ComponentGrad(), Failing(), method=method)
        assert model[2].seen() is None
    finally:
        gc.enable()
    assert kept.traceback[-1].name == "add"


def test_an_older_exception_keeps_its_variables() -> None:
    """Only the frames of the failed call itself let go."""
    try:
        nn.Linear(2, 2)(torch.ones(3))
    except RuntimeError as older:
        with float64(0), pytest.raises(KeyError):
            curvature(nn.Sequential(nn.Linear(4, 3)), nn.CrossEntropyLoss(), (X, y), Failing())
        frame = older.__traceback__.tb_next.tb_frame
        assert "torch" in frame.f_code.co_filename and frame.f_locals
