"""The formulas of the BatchNorm transform: forward, backward, second derivative; which of them are wrong.

    python experiments/identities.py [--quick] [--seed S] [--device D] [--out DIR]

Everything here is an identity, so the figures are rounding errors in float64; beside them stands what the usual
shortcuts and the sources' slips get wrong.
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
from torch.autograd import grad
from torch.autograd.functional import hessian, jacobian

EPS = 1e-5


def relative_gap(a: Tensor, b: Tensor) -> float:
    """Largest deviation relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


# --- first derivatives ----------------------------------------------------------------------------


def moments_rows() -> Iterator[Row]:
    """S1-S3, G4, G23, W2: the formulas against autograd, N = 8 samples of 5 channels."""
    x, target = torch.randn(8, 5, requires_grad=True), 1 + torch.randn(8, 5)
    gamma, beta = (torch.randn(5).requires_grad_() for _ in range(2))
    mean = x.mean(0)
    variance = (x - mean).square().mean(0)
    normal = (x - mean) / (variance + EPS).sqrt()
    loss = (gamma * normal + beta - target).square().sum() / 2
    d = transform.backward((gamma * normal + beta - target).detach(), x.detach(), gamma.detach(), EPS)
    truth = dict(zip(("variance", "mean", "x"), grad(loss, (variance, mean, x), retain_graph=True), strict=True))
    gap = {key: relative_gap(d[key], truth[key]) for key in truth}
    yield check("S1", gap["variance"] < 1e-13, f"error {gap['variance']:.0e}", error=gap["variance"])

    second = float(d["mean_2"].abs().max() / d["mean_1"].abs().max())
    said = f"error {gap['mean']:.0e}, second term {second:.0e} of the first"
    yield check("S2", gap["mean"] < 1e-13 and second < 1e-14, said, error=gap["mean"], second=second)

    invstd = (variance.detach() + EPS).rsqrt()
    short = relative(d["normal"] * invstd, truth["x"])
    said = f"error {gap['x']:.0e}; without the moments' derivatives {short:.0%} off"
    yield check("S3", gap["x"] < 1e-13 and short > 0.5, said, error=gap["x"], shortcut=short)

    without = relative_gap(d["x"] - d["mean_2"] / len(x), truth["x"])
    said = f"second term {second:.0e}; without it ∂ℓ/∂x still right to {without:.0e}"
    yield check("G4", second < 1e-14 and without < 1e-13, said, second=second, without=without)

    approximate = relative((d["normal"] / gamma * invstd).detach(), truth["x"])
    yield refute("G23", approximate > 0.5, f"{approximate:.0%} off; exact: (γ/s) M ∂L/∂y", error=approximate)

    bn = nn.BatchNorm1d(5, eps=EPS)
    bn.load_state_dict({"weight": gamma, "bias": beta}, strict=False)
    loss = (bn(x) - target).square().sum() / 2
    torchs = dict(zip(("x", "gamma", "beta"), grad(loss, (x, bn.weight, bn.bias)), strict=True))
    errors = {key: relative_gap(d[key], t) for key, t in torchs.items()}
    yield check("W2", max(errors.values()) < 1e-12, f"error {max(errors.values()):.0e} (x, γ, β)", errors=errors)


def moments_move() -> Iterator[Row]:
    """S4: moments are functions of the parameters; S6, S7, S8: why their derivatives matter."""
    X, _ = digits(16)
    net = mlp([64, 6, 10]).train()
    y = net[0](X)
    moved = [float(grad(m.sum(), net[0].weight, retain_graph=True)[0].norm()) for m in transform.moments(y)]
    still = net[1].eval().running_mean.requires_grad  # a buffer: no derivative at all
    said = f"train mode: ‖∂μ/∂W‖ = {moved[0]:.2g}, ‖∂σ²/∂W‖ = {moved[1]:.2g}; eval mode: constants, derivative 0"
    yield refute("S4", min(moved) > 0 and not still, said, mean=moved[0], variance=moved[1])

    x = torch.tensor([0.3, 1.1], requires_grad=True)
    mean = x.mean()
    gradient_m, gradient_x = grad((x - mean).sum(), (mean, x))
    said = f"dL/dm = {gradient_m:g}, dL/dx = ({gradient_x[0]:g}, {gradient_x[1]:g})"
    yield refute(
        "S6", gradient_m.item() == -2 and bool((gradient_x == 0).all()), said, dm=float(gradient_m), dx=gradient_x
    )

    worst = {}
    for m in (2, 8):
        y, weights = torch.randn(m, 1, requires_grad=True), torch.randn(m, 1)
        z, normal = transform.transform(y, torch.ones(1), torch.zeros(1), 0.0)
        d, normal = grad((weights * z**3).sum(), y)[0], normal.detach()
        scale = float(weights.norm() / y.detach().std())
        worst[m] = max(abs(float(d.sum())), abs(float((normal * d).sum())), float(d.norm()) if m == 2 else 0) / scale
    said = f"<1, g>, <ŷ, g> {worst[8]:.0e}; two samples: g = {worst[2]:.0e}"
    yield check("S7", max(worst.values()) < 1e-13, said, many=worst[8], two=worst[2])

    u, target, ends = torch.randn(32), 1 + torch.randn(32), {}
    for kind in ("held constant", "through the mean"):
        b = torch.zeros((), requires_grad=True)
        losses = []
        for _ in range(200):
            v = u + b
            mean = v.mean().detach() if kind == "held constant" else v.mean()
            loss = (v - mean - target).square().mean() / 2
            losses.append(loss.item())
            with torch.no_grad():
                b -= 0.1 * grad(loss, b)[0]
        ends[kind] = (abs(b.item()), abs(losses[-1] - losses[0]))
    (b, change), (kept, _) = ends.values()
    said = f"held constant: |b| = {b:.1f}, loss change {change:.0e}; through the mean: |b| = {kept:.0e}"
    yield check("S8", b > 10 and change < 1e-12 and kept < 1e-12, said, detached=b, change=change, through=kept)


# --- the map and its second derivative ------------------------------------------------------------


def closed_forms() -> Iterator[Row]:
    """S5, W12, W13: Jacobian, gradient norm and Hessian of one channel of m = 12 entries, for three values of ε."""
    m, gamma = 12, 1.3
    y, target, A = torch.randn(m), torch.randn(m), torch.randn(m, m) / m
    loss = lambda z: ((z - target) ** 4).sum() / 4 + z @ (A + A.T) @ z / 2  # noqa: E731
    jacobians, norms, hessians, plain = {}, {}, {}, {}
    for eps in (0.0, EPS, 0.5):
        bn = lambda y, eps=eps: transform.transform(y[:, None], torch.tensor([gamma]), torch.zeros(1), eps)[0][:, 0]  # noqa: E731
        jacobians[eps] = relative(transform.jacobian(y, gamma, eps), jacobian(bn, y))
        z = bn(y)
        g, H = jacobian(loss, z), hessian(loss, z)
        gradient, curvature = jacobian(lambda y, f=bn: loss(f(y)), y), hessian(lambda y, f=bn: loss(f(y)), y)
        M, normal, s = transform.projector(y, eps)
        sigma2 = float(s**2) - eps
        rho = sigma2 / float(s**2)
        left = float(gradient @ gradient)
        parts = float(g @ g - g.sum() ** 2 / m), float((normal @ g) ** 2 / m)
        norms[eps] = abs(left / (gamma**2 / float(s**2) * (parts[0] - (2 - rho) * parts[1])) - 1)
        plain[eps] = gamma**2 / sigma2 * (parts[0] - parts[1]) / left
        hessians[eps] = relative(transform.hessian(y, gamma, eps, g, H), curvature)
        if eps == 0:
            right = gamma**2 / sigma2 * gradient @ H @ gradient - gamma / (m * sigma2) * (normal @ g) * left
            form = abs(float(gradient @ curvature @ gradient / right) - 1)
    yield check("S5", max(jacobians.values()) < 1e-14, f"error {max(jacobians.values()):.0e}", errors=jacobians)
    holds = norms[0.0] < 1e-12 and max(norms.values()) < 1e-12 and abs(plain[0.0] - 1) < 1e-12 and plain[0.5] > 1
    said = f"error {max(norms.values()):.0e} (ε = 0, 1e-5, .5); printed bound ÷ truth {plain[0.5]:.3f} at ε = .5"
    yield check("W12", holds, said, errors=norms, printed=plain)
    said = f"quadratic form {form:.0e} at ε = 0; whole Hessian {max(hessians.values()):.0e} (ε = 0, 1e-5, .5)"
    yield check("W13", form < 1e-12 and max(hessians.values()) < 1e-12, said, form=form, hessian=hessians)


def transforms() -> Iterator[Row]:
    """W1, W6, G2: the forward transform, its invariance to scale, its place."""
    errors, rho_errors = [], []
    for shape, layer in (((9, 5), nn.BatchNorm1d(5)), ((4, 5, 3, 3), nn.BatchNorm2d(5))):
        x = 0.1 * torch.randn(shape) + 1
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        z, normal = transform.transform(x, layer.weight, layer.bias, layer.eps)
        errors.append(relative(z, layer(x)))
        variance = transform.moments(x)[1]
        square = normal.square().transpose(0, 1).flatten(1).mean(1)
        rho_errors.append(relative_gap(square, variance / (variance + layer.eps)))
    holds = max(errors + rho_errors) < 1e-12
    yield check("W1", holds, f"error {max(errors):.0e} (1d, 2d); mean(x̂²) = ρ to {max(rho_errors):.0e}", errors=errors)

    X, W, direction = digits(16)[0], torch.randn(6, 64), torch.randn(16, 6)
    gaps: dict[tuple[float, float], float] = {}
    for eps in (0.0, EPS):
        ones, zeros = torch.ones(6), torch.zeros(6)

        def value_and_slopes(a: float, eps: float = eps, ones: Tensor = ones, zeros: Tensor = zeros) -> list[Tensor]:
            scaled, u = (a * W).requires_grad_(), X.clone().requires_grad_()
            z = transform.transform(u @ scaled.T, ones, zeros, eps)[0]
            by_u, by_W = grad((z * direction).sum(), (u, scaled))
            return [z.detach(), by_u, a * by_W]

        for a in (0.1, 10.0):
            pairs = zip(value_and_slopes(a), value_and_slopes(1.0), strict=True)
            gaps[eps, a] = max(relative(b, c) for b, c in pairs)
    said = f"ε = 0: {max(gaps[0.0, 0.1], gaps[0.0, 10.0]):.0e}; ε = 1e-5: {gaps[EPS, 0.1]:.0e} (a = .1), "
    exact = max(gaps[0.0, 0.1], gaps[0.0, 10.0])
    said += f"{gaps[EPS, 10.0]:.0e} (a = 10)"
    numbers = {f"eps {eps:g}, a {a:g}": gap for (eps, a), gap in gaps.items()}
    yield check("W6", exact < 1e-12 and gaps[EPS, 0.1] > 1e-7, said, **numbers)

    X = digits(256)[0]
    pre = nn.Linear(64, 32)(X)
    off = {}
    for place, t in (("before", nn.BatchNorm1d(32)(pre)), ("behind", pre)):
        mean, variance = transform.moments(t)
        off[place] = max(float(mean.abs().max()), float((variance.sqrt() - 1).abs().max()))
    said = f"largest of |mean|, |std - 1| of what enters the activation: {off['before']:.0e} with BatchNorm before it, "
    said += f"{off['behind']:.2f} with BatchNorm behind it"
    yield refute("G2", off["before"] < 1e-3 and off["behind"] > 0.1, said, **off)


# --- the picture ----------------------------------------------------------------------------------


def picture(rows: dict[str, Row]) -> figures.Figure:
    """Rounding errors of what is exact, and errors of the shortcuts."""
    exact = {
        "∂ℓ/∂σ² (S1)": rows["S1"].numbers["error"],
        "∂ℓ/∂μ (S2)": rows["S2"].numbers["error"],
        "∂ℓ/∂x (S3)": rows["S3"].numbers["error"],
        "Jacobian (γ/s) M (S5)": max(rows["S5"].numbers["errors"].values()),
        "gradient norm, any ε (W12)": max(rows["W12"].numbers["errors"].values()),
        "Hessian, any ε (W13)": max(rows["W13"].numbers["hessian"].values()),
        "scale invariance, ε = 0 (W6)": max(v for k, v in rows["W6"].numbers.items() if k.startswith("eps 0")),
    }
    wrong = {
        "scale invariance, ε = 1e-5, a = .1 (W6)": rows["W6"].numbers["eps 1e-05, a 0.1"],
        "gradient bound as printed, ε = .5 (W12)": abs(rows["W12"].numbers["printed"][0.5] - 1),
        "moments held constant (S3)": rows["S3"].numbers["shortcut"],
        "∂L/∂x ≈ (∂L/∂y)/σ (G23)": rows["G23"].numbers["error"],
    }
    figure, ax = figures.panels(size=(9, 5))
    for points, color, marker, label in (
        (exact, figures.BLUE, "o", "exact formulas"),
        (wrong, figures.ORANGE, "s", "shortcuts and slips"),
    ):
        ax.scatter(
            [max(v, 1e-17) for v in points.values()], list(points), color=color, marker=marker, s=45, label=label
        )
    ax.axvspan(1e-17, 1e-13, color=figures.GREY, alpha=0.12, label="rounding in float64")
    ax.set(xscale="log", xlim=(1e-17, 10), xlabel="relative error", title="BatchNorm's formulas against autograd")
    ax.invert_yaxis()
    ax.legend(loc="center left", bbox_to_anchor=(0.45, 0.72))
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows; the whole takes a second or two."""
    run.expect(5)
    rows: list[Row] = []
    for part in (moments_rows, moments_move, closed_forms, transforms):
        rows += part()
        run.tick()
    run.save(picture({row.id: row for row in rows}), "Blue: right to rounding. Orange: what shortcuts cost.")
    run.tick()
    yield from rows


if __name__ == "__main__":
    sys.exit(main(experiment))
