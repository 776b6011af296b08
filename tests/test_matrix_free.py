"""The matrix-free GGN: several mini-batches, what it cannot do, and the network that has moved on."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from bncurv import LowRankGGN, curvature


def network():
    """BatchNorm in training mode and in evaluation mode, and frozen parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
    )
    model[3].requires_grad_(False)
    model[4].eval()
    model[4].running_var.uniform_(0.5, 2)
    return model.double()


def batches(*sizes):
    torch.manual_seed(1)
    return [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in sizes]


def free(model, data, top=3):
    return curvature(model, nn.CrossEntropyLoss(), data, LowRankGGN(top=top, matrix_free=True)).ggn


@pytest.fixture
def moved():
    model, (batch,) = network(), batches(12)
    return model, batch, free(model, batch)


def test_several_batches():
    """Against the rows, which are tested against autograd."""
    model, data = network(), batches(12, 7, 9)
    got, want = free(model, data), curvature(model, nn.CrossEntropyLoss(), data, LowRankGGN()).ggn
    v = torch.randn(want.dim, 2).double()
    assert got.components == want.components == 28 * 2
    assert torch.allclose(got.eigenvalues, want.eigenvalues[:3], rtol=1e-9)
    assert torch.allclose(got @ v, want @ v, rtol=1e-9, atol=1e-13)
    assert torch.allclose(got.gradient, want.gradient, rtol=1e-9, atol=1e-13)
    signs = (got.unit_vectors() * want.unit_vectors(3)).sum(0).sign()
    assert torch.allclose(got.slopes() * signs, want.slopes(3), rtol=1e-6, atol=1e-9)
    assert torch.allclose(got.curvatures(2), want.curvatures(2), rtol=1e-6, atol=1e-9)
    for damping in (1e-6, 1e-2, 10.0):
        assert torch.allclose(got.solve(v, damping), want.solve(v, damping), rtol=1e-6)
        step, expected = got.newton_step(damping), want.newton_step(damping)
        assert torch.allclose(got.flatten(step), want.flatten(expected), rtol=1e-7, atol=1e-10)
    step, expected = got.newton_step(lambda lam: lam + 0.1, 2), want.newton_step(lambda lam: lam + 0.1, 2)
    assert torch.allclose(got.flatten(step), want.flatten(expected), rtol=1e-6, atol=1e-9)


def test_pixels():
    """Several positions of several classes per sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 1)).double()
    data = torch.randn(3, 2, 2, 3).double(), torch.randint(4, (3, 2, 3))
    got, want = free(model, data), curvature(model, nn.CrossEntropyLoss(), data, LowRankGGN()).ggn
    v = torch.randn(want.dim, 2).double()
    assert torch.allclose(got @ v, want @ v, rtol=1e-9, atol=1e-13)
    assert torch.allclose(got.curvatures(2), want.curvatures(2), rtol=1e-6, atol=1e-9)
    assert torch.allclose(got.flatten(got.newton_step(0.1)), want.flatten(want.newton_step(0.1)), rtol=1e-7, atol=1e-10)


def test_top_is_below_the_number_of_parameters():
    model, (batch,) = nn.Linear(4, 3).double(), batches(12)
    assert free(model, batch, top=14).rank <= 14
    with pytest.raises(ValueError, match="top=15 is not below the number of parameters 15; use top=None"):
        free(model, batch, top=15)


def test_no_curvature_at_all():
    model, (batch,) = network(), batches(12)
    nn.init.zeros_(model[6].weight)
    ggn = curvature(model, nn.CrossEntropyLoss(), batch, LowRankGGN(2, matrix_free=True), params=["0.weight"]).ggn
    v = torch.randn(ggn.dim).double()
    assert ggn.rank == 0 and ggn.slopes().shape == ggn.curvatures().shape == (12, 0)
    assert not (ggn @ v).any() and torch.allclose(ggn.solve(v, 0.5), 2 * v)
    assert not ggn.newton_step(0.5)["0.weight"].any()


@pytest.mark.parametrize("name", ["trace", "frobenius_norm", "logdet", "sample"])
def test_what_needs_the_rows_is_refused_and_absent(moved, name):
    _, _, ggn = moved
    with pytest.raises(NotImplementedError, match=f"{name} needs all rows of V, but .* matrix-free with top=3"):
        getattr(ggn, name)
    assert not hasattr(ggn, name)
    with pytest.raises(AttributeError, match="MatrixFreeGGN has no attribute 'typo'"):
        _ = ggn.typo


@pytest.mark.parametrize("damping", [1e-8, 1e-2])
def test_in_float32_a_small_damping_is_refused_where_it_leaves_no_digits(damping):
    model, (batch,) = network(), batches(12)
    single = free(copy.deepcopy(model).float(), (batch[0].float(), batch[1]))
    double = free(model, batch)
    got, want = (g.flatten(g.newton_step(damping)).double() for g in (single, double))
    assert float((got - want).norm() / want.norm()) <= 1e-4  # the gradient is a combination of V's rows
    if damping < 1e-4:
        with pytest.raises(RuntimeError, match=r"at damping=1e-08 .* may be a relative error of .*newton_step"):
            single.solve(single.gradient, damping)
    else:
        got, want = (g.solve(g.gradient, damping).double() for g in (single, double))
        assert float((got - want).norm() / want.norm()) <= 1e-4


def test_conjugate_gradients_that_do_not_converge(moved, monkeypatch):
    monkeypatch.setattr("bncurv.lowrank.lanczos.CG_STEPS", 0)
    _, _, ggn = moved
    with pytest.raises(RuntimeError, match="did not converge at damping=0.1; raise the damping"):
        ggn.solve(torch.ones(ggn.dim).double(), 0.1)


def test_right_sides_near_the_end_of_float32s_range():
    """The search directions of conjugate gradients get smaller than their right side."""
    model, ((X, y),) = network().float(), batches(12)
    ggn = free(model, (X.float(), y))
    v = torch.randn(ggn.dim)
    assert torch.allclose(ggn.solve(1e-36 * v, 0.1), 1e-36 * ggn.solve(v, 0.1), rtol=1e-3, atol=1e-38)


def test_a_saturated_batch_among_others():
    """Where the gradient is outside the factor's range, the step is that of the gradient as a vector."""
    model = nn.Linear(4, 3)
    data = [(X.float(), y) for X, y in batches(6, 8)]
    data[1] = 1e3 * data[1][0], data[1][1]
    got = free(model, data)
    want = curvature(model, nn.CrossEntropyLoss(), data, LowRankGGN()).ggn
    assert want._weights is None
    for ggn in (got, want):
        direct = ggn.solve(ggn.gradient, 10.0)
        assert torch.allclose(ggn.flatten(ggn.newton_step(10.0)), -direct, rtol=1e-5, atol=1e-7)
    assert torch.allclose(got.gradient, want.gradient, rtol=1e-5, atol=1e-6)
    assert torch.allclose(got.slopes(2).sum(0).abs(), want.slopes(2).sum(0).abs(), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- the network has moved on
def step(model, batch):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimiser.step()


def vector(model, batch):
    vector_to_parameters(1.1 * parameters_to_vector(model.parameters()), model.parameters())


def doubled_state(model, batch):
    model.load_state_dict({name: 2 * t for name, t in model.state_dict().items()})


def replaced_data(model, batch):
    model[0].weight.data = -model[0].weight.data


CHANGES = {
    "vector_to_parameters": (vector, "parameter '0.weight'"),
    "optimiser": (step, "parameter '0.weight'"),
    "load_state_dict": (doubled_state, "parameter '0.weight'"),
    "replaced .data": (replaced_data, "parameter '0.weight'"),
    "one entry through .data": (lambda m, b: m[6].bias.data[1].add_(1e-6), "parameter '6.bias'"),
    "numpy": (lambda m, b: m[0].weight.detach().numpy().__imul__(2), "parameter '0.weight'"),
    "frozen parameter": (lambda m, b: m[3].weight.data.mul_(2), "parameter '3.weight'"),
    "buffer in evaluation mode": (lambda m, b: m[4].running_var.mul_(2), "buffer '4.running_var'"),
    "input": (lambda m, b: b[0].numpy().__imul__(2), "the input"),
    "dtype": (lambda m, b: m.float(), "parameter '0.weight'"),
}
USES = {
    "@": lambda g: g @ torch.ones(g.dim).double(),
    "solve": lambda g: g.solve(torch.ones(g.dim).double(), 0.1),
    "newton_step": lambda g: g.newton_step(0.1),
    "slopes": lambda g: g.slopes(),
    "curvatures": lambda g: g.curvatures(),
    "residuals": lambda g: g.residuals(),
    "density": lambda g: g.density(3, 1),
    "to_scipy": lambda g: g.to_scipy() @ torch.ones(g.dim).double().numpy(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_to_change_the_network_is_noticed(moved, change):
    model, batch, ggn = moved
    change, what = CHANGES[change]
    change(model, batch)
    with pytest.raises(RuntimeError, match=f"stale: {what} has changed since .* Compute the curvature again"):
        ggn @ torch.ones(ggn.dim).double()


class Masked(nn.Module):
    """Reads a plain attribute and an input in parts."""

    def __init__(self):
        super().__init__()
        self.layer, self.mask, self.more = nn.Linear(4, 3).double(), torch.rand(3).double(), [torch.rand(3).double()]

    def forward(self, x):
        return self.layer(x["a"][0]).tanh() * self.mask * x["b"] * self.more[0]


PARTS = {
    "mask": "attribute 'mask'",
    "more": r"attribute 'more'\[0\]",
    "b": r"the input\['b'\]",
    "a": r"the input\['a'\]\[0\]",
}


@pytest.mark.parametrize("part, what", PARTS.items())
def test_attributes_and_parts_of_the_input_are_noticed(part, what):
    model, ((X, y),) = Masked(), batches(12)
    X = {"a": [X], "b": torch.rand(12, 3).double()}
    ggn = free(model, [(X, y)])
    {"mask": model.mask, "more": model.more[0], "a": X["a"][0], "b": X["b"]}[part].data.mul_(2)
    with pytest.raises(RuntimeError, match=f"stale: {what} has changed"):
        ggn @ torch.ones(ggn.dim).double()


class Scaled(torch.autograd.Function):
    """Saves what it is multiplied by, or keeps it on its context."""

    @staticmethod
    def forward(ctx, x, saved, kept):
        ctx.save_for_backward(saved)
        ctx.kept = kept
        return x * saved.exp() * kept.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp() * ctx.kept.exp(), None, None


class Custom(nn.Module):
    """A custom function, and a batch normalisation past ``torch.nn.functional`` that moves its statistics."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        for name in ("saved", "kept", "mean", "variance"):
            self.register_buffer(name, 1 + torch.rand(3).double())

    def forward(self, x):
        x = Scaled.apply(self.layer(x), self.saved, self.kept)
        return torch.batch_norm(x, None, None, self.mean, self.variance, True, 0.1, 1e-5, False)


@pytest.mark.filterwarnings("ignore::bncurv.SlowPathWarning")
@pytest.mark.parametrize("name, read", [("saved", True), ("kept", True), ("mean", False), ("variance", False)])
def test_what_custom_functions_read_is_noticed(name, read):
    model, (batch,) = Custom(), batches(12)
    ggn, v = free(model, batch), torch.ones(15).double()
    before = ggn @ v
    getattr(model, name).data.mul_(2)
    if not read:
        assert torch.equal(ggn @ v, before)
        return
    with pytest.raises(RuntimeError, match=f"stale: buffer '{name}' has changed"):
        ggn @ v


@pytest.mark.parametrize("use", USES)
def test_every_use_of_the_graph_notices(moved, use):
    model, _, ggn = moved
    USES[use](ggn)
    model[0].weight.data.add_(1)
    with pytest.raises(RuntimeError, match="stale: parameter '0.weight'"):
        USES[use](ggn)


def test_what_does_not_run_the_graph_stays(moved):
    model, _, ggn = moved
    before = ggn.eigenvalues, ggn.unit_vectors(), ggn.gradient, ggn.flatten(ggn.newton_step(0.1, 2))
    model[6].weight.data.add_(1)
    after = ggn.eigenvalues, ggn.unit_vectors(), ggn.gradient, ggn.flatten(ggn.newton_step(0.1, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_the_graph_does_not_read_may_change(moved):
    """Running statistics of training mode, modes, the bias of a frozen layer, new parameters in the old ones' place."""
    model, batch, ggn = moved
    v = torch.randn(ggn.dim).double()
    before = ggn @ v
    model(batch[0] + 1)
    model.eval()
    model[3].bias.data.add_(1)
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    assert torch.equal(ggn @ v, before)


def test_old_values_put_back(moved):
    model, _, ggn = moved
    v, old = torch.randn(ggn.dim).double(), model[0].weight.detach().clone()
    before = ggn @ v
    model[0].weight.data.add_(1)
    model[0].weight.data.copy_(old)
    assert torch.equal(ggn @ v, before)
    with torch.no_grad():
        model[6].weight.mul_(2).div_(2)  # the same values, but PyTorch counts changes in place
    with pytest.raises(RuntimeError, match="stale: a tensor that the network's graph reads was modified in place"):
        ggn @ v


def test_other_errors_are_not_called_stale(moved, monkeypatch):
    _, _, ggn = moved
    monkeypatch.setattr(type(ggn), "_through", lambda self, v: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ggn @ torch.ones(ggn.dim).double()


def test_hooks_on_parameters_do_not_act(moved):
    model, _, ggn = moved
    v, calls = torch.randn(ggn.dim).double(), []
    before = ggn @ v
    handle = model[0].weight.register_hook(lambda g: calls.append(g) or 2 * g)
    assert torch.equal(ggn @ v, before) and not calls
    model[0].weight.data.add_(1)
    with pytest.raises(RuntimeError, match="stale"):
        ggn @ v
    assert list(model[0].weight._backward_hooks) == [handle.id]
    assert all(p.grad is None for p in model.parameters())


def test_an_unchanged_model_is_copied_once_for_all_batches():
    ggn = free(network(), batches(12, 7, 9))
    copies = [{name: id(before) for name, _, before in op.recorded._watched} for op in ggn._operators]
    assert copies[0].keys() == copies[1].keys() == copies[2].keys()
    shared = [name for name in copies[0] if copies[0][name] == copies[1][name] == copies[2][name]]
    assert sorted(set(copies[0]) - set(shared)) == ["the input"]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = network()[:3], nn.Linear(5, 3).double()

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False))


def test_a_checkpointed_network_has_its_eigenpairs_and_no_more():
    """Its graph would run the model's code again, in another mode and with other buffers than the recorded ones."""
    model, (batch,) = Checkpointed(), batches(12)
    ggn, want = free(model, batch), curvature(model, nn.CrossEntropyLoss(), batch, LowRankGGN()).ggn
    assert torch.allclose(ggn.eigenvalues, want.eigenvalues[:3], rtol=1e-9)
    assert torch.allclose(ggn.gradient, want.gradient, rtol=1e-9, atol=1e-13)
    assert torch.allclose(
        ggn.flatten(ggn.newton_step(0.1, 2)), want.flatten(want.newton_step(0.1, 2)), rtol=1e-6, atol=1e-9
    )
    before = model.inner[1].running_mean.clone()
    with pytest.raises(RuntimeError, match="has its eigenpairs and no more products: .*torch.utils.checkpoint"):
        ggn @ torch.ones(ggn.dim).double()
    assert torch.equal(model.inner[1].running_mean, before)
