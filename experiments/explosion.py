"""Gradient explosion: with BatchNorm gradients grow with depth, at a rate that theory names; skip connections relieve.

    python experiments/explosion.py [--quick] [--seed S] [--device D] [--out DIR]

At initialisation. Each BatchNorm contracts by M, but divides by a deviation that ReLU has made smaller than one: the
squared norm of the gradient grows by π/(π - 1) per layer, and 90 layers make seven orders of magnitude of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from statistics import geometric_mean
from typing import Any

import torch
from lib import figures
from lib.command import Run, main
from lib.explosion import RELU_RATE, bn_factors, gradient_norms, growth, jacobian_values, linear_rate, residual
from lib.statements import Row, check, listed, refute
from lib.systems import TINY, accuracy, digits, mlp, train
from torch import Tensor, nn

DEPTH = 30
FACTOR = math.pi / (math.pi - 1)  # of the squared norm


def stack(
    depth: int, width: int, norm: str = "bn", act: Callable[[], nn.Module] = nn.ReLU, he: bool = True
) -> nn.Sequential:
    """So many hidden layers of one width, and ten outputs; no biases."""
    return mlp([width] * (depth + 1) + [10], norm, act, eps=TINY, bias=False, he=he)


def norms(
    run: Run, seed: int, net: Callable[[], nn.Sequential], batch: int, of: str = "weights", batches: int = 1
) -> list[Tensor]:
    """Gradient norms of one network's hidden layers, for each of a few Gaussian batches."""
    torch.manual_seed(seed)
    model = net().to(run.device)
    X = torch.randn(batches, batch, model[0].in_features, device=run.device)
    run.tick(0.5)
    return [gradient_norms(model, one, of=of)[:-1].cpu() for one in X]


def growth_rows(run: Run, seeds: list[int]) -> tuple[dict[str, Tensor], Iterator[Row]]:
    """W19, G21, and the norms of the first seed."""
    width = 256
    cases = {
        "BN, B = 256": (lambda: stack(DEPTH, width), 256, "weights"),
        "BN, B = 64": (lambda: stack(DEPTH, width), 64, "weights"),
        "BN, B = 16": (lambda: stack(DEPTH, width), 16, "weights"),
        "BN, tanh": (lambda: stack(DEPTH, width, act=nn.Tanh), 256, "weights"),
        "BN, GELU": (lambda: stack(DEPTH, width, act=nn.GELU), 256, "weights"),
        "no BN, He": (lambda: stack(DEPTH, width, "none"), 256, "outputs"),
        "no BN, PyTorch": (lambda: stack(DEPTH, width, "none", he=False), 256, "outputs"),
    }
    found = {name: [norms(run, seed, *case)[0] for seed in seeds] for name, case in cases.items()}
    rates = {name: geometric_mean(growth(n) for n in values) for name, values in found.items()}
    return {name: values[0] for name, values in found.items()}, rate_rows(rates, len(seeds))


def rate_rows(rates: dict[str, float], count: int) -> Iterator[Row]:
    """W19, G21 from the factors per layer."""
    said = f"norm per layer (mean of {count} networks): " + ", ".join(f"{k} {v:.3f}" for k, v in rates.items())
    said += f"; theory {RELU_RATE:.3f} is the norm's factor, {FACTOR:.3f} the squared norm's"
    grows = 1.18 < rates["BN, B = 256"] < 1.23 and min(rates["BN, tanh"], rates["BN, GELU"]) > 1.05
    falls_with_batch = rates["BN, B = 16"] > rates["BN, B = 64"] > rates["BN, B = 256"]
    yield check("W19", grows and falls_with_batch and rates["no BN, He"] < 1.05, said, rates=rates, theory=RELU_RATE)

    he, small = rates["no BN, He"], rates["no BN, PyTorch"]
    said = f"gradient towards a layer's output, per layer: He's initialisation {he:.3f}, PyTorch's {small:.3f} (theory "
    said += f"{math.sqrt(1 / 6):.3f}): the vanishing is the initialisation's"
    yield refute("G21", abs(he - 1) < 0.05 and small < 0.5, said, he=he, default=small, theory=math.sqrt(1 / 6))


def linear_row(run: Run, width: int, seeds: list[int]) -> Row:
    """W20."""
    found: dict[int, float] = {}
    for B in (8, 16, 32):
        each = [norms(run, seed, lambda: stack(16, width, act=nn.Identity), B, batches=3) for seed in seeds]
        found[B] = geometric_mean(growth(n) for network in each for n in network) ** 2
        run.tick(2 * len(seeds))
    said = ", ".join(f"B = {B}: {value:.4f} (theory {linear_rate(B):.4f})" for B, value in found.items())
    holds = all(abs(value / linear_rate(B) - 1) < 0.01 for B, value in found.items())
    said += "; it tends to 1 with large batches: linear networks explode in small batches only"
    return check("W20", holds, said, squared=found, theory={B: linear_rate(B) for B in found})


# --- deep networks on digits ----------------------------------------------------------------------


def trained(net: nn.Module, data: tuple[Tensor, Tensor], steps: int) -> dict[float, float]:
    """Accuracy on the batch after a few steps, for three learning rates, each from the same start."""
    start = {key: value.clone() for key, value in net.state_dict().items()}
    reached = {}
    for lr in (0.001, 0.01, 0.1):
        net.load_state_dict(start)
        train(net, data, steps, lr)
        reached[lr] = accuracy(net, data)
    return reached


def depth_rows(run: Run, steps: int) -> tuple[dict[str, Tensor], list[Row]]:
    """W21, G24, G25, and the norms of both networks."""
    torch.manual_seed(run.seed)
    data = digits(256, run.seed, standardised=True, device=run.device)
    nets = {
        "plain": mlp([64] + [128] * 90 + [10], eps=TINY, bias=False, he=True, device=run.device),
        "residual": residual(60, 128).to(run.device),
    }
    found = {name: gradient_norms(net, *data)[:-1].cpu() for name, net in nets.items()}
    ratio = {name: float(n[0] / n[-1]) for name, n in found.items()}
    learnt = {name: trained(net, data, steps) for name, net in nets.items()}
    run.tick(10)
    best = {name: max(values.values()) for name, values in learnt.items()}
    said = f"first ÷ last: 90 plain layers {ratio['plain']:.1e}, 60 residual blocks {ratio['residual']:.1f}; best "
    said += f"accuracy after {steps} steps (lr 0.001, 0.01, 0.1): plain {best['plain']:.2f}, residual "
    said += f"{best['residual']:.2f}"
    holds = ratio["residual"] < 50 and ratio["plain"] > 1e6
    rows = [check("W21", holds, said, ratio=ratio, accuracy=learnt)]
    theory = RELU_RATE**89
    said = f"first ÷ last {ratio['plain']:.2g}, {RELU_RATE:.4f}^89 = {theory:.2g}; "
    said += f"per layer {growth(found['plain']):.3f}"
    rows.append(check("G24", 1 / 5 < ratio["plain"] / theory < 5, said, ratio=ratio["plain"], theory=theory))
    said = f"60 blocks of two layers: first ÷ last {ratio['residual']:.1f}, accuracy {best['residual']:.2f} after "
    said += f"{steps} steps"
    rows.append(check("G25", ratio["residual"] < 50, said, ratio=ratio["residual"], accuracy=best["residual"]))
    return found, rows


# --- Jacobians ------------------------------------------------------------------------------------


def jacobian_rows(run: Run, depths: list[int]) -> tuple[dict[int, Tensor], list[Row]]:
    """W22, G22, and the non-zero singular values of the stacks."""
    torch.manual_seed(run.seed)
    n = width = 24
    bn = nn.BatchNorm1d(1, eps=TINY)
    y = torch.randn(n, 1)
    nn.init.constant_(bn.weight, 1.5)
    one = jacobian_values(bn, y)
    error = float((one[:-2] * y.std(correction=0) / 1.5 - 1).abs().max())
    zeros = float(one[-2:].max() / one[0])

    net, X = stack(max(depths), width)[:-1], torch.randn(n, width)
    values = {depth: jacobian_values(net[: 3 * depth], X) for depth in depths}
    nonzero = {depth: s[s > 1e-9 * s[0]] for depth, s in values.items()}
    spread = {depth: float(torch.quantile(s, 0.9) / s.median()) for depth, s in nonzero.items()}
    gain = {depth: float(s.square().mean().sqrt()) for depth, s in values.items()}
    largest = {depth: float(s[0]) for depth, s in values.items()}
    by_scale, by_projection = (f[3:] for f in bn_factors(stack(DEPTH, 256), torch.randn(256, 256)))
    run.tick(2)

    single = error < 1e-10 and zeros < 1e-10
    growing = all(b > a for a, b in zip(list(gain.values()), list(gain.values())[1:], strict=False))
    said = f"one BatchNorm: {n - 2} values γ/s (to {error:.0e}), two zeros; in a stack M leaves "
    said += f"{by_projection.mean():.3f} of the squared norm, and 1/s² multiplies it by {by_scale.mean():.3f} (theory "
    said += f"{FACTOR:.3f}), as ReLU has shrunk s; largest value of the product {listed(largest.values())} at depth "
    said += f"{listed(depths, 'd')}"
    holds = single and growing and float(by_projection.max()) <= 1
    factors = {"scale": by_scale, "projection": by_projection}
    rows = [check("W22", holds, said, error=error, zeros=zeros, largest=largest, factors=factors)]
    said = f"one BatchNorm: all γ/s but two zeros; Linear-BN-ReLU at depth {listed(depths, 'd')}: 90 % quantile ÷ "
    said += f"median {listed(spread.values())}, rms gain {listed(gain.values(), '.2g')}"
    wider = list(spread.values()) == sorted(spread.values())
    rows.append(refute("G22", single and wider and growing, said, spread=spread, gain=gain))
    return nonzero, rows


def picture(
    shallow: dict[str, Tensor], deep: dict[str, Tensor], linear: Row, values: dict[int, Tensor]
) -> figures.Figure:
    """Norms over layers with theory; linear networks; deep networks; singular values."""
    theory: dict[str, Any] = {"color": figures.ORANGE, "linestyle": ":", "linewidth": 3}
    theory["label"] = "√(π/(π-1)) per layer"
    figure, axes = figures.panels(2, 2, size=(12, 8.6))
    ax = axes[0, 0]
    colours = (figures.BLUE, figures.SKY, figures.GREEN, figures.PURPLE, figures.AMBER, figures.GREY, figures.BLACK)
    for (name, n), colour in zip(shallow.items(), colours, strict=True):
        ax.semilogy(range(1, DEPTH + 1), n / n[-1], color=colour, label=name, linestyle="--" if "no" in name else "-")
    ax.semilogy([1, DEPTH], [RELU_RATE ** (DEPTH - 1), 1], **theory)
    ax.set(xlabel="layer", ylabel="gradient norm ÷ that of the last", ylim=(1e-3, None))
    ax.set_title("ReLU: every BatchNorm adds a factor")
    ax.legend(fontsize=8, ncols=2)

    ax = axes[0, 1]
    sizes = torch.linspace(6, 36, 100)
    ax.plot(sizes, [linear_rate(float(B)) for B in sizes], color=figures.BLACK, label="(B-2)/(B-3)")
    measured = zip(*linear.numbers["squared"].items(), strict=True)
    ax.plot(*measured, "o", color=figures.BLUE, markersize=9, label="measured")
    ax.set(xlabel="batch size B", ylabel="squared norm per layer", title="Linear networks: only small batches explode")
    ax.legend()

    ax = axes[1, 0]
    ax.semilogy(range(1, 91), deep["plain"], color=figures.BLUE, label="BN, 90 layers")
    ax.semilogy(range(1, 122), deep["residual"], color=figures.GREEN, label="BN, 60 residual blocks")
    last = float(deep["plain"][-1])
    ax.semilogy([1, 90], [last * RELU_RATE**89, last], **theory)
    ax.set(xlabel="layer", ylabel="gradient norm", title="Digits: skip connections take the explosion away")
    ax.legend()

    ax = axes[1, 1]
    shades = (figures.SKY, figures.BLUE, figures.GREEN, figures.AMBER, figures.ORANGE)
    for (depth, s), colour in zip(values.items(), shades, strict=False):
        ax.semilogy(torch.linspace(0, 1, len(s)), s, color=colour, label=f"{depth} layer{'s' if depth > 1 else ''}")
    ax.set(xlabel="rank (share of the non-zero values)", ylabel="singular value of ∂F/∂X")
    ax.set_title("Values do not cluster: they spread with depth")
    ax.legend()
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    seeds, wide = run.seeds(4, 3), run.seeds(4, 2)
    run.expect(3.5 * len(seeds) + 7.5 * len(wide) + 12)
    shallow, rows = growth_rows(run, seeds)
    found = list(rows)
    linear = linear_row(run, run.pick(1024, 768), wide)
    deep, by_depth = depth_rows(run, run.pick(20, 8))
    values, jacobians = jacobian_rows(run, [1, 2, 4, 8, 16])
    run.save(
        picture(shallow, deep, linear, values),
        "Gradients at initialisation. Dotted: theory. Dashed: without BatchNorm, gradient towards the layers' outputs.",
    )
    yield from [*found, linear, *by_depth, *jacobians]


if __name__ == "__main__":
    sys.exit(main(experiment))
