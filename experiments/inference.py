"""Inference: population statistics, torch's conventions for them, and BatchNorm as an affine map folded away.

    python experiments/inference.py [--quick] [--seed S] [--device D] [--out DIR]

In eval mode BatchNorm is affine, so it can be folded into the layer below. The outputs stay, and the curvature of the
network with its BatchNorm follows from the folded network's by the chain rule.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from lib import figures, transform
from lib.command import Run, main
from lib.statements import Row, check, refute
from lib.systems import digits, mlp, relative
from torch import Tensor, nn

import bncurv


def population_rows(variances: Tensor, m: int) -> Iterator[Row]:
    """W3, G7, G6: what torch keeps for inference."""
    _, unbiased = transform.population(torch.zeros(len(variances)), variances, m)
    X, bn = torch.randn(m, 5), nn.BatchNorm1d(5, momentum=1.0)
    bn(X)
    kept = relative(bn.running_var, X.var(0, correction=0) * m / (m - 1))
    biased, unbiased = float(variances.mean()), float(unbiased)
    said = f"E[σ_B²] = {biased:.4f}, times {m}/{m - 1}: {unbiased:.4f}; torch keeps the unbiased variance to {kept:.0e}"
    yield check("W3", abs(unbiased - 1) < 0.03 and kept < 1e-12, said, biased=biased, unbiased=unbiased)
    yield check("G7", kept < 1e-12, f"error {kept:.0e}", error=kept)

    bn = nn.BatchNorm1d(5)
    bn(X)
    gap = relative(bn.running_mean, 0.1 * X.mean(0))
    said = f"running mean after one step = 0.1 · mean to {gap:.0e}; by the printed rule it would be 0.9 · mean"
    yield refute("G6", gap < 1e-12, said, error=gap)


def folding_row(n: int, device: torch.device) -> Row:
    """W4: outputs, and the GGN's diagonal by the chain rule through the folding."""
    X, y = digits(n, device=device)
    net = mlp([64, 12, 10], device=device).train()
    for part in X.split(8):
        net(part)
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    net.eval()
    short = nn.Sequential(transform.folded(net[0], net[1]), *net[2:])
    outputs = relative(short(X), net(X))
    V = bncurv.curvature(short, nn.CrossEntropyLoss(), (X, y), bncurv.SqrtGGNExact()).sqrt_ggn_exact
    rows = {name: V[f"0.{name}"].flatten(0, 1) for name in ("weight", "bias")}
    chained = transform.unfolded_rows(rows, net[0], net[1])
    diagonal = bncurv.curvature(net, nn.CrossEntropyLoss(), (X, y), bncurv.DiagGGNExact()).diag_ggn_exact
    names = {"weight": "0.weight", "bias": "0.bias", "gamma": "1.weight", "beta": "1.bias"}
    gaps = {key: relative(chained[key].square().sum(0), diagonal[name]) for key, name in names.items()}
    said = f"outputs {outputs:.0e}; diag GGN of W, b, γ, β {max(gaps.values()):.0e}"
    return check("W4", outputs < 1e-12 and max(gaps.values()) < 1e-10, said, outputs=outputs, diagonal=gaps)


def picture(variances: Tensor, m: int) -> figures.Figure:
    """Variances of the batches, and both means."""
    figure, ax = figures.panels()
    ax.hist(variances.numpy(), bins=60, color=figures.SKY)
    mean = float(variances.mean())
    ax.axvline(mean, color=figures.ORANGE, linewidth=2, label=f"mean {mean:.3f} (biased)")
    corrected = mean * m / (m - 1)
    ax.axvline(corrected, color=figures.BLUE, linewidth=2, linestyle="--", label=f"times m/(m-1): {corrected:.3f}")
    ax.set(xlabel=f"variance σ² of a batch of {m} from N(0, 1)", ylabel=f"batches (of {len(variances)})")
    ax.set_title("The batch variance is too small on average; the factor m/(m-1) mends it")
    ax.legend()
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows, in a second."""
    run.expect(2)
    m = 10
    variances = torch.randn(4000, m).var(1, correction=0)
    yield from population_rows(variances, m)
    run.tick()
    yield folding_row(run.pick(64, 16), run.device)
    run.save(picture(variances, m), "Training normalises with the biased variance; inference uses the corrected mean.")
    run.tick()


if __name__ == "__main__":
    sys.exit(main(experiment))
