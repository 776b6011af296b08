"""Bad input: what arrived, what was expected, what to do; and everything left as it was."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo  # importing it changes the snapshot
from backpack import backpack
from backpack.extensions import BatchGrad
from cases import Net, frozen_parameters
from state import unchanged
from torch import Tensor, nn
from torch.nn import functional as F

import bncurv
from bncurv import ComponentGrad, DiagGGNExact, curvature, extend, reference
from bncurv.quantities import Quantity

N, C = 6, 3
NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, C))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N, 4)), generator=torch.Generator().manual_seed(1))


def labels(*shape: int) -> Tensor:
    return torch.randint(C, shape or (N,), generator=torch.Generator().manual_seed(2))


def with_value(x: Tensor, sample: int, number: float) -> Tensor:
    x[sample, 0] = number
    return x


def linear(forward: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(forward, layer=nn.Linear(4, C))


class MixingLoss(nn.CrossEntropyLoss):
    """Centres the outputs over the batch: every sample's loss depends on all samples."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input - input.mean(0), target)


class OtherLoss(nn.Module):
    """A loss that bncurv has never heard of."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(input - input.mean(0), target)


@dataclass(frozen=True)
class Bad:
    """One wrong thing in an otherwise right call; the message must hold all of ``says``."""

    name: str
    error: type[Exception] | tuple[type[Exception], ...]
    says: tuple[str, ...]
    data: Callable[[], Any] = lambda: (inputs(), labels())
    model: Callable[[], Any] = mlp
    loss: Callable[[], Any] = nn.CrossEntropyLoss
    quantities: tuple[Any, ...] = (DiagGGNExact(),)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def data(X: Tensor, y: Any) -> Callable[[], tuple[Tensor, Any]]:
    return lambda: (X, y)


# wrong in both gestures
BATCHES = [
    Bad(
        "one_sample",
        ValueError,
        ("'1'", "(1, 5)", "training mode", "at least 2 samples", "eval"),
        data(inputs(1, 4), labels(1)),
    ),
    Bad(
        "infinite_parameter",
        ValueError,
        ("output", "NaN or inf", "check the inputs and parameters"),
        model=lambda: nn.Sequential(nn.Linear(4, C), _Blowing()),
    ),
    Bad("empty_batch", ValueError, ("empty",), data(inputs(0, 4), labels(0))),
    Bad(
        "half",
        TypeError,
        ("torch.float16", "float32 or all float64", "model.float()"),
        data(inputs().half(), labels()),
        lambda: mlp().half(),
    ),
    Bad(
        "bfloat16",
        TypeError,
        ("torch.bfloat16", "float32 or all float64", "model.float()"),
        data(inputs().bfloat16(), labels()),
        lambda: mlp().bfloat16(),
    ),
    Bad(
        "mixed_precision",
        TypeError,
        ("torch.float32", "torch.float64", "all float32 or all float64"),
        model=linear(lambda net, x: net.layer(x).double()),
    ),
    Bad(
        "all_targets_ignored",
        ValueError,
        ("CrossEntropyLoss", "no target that counts"),
        data(inputs(), torch.full((N,), -100)),
    ),
    Bad(
        "target_nan",
        ValueError,
        ("MSELoss", "NaN/inf"),
        data(inputs(), with_value(inputs(N, C), 1, float("nan"))),
        loss=nn.MSELoss,
    ),
    Bad(
        "negative_class_weight",
        ValueError,
        ("CrossEntropyLoss", "not convex", "non-negative"),
        loss=lambda: nn.CrossEntropyLoss(weight=torch.tensor([-1.0, 1.0, 1.0])),
    ),
    Bad(
        "negative_pos_weight",
        ValueError,
        ("BCEWithLogitsLoss", "non-convex", "non-negative"),
        data(inputs(), labels(N, C).clamp(max=1).float()),
        loss=lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([-1.0, 1.0, 1.0])),
    ),
    Bad(
        "once_differentiable_loss",
        ValueError,
        ("MultiMarginLoss", "twice", "CrossEntropyLoss, MSELoss or BCEWithLogitsLoss", "register_loss"),
        loss=nn.MultiMarginLoss,
    ),
    Bad(
        "unknown_loss_class",
        ValueError,
        ("SqrtGGNExact goes by samples", "OtherLoss compares samples", "DiagGGNExact, DiagGGNMC and LowRankGGN"),
        loss=OtherLoss,
        quantities=(bncurv.SqrtGGNExact(),),
    ),
    Bad(
        "mixing_loss",
        ValueError,
        ("ComponentDiagGGNExact goes by samples", "MixingLoss compares samples"),
        loss=MixingLoss,
        quantities=(bncurv.ComponentDiagGGNExact(),),
    ),
    Bad(
        "same_quantity_twice",
        ValueError,
        ("diag_ggn_exact", "twice"),
        quantities=(DiagGGNExact(), ComponentGrad(), DiagGGNExact()),
    ),
]

# wrong in `curvature` only, or noticed by PyTorch itself in the other gesture
CALLS = [
    Bad("no_quantity", ValueError, ("no quantity", "DiagGGNExact()"), quantities=()),
    Bad(
        "y_too_short", ValueError, ("X", "(6, 4)", "y", "(5,)", "equal"), data(inputs(), labels(5))
    ),
    Bad("y_scalar", ValueError, ("X", "(6, 4)", "y", "()"), data(inputs(), labels()[0])),
    Bad(
        "y_column",
        ValueError,
        ("output", "(6, 3)", "target", "(6, 1)", "expected (6,)", "Reshape"),
        data(inputs(), labels(N, 1)),
    ),
    Bad(
        "y_float_indices",
        ValueError,
        ("class probabilities", "(6,)", "expected (6, 3)"),
        data(inputs(), labels().float()),
    ),
    Bad(
        "y_out_of_range",
        (ValueError, IndexError),
        ("Target 7 is out of bounds",),
        data(inputs(), labels(N) * 0 + 7),
    ),
    Bad(
        "y_broadcasts",
        ValueError,
        ("MSELoss", "(6, 3)", "(6, 1)", "must be equal", "Reshape"),
        data(inputs(), inputs(N, 1)),
        loss=nn.MSELoss,
    ),
    Bad(
        "y_broadcasts_bce",
        ValueError,
        ("BCEWithLogitsLoss", "(6, 3)", "(6,)", "must be equal", "Reshape"),
        data(inputs(), torch.ones(N)),
        loss=nn.BCEWithLogitsLoss,
    ),
    Bad(
        "y_list",
        TypeError,
        ("y is list", "tensor"),
        data(inputs(), labels().tolist()),
    ),
    Bad(
        "nan",
        ValueError,
        ("X", "NaN or inf", "[2]", "Remove"),
        data(with_value(inputs(), 2, float("nan")), labels()),
    ),
    Bad(
        "inf",
        ValueError,
        ("X", "NaN or inf", "[3]", "Remove"),
        data(with_value(inputs(), 3, float("inf")), labels()),
    ),
    Bad("empty_loader", ValueError, ("data is empty", "(X, y)", "at least one"), lambda: []),
    Bad(
        "exhausted_generator",
        ValueError,
        ("data is empty", "(X, y)", "at least one"),
        lambda: iter(()),
    ),
    Bad("yields_numbers", TypeError, ("yields int", "pairs (X, y)"), lambda: iter([1, 2])),
    Bad(
        "yields_triples",
        TypeError,
        ("yields", "3", "pairs (X, y)", "forward=lambda model, batch: (model(batch[0], batch[1]), batch[2])"),
        lambda: [(inputs(), labels(), labels())],
    ),
    Bad(
        "second_batch_bad",
        TypeError,
        ("yields", "1", "pairs (X, y)"),
        lambda: [(inputs(), labels()), (inputs(),)],
    ),
    Bad("second_batch_short", ValueError, ("(6, 4)", "(5,)"), lambda: iter(_good_then_short())),
    Bad("data_is_tensor", TypeError, ("yields Tensor", "pairs (X, y)"), lambda: inputs()),
    Bad("data_is_number", TypeError, ("data is int", "(X, y)"), lambda: 3),
    Bad("data_is_none", TypeError, ("data is NoneType", "(X, y)"), lambda: None),
    Bad("data_is_dict", TypeError, ("str", "pairs (X, y)"), lambda: {"X": inputs(), "y": labels()}),
    Bad(
        "reduction_none",
        ValueError,
        ("reduction='none'", "'mean' or 'sum'"),
        loss=lambda: nn.CrossEntropyLoss(reduction="none"),
    ),
    Bad(
        "output_tuple",
        TypeError,
        ("tuple with [0] (6, 3)", "one tensor [N, ...]", "forward=lambda model, batch: (model(batch[0])[0], batch[1])"),
        model=lambda: nn.LSTM(4, C),
    ),
    Bad(
        "output_dict",
        TypeError,
        ("dict with ['logits'] (6, 3)", "expected one tensor [N, ...]", "(model(batch[0])['logits'], batch[1])"),
        model=linear(lambda net, x: {"logits": net.layer(x)}),
    ),
    Bad(
        "output_transposed",
        ValueError,
        ("(3, 6)", "(6,)", "batch first"),
        model=linear(lambda net, x: net.layer(x).T),
    ),
    Bad(
        "output_scalar",
        ValueError,
        ("()", "(6,)", "batch first"),
        model=linear(lambda net, x: net.layer(x).sum()),
    ),
    Bad(
        "forward_without_graph",
        ValueError,
        ("depends on no parameter", "no_grad"),
        model=linear(torch.no_grad()(lambda net, x: net.layer(x))),
    ),
    Bad("model_is_function", TypeError, ("function", "torch.nn.Module"), model=lambda: F.relu),
    Bad(
        "params_unknown",
        ValueError,
        ("'0.wieght'", "did you mean", "'0.weight'"),
        options={"params": ["0.wieght"]},
    ),
    Bad(
        "params_unlike_any",
        ValueError,
        ("'zzz'", "did you mean", "'0.weight'"),
        options={"params": ["0.weight", "zzz"]},
    ),
    Bad(
        "params_frozen",
        ValueError,
        ("'0.weight'", "requires_grad=False", "True", "leave it out"),
        model=lambda: frozen_parameters(mlp(), "0.weight"),
        options={"params": ["0.weight", "3.bias"]},
    ),
    Bad("params_glob", ValueError, ("glob 'x*'", "holds no parameter", "'0.weight'"), options={"params": "x*"}),
    Bad("params_module_name", ValueError, ("'0', a module", "'0.*'"), options={"params": "0"}),
    Bad("params_tensor", ValueError, ("shape (3,)", "no parameter of"), options={"params": torch.ones(3)}),
    Bad("params_other_module", ValueError, ("ReLU", "no part of"), options={"params": nn.ReLU()}),
    Bad("params_predicate", TypeError, ("predicate", "int", "True or False"), options={"params": lambda n, p: 1}),
    Bad("params_none_chosen", ValueError, ("is False for every",), options={"params": lambda n, p: False}),
    Bad(
        "forward_alone",
        TypeError,
        ("forward", "Tensor", "pair (output, target)"),
        options={"forward": lambda model, batch: model(batch[0])},
    ),
    Bad(
        "forward_target",
        TypeError,
        ("forward", "target that is NoneType", "a tensor"),
        options={"forward": lambda model, batch: (model(batch[0]), None)},
    ),
    Bad("params_empty", ValueError, ("params", "empty"), options={"params": []}),
    Bad("params_number", TypeError, ("params", "3", "names"), options={"params": 3}),
    Bad(
        "all_frozen",
        ValueError,
        ("Sequential", "no parameter that requires grad"),
        model=lambda: mlp().requires_grad_(False),
    ),
    Bad(
        "no_parameters",
        ValueError,
        ("ReLU", "no parameter that requires grad"),
        model=nn.ReLU,
        data=data(inputs(N, C), labels()),
    ),
    Bad(
        "quantity_class",
        TypeError,
        ("DiagGGNExact", "not an instance", "DiagGGNExact()"),
        quantities=(DiagGGNExact,),
    ),
    Bad(
        "quantity_of_backpack",
        TypeError,
        ("BatchGrad", "not an instance", "bncurv"),
        quantities=(BatchGrad(),),
    ),
    Bad(
        "method",
        ValueError,
        ("'fast'", "'auto', 'coupled' or 'dense'"),
        options={"method": "fast"},
    ),
    *(
        Bad(
            f"chunk_size_{size}",
            (ValueError, TypeError),
            (f"chunk_size={size!r}", "positive integer"),
            options={"chunk_size": size, "method": method},
        )
        for size in (0, -1, 2.5, "a", True)
        for method in ("coupled", "dense")
    ),
    *(
        Bad(
            f"tol_{tol}",
            (ValueError, TypeError),
            (f"tol={tol!r}", "0 <= tol < 1"),
            options={"tol": tol},
        )
        for tol in (-0.1, 1.0, float("nan"), "a")
    ),
]


class _Blowing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf")


def _good_then_short() -> list[Any]:
    return [(inputs(), labels()), (inputs(), labels(5))]


def assert_says(error: BaseException, bad: Bad) -> None:
    missing = [part for part in bad.says if part not in str(error)]
    assert not missing, f"{missing} not in {error}"


@pytest.mark.parametrize("bad", [*BATCHES, *CALLS], ids=str)
def test_curvature(bad: Bad) -> None:
    model, loss_fn, batches = bad.model(), bad.loss(), bad.data()
    modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
    with unchanged(*modules):
        with pytest.raises(bad.error) as caught:
            curvature(model, loss_fn, batches, *bad.quantities, **bad.options)
    assert_says(caught.value, bad)


# what an ordinary forward pass changes: the running statistics
FORWARD = ("buffer",)


@pytest.mark.parametrize("bad", BATCHES, ids=str)
def test_extend(bad: Bad) -> None:
    (X, y), model, loss_fn = bad.data(), extend(bad.model()), extend(bad.loss())
    with unchanged(model, loss_fn, but=FORWARD):
        with pytest.raises(bad.error) as caught, backpack(*bad.quantities):
            loss_fn(model(X), y).backward()
    assert_says(caught.value, bad)


def error_of(model: nn.Module, loss_fn: nn.Module, X: Tensor, y: Tensor) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        loss_fn(model(X), y).backward()
    return caught.type, str(caught.value)


PYTORCHS_OWN = [
    "y_too_short",
    "y_scalar",
    "y_column",
    "y_float_indices",
    "y_out_of_range",
    "output_tuple",
    "output_dict",
    "output_transposed",
    "output_scalar",
    "forward_without_graph",
    "reduction_none",
    "all_frozen",
]


@pytest.mark.parametrize("bad", [b for b in CALLS if b.name in PYTORCHS_OWN], ids=str)
def test_extend_leaves_pytorchs_own_errors(bad: Bad) -> None:
    own = error_of(bad.model(), bad.loss(), *bad.data())
    model, loss_fn = extend(bad.model()), extend(bad.loss())
    with unchanged(model, loss_fn, but=FORWARD):
        with pytest.raises(own[0]) as caught, backpack(DiagGGNExact()):
            loss_fn(model(bad.data()[0]), bad.data()[1]).backward()
    assert str(caught.value) == own[1]


def test_extend_broadcasting_target() -> None:
    model, loss_fn = extend(mlp()), extend(nn.MSELoss())
    with unchanged(model, but=FORWARD), pytest.warns(UserWarning, match="target size"):
        with pytest.raises(ValueError, match="must be equal"), backpack(DiagGGNExact()):
            loss_fn(model(inputs()), inputs(N, 1)).backward()


def test_extend_reduction_none_reduced_by_hand() -> None:
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss(reduction="none"))
    with unchanged(model, but=FORWARD):
        with pytest.raises(ValueError, match="reduction='none'.*'mean' or 'sum'"):
            with backpack(DiagGGNExact()):
                loss_fn(model(inputs()), labels()).mean().backward()


@pytest.mark.parametrize("thing", [F.cross_entropy, "model", None], ids=["function", "text", "nothing"])
def test_extend_what_is_no_module(thing: Any) -> None:
    with unchanged(), pytest.raises(TypeError, match="extend got .*expected a torch.nn.Module"):
        extend(thing)


def test_quantity_class_in_context() -> None:
    with unchanged(), pytest.raises(ValueError, match="received a class"):
        with backpack(DiagGGNExact):
            pass


# ------------------------------------------------------------- the order of things: who is extended


def both(model: nn.Module, loss_fn: nn.Module) -> None:
    loss_fn(model(inputs()), labels()).backward()


def neither_extended() -> None:
    with backpack(DiagGGNExact()):
        both(mlp(), nn.CrossEntropyLoss())


def model_only() -> None:
    with backpack(DiagGGNExact()):
        both(extend(mlp()), nn.CrossEntropyLoss())


def loss_only() -> None:
    with backpack(DiagGGNExact()):
        both(mlp(), extend(nn.CrossEntropyLoss()))


def forward_before_extend() -> None:
    model, loss_fn = mlp(), extend(nn.CrossEntropyLoss())
    output = model(inputs())
    extend(model)
    with backpack(DiagGGNExact()):
        loss_fn(output, labels()).backward()


def loss_before_extend() -> None:
    model, loss_fn = extend(mlp()), nn.CrossEntropyLoss()
    loss = loss_fn(model(inputs()), labels())
    extend(loss_fn)
    with backpack(DiagGGNExact()):
        loss.backward()


def forward_in_no_grad() -> None:
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with torch.no_grad():
        output = model(inputs())
    with backpack(DiagGGNExact()):
        loss_fn(output.requires_grad_(), labels()).backward()


def detached_output() -> None:
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact()):
        loss_fn(model(inputs()).detach().requires_grad_(), labels()).backward()


def no_backward() -> None:
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact()):
        loss_fn(model(inputs()), labels())


def unextended_again() -> None:
    model, loss_fn = bncurv.unextend(extend(mlp())), bncurv.unextend(extend(nn.CrossEntropyLoss()))
    with backpack(DiagGGNExact()):
        both(model, loss_fn)


MODEL, LOSS = r"bncurv\.extend\(model\)", r"loss_fn = bncurv\.extend\(loss_fn\)"


@pytest.mark.parametrize(
    ("gesture", "says"),
    [
        (neither_extended, f"DiagGGNExact did not run.*{MODEL}.*{LOSS}"),
        (model_only, f"DiagGGNExact did not run.*{LOSS}"),
        (loss_only, f"from no extended model.*{MODEL}"),
        (forward_before_extend, f"from no extended model.*{MODEL} before the forward"),
        (loss_before_extend, f"DiagGGNExact did not run.*{LOSS}"),
        (forward_in_no_grad, f"from no extended model.*{MODEL}"),
        (detached_output, f"from no extended model.*{MODEL}"),
        (no_backward, r"DiagGGNExact did not run.*backward\(\) inside the block"),
        (unextended_again, f"DiagGGNExact did not run.*{MODEL}.*{LOSS}"),
    ],
)
def test_who_is_extended(gesture: Callable[[], None], says: str) -> None:
    with unchanged(), pytest.raises(RuntimeError, match=says):
        gesture()


@pytest.mark.parametrize("forward", ["inside", "before"])
def test_forward_may_run_before_the_context(forward: str) -> None:
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    output = model(inputs()) if forward == "before" else None
    with backpack(DiagGGNExact()):
        loss_fn(model(inputs()) if output is None else output, labels()).backward()
    expected = reference.ggn_diagonal(mlp(), nn.CrossEntropyLoss(), inputs(), labels())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.diag_ggn_exact, expected[name].float(), atol=1e-6, rtol=1e-4)


def test_inner_error_is_not_hidden_by_an_idle_quantity() -> None:
    with pytest.raises(KeyError, match="mine"), backpack(DiagGGNExact()):
        raise KeyError("mine")


# ----------------------------------------------------------------------- scaled and composed losses


def diagonal(scale: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> nn.Module:
    model, loss_fn = extend(mlp().to(dtype)), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact(), ComponentGrad()):
        scale(loss_fn(model(inputs().to(dtype)), labels())).backward()
    return model


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        (lambda loss: loss * 2, 2.0),
        (lambda loss: loss / 4, 0.25),
        (lambda loss: loss + loss, 2.0),
        (lambda loss: 3 * loss - 1, 3.0),
        (lambda loss: loss * 0, 0.0),
    ],
    ids=["double", "quarter", "sum", "affine", "zero"],
)
def test_scaled_loss(scale: Callable[[Tensor], Tensor], factor: float) -> None:
    scaled, plain = diagonal(scale), diagonal(lambda loss: loss)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.diag_ggn_exact, factor * q.diag_ggn_exact)
        torch.testing.assert_close(p.grad_component, factor * q.grad_component)
        torch.testing.assert_close(p.grad, factor * q.grad)


def test_backward_with_a_gradient() -> None:
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact()):
        loss_fn(model(inputs()), labels()).backward(torch.tensor(2.0))
    plain = diagonal(lambda loss: loss, torch.float32)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.diag_ggn_exact, 2 * q.diag_ggn_exact)


def test_negative_loss() -> None:
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with unchanged(model, but=FORWARD):
        with pytest.raises(ValueError, match="multiplied by -1.*negative.*positive number"):
            with backpack(DiagGGNExact()):
                (-loss_fn(model(inputs()), labels())).backward()


def decay(model: nn.Module, strength: float) -> Tensor:
    return strength * torch.stack([p.square().sum() for p in model.parameters()]).sum()


COMPOSED = {
    "strong_decay": lambda model, output, loss: loss + decay(model, 1e-2),
    "weak_decay": lambda model, output, loss: loss + decay(model, 1e-4),
    "one_parameter": lambda model, output, loss: loss + 1e-2 * model[3].weight.abs().sum(),
    "output_penalty": lambda model, output, loss: loss + 1e-3 * output.square().mean(),
    "other_loss": lambda model, output, loss: loss + F.mse_loss(output, F.one_hot(labels()).to(output)),
    "exponential": lambda model, output, loss: loss.exp() + decay(model, 1e-2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("before", [None, 0.5], ids=["no_grad_yet", "grad_accumulated"])
@pytest.mark.parametrize("compose", COMPOSED.values(), ids=COMPOSED)
def test_composed_loss(compose: Any, before: float | None, dtype: torch.dtype) -> None:
    model, loss_fn = extend(mlp().to(dtype)), extend(nn.CrossEntropyLoss())
    for p in model.parameters():
        p.grad = None if before is None else torch.full_like(p, before)
    with unchanged(model, but=("buffer", "grad")):
        with pytest.raises(RuntimeError, match="composed.*other terms"):
            with backpack(DiagGGNExact(), ComponentGrad()):
                output = model(inputs().to(dtype))
                compose(model, output, loss_fn(output, labels())).backward()


def zero_bias_net(dtype: torch.dtype) -> nn.Module:
    """As torchvision's VGG-BNs: a zero bias before a BN, where the gradient is zero too."""
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, C)),
    ).to(dtype)
    nn.init.zeros_(model[0].bias), nn.init.zeros_(model[3].bias)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("steps", [1, 3])
def test_no_false_alarm(steps: int, dtype: torch.dtype) -> None:
    """Gradients that are zero up to rounding, and accumulated ones, are no sign of composition."""
    model, loss_fn = extend(zero_bias_net(dtype)), extend(nn.CrossEntropyLoss())
    for seed in range(steps):
        X = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with backpack(DiagGGNExact()):
            loss_fn(model(X), labels(8)).backward()
    assert all(hasattr(p, "diag_ggn_exact") for p in model.parameters())


# ------------------------------------------------------------------------------------ modes


def test_autocast() -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    with unchanged(model), pytest.raises(TypeError, match="bfloat16.*autocast"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            curvature(model, loss_fn, (inputs(), labels()), DiagGGNExact())
    extend(model), extend(loss_fn)
    with unchanged(model, but=FORWARD), pytest.raises(TypeError, match="bfloat16.*autocast"):
        with backpack(DiagGGNExact()), torch.autocast("cpu", dtype=torch.bfloat16):
            loss_fn(model(inputs()), labels()).backward()


def test_no_grad_in_context() -> None:
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with unchanged(model, but=FORWARD), pytest.raises(RuntimeError, match="does not require grad"):
        with backpack(DiagGGNExact()), torch.no_grad():
            loss_fn(model(inputs()), labels()).backward()


def test_params_may_be_any_iterable() -> None:
    model, loss_fn, batch = mlp(), nn.CrossEntropyLoss(), (inputs(), labels())
    some = NAMES[2:4]
    everything = curvature(model, loss_fn, batch, DiagGGNExact()).diag_ggn_exact
    assert list(everything) == NAMES
    for params in (some, tuple(some), iter(some), dict.fromkeys(some)):
        got = curvature(model, loss_fn, batch, DiagGGNExact(), params=params).diag_ggn_exact
        assert list(got) == some
        for name in some:
            torch.testing.assert_close(got[name], everything[name])


def test_results_name_what_they_hold() -> None:
    res = curvature(mlp(), nn.CrossEntropyLoss(), (inputs(), labels()), DiagGGNExact())
    with pytest.raises(AttributeError, match="diag_ggn_exact.*'grad_component' was not asked for"):
        _ = res.grad_component
    with pytest.raises(AttributeError, match="cannot assign"):
        res.method = "other"
    assert "diag_ggn_exact" in dir(res) and "diag_ggn_exact" in repr(res)


def test_every_public_quantity_is_refused_twice() -> None:
    """No quantity escapes the check for duplicates."""
    kinds = [q for q in vars(bncurv).values() if inspect.isclass(q) and issubclass(q, Quantity)]
    assert {DiagGGNExact, ComponentGrad} <= set(kinds)
    for kind in kinds:
        with pytest.raises(ValueError, match="twice"):
            curvature(mlp(), nn.CrossEntropyLoss(), (inputs(), labels()), kind(), kind())
