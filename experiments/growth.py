"""Growth on paper: passes, FLOPs and bytes of each quantity, for networks too large to try.

    python experiments/growth.py [--write]

Counts a network on PyTorch's meta device (nothing is computed), layer by layer in forward order: FLOPs of
convolutions and linear layers, statistics of the BatchNorms, parameters. Prints a Markdown table; ``--write`` puts it
into docs/growth.md. For the small networks of the benchmark the counted passes are compared with those that bncurv
reports; exit status 1 if some differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lib.networks import build
from lib.pages import ROOT, insert
from torch import Tensor, nn

import bncurv

# what docs/speed.md speaks of
SHOWN = "mlp", "cnn", "convnext"
SMALL = (("vgg", 128), ("vgg", 256), ("vgg", 1024), ("resnet20-c100", 64), ("wrn16-2-c100", 32))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(fan_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = fan_in == out and stride == 1
        shortcut = [nn.Conv2d(fan_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50 for 224x224 images and 1000 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    fan_in = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Bottleneck(fan_in, width, stride if i == 0 else 1))
            fan_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, 1000))


@dataclass
class Count:
    """What a forward pass of one sample costs, and what lies above what.

    Attributes:
        flops: of one sample's forward pass.
        backward: of one sample's backward pass: parameter products, and input gradients but for the first layer.
        statistics: R.
        parameters: D.
        below: Σ over statistics of the backward FLOPs of the layers below but the direct one, per sample.
        directions: Σ over parameters of the directions kept for them (entries of P).
        passing: statistics that need a pass (all but those of a first BatchNorm).
        between: Σ over pairs of BatchNorms of the product of their statistics (entries of B).
        below_norms: parameters of the layers directly below a BatchNorm (their own P, of one moment).
        inputs: features that these layers see (means of their inputs).
        norms: BatchNorms.
    """

    flops: float = 0.0
    backward: float = 0.0
    statistics: int = 0
    parameters: int = 0
    below: float = 0.0
    directions: float = 0.0
    passing: int = 0
    between: int = 0
    below_norms: int = 0
    inputs: int = 0
    norms: int = 0
    layers: list[tuple[float, int]] = field(default_factory=list)  # backward FLOPs and parameters of the layers so far


def count(network: nn.Module, sample: Tensor) -> Count:
    """Count a network on one sample, in forward order (parallel branches one after the other)."""
    result, handles = Count(), []

    def linear(module: nn.Module, args: tuple, output: Tensor) -> None:
        weight = module.weight
        flops = 2.0 * output[0].numel() * weight[0].numel()
        backward = 2 * flops if result.layers else flops
        result.flops += flops
        result.backward += backward
        result.layers.append((backward, sum(p.numel() for p in module.parameters())))

    def norm(module: nn.Module, args: tuple, output: Tensor) -> None:
        size, earlier = 2 * module.num_features, result.layers[:-1]
        result.norms += 1
        result.between += size * result.statistics
        result.below_norms += result.layers[-1][1]
        result.inputs += result.layers[-1][1] // module.num_features
        result.below += size * sum(flops for flops, _ in earlier)
        result.directions += size * sum(p for _, p in earlier)
        result.passing += size if earlier else 0
        result.statistics += size
        result.layers.append((0.0, sum(p.numel() for p in module.parameters())))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(linear))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            handles.append(module.register_forward_hook(norm))
    network(torch.cat([sample, sample]))
    for handle in handles:
        handle.remove()
    result.parameters = sum(p.numel() for p in network.parameters())
    return result


def human(value: float, unit: str) -> str:
    """A number with a metric prefix."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def work(c: Count, n: int, classes: int) -> tuple[float, float, float]:
    """FLOPs of an exact diagonal: the plain passes; of the coupled way the passes and A P."""
    k, one = n * (classes - 1), c.backward * n
    return k * one, (classes - 1) * one + n * c.below, 2.0 * k * c.directions


def rows(c: Count, n: int, classes: int, draws: int = 100, products: int = 40) -> list[list[str]]:
    """One line per quantity: passes, FLOPs, bytes beyond the network's own (float32)."""
    k, one, d = n * (classes - 1), c.backward * n, c.parameters
    plain, passes, correction = work(c, n, classes)
    return [
        ["one gradient", "1", human(c.flops * n + one, "FLOP"), human(4 * d, "B")],
        [f"`DiagGGNMC({draws})` or `(passes={draws})`", f"{draws}", human(draws * one, "FLOP"), human(4 * d, "B")],
        ["top 10 eigenpairs, matrix-free", f"{2 * products}", human(2 * products * one, "FLOP"), human(80 * d, "B")],
        ["`ComponentGrad`, dense", f"{n}", human(n * one, "FLOP"), human(4.0 * n * d, "B")],
        ["`DiagGGNExact`, plain passes", f"{k}", human(plain, "FLOP"), human(8 * d, "B")],
        [
            "`DiagGGNExact`, coupled",
            f"{classes - 1 + c.passing}",
            human(passes + correction, "FLOP"),
            human(4 * c.directions, "B") + " of P, 2 GiB at once",
        ],
        ["whole spectrum from V", "as diagonal", human(2.0 * k * k * d, "FLOP") + " more", human(4.0 * k * d, "B")],
    ]  # fmt: skip


def diagonal(name: str, n: int) -> list[str]:
    """The exact diagonal of a benchmark network of convolutions: work of the plain passes and of bncurv's parts."""
    with torch.device("meta"):
        network, shape, classes = build(name)
        c = count(network, torch.empty(1, *shape))
    plain, passes, correction = work(c, n, classes)
    said = [human(value, "FLOP") for value in (plain, passes, correction)]
    return [name, str(n), *said, f"{plain / (passes + correction):.1f}", human(4 * c.directions, "B")]


def messages(c: Count) -> dict[str, int]:
    """Numbers that a rank sends for a diagonal by the coupled way, by purpose as in ``Results.messages``."""
    norms = c.norms
    return {
        "statistics": c.statistics + norms,
        "means of inputs": c.inputs + norms,
        "B": c.between,
        "P": int(c.directions),
        "P of the layer below a BatchNorm": c.below_norms,
        "results": c.parameters,
    }


DIAGONAL = ["network", "N", "plain passes", "coupled: passes", "coupled: A P", "plain / coupled", "P"]
QUANTITIES = ["quantity", "backward passes", "work", "memory"]


def table(title: str, header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table under a title."""
    cells = [header, ["---"] * len(header), *lines]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells)


def divided(c: Count, n: int, classes: int, ranks: int) -> tuple[int, int]:
    """Passes of each rank, for an exact diagonal of the same batch on all: plain; coupled (C - 1, its share of R)."""
    return -(-n // ranks) * (classes - 1), classes - 1 + -(-c.passing // ranks)


DRAWS, PAIRS, ROOMY, KEPT = 40, 5, "1GiB", 32 * 2**20
SAMPLED = "`DiagGGNMC`: `mc_samples={}`, or `passes={}` (as many as given; `rtol=`: as many as it takes)"


def counted(c: Count, n: int, classes: int) -> dict[str, int]:
    """Passes by call, from the count alone."""
    own, plain = classes - 1, n * (classes - 1)
    return {
        "`DiagGGNExact()`, coupled": own + c.passing,
        f"... with `memory=` that holds P ({ROOMY})": own + c.passing,
        "... at the same point (`bncurv.at`) after itself or `ComponentGrad()`: P is there": own,
        "... at the same point after `LowRankGGN()`: V is there, if small": own * (4 * plain * c.parameters > KEPT),
        "`ComponentGrad()`, coupled": 1 + c.passing,
        "`DiagGGNExact()` and `ComponentGrad()` in one call, coupled": own + 1 + c.passing,
        "`LowRankGGN()`, coupled": own + c.passing,
        "`DiagGGNExact()`, plain passes": plain,
        "`ComponentGrad()`, plain passes": n,
        SAMPLED.format(DRAWS, DRAWS): DRAWS,
        f"`LowRankGGN(top={PAIRS}, matrix_free=True)`: two for each product, later": 0,
    }


def taken(network: nn.Module, X: Tensor, y: Tensor) -> list[int]:
    """The same as bncurv reports them, in the same order."""
    Diagonal, Grad, LowRank, Random = bncurv.DiagGGNExact, bncurv.ComponentGrad, bncurv.LowRankGGN, bncurv.DiagGGNMC

    def passes(*quantities: Any, method: str = "coupled", **options: Any) -> int:
        return bncurv.curvature(network, nn.CrossEntropyLoss(), (X, y), *quantities, method=method, **options).passes

    mixed = {passes(Random(DRAWS), method="dense"), passes(Random(passes=DRAWS), method="dense")}
    with bncurv.at(network, nn.CrossEntropyLoss(), (X, y), method="coupled") as point:
        grad, second, third = (point(quantity).passes for quantity in (Grad(), Diagonal(), Diagonal()))
        point(LowRank())
        last = point(Diagonal()).passes
    return [
        passes(Diagonal()), passes(Diagonal(), memory=ROOMY), max(second, third), last, grad,
        passes(Diagonal(), Grad()), passes(LowRank()), passes(Diagonal(), method="dense"),
        passes(Grad(), method="dense"), max(mixed - {DRAWS} or mixed), passes(LowRank(top=PAIRS, matrix_free=True)),
    ]  # fmt: skip


def check(names: Sequence[str], n: int = 8) -> list[list[str]]:
    """Counted passes of the benchmark's small networks, by call; where bncurv takes others, that is said."""
    lines: dict[str, list[str]] = {}
    for name in names:
        network, shape, classes = build(name)
        X, y = torch.randn(n, *shape), torch.randint(classes, (n,))
        paper = counted(count(network, X[:1]), n, classes)
        for (call, number), true in zip(paper.items(), taken(network, X, y), strict=True):
            said = f"{number}" if number == true else f"{number}, but bncurv took {true}"
            lines.setdefault(call, []).append(said)
    return [[call, *numbers] for call, numbers in lines.items()]


def main() -> int:
    """Print (or write) the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/growth.md")
    args = parser.parse_args()
    with torch.device("meta"):
        c = count(resnet50(), torch.empty(1, 3, 224, 224))
    head = (
        f"ResNet-50 at 224x224 (D = {human(c.parameters, 'parameters')}, R = {c.statistics} statistics, "
        f"{human(c.flops, 'FLOP')} forward per sample)"
    )
    said = check(SHOWN)
    text = "\n\n".join(
        [
            table(f"{head}, N = 256, C = 1000:", QUANTITIES, rows(c, 256, 1000)),
            table("The same with C = 10 and N = 64 (fine-tuning):", QUANTITIES, rows(c, 64, 10)),
            table("Networks of the benchmark:", DIAGONAL, [diagonal(name, n) for name, n in SMALL]),
            table(
                "Over several processes, whatever their number and N: numbers that a rank sends for the exact diagonal "
                "of ResNet-50 by the coupled way (B and P at most: parallel branches count as one after the other; "
                "passes with closed gates send nothing):",
                ["purpose", "numbers", "bytes"],
                [[purpose, human(n, ""), human(4 * n, "B")] for purpose, n in messages(c).items()],
            ),
            table(
                "Divided over W processes that have the same batch (`process_group=`): passes of each for the exact "
                "diagonal of ResNet-50, N = 256, C = 1000:",
                ["W", "plain passes", "coupled"],
                [[str(w), *(str(passes) for passes in divided(c, 256, 1000, w))] for w in (1, 2, 8, 64)],
            ),
            table(
                "Passes counted this way are those that bncurv takes (N = 8, C = 10; a smaller `memory=` makes P in "
                "parts, and takes passes again):",
                ["call", *SHOWN],
                said,
            ),
        ]
    )
    print(text)
    if args.write:
        insert(ROOT / "docs/growth.md", "growth", text)
    return int(any("but bncurv" in word for line in said for word in line))


if __name__ == "__main__":
    sys.exit(main())
