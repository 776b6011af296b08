"""What comes in: several inputs, dictionaries, batches of any kind through ``forward``; parameters by any choice."""

from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Net, float64, perturb
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bncurv import DiagGGNExact, curvature, extend, reference

N = 9
loss = nn.MSELoss()


class Two(nn.Module):
    """Two inputs, a BatchNorm behind one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.o = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return self.o(torch.tanh(self.n(self.a(u)) + self.b(v)))


@dataclass
class Output:
    """As model libraries return it."""

    logits: Tensor
    hidden: Tensor


@dataclass
class Graphs:
    """As PyTorch Geometric's batches: has keys and items, but is no mapping."""

    u: Tensor
    v: Tensor
    y: Tensor

    def keys(self) -> list[str]:
        return ["u", "v", "y"]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(vars(self).items())


class Whole(Two):
    """Returns more than the loss takes."""

    def forward(self, u: Tensor, v: Tensor) -> Output:  # type: ignore[override]
        return Output(super().forward(u, v), u)


@pytest.fixture
def two() -> Any:
    with float64(0):
        model = Two()
        perturb(model)
        u, v, y = torch.randn(N, 3), torch.randn(N, 2), torch.randn(N, 2)
    joined = Net(lambda net, x: net.m(x[:, :3], x[:, 3:]), m=model)
    want = reference.ggn_diagonal(joined, loss, torch.cat([u, v], 1), y)
    return model, u, v, y, {name.removeprefix("m."): t for name, t in want.items()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    whole = max(float(t.norm()) for t in want.values())
    for name, t in want.items():
        assert float((got[name] - t).norm()) <= 1e-10 * float(t.norm()) + 1e-13 * whole, name


def test_several_inputs(two):
    """A tuple, a list, a dictionary by the names of the arguments."""
    model, u, v, y, want = two
    for X in ((u, v), [u, v], {"u": u, "v": v}, {"v": v, "u": u}):
        assert_close(curvature(model, loss, (X, y), DiagGGNExact()).diag_ggn_exact, want)


def test_one_argument_that_is_a_container():
    """It is what the model takes, so it stays one."""
    with float64(0):
        parts = {"a": nn.Linear(3, 4), "n": nn.BatchNorm1d(4), "o": nn.Linear(4, 2)}
        model = Net(lambda net, X: net.o(net.n(net.a(X["u"] if isinstance(X, dict) else X[0])).tanh()), **parts)
        u, y = torch.randn(N, 3), torch.randn(N, 2)
    plain = curvature(model, loss, ((u,), y), DiagGGNExact()).diag_ggn_exact
    assert_close(curvature(model, loss, ({"u": u}, y), DiagGGNExact()).diag_ggn_exact, plain)
    assert_close(curvature(model, loss, ([u, None], y), DiagGGNExact()).diag_ggn_exact, plain)


BATCHES = {
    "triple": (lambda u, v, y: (u, v, y), lambda m, b: (m(b[0], b[1]), b[2])),
    "dict": (lambda u, v, y: {"u": u, "v": v, "labels": y}, lambda m, b: (m(b["u"], b["v"]), b["labels"])),
    "UserDict": (lambda u, v, y: UserDict(u=u, v=v, labels=y), lambda m, b: (m(b["u"], b["v"]), b["labels"])),
    "graphs": (lambda u, v, y: Graphs(u, v, y), lambda m, b: (m(b.u, b.v), b.y)),
    "object": (lambda u, v, y: Output(torch.cat([u, v], 1), y), lambda m, b: (m(*b.logits.split([3, 2], 1)), b.hidden)),
    "tensor": (lambda u, v, y: torch.cat([u, v, y], 1), lambda m, b: (m(b[:, :3], b[:, 3:5]), b[:, 5:])),
    "list of one": (lambda u, v, y: [(u, v, y)], lambda m, b: (m(b[0], b[1]), b[2])),
    "generator": (lambda u, v, y: iter([{"b": (u, v, y)}]), lambda m, b: (m(*b["b"][:2]), b["b"][2])),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("method", ["coupled", "dense"])
def test_forward(two, kind, method):
    model, u, v, y, want = two
    batch, forward = BATCHES[kind]
    res = curvature(model, loss, batch(u, v, y), DiagGGNExact(), forward=forward, method=method)
    assert res.batches == 1
    assert_close(res.diag_ggn_exact, want)


def test_forward_over_a_loader(two):
    """Weighted as pairs are."""
    model, u, v, y, _ = two
    loader = DataLoader(TensorDataset(u, v, y), 5)
    got = curvature(model, loss, loader, DiagGGNExact(), forward=lambda m, b: (m(b[0], b[1]), b[2]))
    want = curvature(model, loss, [((b[0], b[1]), b[2]) for b in loader], DiagGGNExact())
    assert got.batches == 2
    assert_close(got.diag_ggn_exact, want.diag_ggn_exact)


def test_an_output_object(two):
    """Of a model that returns more than the loss takes."""
    model, u, v, y, want = two
    whole = Whole().double()
    whole.load_state_dict(model.state_dict())
    with pytest.raises(TypeError, match="the model returns Output; expected one tensor.*forward=lambda model, batch"):
        curvature(whole, loss, ((u, v), y), DiagGGNExact())
    got = curvature(whole, loss, (u, v, y), DiagGGNExact(), forward=lambda m, b: (m(b[0], b[1]).logits, b[2]))
    assert_close(got.diag_ggn_exact, want)


def test_a_bad_number_in_one_of_several_inputs(two):
    model, u, v, y, _ = two
    v[4, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or inf in sample\(s\) \[4\]"):
        curvature(model, loss, ((u, v), y), DiagGGNExact())


def test_parameters_by_any_choice(two):
    model, u, v, y, want = two
    choices = [
        ("a.weight", ["a.weight"]),
        ("[ab].*", ["a.weight", "a.bias", "b.weight", "b.bias"]),
        (model.n, ["n.weight", "n.bias"]),
        (model.o.bias, ["o.bias"]),
        (lambda name, p: p.dim() == 2, ["a.weight", "b.weight", "o.weight"]),
        (["o.bias", model.n, "a.*", model.n.weight], ["o.bias", "n.weight", "n.bias", "a.weight", "a.bias"]),
    ]
    for choice, names in choices:
        got = curvature(model, loss, ((u, v), y), DiagGGNExact(), params=choice).diag_ggn_exact
        assert list(got) == names
        assert_close(got, {name: want[name] for name in names})
    model.a.bias.requires_grad_(False)
    assert list(curvature(model, loss, ((u, v), y), DiagGGNExact(), params=model.a).diag_ggn_exact) == ["a.weight"]
    with pytest.raises(ValueError, match=r"glob 'a.b\*' holds 'a.bias' only, with requires_grad=False"):
        curvature(model, loss, ((u, v), y), DiagGGNExact(), params="a.b*")


def test_signatures_below_wrappers(two):
    """Extended models and DataParallel forward any arguments; a scripted one tells none."""
    model, u, v, y, want = two
    wrapped = nn.DataParallel(model)
    got = curvature(wrapped, loss, ((u, v), y), DiagGGNExact()).diag_ggn_exact
    assert_close({name.removeprefix("module."): t for name, t in got.items()}, want)
    assert_close(curvature(extend(model), loss, ((u, v), y), DiagGGNExact()).diag_ggn_exact, want)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_batch_is_left_as_it_is(two, kind):
    """Also where forward, or the model, takes out what it has read."""
    model, u, v, y, want = two
    batch = kind(labels=y, inputs=[{"u": u, "v": v}])

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        target = batch.pop("labels")
        return model(**batch["inputs"].pop()), target

    assert_close(curvature(model, loss, batch, DiagGGNExact(), forward=forward).diag_ggn_exact, want)
    taking = Net(lambda net, X: net.m(**X.pop("inputs").pop()), m=model)
    got = curvature(taking, loss, (batch, y), DiagGGNExact()).diag_ggn_exact
    assert_close({name.removeprefix("m."): t for name, t in got.items()}, want)
    assert list(batch) == ["labels", "inputs"] and list(batch["inputs"][0]) == ["u", "v"]


def test_ambiguous_data(two):
    model, u, v, y, _ = two
    with pytest.raises(TypeError, match=r"data is a list of tensors; .*tuple\(data\) for one batch, iter\(data\)"):
        curvature(model, loss, [u, v, y], DiagGGNExact(), forward=lambda m, b: (m(b[0], b[1]), b[2]))
    with pytest.raises(TypeError, match="data is None; with forward="):
        curvature(model, loss, None, DiagGGNExact(), forward=lambda m, b: (m(b[0], b[1]), b[2]))
    with pytest.raises(TypeError, match=r"yields tuple of length 3; .*\(model\(batch\[0\], batch\[1\]\), batch\[2\]\)"):
        curvature(model, loss, (u, v, y), DiagGGNExact())


@pytest.mark.filterwarnings("ignore")
def test_quantized_modules_are_refused():
    """PyTorch lets no derivative through them, so what is before would be zero."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 2))
    model[2] = torch.ao.quantization.quantize_dynamic(nn.Sequential(model[2]), {nn.Linear}, torch.qint8)[0]
    with pytest.raises(TypeError, match=r"module '2' \(Linear\) is quantized"):
        curvature(model, loss, (torch.randn(6, 4), torch.randn(6, 2)), DiagGGNExact())
    with pytest.raises(TypeError, match=r"module '2' \(Linear\) is quantized"):
        extend(model)


# ---------------------------------------------------------------------------- masks
class Masked(nn.Module):
    """Attention under an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.o = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.t = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, u, mask=None):  # no annotations: a call with a pair may mean two things
        h = self.n(self.a(u).flatten(0, 1)).unflatten(0, u.shape[:2])
        return self.o(self.t(h, h, h, attn_mask=mask, need_weights=False)[0].mean(1))


class Annotated(Masked):
    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(u, mask)


class Paired(Masked):
    def forward(self, both: "tuple[Tensor, Tensor]", scale: float = 1.0) -> Tensor:
        return super().forward(*both) * scale


class Free(Masked):
    def forward(self, **inputs: Tensor) -> Tensor:
        return super().forward(**inputs)


@pytest.fixture
def masked() -> Any:
    with float64(0):
        model = Masked()
        u, y, mask = torch.randn(N, 3, 4), torch.randn(N, 2), torch.full((3, 3), -torch.inf).triu(1)
    fixed = Net(lambda net, x: net.m(x, mask), m=model)
    want = reference.ggn_diagonal(fixed, loss, u, y)
    return model, u, mask, y, {name.removeprefix("m."): t for name, t in want.items()}


def test_minus_infinity_in_a_mask(masked):
    """It is what additive masks hold; where it leaves no derivative, the part is named."""
    model, u, mask, y, want = masked
    assert_close(curvature(model, loss, ({"u": u, "mask": mask}, y), DiagGGNExact()).diag_ggn_exact, want)
    batch = {"u": u, "mask": mask, "y": y}
    got = curvature(model, loss, batch, DiagGGNExact(), forward=lambda m, b: (m(b["u"], b["mask"]), b["y"]))
    assert_close(got.diag_ggn_exact, want)
    scaled = Net(lambda net, X: net.m((X["u"] * net.s).exp().tanh()), m=model, s=nn.Parameter(torch.ones(4).double()))
    u = u.index_fill(0, torch.tensor(1), -torch.inf)
    with pytest.raises(ValueError, match=r"^X\['u'\] has -inf, .* no derivative by 's': only what is added to the log"):
        curvature(scaled, loss, ({"u": u, "v": y}, y), DiagGGNExact())
    with pytest.raises(ValueError, match=r"^batch\['mask'\] has NaN or inf in sample\(s\) \[0, 1\]"):
        curvature(model, loss, batch | {"mask": -mask}, DiagGGNExact(), forward=lambda m, b: (m(b["u"]), b["y"]))
    with pytest.raises(ValueError, match=r"^X has NaN or inf in sample\(s\) \[1\]"):
        curvature(model, loss, (u, y), DiagGGNExact())


def test_one_argument_or_several(masked):
    """By the annotation of the first; without one, a pair that may be both is refused."""
    model, u, mask, y, want = masked
    with pytest.raises(TypeError, match=r"tuple of 2, which forward\(u, mask=None\) .*\(model\(\*batch\[0\]\), batch"):
        curvature(model, loss, ((u, mask), y), DiagGGNExact())
    for kind, X in ((Annotated, (u, mask)), (Paired, [u, mask]), (Free, {"u": u, "mask": mask})):
        other = kind().double()
        other.load_state_dict(model.state_dict())
        assert_close(curvature(other, loss, (X, y), DiagGGNExact()).diag_ggn_exact, want)


# ---------------------------------------------------------------------------- targets
def both(outputs: dict[str, Tensor], target: dict[str, Any]) -> Tensor:
    """Of two heads, for two targets, at a weight."""
    return loss(outputs["a"], target["a"]) + target["w"].sum() * loss(outputs["b"], target["b"][0])


@pytest.mark.parametrize("bn", [True, False])
def test_several_targets(two, bn):
    """In a dictionary, by pairs and by forward; without coupling, batches give what their union gives."""
    model, u, v, y, _ = two
    model.n.train(bn)
    heads = Net(lambda net, x: {"a": (h := net.m(x[:, :3], x[:, 3:])), "b": h.sin()}, m=model)
    joined = Net(lambda net, x: torch.cat([h := net.m(x[:, :3], x[:, 3:]), h.sin()], 1), m=model)
    X, w = torch.cat([u, v], 1), torch.tensor([2.0, 1.0]).double()
    target = {"a": y, "b": [y.cos()], "w": w}
    want = reference.ggn_diagonal(joined, lambda o, y: both({"a": o[:, :2], "b": o[:, 2:]}, target), X, y)
    assert_close(curvature(heads, both, (X, target), DiagGGNExact()).diag_ggn_exact, want)
    got = curvature(heads, both, {"x": X} | target, DiagGGNExact(), forward=lambda m, b: (m(b["x"]), b))
    assert_close(got.diag_ggn_exact, want)
    if not bn:
        parts = [(X[at], {"a": y[at], "b": [y[at].cos()], "w": w}) for at in (slice(0, 4), slice(4, N))]
        assert_close(curvature(heads, both, parts, DiagGGNExact()).diag_ggn_exact, want)


def test_targets_that_are_refused(two):
    model, u, v, y, _ = two
    with pytest.raises(TypeError, match=r"MSELoss takes a tensor as target and got dict; say which of it: forward="):
        curvature(model, loss, ((u, v), {"y": y}), DiagGGNExact())
    with pytest.raises(TypeError, match="y is list; expected a tensor, or a tuple, list or dict of tensors, the sec"):
        curvature(model, loss, [((u, v), [1, 2])], DiagGGNExact())
    with pytest.raises(ValueError, match=r"output has shape \(9, 2\) and y\['y'\] has shape \(3, 2\); expected the"):
        curvature(model, lambda o, t: loss(o[:3], t["y"]), ((u, v), {"y": y[:3]}), DiagGGNExact())


def test_a_last_batch_that_is_too_small(two):
    """Also where forward takes the batches apart."""
    model, u, v, y, _ = two
    loader = DataLoader(TensorDataset(u, v, y), 4)
    with pytest.raises(ValueError, match="BatchNorm 'n'.* mini-batch of 1 sample.s. after one of 4: .*drop_last=True"):
        curvature(model, loss, loader, DiagGGNExact(), forward=lambda m, b: (m(b[0], b[1]), b[2]))
    hidden = [{"b": Output(torch.cat([u, v], 1)[at], y[at])} for at in (slice(0, 4), slice(8, 9))]
    with pytest.raises(ValueError, match="mini-batch of unknown sample.s. after one of 4"):
        forward = lambda m, b: (m(*b["b"].logits.split([3, 2], 1)), b["b"].hidden)  # noqa: E731
        curvature(model, loss, hidden, DiagGGNExact(), forward=forward)
