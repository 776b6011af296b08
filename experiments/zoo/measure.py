"""One architecture: bncurv in float64 beside plain autograd, the passes of both, and what was slow."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lib.defaults import defaults
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncurv import ComponentL2Grad, DiagGGNExact, Results, SlowPathWarning, curvature, reference

TOLERANCE = {False: 1e-10, True: 1e-5}  # by whether the model computes in float32 inside, as bncurv tells
Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


def call(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
    """``forward=`` of a pair (X, y)."""
    return model(batch[0]), batch[1]


@dataclass(frozen=True)
class Architecture:
    """A public model with random weights, and a small batch for it.

    Attributes:
        name: unique.
        library: the package that it comes from.
        build: the model.
        batch: one batch for ``forward``.
        forward: ``f(model, batch) -> (output, target)``, for the mean cross-entropy.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    forward: Callable[[nn.Module, Any], tuple[Any, Tensor]] = call

    def __str__(self) -> str:
        return self.name


@dataclass
class Measured:
    """What came out; ``problem`` is empty where nothing is wrong.

    Attributes:
        name: of the architecture.
        library: of the architecture.
        parameters: how many numbers are learnt.
        norms: BatchNorms.
        samples: N.
        columns: passes that the dense way takes for each sample.
        passes: backward passes of the batch that the coupled way took.
        single: whether the model computes in float32 inside, whatever its dtype.
        error: largest relative error of the GGN diagonal and of ‖g_n‖², by both ways.
        slow: parameters without a product, and why; or why the coupled way does not apply to the model.
        refused: whether it does not.
        seconds: for everything.
        problem: what is wrong.
    """

    name: str
    library: str
    parameters: int = 0
    norms: int = 0
    samples: int = 0
    columns: int = 0
    passes: int = 0
    single: bool = False
    error: float = float("nan")
    slow: str = ""
    refused: bool = False
    seconds: float = 0.0
    problem: str = ""


class Called(nn.Module):
    """A model with its batch and ``forward=`` inside, for `reference`; what it is called with is not used."""

    def __init__(self, model: nn.Module, one: Architecture, batch: Any) -> None:
        super().__init__()
        self.model, self._forward, self._batch = model, one.forward, batch

    def forward(self, _: Tensor) -> Tensor:
        return self._forward(self.model, self._batch)[0]


def measure(one: Architecture, seed: int = 0) -> Measured:
    """Build it, compare it; whatever goes wrong is said in the result."""
    start, row = time.perf_counter(), Measured(one.name, one.library)
    with torch.random.fork_rng(devices=[]), defaults(seed):
        try:
            compare(row, one)
        except Exception as error:  # the others go on
            row.problem = f"{type(error).__name__}: {error}"
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def compare(row: Measured, one: Architecture) -> None:
    """Fill in the row: by the dense way and, whatever it costs at this N, by the coupled one."""
    model, batch, loss_fn = shaken(one.build().double()).train(), one.batch(), nn.CrossEntropyLoss()
    row.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row.norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    quantities = DiagGGNExact(), ComponentL2Grad()
    by_both = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for method in ("dense", "coupled"):
            try:
                by_both.append(curvature(model, loss_fn, batch, *quantities, forward=one.forward, method=method))
            except RuntimeError as error:
                said = re.match(r"method='coupled' does not apply: (.*?)\.? Use method=", str(error))
                if not said:
                    raise
                row.slow, row.refused = said[1], True
    said = dict.fromkeys(slow(str(w.message)) for w in caught if issubclass(w.category, SlowPathWarning))
    row.slow = row.slow or "; ".join(said)
    row.single = any("with the digits of float32" in str(w.message) for w in caught)
    diagonal, squares = plain(model, one, batch, loss_fn)
    row.samples, row.passes = len(next(iter(squares.values()))), by_both[-1].passes
    row.columns = by_both[0].passes // row.samples
    row.error = max(e for res in by_both for e in errors(res, diagonal, squares))
    if not row.error <= TOLERANCE[row.single]:
        row.problem = f"relative error {row.error:.0e}"


def errors(res: Results, diagonal: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> tuple[float, float]:
    return relative_error(res.diag_ggn_exact, diagonal), relative_error(res.l2_component, squares)


def shaken(model: nn.Module) -> nn.Module:
    """Norms, biases, LayerScales and tokens that start at a constant are moved off it: a forgotten factor shows."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2 or float(p.std()) < 1e-3:
                p += 0.1 * torch.randn_like(p)
    return model


def plain(model: nn.Module, one: Architecture, batch: Any, loss_fn: nn.Module) -> Pair:
    """GGN diagonal, and ‖g_n‖² of every parameter, by one ordinary backward pass per row of the Jacobian."""
    called, prefix = Called(model, one, batch), len("model.")
    with torch.random.fork_rng(devices=[]):
        y = one.forward(model, batch)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagonal = reference.ggn_diagonal(called, loss_fn, y, y)
        gradients = reference.component_gradients(called, loss_fn, y, y)
    squares = {name[prefix:]: g.reshape(len(g), -1).square().sum(1) for name, g in gradients.items()}
    return {name[prefix:]: t for name, t in diagonal.items()}, squares


def relative_error(values: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Largest relative error of a tensor; of one that is zero, relative to the largest entry."""
    largest = max(float(t.abs().max()) for t in truth.values())
    errors = [0.0 if values.keys() == truth.keys() else float("inf")]
    for name in values.keys() & truth.keys():
        scale, gap = float(truth[name].norm()), float((values[name] - truth[name]).norm())
        zero = scale <= 1e-10 * largest * truth[name].numel() ** 0.5
        errors.append(gap / (largest if zero else scale) if gap == gap else float("inf"))
    return max(errors)


def slow(message: str) -> str:
    """Of a warning: the parameters and the cause."""
    said = re.match(r"No parameter product for (.*): exact", message)
    return said[1] if said else message
