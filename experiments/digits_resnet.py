"""Exact curvature of a trained BatchNorm ResNet on scikit-learn's digits, in train mode.

    python experiments/digits_resnet.py [--epochs 10] [--batch-size 128] [--seed 0] [--device cpu] [--out DIR] [--quick]

Trains a small ResNet, computes its per-component gradients and its exact GGN diagonal with batch
statistics differentiated through, checks both against plain `torch.autograd.grad`, prints what the
coupling between samples does to every layer and saves three plots. The exit status is 1 if the
accuracy or a check misses its limit.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from lib.demo_figures import by_layer, plot_components, plot_entries, plot_layers
from lib.figures import save
from lib.plain import plain_component_gradients, plain_diag_ggn, plain_gradient, relative_error
from lib.resnet import SmallResNet, accuracy, load_data, train
from lib.systems import frozen as freeze_statistics
from torch import Tensor, nn

from bncurv import ComponentGrad, DiagGGNExact, curvature

Tensors = dict[str, Tensor]


# --- the computation ------------------------------------------------------------------------------


class Timed(NamedTuple):
    """A quantity by parameter name, the way it was computed, seconds and backward passes."""

    values: Tensors
    way: str
    seconds: float
    passes: int


class Report(NamedTuple):
    """All that the tables and the plots show of one batch."""

    components: Timed
    coupled: Timed
    dense: Timed
    own: Tensors


class Check(NamedTuple):
    """A statement, what was measured, and the limit it must keep."""

    statement: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the measured value keeps the limit (NaN does not)."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def timed(quantity: ComponentGrad | DiagGGNExact, model: nn.Module, X: Tensor, y: Tensor, method: str) -> Timed:
    """Compute a quantity in the given way, with a progress bar."""
    start = time.perf_counter()
    result = curvature(model, nn.CrossEntropyLoss(), (X, y), quantity, method=method, progress=True)
    seconds = time.perf_counter() - start
    is_diagonal = isinstance(quantity, DiagGGNExact)
    values = result.diag_ggn_exact if is_diagonal else result.grad_component
    return Timed(values, result.method, seconds, result.passes)


def compute(model: nn.Module, X: Tensor, y: Tensor) -> Report:
    """Components and diagonal of one batch; also the dense diagonal and the own part."""
    print("\nPer-component gradients")
    components = timed(ComponentGrad(), model, X, y, "auto")
    print("Exact GGN diagonal, coupled way")
    coupled = timed(DiagGGNExact(), model, X, y, "coupled")
    print("Exact GGN diagonal, dense way (for comparison)")
    dense = timed(DiagGGNExact(), model, X, y, "dense")
    print("Exact GGN diagonal, batch statistics held constant (for comparison)")
    own = timed(DiagGGNExact(), freeze_statistics(model, X), X, y, "auto")
    return Report(components, coupled, dense, own.values)


def check_batch(model: nn.Module, X: Tensor, y: Tensor, report: Report) -> list[Check]:
    """Hold some components against plain passes, and the coupled way against the dense one."""
    samples = list(range(0, len(X), max(1, len(X) // 8)))
    some = {name: g[samples] for name, g in report.components.values.items()}
    total = {name: g.sum(dim=0) for name, g in report.components.values.items()}
    return [
        Check(
            f"gradients of {len(samples)} components against plain passes",
            relative_error(some, plain_component_gradients(model, X, y, samples)),
            1e-3,
        ),
        Check(
            "sum of all components against the ordinary gradient",
            relative_error(total, plain_gradient(model, X, y)),
            1e-3,
        ),
        Check(
            "GGN diagonal, coupled against dense way",
            relative_error(report.coupled.values, report.dense.values),
            1e-3,
        ),
    ]


def check_exactly(model: nn.Module, X: Tensor, y: Tensor) -> list[Check]:
    """Hold the coupled way against plain passes in float64, for all components of a small batch."""
    model, X = copy.deepcopy(model).double(), X.double()
    components = timed(ComponentGrad(), model, X, y, "coupled").values
    diagonal = timed(DiagGGNExact(), model, X, y, "coupled").values
    which = f"N={len(X)}, float64: "
    return [
        Check(
            which + "gradients of all components against plain passes",
            relative_error(components, plain_component_gradients(model, X, y, list(range(len(X))))),
            1e-8,
        ),
        Check(
            which + "GGN diagonal against plain passes",
            relative_error(diagonal, plain_diag_ggn(model, X)),
            1e-8,
        ),
    ]


# --- what is shown --------------------------------------------------------------------------------


def print_table(report: Report) -> None:
    """Per layer: size, trace, largest entry, own part and the share that is coupling."""
    full, own = by_layer(report.coupled.values), by_layer(report.own)
    full["all layers"], own["all layers"] = (torch.cat(list(x.values())) for x in (full, own))
    print(f"\n{'layer':<20}{'parameters':>11}{'trace':>12}{'largest':>12}{'own part':>12}{'coupling':>14}")
    for layer, entries in full.items():
        trace, own_trace = entries.sum().item(), own[layer].sum().item()
        share = round(1 - own_trace / trace, 2) + 0.0  # -0.0 becomes 0.0
        print(
            f"{layer:<20}{len(entries):>11}{trace:>12.3e}{entries.max().item():>12.3e}{own_trace:>12.3e}{share:>+14.0%}"
        )
    print(
        "own part: the trace with the batch statistics held constant. coupling: the share of the"
        "\ntrace that comes through the statistics, 1 - own part / trace; negative where the own"
        "\npart alone is too large. Layers after the last BatchNorm have none."
    )


def print_times(report: Report) -> None:
    """Way, seconds and backward passes of what was computed."""
    rows = (
        ("per-component gradients", report.components),
        ("GGN diagonal", report.coupled),
        ("GGN diagonal", report.dense),
    )
    print(f"\n{'computation':<26}{'way':<10}{'seconds':>9}{'passes':>9}")
    for name, item in rows:
        print(f"{name:<26}{item.way:<10}{item.seconds:>9.2f}{item.passes:>9}")
    ratio = report.dense.seconds / report.coupled.seconds
    print(f"GGN diagonal: the dense way took {ratio:.1f} times as long as the coupled way.")


def print_checks(checks: list[Check]) -> None:
    """One line per check: statement, measured value, limit, verdict."""
    print(f"\n{'check':<68}{'measured':>10}{'limit':>10}")
    for item in checks:
        verdict = "ok" if item.passed else "FAILED"
        print(f"{item.statement:<68}{item.measured:>10.2g}{item.limit:>10.2g}  {verdict}")


# --- the command ----------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training")
    parser.add_argument("--batch-size", type=int, default=128, help="N, the curvature's batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="e.g. cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--quick", action="store_true", help="N at most 64, for a smoke test")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    matplotlib.use("Agg")
    torch.manual_seed(args.seed)
    size = min(args.batch_size, 64) if args.quick else args.batch_size
    digits = load_data(args.seed, args.device)
    model = SmallResNet().to(args.device)
    train(model, digits, args.epochs)
    test_accuracy = accuracy(model, digits.test_x, digits.test_y)
    print(f"Trained: {test_accuracy:.1%} of {len(digits.test_x)} test digits right.")

    model.train()
    X, y = digits.train_x[:size], digits.train_y[:size]
    report = compute(model, X, y)
    checks = [Check("accuracy on the test digits", test_accuracy, 0.97, at_least=True)]
    print("Checks against plain backward passes")
    checks += check_batch(model, X, y, report) + check_exactly(model, X[:16], y[:16])
    print_table(report)
    print_times(report)
    print_checks(checks)

    figures = {
        "layers": plot_layers(report.coupled.values, report.own),
        "entries": plot_entries(report.coupled.values, report.own, model),
        "components": plot_components(report.components.values, X, y),
    }
    print()
    for name, figure in figures.items():
        print(f"wrote {save(figure, args.out / f'digits_resnet_{name}.png')}")
    return 0 if all(item.passed for item in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
