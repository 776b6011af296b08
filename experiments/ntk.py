"""The neural tangent kernel through BatchNorm: its spectrum in train and eval mode, and which one predicts training.

    python experiments/ntk.py [--quick] [--seed S] [--device D] [--out DIR] [--write]

K = J Jᵀ from `SqrtGGNExact` of a squared error: V = √2 J. Gradient descent with small steps moves the outputs by
dF/dt = -K ∂L/∂F; a wide network keeps its kernel, so the kernel at the start predicts the losses to come.
"""

from __future__ import annotations

import copy
import sys

import torch
from lib import figures
from lib.command import Run
from lib.gallery import descent, show, table
from lib.systems import Batch, digits, estimate_population, mlp, modes, one_hot, participation, relative
from torch import Tensor, nn

import bncurv

LOSS = nn.MSELoss(reduction="sum")
SHOWN = ("train", "frozen", "eval")
DASHED = {"eval": {"linestyle": (0, (4, 2))}}  # it covers the frozen one


def jacobian(net: nn.Module, data: Batch) -> Tensor:
    """∂F/∂θ, ``[N C, D]``: the factor of a squared error's GGN, whose Hessian is 2."""
    V = bncurv.curvature(net, LOSS, data, bncurv.SqrtGGNExact()).sqrt_ggn_exact
    J = torch.cat([v.flatten(2) for v in V.values()], 2) / 2**0.5  # [C, N, D]
    return J.transpose(0, 1).flatten(0, 1)


def trained(net: nn.Module, data: Batch, rate: float, steps: int) -> Tensor:
    """Losses L of gradient descent in train mode, ``[steps + 1]``."""
    net = copy.deepcopy(net)
    losses = descent(net, LOSS, data, torch.optim.SGD(net.parameters(), rate), steps)
    return torch.tensor(losses, dtype=data[0].dtype, device=data[0].device)


def predicted(K: Tensor, residual: Tensor, rate: float, steps: int) -> Tensor:
    """The same if K stays: r ← r - 2 rate K r."""
    values, vectors = torch.linalg.eigh(K)
    along = vectors.T @ residual
    powers = (1 - 2 * rate * values)[None] ** torch.arange(steps + 1, device=K.device)[:, None]
    return (powers * along).square().sum(1)


def picture(spectra: dict[str, Tensor], curves: dict[str, Tensor], true: Tensor) -> figures.Figure:
    """Eigenvalues by mode; the loss and what each kernel says of it."""
    figure, (left, right) = figures.panels(2, size=(11, 4.6))
    for mode in SHOWN:
        look = figures.look(mode)
        left.semilogy(
            range(1, len(spectra[mode]) + 1),
            spectra[mode],
            color=look["color"],
            label=look["label"],
            linewidth=2,
            **DASHED.get(mode, {}),
        )
        right.plot(
            curves[mode], color=look["color"], label="K of " + look["label"], linewidth=2, **DASHED.get(mode, {})
        )
    right.plot(true, color=figures.BLACK, linestyle="--", label="gradient descent")
    left.set(xlabel="index", ylabel="eigenvalue of K", title="Spectrum")
    right.set(xlabel="step", ylabel="squared error", title="Who predicts training?", yscale="log")
    right.set(ylim=(0.7 * float(true.min()), 1.5 * float(true.max())))
    left.legend(), right.legend()
    return figure


def application(run: Run) -> str:
    """Spectrum by mode, and how far its prediction is off."""
    N, width, steps = run.pick(64, 8), run.pick(256, 16), run.pick(100, 10)
    run.expect(len(SHOWN) + 1)
    X, y = digits(N, run.seed, device=run.device)
    data = X, one_hot(y)
    net = mlp((64, width, width, 10), he=True, device=run.device).train()
    estimate_population(net, X[:N].repeat(3, 1)[:128])
    residual = (net(X) - data[1]).detach().flatten()
    kernels = {mode: J @ J.T for mode, model in modes(net, X).items() for J in [jacobian(model, data)]}
    spectra = {mode: torch.linalg.eigvalsh(K).flip(0) for mode, K in kernels.items()}
    rate = 0.25 / float(spectra["train"][0])
    true = trained(net, data, rate, steps)
    curves = {mode: predicted(kernels[mode], residual, rate, steps) for mode in SHOWN}
    run.tick(len(SHOWN) + 1)
    run.save(
        picture(spectra, curves, true),
        "Left: with statistics held constant, and in eval mode, the kernel looks larger than training feels it. Right: "
        "so they promise a faster descent; the train-mode kernel is right at first, until the kernel has changed.",
    )
    rows = [
        [mode, f"{float(e[0]):.3g}", f"{float(e.sum()):.3g}", f"{participation(e):.2f}",
         int((e > 1e-10 * e[0]).sum()), f"{relative(curves[mode].log(), true.log()):.0%}"]
        for mode, e in spectra.items()
    ]  # fmt: skip
    header = ["mode", "λ_max", "trace", "participation ratio", f"rank of {10 * N}", "error of the predicted log loss"]
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(show(application))
