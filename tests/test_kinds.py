"""What user code puts between layers (``kinds.py``), alone and in random networks: exact, or refused by name."""

import re
import warnings
from typing import Any

import kinds
import pytest
import torch
from cases import float64, perturb
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_fuzz import COMMON, Oracle, Problem, problems, rounding, trains
from torch import Tensor, nn

from bncurv import ComponentGrad, DiagGGNExact, curvature, reference

Found = dict[Oracle, dict[str, Tensor]]
Refusals = list[tuple[type[Exception], str]]


def results(problem: Problem, method: str) -> Found | None:
    """Diagonal and components, by their oracles; ``None`` where the coupled way says that it loses digits."""
    model, loss_fn, X, y = problem
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        res = curvature(model, loss_fn, (X.clone(), y), DiagGGNExact(), ComponentGrad(), method=method)
    if method == "coupled" and any("Use method='auto' or 'dense'" in str(w.message) for w in said):
        return None
    return {reference.ggn_diagonal: res.diag_ggn_exact, reference.component_gradients: res.grad_component}


def beyond(got: dict[str, Tensor], want: dict[str, Tensor], bounds: dict[str, float]) -> dict[str, str]:
    """What is off by more than its bound."""
    errors = {name: float((got[name] - t).norm()) for name, t in want.items()}
    said = "{:.1e} > {:.1e} of {:.1e}"
    return {n: said.format(e, bounds[n], float(want[n].norm())) for n, e in errors.items() if not e <= bounds[n]}


def size(t: Tensor) -> float:
    return float(t.norm())


def assert_exact(found: Found, problem: Problem) -> None:
    """To 1e-10, or to the oracle's own rounding; a backward that is another one each time is no excuse."""
    inside = kinds.kinds_of(problem[0])
    noise, scaled = kinds.REFUSED.keys().isdisjoint(inside), not kinds.SCALING.isdisjoint(inside)
    for oracle, got in found.items():
        want = oracle(*problem)
        whole = 0.0 if scaled and noise else max(1e-3, *map(size, want.values()))
        bounds = {n: 1e-10 * size(t) + 1e-12 * whole for n, t in want.items()}
        far = beyond(got, want, bounds)
        if far and noise:
            bounds = {n: bounds[n] + allowed(size(want[n]), most) for n, most in rounding(oracle, problem).items()}
            far = beyond(got, want, bounds)
        assert not far, (oracle.__name__, far)


def assert_as_good_as_dense(found: Found, dense: Found, problem: Problem) -> None:
    """Float32: to 1e-4, or to ten times the error of the dense way, here or after a change of all last digits."""
    for oracle, got in found.items():
        want = oracle(*problem)
        bounds = {n: 1e-4 * size(t) + allowed(size(t), 10 * size(dense[oracle][n] - t)) for n, t in want.items()}
        far = beyond(got, want, bounds)
        if far:

            def dense_way(*moved: Any, oracle: Oracle = oracle) -> dict[str, Tensor]:
                return (results(moved, "dense") or {})[oracle]

            moves = rounding(dense_way, problem)
            far = beyond(got, want, {n: b + allowed(size(want[n]), moves[n]) for n, b in bounds.items()})
        assert not far, (oracle.__name__, far)


def allowed(size: float, noise: float) -> float:
    """Of a tensor that is all noise, its size is too."""
    return noise if size > noise else 100 * noise


def refusals(model: nn.Module, method: str) -> Refusals:
    """The errors that are due to what stands inside a network."""
    inside = kinds.kinds_of(model)
    due = [kinds.ERRORS[kind] for kind in inside if kind in kinds.ERRORS]
    mixed = method == "coupled" and not kinds.MIXING.isdisjoint(inside)
    return due + [(RuntimeError, "method='coupled' does not apply")] * mixed


def assert_exact_or_refused(problem: Problem, method: str) -> bool:
    """Exact, or one of the errors that are due; whether it was refused."""
    double, due = problem[2].dtype == torch.float64, refusals(problem[0], method)
    try:
        found = results(problem, method)
        dense = None if double else results(problem, "dense")
    except tuple({kind for kind, _ in due}) as error:
        assert any(isinstance(error, kind) and re.search(text, str(error)) for kind, text in due), error
        return True
    if found and dense:
        assert_as_good_as_dense(found, dense, problem)
    elif found:
        assert_exact(found, problem)
    return False


# ---------------------------------------------------------------------------- one kind in a fixed network
def problem_with(*middle: nn.Module) -> Problem:
    layers = [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), *middle, nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(3, 2))
    perturb(model)
    return model, nn.MSELoss(), torch.randn(5, 4), torch.randn(5, 2)


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("kind", kinds.INSIDE | kinds.MIXED | kinds.REFUSED | kinds.HALF | kinds.NESTED)
def test_one_thing_inside(kind, method):
    with float64(0):
        refused = assert_exact_or_refused(problem_with(kinds.Inside(kind)), method)
    assert refused == (kind in kinds.REFUSED | kinds.HALF or (kind in kinds.MIXED and method == "coupled"))


@pytest.mark.parametrize("kind", kinds.INSIDE | kinds.REFUSED)
def test_one_thing_at_the_output(kind):
    """Where no pass starts beyond it."""
    with float64(0):
        model = nn.Sequential(nn.Linear(4, 3), kinds.Inside(kind))
        refused = assert_exact_or_refused((model, nn.MSELoss(), torch.randn(5, 4), torch.randn(5, 3)), "coupled")
    assert refused == (kind in kinds.REFUSED)


@pytest.mark.parametrize("method", ["coupled", "dense"])
@pytest.mark.parametrize("kind", kinds.AROUND)
def test_one_thing_around_a_branch(kind, method):
    with float64(0):
        branch = nn.Linear(3, 3), *([] if kind == "none" else [nn.BatchNorm1d(3)]), nn.Softplus()
        refused = assert_exact_or_refused(problem_with(kinds.Around(kind, *branch)), method)
    assert not refused or method == "coupled"


# ---------------------------------------------------------------------------- random networks
@st.composite
def wild_problems(draw: Any) -> tuple[Problem, str]:
    """A network with whatever there is, in float64 or float32, and the way to go."""
    problem, method = draw(problems(wild=True)), draw(st.sampled_from(["coupled", "auto", "dense"]))
    if method != "dense" and draw(st.integers(0, 3)) == 0:  # float32 is held against the dense way
        model, loss_fn, X, y = problem
        problem = model.float(), loss_fn.float(), X.float(), y.float() if y.is_floating_point() else y
    assume(trains(*problem, most=1e40 if problem[2].dtype == torch.float64 else 1e6))
    return problem, method


@settings(max_examples=40, **COMMON)
@given(drawn=wild_problems())
def test_wild_networks(drawn: tuple[Problem, str]) -> None:
    assert_exact_or_refused(*drawn)


@pytest.mark.slow
@settings(max_examples=5000, **COMMON)
@given(drawn=wild_problems())
def test_many_wild_networks(drawn: tuple[Problem, str]) -> None:
    assert_exact_or_refused(*drawn)
