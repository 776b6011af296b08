"""Training by damped Gauss-Newton steps of the train-mode GGN, beside gradient descent and Adam.

    python experiments/gauss_newton.py [--quick] [--seed S] [--device D] [--out DIR] [--write]

θ ← θ - (G + δ I)⁻¹ ∇L on one batch, by `LowRank.newton_step`; δ is halved after a step that lowers the loss, and else
the step is taken back and δ doubled. Beside it the same with G of constant batch statistics, and SGD and Adam at the
best of their learning rates. All see the same batch in train mode.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch
from lib import figures
from lib.command import Run
from lib.gallery import descent, show, table
from lib.systems import Batch, digits, frozen, mlp
from torch import nn

import bncurv

LOSS = nn.CrossEntropyLoss()
PRICE = 400  # steps of first order in the time of one of the GGN, roughly
RATES = {"SGD, momentum 0.9": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), "Adam": (0.003, 0.01, 0.03, 0.1, 0.3)}
GGN, FROZEN = "GGN, train mode", "GGN, statistics constant"
LOOKS = {
    GGN: {"color": figures.BLUE, "marker": "o"},
    FROZEN: {"color": figures.ORANGE, "marker": "s"},
    "SGD, momentum 0.9": {"color": figures.GREY, "marker": "D"},
    "Adam": {"color": figures.PURPLE, "marker": "v"},
}


def loss_of(net: nn.Module, data: Batch) -> float:
    """In train mode."""
    with torch.no_grad():
        return float(LOSS(net(data[0]), data[1]))


def second_order(net: nn.Module, data: Batch, steps: int, held: bool, damping: float = 1.0) -> list[float]:
    """Losses after each step; a step that raises the loss is taken back."""
    losses = [loss_of(net, data)]
    for _ in range(steps):
        G = bncurv.curvature(net, LOSS, data, bncurv.LowRankGGN()).ggn
        matrix = bncurv.curvature(frozen(net, data[0]), LOSS, data, bncurv.LowRankGGN()).ggn if held else G
        step = matrix.unflatten(-matrix.solve(G.gradient, damping)) if held else G.newton_step(damping)
        for _ in range(20):
            moved = copy.deepcopy(net)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    p += step[name]
            if loss_of(moved, data) < losses[-1]:
                break
            damping *= 2
            step = matrix.unflatten(-matrix.solve(G.gradient, damping))
        net, damping = moved, damping / 2
        losses.append(loss_of(net, data))
    return losses


def first_order(net: nn.Module, data: Batch, steps: int, kind: str, rate: float) -> list[float]:
    """Losses after each step."""
    net = copy.deepcopy(net)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, rate) if kind == "Adam" else torch.optim.SGD(parameters, rate, 0.9)
    return descent(net, LOSS, data, optimizer, steps)


def timed(steps: int, way: Callable[..., list[float]], *arguments: object) -> tuple[list[float], float]:
    """Losses, and seconds of a step."""
    start = time.perf_counter()
    return way(*arguments), (time.perf_counter() - start) / steps


def picture(found: dict[str, tuple[list[float], float]], labels: dict[str, str]) -> figures.Figure:
    """Loss against steps."""
    figure, ax = figures.panels()
    for way, (losses, _) in found.items():
        every = max(len(losses) // 15, 1)
        ax.semilogy(losses, label=labels[way], markevery=every, linewidth=2, **LOOKS[way])
    ax.set(xlabel="step", ylabel="training loss (train mode)", title="Full-batch training of an MLP with BatchNorm")
    ax.legend()
    return figure


def application(run: Run) -> str:
    """Loss after some steps, and seconds of a step."""
    steps, N = run.pick(24, 3), run.pick(128, 16)
    run.expect(4)
    data = digits(N, run.seed, device=run.device)
    net = mlp((64, 24, 24, 10), device=run.device).train()
    found, long, labels = {}, {}, {GGN: GGN, FROZEN: FROZEN}
    for way in (GGN, FROZEN):
        found[way] = timed(steps, second_order, copy.deepcopy(net), data, steps, way == FROZEN)
        run.tick()
    for kind, rates in RATES.items():
        tried = {rate: timed(steps, first_order, net, data, steps, kind, rate) for rate in rates}
        best = min(tried, key=lambda rate: tried[rate][0][-1])
        found[kind], labels[kind] = tried[best], f"{kind}, rate {best:g}"
        long[kind] = first_order(net, data, PRICE * steps, kind, best)[-1]
        run.tick()
    run.save(
        picture(found, labels),
        f"All from the same initial values on the same {N} digits. A step of the GGN costs hundreds of the others.",
    )
    at = [i for i in (2, 4, 8, 16, 24) if i <= steps]
    rows = [[labels[way], *(f"{losses[i]:.2g}" for i in at), f"{1000 * s:.3g}"] for way, (losses, s) in found.items()]
    said = f"With {PRICE} steps for each of the GGN's, about as long: " + ", ".join(
        f"{loss:.1g} ({labels[kind]})" for kind, loss in long.items()
    )
    return said + ".\n\n" + table(["way", *(f"loss after {i}" for i in at), "ms per step"], rows)


if __name__ == "__main__":
    sys.exit(show(application))
