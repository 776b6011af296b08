"""What ``tol=`` saves and what it costs: coupling directions dropped in a trained ResNet, claimed against true error.

    python experiments/tolerance.py [--batch-size 64] [--epochs 10] [--seed 0]

Exit status 1 if a claimed error is off by more than a factor of 2, or a diagonal is further off than its bound.
"""

from __future__ import annotations

import argparse
import sys

import torch
from lib.resnet import SmallResNet, load_data, train
from torch import nn

from bncurv import DiagGGNExact, SqrtGGNExact, curvature

TOLERANCES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Train, compare, print a Markdown table."""
    args = parse()
    torch.manual_seed(args.seed)
    digits, model, loss_fn = load_data(args.seed), SmallResNet(), nn.CrossEntropyLoss()
    train(model, digits, args.epochs)
    model.double().train()
    batch = digits.train_x[: args.batch_size].double(), digits.train_y[: args.batch_size]
    quantities = SqrtGGNExact(), DiagGGNExact()

    exact = curvature(model, loss_fn, batch, *quantities, method="coupled")
    V, size = exact.sqrt_ggn_exact, sum(float(t.square().sum()) for t in exact.sqrt_ggn_exact.values()) ** 0.5
    trace = sum(float(t.sum()) for t in exact.diag_ggn_exact.values())
    print("| tol | backward passes | error of V, claimed | error of V, true | error of the diagonal |")
    print("|---|---|---|---|---|")
    print(f"| 0 (exact) | {exact.passes} | | | |")
    failed = False
    for tol in TOLERANCES:
        rough = curvature(model, loss_fn, batch, *quantities, method="coupled", tol=tol)
        claimed = sum(e**2 for e in rough.error.values()) ** 0.5 / size
        true = sum(float((rough.sqrt_ggn_exact[n] - t).square().sum()) for n, t in V.items()) ** 0.5 / size
        gap = sum(float((rough.diag_ggn_exact[n] - t).abs().sum()) for n, t in exact.diag_ggn_exact.items()) / trace
        nothing = claimed == 0 and true < 1e-12  # was dropped, since all of it is no dearer
        honest = nothing or 0.5 < claimed / true < 2 or true < claimed < 1e-6  # where only rounding was dropped
        failed |= not honest or gap > 2 * true + true**2 + 1e-12
        print(f"| {tol:g} | {rough.passes} | {claimed:.1e} | {true:.1e} | {gap:.1e} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
