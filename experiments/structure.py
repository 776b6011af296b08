"""Which structure of the loss survives BatchNorm: what depends on what, and what the GGN needs of it.

    python experiments/structure.py [--quick] [--seed S] [--device D] [--out DIR]

The note's ladder: a model and a loss function (kept), a loss that is reduced from individual losses (kept), a forward
pass that treats samples alike and apart (lost). The GGN needs only the first two.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from lib import figures
from lib.command import Run, main
from lib.statements import Row, check
from lib.systems import TINY, Batch, digits, evaluated, ggn, mlp, one_hot, relative
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.functional import hessian, jacobian

import bncurv
from bncurv import reference

CE, CE_SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
WIDTHS = (64, 12, 12, 10)


class Contrastive(nn.Module):
    """NT-Xent: rows 2i and 2i+1 of the output are views of one sample, all others are negatives."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        z = nn.functional.normalize(output)
        same = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similarity = (z @ z.T / 0.5).masked_fill(same, -1e9)
        return nn.functional.cross_entropy(similarity, torch.arange(len(z), device=z.device) ^ 1)


# --- what depends on what -------------------------------------------------------------------------


def dependence(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """``[n, k]``: ‖∂ℓ_n/∂x_k‖."""
    losses = lambda X: nn.functional.cross_entropy(model(X), y, reduction="none")  # noqa: E731
    return jacobian(losses, X).norm(dim=2)


def moved(model: nn.Module, X: Tensor) -> float:
    """How far all outputs but the first move when the first sample is replaced."""
    other = X.clone()
    other[0] = torch.rand_like(X[0])
    with torch.no_grad():
        return float((model(other)[1:] - model(X)[1:]).abs().max())


def forward_structure(data: Batch) -> Iterator[Row]:
    """D2, D4, D7."""
    X, y = data
    sizes: dict[str, float] = {}
    for eps in (TINY, 1e-5):
        net = mlp((64, 32, 10), eps=eps, device=X.device).train()
        all_sizes = all(net(X[:n]).shape == (n, 10) for n in (2, 7, len(X)))
        outputs = lambda W, net=net: torch.func.functional_call(net, {"0.weight": W}, X[:2])  # noqa: E731
        sizes["0" if eps == TINY else "1e-5"] = float(jacobian(outputs, net[0].weight).abs().max())
    error = refusal(net, CE, (X[:1], y[:1]))
    said = f"n = 1: {error or 'no error'}; n = 2: largest |∂F/∂W| {sizes['0']:.0e} (ε = 0), {sizes['1e-5']:.0e} (1e-5)"
    holds = bool(error) and all_sizes and sizes["0"] < 1e-8 and sizes["1e-5"] > 1e-5
    yield check("D2", holds, said, **sizes)

    nets = {kind: mlp(WIDTHS, kind, device=X.device).train() for kind in ("bn", "gn", "ln", "none")}
    nets["eval"] = evaluated(nets["bn"])
    moves = {kind: moved(net, X) for kind, net in nets.items()}
    apart = max(value for kind, value in moves.items() if kind != "bn")
    said = f"other outputs move by {moves['bn']:.2g} (BatchNorm, train), {apart:g} (eval, GN, LN, none)"
    yield check("D4", moves["bn"] > 1e-3 and apart == 0, said, **moves)

    maps = {kind: dependence(nets[kind], X, y) for kind in ("none", "bn", "eval")}
    off = {kind: float((t - t.diag().diag()).max()) for kind, t in maps.items()}
    dense = float((maps["bn"] > 0).double().mean())
    said = (
        f"off the diagonal exactly {max(off['none'], off['eval']):g} (none, eval); train mode: {dense:.0%} of all pairs"
    )
    holds = off["none"] == off["eval"] == 0 and dense == 1
    yield check("D7", holds, said, maps={kind: t.tolist() for kind, t in maps.items()})


def refusal(model: nn.Module, loss_fn: nn.Module, data: Batch) -> str:
    """The kind of error that bncurv answers with, or nothing."""
    try:
        bncurv.curvature(model, loss_fn, data, bncurv.DiagGGNExact())
    except (ValueError, TypeError) as error:
        return type(error).__name__
    return ""


# --- the loss -------------------------------------------------------------------------------------


def loss_structure(data: Batch) -> Iterator[Row]:
    """D5, D6, D14."""
    X, y = data
    n, gaps = len(X), []
    for norm in ("bn", "none"):
        net = mlp(WIDTHS, norm, device=X.device).train()
        by_mean, by_sum = (
            bncurv.curvature(net, loss, data, bncurv.SqrtGGNExact(), bncurv.ComponentGrad()) for loss in (CE, CE_SUM)
        )
        for field, factor in (("sqrt_ggn_exact", n**0.5), ("grad_component", n)):
            pairs = zip(getattr(by_mean, field).values(), getattr(by_sum, field).values(), strict=True)
            pairs = [(a.flatten(), b.flatten()) for a, b in pairs]
            a, b = (torch.cat(part) for part in zip(*pairs, strict=True))
            gaps.append(relative(a * factor, b))
    yield check("D5", max(gaps) < 1e-12, f"error {max(gaps):.0e} (V and gradients; BatchNorm and none)", errors=gaps)

    F = torch.randn(8, 4)
    labels, targets = torch.arange(8) % 4, one_hot(torch.arange(8) % 4, 4)
    shares, factors = {}, {}
    for name, loss_fn, t in (
        ("CE", CE, labels),
        ("MSE", nn.MSELoss(), targets),
        ("contrastive", Contrastive(), labels),
    ):
        H = hessian(lambda F, loss_fn=loss_fn, t=t: loss_fn(F, t), F)  # [n, c, n', c']
        own = torch.einsum("ncnd->ncd", H)
        whole = H.flatten(2).flatten(0, 1)
        shares[name] = float((whole - torch.block_diag(*own)).norm() / whole.norm())
        if name != "contrastive":
            ranks = []
            for k in range(8):
                S = factor_of(loss_fn, F[k : k + 1], t[k : k + 1])
                ranks.append((relative(S.T @ S / 8, own[k]), int(torch.linalg.matrix_rank(S))))
            factors[name] = max(gap for gap, _ in ranks), max(rank for _, rank in ranks)
    error = refusal(mlp((64, 8, 4), device=X.device).train(), Contrastive(), (X[:8], labels.to(X.device)))
    said = f"off-block share 0 (CE, MSE), {shares['contrastive']:.2f} (contrastive: bncurv raises {error})"
    holds = shares["CE"] == shares["MSE"] == 0 and shares["contrastive"] > 1e-3 and bool(error)
    yield check("D6", holds, said, **shares)
    gap = max(gap for gap, _ in factors.values())
    said = f"error {gap:.0e}; rank {factors['CE'][1]} (CE, C = 4), {factors['MSE'][1]} (MSE)"
    holds = gap < 1e-14 and factors["CE"][1] == 3 and factors["MSE"][1] == 4
    yield check("D14", holds, said, errors=factors)


def factor_of(loss_fn: nn.Module, F: Tensor, t: Tensor) -> Tensor:
    """The columns s_c of one sample as rows ``[C, entries]``: V of a network whose output is its only parameter."""
    net = nn.Sequential(nn.Linear(1, F.shape[1]))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(F[0])
    ones = torch.ones(1, 1)
    return bncurv.curvature(net, loss_fn, (ones, t), bncurv.SqrtGGNExact()).sqrt_ggn_exact["0.bias"][:, 0]


# --- the GGN --------------------------------------------------------------------------------------


def ggn_structure(data: Batch, pool: Tensor, draws: int) -> Iterator[Row]:
    """D3, D12, D13, D19."""
    X, y = data
    net = mlp((64, 6, 6, 10), device=X.device).train()
    G = ggn(net, data)
    J = torch.cat([t.flatten(1) for t in reference.jacobian(net, X).values()], 1)
    H = reference.loss_hessian(CE, net(X).detach(), y)
    gap = relative(G @ torch.eye(G.dim, device=X.device), J.T @ H @ J)
    yield check("D3", gap < 1e-10, f"error {gap:.0e} (D = {G.dim}, N C = {len(H)})", error=gap)

    parameters = tuple(net.parameters())
    F = net(X)
    loss_gradient = grad(CE(F, y), F, create_graph=True)[0]
    u = torch.zeros_like(F, requires_grad=True)
    back = grad(F, parameters, u, create_graph=True)
    gaps = []
    for _ in range(draws):
        v = torch.randn(G.dim, device=X.device)
        parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
        Jv = grad(back, u, parts, retain_graph=True)[0]
        HJv = grad(loss_gradient, F, Jv, retain_graph=True)[0]
        product = torch.cat([t.flatten() for t in grad(F, parameters, HJv, retain_graph=True)])
        gaps.append(relative(G @ v, product))
    yield check("D12", max(gaps) < 1e-10, f"largest error {max(gaps):.0e} of {draws} vectors", errors=gaps)

    def summands(X: Tensor) -> tuple[Tensor, float]:
        quantities = bncurv.ComponentDiagGGNExact(), bncurv.DiagGGNExact()
        result = bncurv.curvature(net, CE, (X, y), *quantities)
        parts = torch.cat([t.flatten(1) for t in result.diag_ggn_exact_component.values()], 1)
        return parts, relative(parts.sum(0), torch.cat([t.flatten() for t in result.diag_ggn_exact.values()]))

    (parts, gap), others = summands(X), []
    for k in range(draws):
        changed = pool[k * len(X) : (k + 1) * len(X)].clone()
        changed[0] = X[0]  # sample 0 stays, its company changes
        others.append(summands(changed)[0][0])
    change = min(relative(other, parts[0]) for other in others)
    said = f"sum right to {gap:.0e}; summand 0 changes by {change:.0%} or more when the other samples do"
    yield check("D13", gap < 1e-12 and change > 1e-3, said, error=gap, change=change)
    traces = torch.stack([other.sum() for other in others])
    spread = float(traces.std() / traces.mean())
    said = f"tr G_0 varies by {spread:.0%} (relative std) with the other samples; sum = tr G to {gap:.0e}"
    yield check("D19", spread > 0.01 and gap < 1e-12, said, spread=spread, traces=traces)


def picture(maps: dict[str, list[list[float]]]) -> figures.Figure:
    """N × N maps of ∂ℓ_n/∂x_k."""
    figure, axes = figures.panels(3, size=(11, 4))
    titles = {"none": "no BatchNorm", "eval": "BatchNorm, eval mode", "bn": "BatchNorm, train mode"}
    for ax, (kind, title) in zip(axes, titles.items(), strict=True):
        t = torch.tensor(maps[kind])
        image = ax.imshow(t / t.max(), cmap="viridis", norm="log", vmin=1e-3, vmax=1)
        image.cmap.set_bad("black")
        ax.set(title=title, xlabel="input $x_k$")
        ax.grid(False)
        ax.set_facecolor("black")
    axes[0].set_ylabel("loss $\\ell_n$")
    figure.colorbar(image, ax=axes, label=r"$\|\partial\ell_n/\partial x_k\|$, relative to the largest", shrink=0.8)
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows, in a few seconds."""
    run.expect(3)
    X, y = digits(device=run.device, seed=run.seed)
    data = X[:24], y[:24]
    rows = list(forward_structure(data))
    run.tick()
    run.save(
        picture(next(row for row in rows if row.id == "D7").numbers["maps"]),
        "Black: no dependence at all. Without BatchNorm, and in eval mode, each loss depends on its own input only; in "
        "train mode every loss depends on every input.",
    )
    rows += loss_structure(data)
    run.tick()
    rows += ggn_structure(data, X[24:], 20)
    run.tick()
    yield from rows


if __name__ == "__main__":
    sys.exit(main(experiment))
