"""Least squares behind a BatchNorm: length and direction apart, linear rates, and the rate read off the GGN.

    python experiments/ols_bn.py [--quick] [--seed S] [--device D] [--out DIR]

The GGN block of the weights below a BatchNorm is (a²/σ²) times Cai's reduced covariance H - H w wᵀ H/(wᵀ H w), at every
w; its eigenvalues predict at what rate gradient descent converges. What BatchNorm gives is convergence for any learning
rate; the rate (1 - μ/L)² is that of plain gradient descent with step 1/L.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from lib import figures
from lib.command import Run, main
from lib.decoupling import LeastSquares, bn_descent, plain_change, rayleigh_step, reduced, spd, with_covariance
from lib.statements import Row, check, listed, refute
from lib.systems import TINY, batch_norms, digits, mlp, relative, table, train
from torch import Tensor, nn

import bncurv

ENOUGH = 1e-14  # of the first J

# --- length and direction -------------------------------------------------------------------------


def decoupling_row(run: Run, steps: int) -> Row:
    """W23: in a network, over training."""
    net = mlp((64, 16, 16, 10), eps=TINY, bias=False, device=run.device).train()
    data = digits(256, run.seed, standardised=True, device=run.device)
    layers, lr = (net[0].weight, net[3].weight), 0.2
    angles, growths = [], []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(data[0]), data[1])
        gradients = torch.autograd.grad(loss, layers)
        before = [w.detach().clone() for w in layers]
        train(net, data, 1, lr)
        for w, old, g in zip(layers, before, gradients, strict=True):
            angles.append(float(((old * g).sum(1) / (old.norm(dim=1) * g.norm(dim=1))).abs().max()))
            expected = old.square().sum(1) + lr**2 * g.square().sum(1)
            growths.append(relative(w.square().sum(1), expected))
    said = f"{steps} steps, 32 units: |cos(w, ∇)| ≤ {max(angles):.0e}; ‖w_(t+1)‖² to {max(growths):.0e}"
    return check("W23", max(angles) < 1e-12 and max(growths) < 1e-12, said, cosine=max(angles), norm=max(growths))


def scale_row(run: Run) -> Row:
    """G26: the output's deviation is γ √ρ, for every size of the weights and not for their norm."""
    X = digits(256, run.seed, standardised=True, device=run.device)[0]
    layer, bn = nn.Linear(64, 12, bias=False).to(run.device), nn.BatchNorm1d(12).to(run.device)
    nn.init.uniform_(bn.weight, 0.5, 2)
    gaps = []
    with torch.no_grad():
        for factor in (0.1, 1, 10):
            y = X @ (factor * layer.weight).T
            rho = y.var(0, correction=0) / (y.var(0, correction=0) + bn.eps)
            gaps.append(relative(bn(y).std(0, correction=0), bn.weight * rho.sqrt()))
        y = X @ layer.weight.T
        S = (X - X.mean(0)).T @ (X - X.mean(0)) / len(X)
        exact = bn.weight * (y - y.mean(0)) / (layer.weight @ S * layer.weight).sum(1).sqrt()
        per_unit = relative(exact, bn(y))
        printed = relative(bn.weight * y / y.norm(dim=1, keepdim=True) + bn.bias, bn(y))
        by_norm = relative(bn.weight * layer.weight.norm(dim=1), bn(y).std(0))
    said = f"deviation = γ √ρ to {max(gaps):.0e} with weights × 0.1, 1, 10; γ wᵀ(x - μ)/‖w‖_S to {per_unit:.0e} (ε); "
    said += f"the printed γ W x/‖W x‖ + β is {printed:.0%} off, its scale γ ‖W‖ {by_norm:.0%}"
    shown = max(gaps) < 1e-12 and per_unit < 1e-3 and min(printed, by_norm) > 0.1
    return refute("G26", shown, said, deviation=gaps, per_unit=per_unit, printed=printed, norm=by_norm)


# --- Kohler's rate --------------------------------------------------------------------------------


def problems(seed: int) -> dict[str, LeastSquares]:
    """A random one of condition 50, and diabetes."""
    torch.manual_seed(seed)
    X, y = table("diabetes", seed=seed)
    real = LeastSquares(X.T @ X / len(X), -(y * X).mean(0))
    return {"random": LeastSquares(spd(torch.logspace(0, math.log10(50), 10)), torch.randn(10)), "diabetes": real}


def kohler(problem: LeastSquares, steps: int) -> tuple[dict[str, Tensor], float]:
    """Gaps over time (BatchNorm, its bound, plain descent), and the worst error of the side identity."""
    mu, L = problem.ends
    w = plain = torch.randn(len(problem.u))
    gaps, plain_gaps, worst = [problem.gap(w)], [problem.plain_gap(plain)], 0.0
    for _ in range(steps):
        g = problem.gradient(w)
        dual = (w @ problem.S @ w) * (g @ torch.linalg.solve(problem.S, g)) / (4 * problem.rho(w).abs())
        worst = max(worst, float((dual - gaps[-1]).abs() / problem.rho(w).abs()))
        w, plain = problem.step(w), problem.plain_step(plain)
        gaps.append(problem.gap(w))
        plain_gaps.append(problem.plain_gap(plain))
    bound = (1 - mu / L) ** (2.0 * torch.arange(steps + 1)) * gaps[0]
    return {"BatchNorm": torch.stack(gaps), "bound": bound, "plain": torch.stack(plain_gaps)}, worst


def rate_rows(seed: int, steps: int) -> tuple[dict[str, dict[str, Tensor]], list[Row]]:
    """W24, W25, and the gaps over time."""
    found = {name: kohler(problem, steps) for name, problem in problems(seed).items()}
    curves, identity = {name: one[0] for name, one in found.items()}, max(one[1] for one in found.values())
    floor = 1e-26  # where rounding, squared, keeps the gap from falling further
    under = all(
        bool((c["BatchNorm"] <= c["bound"] * (1 + 1e-12) + floor * c["bound"][0]).all()) for c in curves.values()
    )
    rates = {name: float((c["BatchNorm"][20] / c["BatchNorm"][10]) ** 0.1) for name, c in curves.items()}
    bounds = {name: float(c["bound"][1] / c["bound"][0]) for name, c in curves.items()}
    said = f"under the bound at all {steps} steps: {'yes' if under else 'no'}; rate at t = 10-20 "
    said += ", ".join(f"{name} {rates[name]:.3f} ≤ {bounds[name]:.4f}" for name in rates)
    said += f"; ‖w‖_S² ‖∇ρ‖²_S⁻¹/(4 |ρ|) = ρ - ρ* to {identity:.0e}"
    rows = [check("W24", under and identity < 1e-12, said, rates=rates, bounds=bounds, identity=identity)]
    problem, w = problems(seed)["random"], torch.randn(10)
    for _ in range(700):
        w = problem.plain_step(w)
    rate = float(problem.plain_gap(problem.plain_step(w)) / problem.plain_gap(w))
    said = f"plain descent, step 1/L: gap × {rate:.6f} per step, (1 - μ/L)² = {bounds['random']:.6f}: linear, at "
    said += "the theorem's rate"
    rows.append(refute("W25", abs(rate / bounds["random"] - 1) < 1e-4, said, rate=rate, theory=bounds["random"]))
    return curves, rows


def rayleigh_row(seed: int, steps: int) -> Row:
    """W26: the factor holds with A = I, and is refuted by a rank-one B with A = S."""
    torch.manual_seed(seed)
    values = torch.sort(torch.rand(8), descending=True).values
    B, A, w = spd(values), torch.eye(8), torch.randn(8)
    first, second, last = (float(values[i]) for i in (0, 1, -1))
    printed, ratios = (1 - (first - second) / (first - last)) ** 2, []
    for _ in range(steps):
        rho = float(w @ B @ w / (w @ w))
        if first - rho < 1e-10:
            break
        if rho > second:
            ratios.append((first - rho) / (rho - second))
        w = rayleigh_step(B, A, w)
    worst = max(b / a for a, b in zip(ratios, ratios[1:], strict=False))
    problem, w, gaps = problems(seed)["random"], torch.randn(10), []
    B = torch.outer(problem.u, problem.u)
    for _ in range(31):
        gaps.append(float(problem.gap(w)))
        w = rayleigh_step(B, problem.S, w)
    rate = (gaps[30] / gaps[20]) ** 0.1
    said = f"A = I: factor per step ≤ {worst:.3f} (bound {printed:.3f}, {len(ratios)} steps); rank-one B and A = S: "
    said += f"printed factor 0, measured {rate:.3f} with the best steps: A's conditioning must enter"
    holds = worst <= printed and rate > 0.5
    return check("W26", holds, said, worst=worst, printed=printed, rate=rate)


# --- Cai: the GGN block ---------------------------------------------------------------------------


def block(H: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """GGN block of the weights of Linear-BN under half the squared error, by bncurv, and its gap to (a²/σ²) H*."""
    torch.manual_seed(0)
    X = with_covariance(H, 20)
    net = nn.Sequential(nn.Linear(3, 1, bias=False), nn.BatchNorm1d(1, eps=TINY)).train()
    variance = w @ H @ w
    a = (w @ H @ target) / variance.sqrt()
    with torch.no_grad():
        net[0].weight.copy_(w[None])
        batch_norms(net)[0].weight.fill_(float(a))
    V = bncurv.curvature(net, nn.MSELoss(), (X, X @ target[:, None]), bncurv.SqrtGGNExact()).sqrt_ggn_exact
    rows = V["0.weight"].reshape(-1, 3)
    G = rows.T @ rows / 2
    return G, relative(G, a**2 / variance * reduced(H, w))


def descent_rows(run: Run, steps: int) -> tuple[dict[float, Tensor], list[Row]]:
    """G28, X14, and J over time."""
    torch.manual_seed(run.seed)
    H = torch.diag(torch.tensor([1.0, 10.0, 100.0]))
    target, start = torch.randn(3), torch.randn(3)
    target, start = target / (target @ H @ target).sqrt(), start * (10 / (start @ H @ start)).sqrt()
    rates = [0.01, 0.1, 1.0, 10.0, 100.0]
    w, J = bn_descent(H, target, start.expand(5, 3), torch.tensor(rates), steps, ENOUGH)
    needed = {lr: int((J[:, i] > 1e-8 * J[0, i]).sum()) for i, lr in enumerate(rates)}
    below, above = plain_change(H, start, target, 0.019), plain_change(H, start, target, 0.021)
    eigenvalues = torch.linalg.eigvalsh(reduced(H, target))
    kappa = float(eigenvalues[-1] / eigenvalues[1])
    said = f"steps to 1e-8: {listed(needed.values(), 'd')} at learning rate {listed(needed, 'g')}; plain descent after "
    said += f"2000 steps: × {below:.0e} below 2/λ_max = 0.02, × {above:.0e} above; κ 100, κ* {kappa:.1f}"
    shown = max(needed.values()) < steps and below < 1e-8 and above > 1e8 and kappa <= 100
    rows = [refute("G28", shown, said, needed=needed, below=below, above=above, kappa=kappa)]

    predicted, seen, gaps = {}, {}, []
    for i, lr in enumerate(rates):
        G, gap = block(H, w[i], target)
        gaps += [gap, block(H, start, target)[1]]
        end = int((J[:, i] > ENOUGH * J[0, i]).sum()) - 1
        if end < steps:  # else it is not there yet, and the asymptotic rate is not to be seen
            late = max(1, end // 5)
            predicted[lr] = max((1 - lr * float(e)) ** 2 for e in torch.linalg.eigvalsh(G)[1:])
            seen[lr] = float(J[end, i] / J[end - late, i]) ** (1 / late)
    worst = max(abs(seen[lr] / predicted[lr] - 1) for lr in predicted)
    said = f"GGN block = (a²/σ²) H* to {max(gaps):.0e}; rate at lr {listed(seen, 'g')}: measured "
    said += f"{listed(seen.values(), '.7f')}, predicted {listed(predicted.values(), '.7f')}; κ* {kappa:.1f} ≤ 100"
    holds = worst < 1e-4 and len(predicted) >= 3 and max(gaps) < 1e-10 and kappa <= 100
    rows.append(check("X14", holds, said, seen=seen, predicted=predicted, block=max(gaps), kappa=kappa))
    return {lr: J[:, i] for i, lr in enumerate(rates)}, rows


def picture(
    curves: dict[str, dict[str, Tensor]], J: dict[float, Tensor], predicted: dict[float, float]
) -> figures.Figure:
    """Kohler's bound; descent for five learning rates, with the predicted rate."""
    figure, axes = figures.panels(2, size=(12, 4.8))
    for colour, (name, gaps) in zip((figures.BLUE, figures.ORANGE), curves.items(), strict=True):
        for (kind, values), line in zip(gaps.items(), ("-", "--", ":"), strict=True):
            axes[0].semilogy(values / values[0], line, color=colour, label=f"{name}: {kind}")
    axes[0].set(xlabel="step", ylabel="gap to the optimum ÷ first", ylim=(1e-10, 2))
    axes[0].set_title("Least squares: under the bound, and so is plain descent")
    axes[0].legend(fontsize=9, ncols=2)
    colours = (figures.SKY, figures.BLUE, figures.GREEN, figures.AMBER, figures.ORANGE)
    for (lr, values), colour in zip(J.items(), colours, strict=True):
        kept = values[values > ENOUGH * values[0]] / values[0]
        axes[1].loglog(torch.arange(1, len(kept) + 1), kept, color=colour, label=f"lr {lr:g}")
        if lr in predicted:
            t = torch.arange(len(kept) // 2, len(kept))
            axes[1].loglog(t + 1, kept[-1] * predicted[lr] ** (t + 1.0 - len(kept)), "--", color=figures.BLACK)
    axes[1].set(xlabel="step", ylabel="J ÷ first", title="Any learning rate converges, at the GGN's rate (dashed)")
    axes[1].legend(loc="lower left")
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    run.expect(5)
    yield decoupling_row(run, run.pick(40, 10))
    yield scale_row(run)
    run.tick()
    curves, rows = rate_rows(run.seed, run.pick(400, 200))
    found = [*rows, rayleigh_row(run.seed, 300)]
    run.tick()
    J, cai = descent_rows(run, run.pick(100_000, 60_000))
    found += cai
    run.tick(3)
    run.save(
        picture(curves, J, cai[-1].numbers["predicted"]),
        "Left: dashed the theorem's bound, dotted plain descent, which converges linearly too. Right: gradient descent "
        "behind BatchNorm tunes itself by the growth of ‖w‖.",
    )
    yield from found


if __name__ == "__main__":
    sys.exit(main(experiment))
