"""Vectors in parameter space: every form gives the same, and what does not fit is named."""

import pytest
import torch
from torch import nn

from bncurv import ComponentGrad, LowRankGGN, curvature

FORMS = {"one": (), "three": (3,)}


@pytest.fixture(scope="module", params=[False, True], ids=["rows", "matrix_free"])
def problem(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    model[2].register_forward_hook(lambda module, args, output: output * model.scale)
    batch = torch.randn(8, 4), torch.randint(2, (8,))
    quantity = LowRankGGN(top=2, matrix_free=True) if request.param else LowRankGGN()
    return curvature(model, nn.CrossEntropyLoss(), batch, quantity, ComponentGrad())


def vectors(ggn, lead):
    return {name: torch.randn((*lead, *shape)) for name, shape in ggn.shapes.items()}


@pytest.mark.parametrize("lead", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("function", ["product", "solve"])
def test_dicts_and_flat_vectors_agree(problem, function, lead):
    ggn = problem.ggn
    f = {"product": lambda v: ggn @ v, "solve": lambda v: ggn.solve(v, 0.3)}[function]
    v = vectors(ggn, lead)
    got, flat = f(v), ggn.flatten(v)
    assert {name: t.shape for name, t in got.items()} == {name: t.shape for name, t in v.items()}
    assert flat.shape == (ggn.dim, *lead)
    assert torch.allclose(ggn.flatten(got), f(flat), rtol=1e-5, atol=1e-6)
    assert torch.equal(ggn.unflatten(flat.movedim(0, -1))["scale"], v["scale"])
    for i in range(*lead or (0,)):
        alone = f({name: t[i] for name, t in v.items()})
        assert all(torch.allclose(alone[name], got[name][i], rtol=1e-5, atol=1e-6) for name in v)


def test_all_gradients_at_once(problem):
    """Influence functions: N right sides as they come out of ComponentGrad."""
    ggn, g = problem.ggn, problem.grad_component
    solved = ggn.solve(g, 0.3)
    back = ggn @ solved
    assert all(torch.allclose(back[name] + 0.3 * solved[name], g[name], atol=1e-5) for name in g)


MISFITS = {
    "transposed": (
        {"0.weight": torch.zeros(4, 3)},
        r"'0.weight'\] has shape \(4, 3\); expected \(3, 4\), or \(m, 3, 4\)",
    ),
    "flattened": ({"0.weight": torch.zeros(12)}, r"'0.weight'\] has shape \(12,\); expected \(3, 4\)"),
    "two axes": ({"scale": torch.zeros(2, 2)}, r"'scale'\] has shape \(2, 2\); expected \(\), or \(m\) for m"),
    "one of several": ({"0.bias": torch.zeros(2, 3)}, r"'0.bias'\] has shape \(2, 3\), 2 vectors, but .*one vector"),
    "dtype": (
        {"0.bias": torch.zeros(3).double()},
        r"'0.bias'\] is torch.float64 on cpu; expected torch.float32 on cpu",
    ),
    "device": ({"0.bias": torch.zeros(3, device="meta")}, r"'0.bias'\] is torch.float32 on meta; expected .* on cpu"),
    "array": ({"0.bias": [0.0] * 3}, r"'0.bias'\] is list; expected a torch.Tensor"),
    "unknown": ({"typo": torch.zeros(3)}, r"vector has unknown \['typo'\]; expected exactly .* \(7 in all\)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_named(problem, case):
    entries, message = MISFITS[case]
    v = vectors(problem.ggn, ()) | entries
    for call in (lambda: problem.ggn @ v, lambda: problem.ggn.solve(v, 0.1), lambda: problem.ggn.flatten(v)):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_missing_names(problem):
    v = vectors(problem.ggn, ())
    del v["scale"], v["0.bias"]
    with pytest.raises(ValueError, match=r"vector lacks \['scale', '0.bias'\]; expected exactly"):
        problem.ggn @ v
    with pytest.raises(ValueError, match=r"lacks \['scale', '0.bias'\] and has unknown \['x'\]"):
        problem.ggn @ (v | {"x": torch.zeros(1)})


@pytest.mark.parametrize("shape", [(3,), (2, 24), (24, 1, 1), ()])
def test_flat_vectors_have_the_entries_first(problem, shape):
    with pytest.raises(ValueError, match=r"vector has shape .*; expected \[30\], or \[30, m\]"):
        problem.ggn @ torch.zeros(shape)


def test_flat_vectors_of_another_dtype(problem):
    with pytest.raises(
        ValueError, match=r"vector is torch.float64 on cpu; expected torch.float32 on cpu.*\.to\(\.\.\.\)"
    ):
        problem.ggn.solve(torch.zeros(problem.ggn.dim).double(), 0.1)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_surroundings_do_not_matter(problem, context):
    ggn = problem.ggn
    v = torch.randn(ggn.dim, 2)
    calls = [
        lambda: ggn @ v,
        lambda: ggn.solve(v, 0.3),
        lambda: ggn.flatten(ggn.newton_step(0.3)),
        lambda: ggn.flatten(ggn.newton_step(0.3, 2)),
        lambda: ggn.slopes(2),
        lambda: ggn.curvatures(2),
        lambda: ggn.unit_vectors(2),
        lambda: ggn.density(5, 2, torch.Generator().manual_seed(0))[0],
    ]
    want = [call() for call in calls]
    with context():
        got = [call() for call in calls]
    assert all(g.dtype == torch.float32 and torch.allclose(g, w, atol=1e-6) for g, w in zip(got, want, strict=True))
