"""Estimates of the GGN through BatchNorm: what random labels cost and give, and what small batches do to curvature.

    python experiments/mc_diag.py [--quick] [--seed S] [--device D] [--out DIR]

One backward pass of the whole batch with labels drawn for all samples at once is an unbiased estimate of the diagonal,
although samples are coupled: cross terms vanish on average. And with BatchNorm the curvature of a mini-batch is no
unbiased estimate of the whole data's: its batch statistics make another function, more curved, the smaller the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from lib import figures
from lib.command import Run, main
from lib.statements import Row, check
from lib.systems import Batch, digits, mlp, slope, train
from torch import Tensor, nn

import bncurv

CE = nn.CrossEntropyLoss()


def flat(diagonal: dict[str, Tensor]) -> Tensor:
    """All entries of a diagonal ``{name: [*p]}``."""
    return torch.cat([t.flatten() for t in diagonal.values()])


# --- Monte Carlo ----------------------------------------------------------------------------------


def draws(net: nn.Module, data: Batch, quantity: bncurv.DiagGGNMC | bncurv.ComponentDiagGGNMC, count: int) -> Tensor:
    """``[count, D]`` single draws; the quantity's generator makes them differ."""
    rows = []
    for _ in range(count):
        values = getattr(bncurv.curvature(net, CE, data, quantity, method="dense"), quantity.field)
        summed = {name: t.sum(0) for name, t in values.items()} if quantity.per_component else values
        rows.append(flat(summed))
    return torch.stack(rows)


def monte_carlo_row(run: Run, repeats: int) -> Row:
    """X6: N = 64, so that per-component draws cost 64 passes each."""
    torch.manual_seed(run.seed)
    data = digits(64, run.seed, device=run.device)
    net = mlp((64, 32, 32, 10), device=run.device).train()
    exact = flat(bncurv.curvature(net, CE, data, bncurv.DiagGGNExact()).diag_ggn_exact)
    generator = torch.Generator(run.device).manual_seed(run.seed)

    sizes = [1, 4, 16, 64, 200]
    errors: dict[str, dict[int, float]] = {"whole batch": {}, "per component": {}}
    for size in sizes:
        estimates = torch.stack(
            [
                flat(bncurv.curvature(net, CE, data, bncurv.DiagGGNMC(size, "labels", generator)).diag_ggn_mc)
                for _ in range(repeats)
            ]
        )
        errors["whole batch"][size] = rms(estimates, exact)
        run.tick()
    single = draws(net, data, bncurv.ComponentDiagGGNMC(1, "labels", generator), 2 * repeats)
    errors["per component"] = {64 * k: rms(single.unflatten(0, (-1, k)).mean(1), exact) for k in (1, 4)}

    result = bncurv.curvature(net, CE, data, bncurv.DiagGGNMC(2000, "labels", generator))
    where = torch.randperm(len(exact), generator=torch.Generator().manual_seed(run.seed))
    alive = where[exact[where.to(exact.device)].cpu() > exact.mean().cpu() / 100][:20].to(exact.device)
    z = (flat(result.diag_ggn_mc) - exact)[alive] / flat(result.diag_ggn_mc_stderr)[alive]
    run.tick()

    one, many = errors["whole batch"][1], errors["whole batch"][200]
    rate = many / (one / 200**0.5)
    gain = 64 * errors["per component"][64] ** 2 / one**2
    said = f"largest |z| {float(z.abs().max()):.1f} on 20 entries; relative RMSE per draw {one:.2f} (1 pass), per "
    said += (
        f"component {errors['per component'][64]:.2f} (64 passes): {gain:.1f} times less variance per pass; 200 draws "
    )
    said += f"{many:.3f} = draw/√200 · {rate:.2f}"
    accepted = float(z.abs().max()) < 4 and abs(rate - 1) < 0.25 and gain > 3
    return check("X6", accepted, said, errors=errors, z=z)


def rms(estimates: Tensor, exact: Tensor) -> float:
    """Root mean square of ‖estimate - exact‖ / ‖exact‖."""
    return float(((estimates - exact).norm(dim=1) / exact.norm()).square().mean().sqrt())


# --- mini-batches ---------------------------------------------------------------------------------


def trace(net: nn.Module, data: Batch) -> float:
    """tr G of a batch."""
    return float(flat(bncurv.curvature(net, CE, data, bncurv.DiagGGNExact()).diag_ggn_exact).sum())


def batch_bias_row(run: Run, n: int, count: int) -> Row:
    """X11: mean over the batches of shuffled data of tr G_B / tr G - 1, at initialisation and after 200 steps.

    Each shuffle is cut into batches, so that every sample is in one of them and without BatchNorm the mean is that of
    all data exactly; the standard error, from the spread of single batches, is on the safe side.
    """
    sizes, found = [8, 16, 32, 64], {}
    X, y = digits(n, run.seed, device=run.device)
    for norm in ("bn", "none"):
        torch.manual_seed(run.seed)
        net = mlp((64, 24, 10), norm, device=run.device).train()
        for steps in (0, 200):
            train(net, (X, y), steps, 0.1, batch_size=64, seed=run.seed)
            whole, generator = trace(net, (X, y)), torch.Generator().manual_seed(run.seed + 1)
            found[f"{norm}, step {steps}"] = bias = {}
            for size in sizes:
                shuffles = [torch.randperm(n, generator=generator) for _ in range(max(1, count * size // n))]
                batches = [batch for order in shuffles for batch in order.split(size)]
                traces = torch.tensor([trace(net, (X[i], y[i])) for i in batches]) / whole - 1
                bias[size] = float(traces.mean()), float(traces.std() / len(batches) ** 0.5)
                run.tick()
    first = [value for value, _ in found["bn, step 0"].values()]
    power = slope(sizes, first)
    control = max(abs(value) for name in found if name.startswith("none") for value, _ in found[name].values())
    said = "; ".join(
        f"{name}: " + ", ".join(f"{value:+.1%} ± {error:.1%}" for value, error in bias.values())
        for name, bias in found.items()
        if name.startswith("bn")
    )
    said += f" at B = {sizes}; slope {power:.2f} at step 0; without BatchNorm {control:.0e}"
    accepted = -1.5 < power < -0.6 and first[0] > 0.05 and control < 1e-12
    return check("X11", accepted, said, bias=found, slope=power, control=control)


def picture(errors: dict[str, dict[int, float]], bias: dict[str, dict[int, tuple[float, float]]]) -> figures.Figure:
    """Error against cost; bias against batch size."""
    figure, (left, right) = figures.panels(2, size=(11.5, 4.6))
    for (name, points), color, marker in zip(errors.items(), (figures.BLUE, figures.ORANGE), "os", strict=True):
        left.loglog(list(points), list(points.values()), color=color, marker=marker, label=f"{name}: labels drawn")
    passes = [1, 300]
    first = errors["whole batch"][1]
    left.loglog(passes, [first / p**0.5 for p in passes], "--", color=figures.BLACK, linewidth=1, label="1/√passes")
    left.set(xlabel="backward passes of the batch", ylabel="relative error of the diagonal")
    left.set_title("One pass for the whole batch is the better bargain")
    left.legend()
    looks = {
        "bn, step 0": figures.look("train", label="BatchNorm, at initialisation"),
        "bn, step 200": figures.look(
            "train", label="BatchNorm, after 200 steps", linestyle="--", markerfacecolor="white"
        ),
        "none, step 200": figures.look("none", label="no BatchNorm, after 200 steps"),
    }
    for name, look in looks.items():
        values, bars = zip(*bias[name].values(), strict=True)
        bars = None if name.startswith("none") else [200 * b for b in bars]
        right.errorbar(list(bias[name]), [100 * v for v in values], bars, capsize=3, **look)
    right.axhline(0, color=figures.BLACK, linewidth=1)
    right.set(
        xscale="log",
        xlabel="batch size B",
        ylabel="bias of tr G, %",
        title="Small batches look sharper, with BatchNorm",
    )
    right.set_yscale("symlog", linthresh=10)
    right.set_yticks([0, 5, 10, 30, 100, 300], ["0", "5", "10", "30", "100", "300"])
    right.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
    right.minorticks_off()
    right.legend()
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """Both rows."""
    run.expect(6 + 16)
    rows = [monte_carlo_row(run, run.pick(40, 20)), batch_bias_row(run, *run.pick((1792, 224), (704, 88)))]
    run.save(
        picture(rows[0].numbers["errors"], rows[1].numbers["bias"]),
        "Left: for the same number of passes, draws for the whole batch at once are the more exact. Right: mean of "
        "the trace of the GGN over all batches of shuffled data, against all data at once (bars: two standard errors).",
    )
    yield from rows


if __name__ == "__main__":
    sys.exit(main(experiment))
