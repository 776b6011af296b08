"""The README's figure: what the coupled way costs, and what coupling does to curvature.

    python experiments/readme_figure.py [--quick] [--out experiments/figures/readme.png]

Left: seconds for the exact GGN diagonal of a two-convolution BatchNorm network against the batch
size, by one backward pass per component (plain PyTorch) and through the cut at the batch
statistics. Right: trace of every layer's block of the GGN of a ResNet trained on digits, exact and
with the batch statistics held constant. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from lib.figures import BLUE, ORANGE
from lib.resnet import SmallResNet, load_data, train
from torch import Tensor, nn
from tqdm import tqdm

from bncurv import CouplingReport, DiagGGNExact, curvature, plots

CHUNK = 16  # columns at once: where plain passes of this network are fastest


def two_conv_cnn() -> nn.Sequential:
    """For images [N, 1, 8, 8] and ten classes."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def plain_diagonal(model: nn.Module, X: Tensor, y: Tensor) -> list[Tensor]:
    """One backward pass per component, in batches of columns: N (C - 1) passes of the batch."""
    params = list(model.parameters())
    output = model(X)
    p = output.detach().softmax(1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    columns = vectors[:, :, 1:] * (values[:, None, 1:] / len(X)).sqrt()  # the smallest one is zero
    diagonal = [torch.zeros_like(p) for p in params]
    which = torch.cartesian_prod(torch.arange(len(X)), torch.arange(columns.shape[2]))
    for n, c in (part.unbind(1) for part in which.split(CHUNK)):
        cotangents = torch.zeros(len(n), *output.shape)
        cotangents[torch.arange(len(n)), n] = columns[n, :, c]
        rows = torch.autograd.grad(output, params, cotangents, retain_graph=True, is_grads_batched=True)
        for total, v in zip(diagonal, rows, strict=True):
            total += v.square().sum(0)
    return diagonal


def coupled_diagonal(model: nn.Module, X: Tensor, y: Tensor) -> list[Tensor]:
    """Through the cut at the batch statistics."""
    loss_fn = nn.CrossEntropyLoss()
    result = curvature(model, loss_fn, (X, y), DiagGGNExact(), method="coupled")
    return list(result.diag_ggn_exact.values())


def seconds(way: Callable[..., list[Tensor]], *arguments: object, repeats: int = 3) -> float:
    """Smallest CPU time of a few runs; a run of more than two seconds is not repeated."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        way(*arguments)
        best = min(best, time.process_time() - start)
        if best > 2:
            break
    return best


def measure(sizes: list[int], plain_up_to: int) -> dict[str, dict[int, float]]:
    """Seconds by way and batch size; the ways are compared on the smallest batch."""
    model = two_conv_cnn().train()
    batches = {n: (torch.randn(n, 1, 8, 8), torch.randint(10, (n,))) for n in sizes}
    plain, coupled = (
        torch.cat([part.flatten() for part in way(model, *batches[sizes[0]])])
        for way in (plain_diagonal, coupled_diagonal)
    )
    torch.testing.assert_close(plain, coupled, rtol=1e-3, atol=1e-6 * float(plain.max()))
    ways = {"one backward pass\nper component": plain_diagonal, "bncurv": coupled_diagonal}
    return {
        name: {
            n: seconds(way, model, *batch)
            for n, batch in tqdm(batches.items(), desc=way.__name__)
            if way is coupled_diagonal or n <= plain_up_to
        }
        for name, way in ways.items()
    }


def plot_cost(ax: plt.Axes, times: dict[str, dict[int, float]]) -> None:
    """Seconds against N for each way."""
    styles = ((ORANGE, "s", (-10, 2), "right"), (BLUE, "o", (6, -18), "left"))
    for (name, points), (color, marker, offset, side) in zip(times.items(), styles, strict=True):
        ax.loglog(list(points), list(points.values()), color=color, marker=marker)
        where = sorted(points.items())[-2]  # the line's name stands beside its last but one point
        ax.annotate(name, where, offset, textcoords="offset points", ha=side, color=color)
    plain, coupled = times.values()
    n = max(plain)
    ax.annotate(
        f"{plain[n] / coupled[n]:.0f} times faster\nat N = {n}",
        (n, (plain[n] * coupled[n]) ** 0.5),
        (10, -14),
        textcoords="offset points",
    )
    ax.annotate("", (n, coupled[n]), (n, plain[n]), arrowprops={"arrowstyle": "<->"})
    ax.set(
        xlabel="batch size N",
        ylabel="seconds, exact GGN diagonal",
        title="Cost grows with N, not with N²",
    )
    ax.set_xticks(list(coupled), [str(n) for n in coupled])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def trained_coupling(epochs: int, size: int) -> dict[str, object]:
    """Coupling report of a ResNet trained on digits, convolutions and the linear layer only."""
    digits = load_data()
    model = SmallResNet()
    train(model, digits, epochs)
    batch = digits.train_x[:size], digits.train_y[:size]
    report = curvature(model.train(), nn.CrossEntropyLoss(), batch, CouplingReport()).coupling
    layers = dict(model.named_modules())
    return {n: part for n, part in report.items() if isinstance(layers[n], nn.Conv2d | nn.Linear)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures/readme.png")
    args = parser.parse_args(arguments)
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    sizes, limit = ([8, 16], 16) if args.quick else ([32, 64, 128, 256, 512, 1024], 256)
    times = measure(sizes, limit)
    report = trained_coupling(*((1, 32) if args.quick else (10, 128)))

    with plt.rc_context({"font.size": 11.5, "axes.titlesize": "medium"}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        plot_cost(left, times)
        plots.coupling(report, right)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, dpi=110)
    for name, points in times.items():
        print(" ".join(name.split()), {n: f"{t:.3g} s" for n, t in points.items()})
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
