"""Random small networks against the oracle: whatever plain PyTorch can differentiate must be exact.

What user code puts between ordinary layers is ``test_kinds.py``'s.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import kinds
import pytest
import torch
from cases import float64, perturb
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bncurv import ComponentGrad, DiagGGNExact, SlowPathWarning, curvature, reference

Shape = tuple[int, ...]  # of one sample, channels first
Layers = tuple[list[nn.Module], Shape]

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
INSTANCE: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}
POOL: dict[int, Any] = {
    1: [nn.AvgPool1d, nn.MaxPool1d],
    2: [nn.AvgPool2d, nn.MaxPool2d],
}


class Combined(nn.Module):
    """A branch beside its input: added, multiplied, concatenated, or the branch twice."""

    def __init__(self, how: str, *branch: nn.Module) -> None:
        super().__init__()
        self.how, self.branch = how, nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.how == "add_":
            y += x
            return y
        if self.how == "twice":
            return self.branch(y)
        ways: dict[str, Callable[[], Tensor]] = {
            "add": lambda: x + y,
            "gate": lambda: x * y.sigmoid(),
            "cat": lambda: torch.cat([x, y], 1),
        }
        return ways[self.how]()


# ------------------------------------------------------------------------------- single layers


def activation(draw: Any) -> nn.Module:
    inplace = draw(st.booleans())
    smooth = [nn.Tanh(), nn.SiLU(inplace), nn.Softplus(), nn.Sigmoid(), nn.ELU(inplace=inplace)]
    kinked = [nn.ReLU(inplace), nn.LeakyReLU(0.1, inplace), nn.Hardswish(inplace)]
    return draw(st.sampled_from([*smooth, *kinked]))


def batch_norm(draw: Any, shape: Shape) -> nn.Module:
    kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    norm = kind(
        shape[0],
        affine=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 0.1])),
        momentum=draw(st.sampled_from([0.1, None])),
        track_running_stats=draw(st.booleans()),
    )
    return norm.eval() if draw(st.integers(0, 4)) == 0 else norm


def other_norm(draw: Any, shape: Shape) -> nn.Module:
    """None of them over a single value: what is left of that is rounding."""
    affine = draw(st.booleans())
    size, positions = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    groups = [g for g in (1, 2, 3) if shape[0] % g == 0 and size > g]
    norms: list[nn.Module] = [nn.GroupNorm(g, shape[0], affine=affine) for g in groups]
    norms += [nn.LayerNorm(s, elementwise_affine=affine) for s in (shape, shape[-1:]) if s != (1,)]
    if positions > 1:
        norms.append(INSTANCE[len(shape) - 1](shape[0], affine=affine))
    return draw(st.sampled_from(norms or [nn.Identity()]))


def mixing(draw: Any, shape: Shape, same: bool) -> Layers:
    """A layer that mixes features: linear, convolution, or its transpose."""
    width = shape[0] if same else draw(st.integers(1, 4))
    bias = draw(st.booleans())
    dims = len(shape) - 1
    if dims == 0:
        return [nn.Linear(shape[0], width, bias=bias)], (width,)
    if draw(st.integers(0, 5)) == 0:  # over the last axis, as in transformers and mixers
        last = shape[-1] if same else draw(st.integers(1, 4))
        return [nn.Linear(shape[-1], last, bias=bias)], (*shape[:-1], last)
    groups = draw(st.sampled_from([g for g in (1, 2) if shape[0] % g == width % g == 0]))
    if same:
        options = {"kernel_size": draw(st.sampled_from([1, 2, 3])), "padding": "same"}
        layer = CONV[dims](shape[0], width, bias=bias, groups=groups, **options)
    else:
        kind = draw(st.sampled_from([CONV, TRANSPOSED]))
        options = {
            "kernel_size": draw(st.integers(1, 3)),
            "stride": draw(st.integers(1, 2)),
            "padding": draw(st.integers(0, 1)),
        }
        if kind is CONV:
            modes = ["zeros", "circular", "replicate"]
            options["padding_mode"] = draw(st.sampled_from(modes))
        layer = kind[dims](shape[0], width, bias=bias, groups=groups, **options)
    return [layer], out_shape(layer, shape)


def out_shape(layer: nn.Module, shape: Shape) -> Shape:
    """Of one sample; layers that do not fit the size are not drawn."""
    try:
        out = tuple(layer(torch.zeros(1, *shape))[0].shape)
    except RuntimeError:
        assume(False)
    assume(0 < torch.Size(out).numel() <= 64)
    return out


def pooled(draw: Any, shape: Shape) -> Layers:
    dims = len(shape) - 1
    if dims == 0 or min(shape[1:]) < 2:
        return [], shape
    pool = draw(st.sampled_from(POOL[dims]))(2)
    return [pool], out_shape(pool, shape)


# ----------------------------------------------------------------------------------- networks


def strange(draw: Any, shape: Shape, depth: int) -> nn.Module:
    """One of ``kinds.py``: most must be exact."""
    if depth and draw(st.booleans()):
        branch, _ = blocks(draw, shape, True, depth - 1, draw(st.integers(1, 2)), True)
        return kinds.Around(draw(st.sampled_from(list(kinds.AROUND))), *branch)
    table = draw(st.sampled_from([kinds.INSIDE] * 12 + [kinds.MIXED, kinds.REFUSED, kinds.STRICT]))
    return kinds.Inside(draw(st.sampled_from(list(table))))


def block(draw: Any, shape: Shape, same: bool, depth: int, wild: bool = False) -> Layers:
    """One or a few layers; with ``same`` the shape is kept, and ``wild`` also those of ``kinds.py``."""
    choice = ["unit", "unit", "mixing", "batch_norm", "activation", "other_norm"]
    choice += [] if same else ["pool"]
    choice += ["branch", "branch"] if depth else []
    kind = draw(st.sampled_from(choice + ["strange"] * (len(choice) // 2 if wild else 0)))
    if kind == "strange":
        return [strange(draw, shape, depth)], shape
    if kind == "mixing":
        return mixing(draw, shape, same)
    if kind == "unit":
        layers, shape = mixing(draw, shape, same)
        return [*layers, batch_norm(draw, shape), activation(draw)], shape
    if kind == "batch_norm":
        return [batch_norm(draw, shape)], shape
    if kind == "activation":
        return [activation(draw)], shape
    if kind == "other_norm":
        return [other_norm(draw, shape)], shape
    if kind == "pool":
        return pooled(draw, shape)
    how = draw(st.sampled_from(["add", "add_", "gate", "twice"] + ([] if same else ["cat"])))
    branch, _ = blocks(draw, shape, True, depth - 1, draw(st.integers(1, 3)), wild)
    out = (2 * shape[0], *shape[1:]) if how == "cat" else shape
    return [Combined(how, *branch)], out


def blocks(draw: Any, shape: Shape, same: bool, depth: int, count: int, wild: bool = False) -> Layers:
    layers: list[nn.Module] = []
    for _ in range(count):
        more, shape = block(draw, shape, same, depth, wild)
        layers += more
    return layers, shape


def target(draw: Any, output: Shape, samples: int) -> tuple[nn.Module, Tensor]:
    """A loss that fits the output, and its targets."""
    reduction = draw(st.sampled_from(["mean", "sum"]))
    losses = ["squared", "binary"] + (["classes", "smooth", "soft"] if output[0] > 1 else [])
    kind = draw(st.sampled_from(losses))
    if kind == "squared":
        return nn.MSELoss(reduction=reduction), torch.randn(samples, *output)
    if kind == "binary":
        weight = torch.rand(output) + 0.5 if draw(st.booleans()) else None
        loss = nn.BCEWithLogitsLoss(reduction=reduction, pos_weight=weight)
        return loss, torch.rand(samples, *output).round()
    smoothing = 0.2 if kind == "smooth" else 0.0
    weight = torch.rand(output[0]) + 0.5 if draw(st.booleans()) else None
    loss = nn.CrossEntropyLoss(weight=weight, reduction=reduction, label_smoothing=smoothing)
    if kind == "soft":
        return loss, torch.rand(samples, *output).softmax(1)
    return loss, torch.randint(output[0], (samples, *output[1:]))


Problem = tuple[nn.Module, nn.Module, Tensor, Tensor]


@st.composite
def problems(draw: Any, wild: bool = False) -> Problem:
    """A network, a loss and a batch."""
    shapes: list[Shape] = [(2, 3, 4), (1, 4, 4), (2, 4), (4, 3), (4,)]
    shape, samples = draw(st.sampled_from(shapes)), draw(st.integers(3, 6))
    with float64(draw(st.integers(0, 2**20))):
        X = torch.randn(samples, *shape)
        layers, shape = blocks(draw, shape, False, 2, draw(st.integers(2, 5)), wild)
        if len(shape) == 1 or draw(st.booleans()):
            outputs = draw(st.integers(1, 3))
            layers += [nn.Flatten(), nn.Linear(torch.Size(shape).numel(), outputs)]
            shape = (outputs,)
        model = nn.Sequential(*layers)
        perturb(model)
        loss_fn, y = target(draw, shape, samples)
        if wild and saturated(model, X):  # there the oracle's own Hessian of a softmax has lost its digits
            loss_fn, y = nn.MSELoss(), torch.randn(samples, *shape)
    return model, loss_fn, X, y


def saturated(model: nn.Module, X: Tensor) -> bool:
    """Whether an output is so large that a softmax or sigmoid of it is constant."""
    try:
        return not bool((copy.deepcopy(model)(X.clone()).abs() < 10).all())
    except (RuntimeError, ValueError, IndexError):
        return False


def trains(model: nn.Module, loss_fn: nn.Module, X: Tensor, y: Tensor, most: float = 1e4) -> bool:
    """Whether plain PyTorch runs forward and backward, with numbers of a reasonable size."""
    model = copy.deepcopy(model)
    try:
        output = model(X.clone())
        loss_fn(output, y).backward()
    except (RuntimeError, ValueError, IndexError):  # in place on what is needed; one value per channel; no row
        return False
    sizes = [output.detach()] + [p.grad for p in model.parameters() if p.grad is not None]
    return len(sizes) > 1 and all(bool((t.abs() < most).all()) for t in sizes)


def far_off(got: dict[str, Tensor], want: dict[str, Tensor], noise: dict[str, float]) -> list[str]:
    """What is not equal to 1e-8 per tensor; where one is zero by symmetry, to 1e-11 on the scale of all, or of one."""
    whole = max(1e-3, *(float(t.abs().max()) for t in want.values()))
    bounds = {
        name: 1e-8 * float(t.norm()) + 1e-11 * whole * t.numel() ** 0.5 + noise.get(name, 0.0)
        for name, t in want.items()
    }
    errors = {name: float((got[name] - t).norm()) for name, t in want.items()}
    return [f"{name}: {errors[name]:.1e} > {bounds[name]:.1e}" for name in want if not errors[name] <= bounds[name]]


Oracle = Callable[[nn.Module, nn.Module, Tensor, Tensor], dict[str, Tensor]]


def last_digits(t: Tensor, generator: torch.Generator) -> Tensor:
    """Factors."""
    return 1 + 10 * torch.finfo(t.dtype).eps * (torch.rand(t.shape, generator=generator, dtype=t.dtype) - 0.5)


def in_its_last_digits(module: nn.Module, args: Any, output: Tensor, seed: int) -> Tensor:
    """A forward hook."""
    return output * last_digits(output, torch.Generator().manual_seed(seed))


def rounding(oracle: Oracle, problem: Problem) -> dict[str, float]:
    """How much the oracle itself moves when all numbers change in their last digits: no result can be better.

    A signal of 1e-7 on a constant of 0.6, before a BatchNorm, has lost seven digits for everybody. The output's digits
    are moved on their own: those of X may be gone by then (1e-6 x, beside a bias), and what vanishes is rounding of
    the loss' gradient.
    """
    model, loss_fn, X, y = problem
    want = oracle(*problem)
    noise = dict.fromkeys(want, 0.0)
    for seed in range(5):
        digits = torch.Generator().manual_seed(seed)
        moved_X, moved_model = X.clone(), copy.deepcopy(model)
        for t in (moved_X, *moved_model.parameters()):
            t.data *= last_digits(t, digits)
        moved_model.register_forward_hook(partial(in_its_last_digits, seed=seed))
        moved = oracle(moved_model, loss_fn, moved_X, y)
        noise = {name: max(noise[name], float((moved[name] - want[name]).norm())) for name in want}
    return {name: 10 * most for name, most in noise.items()}


def assert_near(got: dict[str, Tensor], oracle: Oracle, problem: Problem) -> None:
    want = oracle(*problem)
    far = far_off(got, want, {})
    if far:  # an ill-conditioned network, or wrong
        far = far_off(got, want, rounding(oracle, problem))
    assert not far, far


def assert_exact(problem: Problem, method: str) -> None:
    model, loss_fn, X, y = problem
    assume(trains(*problem))
    with warnings.catch_warnings():  # an in-place activation may hide a layer whose output is a view
        warnings.simplefilter("ignore", SlowPathWarning)
        quantities = DiagGGNExact(), ComponentGrad()
        res = curvature(model, loss_fn, (X.clone(), y), *quantities, method=method)  # it may work in place
    assert_near(res.diag_ggn_exact, reference.ggn_diagonal, problem)
    assert_near(res.grad_component, reference.component_gradients, problem)


COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.parametrize("method", ["coupled", "dense"])
@settings(max_examples=50, **COMMON)
@given(problem=problems())
def test_random_networks(method: str, problem: Problem) -> None:
    assert_exact(problem, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["coupled", "dense", "auto"])
@settings(max_examples=2000, **COMMON)
@given(problem=problems())
def test_many_random_networks(method: str, problem: Problem) -> None:
    assert_exact(problem, method)
