"""Gradient descent on a BatchNorm network sits at the edge of stability, and only train-mode curvature shows it.

    python experiments/edge_of_stability.py [--quick] [--seed S] [--device D] [--out DIR]

Full-batch gradient descent drives the largest eigenvalue of the loss' curvature to 2/lr and holds it there (Cohen et
al. 2021). Through the batch statistics the GGN says just that; with the same statistics held constant, it says ten
times as much, a curvature at which descent would explode.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import mean

import torch
from lib import figures
from lib.command import Run, main
from lib.statements import Row, check
from lib.systems import digits, frozen, ggn, mlp, one_hot, train
from torch import nn

# The loss is ½ ‖F_n - Y_n‖² averaged over samples: 5 times nn.MSELoss, which averages over ten outputs too.
MSE, SCALE = nn.MSELoss(), 5.0
SIZES = (64, 24, 24, 10)


def descent(run: Run, seed: int, lr: float, steps: int, every: int) -> dict[str, list[float]]:
    """λ_max of both matrices every so many steps, in the units of the loss."""
    torch.manual_seed(seed)
    X, y = digits(200, seed, device=run.device)
    Y = one_hot(y)
    net = mlp(SIZES, activation=nn.Tanh, device=run.device).train()
    path: dict[str, list[float]] = {"step": [], "train": [], "frozen": []}

    def look(t: int) -> None:
        if t % every == 0:
            path["step"].append(t)
            for mode, model in (("train", net), ("frozen", frozen(net, X))):
                path[mode].append(SCALE * float(ggn(model, (X, Y), MSE, top=1).eigenvalues[0]))
            run.tick()

    train(net, (X, Y), steps, SCALE * lr, loss_fn=MSE, each=look)
    with torch.no_grad():
        path["loss"] = [SCALE * float(MSE(net(X), Y))]
    return path


def row(paths: dict[float, list[dict[str, list[float]]]]) -> Row:
    """X8: means over the second half of the steps."""
    means = {
        lr: {mode: [mean(p[mode][len(p[mode]) // 2 :]) for p in found] for mode in ("train", "frozen")}
        for lr, found in paths.items()
    }
    said, holds = [], True
    for lr, by_mode in means.items():
        edge = 2 / lr
        off = max(abs(value / edge - 1) for value in by_mode["train"])
        times = min(f / t for f, t in zip(by_mode["frozen"], by_mode["train"], strict=True))
        holds &= off < 0.12 and times > 5
        values = ", ".join(f"{v:.2f}" for v in by_mode["train"])
        held = ", ".join(f"{v:.0f}" for v in by_mode["frozen"])
        said.append(f"lr {lr:g}: 2/lr = {edge:.2f}, train {values} ({off:.0%} off), frozen {held} ({times:.1f} times)")
    return check(
        "X8", holds, "; ".join(said), means=means, losses={lr: [p["loss"] for p in f] for lr, f in paths.items()}
    )


def picture(paths: dict[float, list[dict[str, list[float]]]]) -> figures.Figure:
    """λ_max over the steps, and 2/lr."""
    figure, axes = figures.panels(len(paths), size=(5.6 * len(paths), 4.6))
    for ax, (lr, found) in zip(axes, paths.items(), strict=True):
        for mode in ("frozen", "train"):
            for i, path in enumerate(found):
                style = figures.look(mode, marker="", linewidth=1.8, alpha=0.8)
                ax.semilogy(path["step"], path[mode], **style | ({} if i == 0 else {"label": "_"}))
        figures.reference_line(ax, f"2/lr = {2 / lr:.3g}", y=2 / lr, below=True)
        ax.set(xlabel="step of gradient descent", ylabel="largest eigenvalue of the GGN", title=f"learning rate {lr:g}")
        ax.set_ylim(2 / lr / 3, 2 / lr * 45)
        ax.set_yticks(*[(v := [v for v in (3, 10, 30, 100, 300) if 2 / lr / 3 < v < 90 / lr]), [str(i) for i in v]])
        ax.minorticks_off()
        ax.legend(loc="upper right")
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """The one row."""
    seeds, looks = run.seeds(3), run.pick(40, 20)
    steps = {0.3: 800, 0.1: 2400}  # equal times lr · steps
    run.expect(len(steps) * len(seeds) * looks)
    paths = {lr: [descent(run, seed, lr, count, count // looks) for seed in seeds] for lr, count in steps.items()}
    run.save(
        picture(paths),
        "Blue: curvature through the batch statistics settles at 2/lr, the edge of stability. Orange: the same network "
        f"at the same points with its statistics held constant. {len(seeds)} seeds each.",
    )
    yield row(paths)


if __name__ == "__main__":
    sys.exit(main(experiment))
