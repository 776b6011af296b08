"""Does BatchNorm smooth the landscape? The bounds, exactly; the loss along the gradient; learning rates and steps.

    python experiments/smoothness.py [--quick] [--seed S] [--device D] [--out DIR]

Eight hidden layers on digits, He initialisation for both, raw pixels. Control: standardised pixels, where the network
without BatchNorm does better and the advantage shrinks to less than half.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from statistics import mean

import torch
from lib import figures, transform
from lib.command import Run, main
from lib.smoothness import along_gradient, gradient_bound, isometry, nearest_rescaling, printed_weight_bound
from lib.statements import Row, check, listed, refute
from lib.systems import TINY, Batch, digits, mlp, steps_to, train
from torch import Tensor, nn

KINDS = ("none", "bn")
MEASURES = {"range": "loss range", "change": "gradient change", "beta": "effective β"}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

# --- bounds ---------------------------------------------------------------------------------------


def channel(loss: Callable[[Tensor], Tensor], y: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """∇_z L and ∇_y L̂ of a loss behind the BatchNorm of one channel ``[m]``, ε = 0."""
    y = y.clone().requires_grad_()
    z = transform.transform(y[:, None], torch.tensor([gamma]), torch.tensor([0.3]), TINY)[0][:, 0]
    return torch.autograd.grad(loss(z), (z, y))


def weight_row() -> Row:
    """W14: inputs of one size, y = X w kept; the printed form against a smaller loss."""
    m, d, size, gamma = 12, 20, 3.0, 1.4
    X, y, target = isometry(m, d, size), torch.randn(m), torch.randn(m)
    w = (X.T @ y / size**2).requires_grad_()
    errors, excess = [], {}
    for factor in (1.0, 1e-3):

        def loss(z: Tensor, factor: float = factor) -> Tensor:
            return factor * (z - target).pow(4).sum()

        z = transform.transform((X @ w)[:, None], torch.tensor([gamma]), torch.tensor([0.3]), TINY)[0][:, 0]
        worst = torch.autograd.grad(loss(z), w)[0].square().sum()  # no X of this size makes it larger
        g = channel(loss, y, gamma)[0]
        errors.append(abs(float(worst / (size**2 * gradient_bound(g, y, gamma))) - 1))
        excess[factor] = float(worst / printed_weight_bound(g, y, gamma, size))
    said = f"λ² (γ²/σ²)(‖g‖² - <1, g>²/m - <ŷ, g>²/m) is reached to {max(errors):.0e}; measured ÷ printed bound "
    said += (
        f"{excess[1.0]:.0e}, and with the loss × 0.001 {excess[1e-3]:.0e}: G² scales otherwise than the rest, so the "
    )
    said += "printed form bounds nothing"
    shown = max(errors) < 1e-12 and not math.isclose(excess[1.0], excess[1e-3], rel_tol=0.1)
    return check("W14", shown, said, errors=errors, printed=excess)


def distance_row(count: int) -> Row:
    """W15."""
    errors = []
    while len(errors) < count:
        target, start = torch.randn(2, 20)
        if target @ start > 0:  # the lemma's assumption
            near = (start - nearest_rescaling(target, start)).square().sum()
            bound = (start - target).square().sum() - (target @ target - target @ start) ** 2 / (target @ target)
            errors.append(abs(float(near / bound) - 1))
    said = f"equality to {max(errors):.0e} in {count} random pairs: it is Pythagoras' theorem"
    return check("W15", max(errors) < 1e-12, said, error=max(errors))


def condition_row() -> Row:
    """G17: squared error, whose Hessian is I; behind the BatchNorm its condition number is infinite."""
    m, gamma = 12, 1.4
    y, target = torch.randn(m), torch.randn(m)
    g, below = channel(lambda z: (z - target).square().sum() / 2, y, gamma)
    bound = abs(float(below @ below / gradient_bound(g, y, gamma)) - 1)
    sizes = torch.linalg.eigvalsh(transform.hessian(y, gamma, TINY, g, torch.eye(m))).abs().sort(descending=True).values
    zero = float(sizes[-1] / sizes[0])
    rest = float(sizes[0] / sizes[-2])
    said = (
        f"bound reached to {bound:.0e}; the Hessian I of the squared error, condition 1, becomes singular (λ_min/λ_max "
    )
    said += f"{zero:.0e}), condition {rest:.1f} off its null vector: conditioning does not follow from the bound"
    return refute("G17", bound < 1e-12 and zero < 1e-12 and rest > 1.01, said, bound=bound, rest=rest)


# --- landscape ------------------------------------------------------------------------------------


def landscape(run: Run, seed: int, steps: int, standardised: bool = False) -> dict[str, list[dict[str, float]]]:
    """Every fifth step, for both kinds: range, change, beta at 1/2 to 4 times the learning rate."""
    data = digits(512, seed, standardised=standardised, device=run.device)
    found: dict[str, list[dict[str, float]]] = {}
    for kind in KINDS:
        torch.manual_seed(seed)
        net = mlp([64, *[32] * 8, 10], kind, he=True, device=run.device).train()
        seen = found[kind] = []

        def each(t: int, net: nn.Module = net, seen: list[dict[str, float]] = seen) -> None:
            if t % 5 == 0:
                seen.append(along_gradient(net, data, [0.05, 0.1, 0.2, 0.3, 0.4]))

        train(net, data, steps, 0.1, each=each)
        run.tick(steps / 100)
    return found


def averages(paths: list[dict[str, list[dict[str, float]]]]) -> dict[str, tuple[float, float]]:
    """Means over training and networks, without and with BatchNorm, of each measure."""
    return {key: tuple(mean(one[key] for path in paths for one in path[kind]) for kind in KINDS) for key in MEASURES}  # type: ignore[return-value]


def landscape_rows(
    paths: list[dict[str, list[dict[str, float]]]], control: dict[str, list[dict[str, float]]]
) -> list[Row]:
    """W16, G18."""
    values, plain = averages(paths), averages([control])
    ratios = {key: a / b for key, (a, b) in values.items()}
    apart = {key: a / b for key, (a, b) in plain.items()}
    said = "none against BatchNorm, mean over training: " + ", ".join(
        f"{MEASURES[key]} {a:.3g} and {b:.3g} (÷ {ratios[key]:.2f})" for key, (a, b) in values.items()
    )
    alone = [averages([path])["beta"] for path in paths]
    said += f"; β by network ÷ {listed((a / b for a, b in alone), '.2f')}: it differs little; control, standardised "
    said += f"pixels: ÷ {listed(apart.values(), '.2f')}"
    holds = ratios["range"] > 10 and ratios["change"] > 4 and ratios["beta"] > 1.3
    rows = [check("W16", holds, said, values=values, ratios=ratios, standardised=apart)]
    said = f"loss range ÷ {ratios['range']:.0f}; standardised pixels ÷ {apart['range']:.0f}"
    rows.append(check("G18", ratios["range"] > 10, said, ratio=ratios["range"], standardised=apart["range"]))
    return rows


# --- learning rates, steps ------------------------------------------------------------------------


def final_losses(kind: str, data: Batch, seed: int) -> list[float]:
    """Loss after 60 steps of six hidden layers, for each learning rate."""
    losses = []
    for lr in RATES:
        torch.manual_seed(seed)
        net = mlp([64, *[32] * 6, 10], kind, he=True, device=data[0].device).train()
        train(net, data, 60, lr)
        losses.append(nn.functional.cross_entropy(net(data[0]), data[1]).item())
    return losses


def rate_row(run: Run) -> tuple[dict[str, list[float]], Row]:
    """G14, and the losses."""
    losses, best = {}, {}
    for inputs in ("raw", "standardised"):
        data = digits(512, run.seed, standardised=inputs == "standardised", device=run.device)
        for kind in KINDS:
            values = final_losses(kind, data, run.seed)
            losses[kind, inputs] = values
            best[kind, inputs] = RATES[
                min(range(len(RATES)), key=lambda i: values[i] if values[i] < math.inf else math.inf)
            ]
            run.tick()
    said = f"loss after 60 steps at lr {listed(RATES, 'g')}: BatchNorm {listed(losses['bn', 'raw'], '.2g')}; none "
    said += f"{listed(losses['none', 'raw'], '.2g')}; best {best['bn', 'raw']:g} against {best['none', 'raw']:g} "
    said += f"(standardised pixels {best['bn', 'standardised']:g}, {best['none', 'standardised']:g})"
    shown = {kind: losses[kind, "raw"] for kind in KINDS}
    return shown, check("G14", best["bn", "raw"] >= 3 * best["none", "raw"], said, losses=shown)


def steps_row(run: Run, seeds: list[int], most: int) -> Row:
    """G10."""
    taken: dict[str, dict[str, list[int]]] = {}
    for inputs in ("raw", "standardised"):
        taken[inputs] = {kind: [] for kind in KINDS}
        for seed in seeds:
            data = digits(None, seed, standardised=inputs == "standardised", device=run.device)
            for kind, rates in (("none", (0.03, 0.1, 0.3)), ("bn", (0.3, 1.0))):
                tried = []
                for lr in rates:
                    torch.manual_seed(seed)
                    net = mlp([64, *[32] * 8, 10], kind, he=True, device=run.device).train()
                    tried.append(steps_to(net, data, 0.9, lr, most=most, seed=seed))
                taken[inputs][kind].append(min(tried))
            run.tick()
    ratio = {inputs: mean(by["none"]) / mean(by["bn"]) for inputs, by in taken.items()}
    said = f"steps to 90 %, best learning rate: none {listed(taken['raw']['none'], 'd')}, BatchNorm "
    said += (
        f"{listed(taken['raw']['bn'], 'd')}: ÷ {ratio['raw']:.1f}; standardised pixels ÷ {ratio['standardised']:.1f}; "
    )
    said += "the 14 are ImageNet's"
    return check("G10", ratio["raw"] >= 4, said, steps=taken, ratio=ratio)


def picture(paths: dict[str, list[dict[str, float]]], losses: dict[str, list[float]]) -> figures.Figure:
    """The three measures over training; loss against the learning rate."""
    figure, axes = figures.panels(4, size=(16, 4.3))
    for ax, (key, label) in zip(axes, MEASURES.items(), strict=False):
        for kind, seen in paths.items():
            look = figures.look(kind, markersize=3)
            ax.semilogy(range(0, 5 * len(seen), 5), [one[key] for one in seen], **look)
        ax.set(xlabel="training step", ylabel=label)
    axes[2].set(yscale="linear", ylim=(0, None))
    axes[0].set_title("Loss along -∇L: BatchNorm varies less")
    axes[1].set_title("So does the gradient")
    axes[2].set_title("Smoothness itself differs little")
    for kind, values in losses.items():
        axes[3].loglog(RATES, [v if v < math.inf else math.nan for v in values], **figures.look(kind))
    axes[3].set(xlabel="learning rate", ylabel="loss after 60 steps", title="Larger learning rates are possible")
    for ax in axes:
        ax.legend(fontsize=9)
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    seeds, steps, fewer = run.seeds(4, 2), 150, run.seeds(3, 1)
    run.expect(2 * (len(seeds) + 1) * steps / 100 + 4 + 2 * len(fewer))
    rows = [weight_row(), distance_row(1000), condition_row()]
    paths = [landscape(run, seed, steps) for seed in seeds]
    rows += landscape_rows(paths, landscape(run, run.seed, steps, standardised=True))
    losses, row = rate_row(run)
    rows += [row, steps_row(run, fewer, run.pick(400, 250))]
    run.save(picture(paths[0], losses), "Digits, raw pixels, He initialisation for both. Missing points: not a number.")
    yield from rows


if __name__ == "__main__":
    sys.exit(main(experiment))
