"""Learning halfspaces with gradient descent in length and direction (GDNP): the gradient, its line, the rates.

    python experiments/halfspace_gdnp.py [--quick] [--seed S] [--device D] [--out DIR]

Gaussian inputs, logistic loss; d = 8, condition 10. Every expectation is a quadrature, held against samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from lib import figures
from lib.command import Run, main
from lib.decoupling import LeastSquares, spd
from lib.halfspaces import Halfspace, TanhLayer, bisection, gdnp, outside
from lib.statements import Row, check, listed, refute
from lib.systems import relative
from torch import Tensor

DIM = 8


def problem(seed: int) -> Halfspace:
    """S of condition 10 and a random direction of u with uᵀ S⁻¹ u = 1/2."""
    torch.manual_seed(seed)
    S, u = spd(torch.logspace(0, 1, DIM)), torch.randn(DIM)
    return Halfspace(u * (0.5 / (u @ torch.linalg.solve(S, u))).sqrt(), S)


def gradient_row(run: Run, data: Halfspace, count: int) -> Row:
    """W27: the formula against samples and against finite differences of the loss."""
    w = torch.randn(DIM)
    w = 1.5 * w / data.length(w)
    exact = data.gradient(w)
    total, squares = torch.zeros(DIM), torch.zeros(DIM)
    for _ in range(10):
        z = data.samples(count // 10)
        g = torch.sigmoid(z @ w)[:, None] * z
        total, squares = total + g.sum(0), squares + g.square().sum(0)
    mean = total / count
    z_scores = (mean - exact) / ((squares / count - mean**2) / count).sqrt()
    differences = torch.stack([(data.loss(w + e) - data.loss(w - e)) / 2e-5 for e in 1e-5 * torch.eye(DIM)])
    gap = relative(exact, differences)
    run.tick()
    worst = float(z_scores.abs().max())
    said = f"{count:.0e} samples: |z| ≤ {worst:.2f} in {DIM} entries; finite differences {gap:.0e}"
    return check("W27", worst < 4 and gap < 1e-6, said, z=z_scores, differences=gap)


def path_rows(data: Halfspace, steps: int) -> tuple[dict[str, Tensor], list[Row]]:
    """W28, W29, and gaps and gradient norms over time."""
    squares = LeastSquares(data.S, data.u)
    mu, L = squares.ends
    start = torch.randn(DIM)
    directions, lengths = gdnp(data, start, steps)
    gaps = torch.stack([squares.gap(w) for w in directions])
    bound = (1 - mu / L) ** (2.0 * torch.arange(steps + 1)) * gaps[0]
    ends = [data.at(w, gamma) for w, gamma in zip(directions, lengths, strict=True)]
    plain = [ends[0]]
    for _ in range(steps):
        plain.append(plain[-1] - data.gradient(plain[-1]) / (L / 4))  # φ'' ≤ 1/4
    norms = {
        name: torch.stack([data.gradient(w).norm() for w in path]) for name, path in (("GDNP", ends), ("plain", plain))
    }

    line = torch.linalg.solve(data.S, data.u)
    off = float(outside(ends[-1], line[:, None]).norm() / ends[-1].norm())  # the angle's sine
    said = (
        f"1 - |cos| = {1 - math.sqrt(1 - off**2):.0e} after {steps} steps; {1 - _cosine(start, line):.2f} at the start"
    )
    rows = [check("W28", 1 - math.sqrt(1 - off**2) < 1e-10, said, sine=off)]
    under = bool((gaps <= bound * (1 + 1e-12) + 1e-26).all())
    shown = [t for t in (0, 20, 50, 100, 200) if t <= steps]
    said = f"gap at t = {listed(shown, 'd')}: {listed((float(gaps[t]) for t in shown), '.1e')}, "
    said += (
        f"{'always' if under else 'not always'} under the bound; ‖∇f‖ at t = 100: GDNP {norms['GDNP'][100]:.1e}, plain "
    )
    said += f"descent {norms['plain'][100]:.1e}"
    rows.append(check("W29", under and bool(norms["GDNP"][100] < norms["plain"][100]), said, gaps=gaps, norms=norms))
    return {"gap": gaps, "bound": bound, **norms}, rows


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b).abs() / (a.norm() * b.norm()))


def bisection_row(data: Halfspace) -> tuple[list[float], Row]:
    """W30, and |∂f/∂γ| after 1, 2, ... bisections."""
    w = gdnp(data, torch.randn(DIM), 3)[0][-1]
    slopes = [abs(float(data.slope(w, bisection(data, w, steps, (-16.0, 16.0))))) for steps in range(1, 41)]
    t, y = torch.arange(3.0, 41), torch.tensor(slopes[2:]).log2()
    t = t - t.mean()
    rate = float((t * y).sum() / t.square().sum())
    said = f"slope of log2 |∂f/∂γ| per bisection {rate:.3f}: the square falls as 4^(-T_s), the bound says 2^(-T_s)"
    return slopes, check("W30", abs(rate + 1) < 0.1, said, rate=rate, slopes=slopes)


def layer_row(run: Run, data: Halfspace, count: int) -> Row:
    """W31: Stein's span, and one unit's optimum with the others fixed."""
    layer = TanhLayer(data, torch.tensor([4.0, 2.0, -2.0]))
    W = torch.randn(DIM, 3)
    W = W / (W * (data.S @ W)).sum(0).sqrt()
    span = torch.cat([data.u[:, None], data.S @ W], 1)
    total, squares, gradient = torch.zeros(DIM), torch.zeros(DIM), torch.zeros(DIM)
    for _ in range(10):
        g = layer.sampled_gradients(W, data.samples(count // 10))
        r = outside(g, span)
        total, squares, gradient = total + r.sum(0), squares + r.square().sum(0), gradient + g.sum(0)
    residual = float((total / count).norm())
    error = float(((squares / count - (total / count) ** 2).sum() / count).sqrt())
    run.tick()

    free = W[:, 0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free], 1, 400, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer.loss(torch.cat([free[:, None], W[:, 1:]], 1))
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum, line = free.detach(), torch.linalg.solve(data.S, data.u)
    cosine = _cosine(optimum, line)
    beside = float(outside(optimum, torch.cat([line[:, None], W[:, 1:]], 1)).norm() / optimum.norm())
    run.tick()
    said = f"outside span{{u, S w_j}}: {residual:.1e} of {float(gradient.norm()) / count:.1f} (standard error "
    said += f"{error:.1e}); one unit's optimum, others fixed: |cos| to S⁻¹u {cosine:.3f}, outside "
    said += f"span{{S⁻¹u, w_j}} {beside:.0e}"
    holds = residual < 4 * error and cosine < 0.99 and beside < 1e-5
    return check("W31", holds, said, residual=residual, error=error, cosine=cosine, beside=beside)


def claims_row(data: Halfspace) -> Row:
    """G29: not separable, not convex in the direction; rates are the squared norm's."""
    w = torch.randn(DIM)
    H = torch.autograd.functional.hessian(lambda v: data.loss(data.at(v, 1.0)), w)
    lowest = float(torch.linalg.eigvalsh(H)[0] * w.norm() ** 2)
    radial = float((H @ w + data.direction_gradient(w, 1.0)).norm() / data.direction_gradient(w, 1.0).norm())
    best = -torch.linalg.solve(data.S, data.u)
    share = -float(data.u @ best / (best @ data.S @ best - (data.u @ best) ** 2).sqrt())
    wrong = 0.5 * math.erfc(share / math.sqrt(2))
    said = f"in the direction the Hessian has an eigenvalue {lowest:.2g}/‖w‖² < 0 (H w = -∇ to {radial:.0e}, so it is "
    said += f"indefinite wherever ∇ ≠ 0); the best halfspace errs on {wrong:.0%} of Gaussian data, none separates; "
    said += "the loss is smooth, the gradient full, and μ, L belong to S"
    return refute("G29", lowest < 0 and wrong > 0 and radial < 1e-8, said, lowest=lowest, radial=radial, error=wrong)


def picture(curves: dict[str, Tensor], slopes: list[float]) -> figures.Figure:
    """The gap under its bound; gradient norms; bisection."""
    figure, axes = figures.panels(3, size=(14, 4.4))
    axes[0].semilogy(curves["gap"], color=figures.BLUE, label="GDNP")
    axes[0].semilogy(curves["bound"], "--", color=figures.BLACK, label="(1 - μ/L)^(2t) bound")
    axes[0].set(xlabel="step", ylabel="ρ(w) - ρ*", title="The direction converges linearly", ylim=(1e-18, 2))
    for name, colour in (("GDNP", figures.BLUE), ("plain", figures.ORANGE)):
        axes[1].semilogy(curves[name], color=colour, label="plain descent" if name == "plain" else name)
    axes[1].set(xlabel="step", ylabel="‖∇f‖", title="Faster than plain descent")
    axes[2].semilogy(range(1, len(slopes) + 1), slopes, ".", color=figures.BLUE, label="measured")
    axes[2].semilogy([1, 40], [slopes[0], slopes[0] * 2.0**-39], "--", color=figures.BLACK, label="2^(-T)")
    axes[2].semilogy(
        [1, 40], [slopes[0], slopes[0] * 2.0**-19.5], ":", color=figures.ORANGE, label="2^(-T/2), the printed bound"
    )
    axes[2].set(xlabel="bisections T", ylabel="|∂f/∂γ|", title="Bisection beats its bound")
    for ax in axes:
        ax.legend(fontsize=9)
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    run.expect(5)
    data = problem(run.seed)
    rows = [gradient_row(run, data, run.pick(2_000_000, 200_000))]
    curves, found = path_rows(data, run.pick(200, 120))
    slopes, row = bisection_row(data)
    rows += [*found, row, claims_row(data)]
    run.tick(2)
    rows.append(layer_row(run, data, run.pick(1_500_000, 150_000)))
    run.save(picture(curves, slopes), "Halfspaces, logistic loss, Gaussian inputs. Dashed and dotted: theory.")
    yield from rows


if __name__ == "__main__":
    sys.exit(main(experiment))
