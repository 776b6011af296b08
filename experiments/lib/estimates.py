"""Estimates of the GGN diagonal beside the exact one: digits networks, errors, and the estimators of others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bncurv import DiagGGNExact, DiagGGNMC, curvature
from lib.networks import untracked
from lib.resnet import SmallResNet, load_data, train

CE = nn.CrossEntropyLoss()
Diagonal = dict[str, Tensor]


class Case(NamedTuple):
    """A network at a batch, its exact diagonal, and what that took."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    exact: Diagonal
    seconds: float
    passes: int


def mlp() -> nn.Module:
    """Two hidden layers with BatchNorm."""
    hidden = nn.Linear(64, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 100), nn.BatchNorm1d(100), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))


BUILDERS: dict[str, Callable[[], nn.Module]] = {"ResNet": SmallResNet, "MLP": mlp}


Estimator = Callable[[Case, int], Diagonal | None]  # at so many passes; None where it is not installed


def cases(
    builders: dict[str, Callable[[], nn.Module]], n: int, epochs: int, seed: int = 0, device: Any = "cpu"
) -> Iterator[Case]:
    """Trained and as initialised, each at the first ``n`` digits with its exact diagonal."""
    digits = load_data(seed, device)
    for name, build in builders.items():
        for steps in (epochs, 0):
            torch.manual_seed(seed)
            model = build().to(device)
            if steps:
                train(model, digits, steps)
            batch = digits.train_x[:n], digits.train_y[:n]
            seconds, res = timed(partial(curvature, model.train(), CE, batch, DiagGGNExact()))
            which = f"{name}, {'trained' if steps else 'initial'}"
            yield Case(which, model, batch, res.diag_ggn_exact, seconds, res.passes)


def timed(call: Callable) -> tuple[float, Any]:
    """Seconds, and what the call returns."""
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def alive(exact: Diagonal) -> list[str]:
    """Tensors whose diagonal is more than rounding (a bias below a BatchNorm has none)."""
    most = max(float(t.max()) for t in exact.values())
    return [name for name, t in exact.items() if float(t.max()) > 1e-9 * most]


def errors(got: Diagonal, exact: Diagonal) -> Tensor:
    """Relative error of every tensor."""
    return torch.stack([(got[n] - exact[n]).norm() / exact[n].norm() for n in alive(exact)]).double().cpu()


def rms(got: Diagonal, exact: Diagonal) -> float:
    """Root mean square over the tensors."""
    return float(errors(got, exact).square().mean().sqrt())


def worst(got: Diagonal, exact: Diagonal) -> float:
    """The largest relative error of a diagonal or a trace."""
    traces = [abs(float(got[n].sum() / exact[n].sum() - 1)) for n in alive(exact)]
    return max(float(errors(got, exact).max()), *traces)


def estimate(case: Case, quantity: DiagGGNMC) -> tuple[float, Any]:
    """Sampled, whatever the coupled way costs: ``method="dense"`` compares with the plain passes only."""
    return timed(lambda: curvature(case.model, CE, case.batch, quantity, method="dense"))


def curvlinops_diagonal(case: Case, passes: int, kind: str) -> Diagonal | None:
    """Of curvlinops' GGN, a product counted as two passes; ``None`` where it is not installed."""
    try:
        import curvlinops
    except ImportError:
        return None
    model = untracked(case.model)
    parameters, data = list(model.parameters()), [case.batch]
    operator = curvlinops.GGNLinearOperator(
        model, CE, parameters, data, check_deterministic=False, num_data=len(case.batch[1])
    )
    flat = getattr(curvlinops, kind)(operator, passes // 2).detach()
    parts = flat.split([p.numel() for p in parameters])
    return {n: part.view_as(p) for (n, p), part in zip(model.named_parameters(), parts, strict=True)}


def mean(values: list[float]) -> float:
    """Root mean square over repeats."""
    return (sum(v**2 for v in values) / len(values)) ** 0.5


def error(case: Case, estimator: Estimator, passes: int, repeats: int) -> float:
    """The largest of a tensor or its trace, root mean square over repeats."""
    return mean([worst(estimator(case, passes), case.exact) for _ in range(repeats)])
