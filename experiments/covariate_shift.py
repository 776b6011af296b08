"""Internal covariate shift: two measures that disagree about BatchNorm, and training that does not mind.

    python experiments/covariate_shift.py [--quick] [--seed S] [--device D] [--out DIR]

BatchNorm does keep the distributions of layer inputs where they were. It does not keep gradients: they change more by
an update of the layers below than without it, if both start from the same weights (other starts decide the result).
And shift that is put in on purpose does not hurt: noisy BatchNorm moves most and trains nearly as fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from statistics import mean

import torch
from lib import figures
from lib.command import Run, main
from lib.covariate_shift import (
    NoisyBatchNorm,
    gaussian_kl,
    gradient_shift,
    linear_net,
    moment_distance,
    movement,
    preactivations,
)
from lib.statements import Row, check, listed, refute
from lib.systems import Batch, accuracy, digits, mlp, steps_to, train
from torch import Tensor, nn

KINDS = ("bn", "none")


# --- distributions --------------------------------------------------------------------------------


def drift(run: Run, seed: int, kind: str, steps: int) -> dict[str, list[float]]:
    """KL(start ‖ end) and distance of moments of each layer's pre-activations, over training."""
    torch.manual_seed(seed)
    X, y = digits(512, seed, device=run.device)
    net = mlp((64, 32, 32, 32, 10), kind, he=True, device=run.device).train()
    start = preactivations(net, X)
    train(net, (X, y), steps, 0.1)
    pairs = list(zip(start, preactivations(net, X), strict=True))
    run.tick()
    return {"kl": [gaussian_kl(a, b) for a, b in pairs], "moments": [moment_distance(b, a) for a, b in pairs]}


def drift_rows(found: dict[str, list[dict[str, list[float]]]]) -> list[Row]:
    """W7, G19, from all seeds."""
    layers = {kind: [[one["kl"][i] for one in each] for i in range(3)] for kind, each in found.items()}
    smaller = all(max(bn) < min(none) / 5 for bn, none in zip(layers["bn"], layers["none"], strict=True))
    by_layer = {kind: [mean(values) for values in by_layer] for kind, by_layer in layers.items()}
    said = f"KL by layer: BatchNorm {listed(by_layer['bn'], '.2g')}, none {listed(by_layer['none'], '.2g')}"
    said += f" (mean of {len(found['bn'])} networks)"
    rows = [check("W7", smaller, said, kl=layers)]
    overall = {kind: mean(values) for kind, values in by_layer.items()}
    said = f"Gaussian fit, mean of layers: BatchNorm {overall['bn']:.2g}, none {overall['none']:.2g}; not in Ioffe & "
    said += "Szegedy, but a sound measure"
    rows.append(check("G19", overall["bn"] < overall["none"] / 5, said, kl=overall))
    return rows


def quantiles(run: Run, kind: str, steps: int) -> tuple[Tensor, float]:
    """15, 50 and 85 % quantiles of all units of the last of three sigmoid layers, over training; last accuracy."""
    torch.manual_seed(run.seed)
    data = digits(None, run.seed, standardised=True, device=run.device)
    net = mlp((64, 100, 100, 100, 10), kind, nn.Sigmoid, device=run.device).train()
    seen: list[Tensor] = []

    def each(t: int) -> None:
        if t % (steps // 30) == 0:
            seen.append(torch.quantile(preactivations(net, data[0][:500])[-1], torch.tensor([0.15, 0.5, 0.85]), dim=0))

    train(net, data, steps, 0.5, batch_size=60, seed=run.seed, each=each)
    run.tick(2)
    return torch.stack(seen), accuracy(net, data)


def quantile_row(found: dict[str, tuple[Tensor, float]]) -> Row:
    """G11."""
    moves = {kind: float(q[:, 1].std(0).mean()) for kind, (q, _) in found.items()}
    said = "3 × 100 sigmoid units on digits (the paper: MNIST): deviation over time of a unit's median, BatchNorm "
    said += f"{moves['bn']:.3f}, none {moves['none']:.3f}; accuracy {found['bn'][1]:.2f}, {found['none'][1]:.2f}"
    return check("G11", moves["bn"] < 0.3 * moves["none"], said, deviation=moves)


# --- gradients ------------------------------------------------------------------------------------


def shifted(
    run: Run, seed: int, steps: int, lr: float, init: Callable[[Tensor], Tensor]
) -> dict[str, tuple[float, float]]:
    """cos(G, G') and ‖G - G'‖/‖G‖, mean over layers and steps, of 25 linear layers from the same weights."""
    data = digits(256, seed, standardised=True, device=run.device)
    torch.manual_seed(seed)
    sizes = [64, *[32] * 24, 10]
    weights = [init(torch.empty(o, i, device=run.device)) for i, o in zip(sizes, sizes[1:], strict=False)]
    found = {}
    for kind in KINDS:
        net = linear_net(weights, kind == "bn").train()
        pairs = [gradient_shift(net, data, lr) for _ in range(steps)]
        cosines, changes = (torch.stack(values).mean() for values in zip(*pairs, strict=True))
        found[kind] = float(cosines), float(changes)
        run.tick(steps / 5)
    return found


def gradient_rows(found: list[dict[str, tuple[float, float]]], controls: dict[str, dict]) -> list[Row]:
    """W8, W18."""
    cosines, changes = ({kind: [one[kind][i] for one in found] for kind in KINDS} for i in (0, 1))
    lower = all(bn < none for bn, none in zip(cosines["bn"], cosines["none"], strict=True))
    larger = all(bn > none for bn, none in zip(changes["bn"], changes["none"], strict=True))
    said = f"cos(G, G'): BatchNorm {listed(cosines['bn'], '.2f')}, none {listed(cosines['none'], '.2f')}; controls: "
    said += ", ".join(f"{name} {c['bn'][0]:.4f} and {c['none'][0]:.4f}" for name, c in controls.items())
    rows = [check("W8", lower, said, cosines=cosines, controls=controls)]
    said = f"‖G - G'‖/‖G‖: BatchNorm {listed(changes['bn'], '.2f')}, none {listed(changes['none'], '.2f')}; the "
    said += f"cosine says {'the same' if lower == larger else 'otherwise'}"
    rows.append(check("W18", lower and larger, said, changes=changes))
    return rows


def disagreement_row(moments: dict[str, list[dict[str, list[float]]]], by_gradient: Row) -> Row:
    """G20."""
    distance = {kind: mean(mean(one["moments"]) for one in each) for kind, each in moments.items()}
    cosine = {kind: mean(values) for kind, values in by_gradient.numbers["cosines"].items()}
    said = f"L2 of moments: BatchNorm {distance['bn']:.2f}, none {distance['none']:.2f} (less shift); cos(G, G') "
    said += (
        f"{cosine['bn']:.2f}, {cosine['none']:.2f} (more shift), Santurkar's definition; 83 % and 80 % have no source"
    )
    disagree = distance["bn"] < distance["none"] and cosine["bn"] < cosine["none"]
    return refute("G20", disagree, said, moments=distance, cosine=cosine)


# --- shift put in ---------------------------------------------------------------------------------


def deep(kind: str, seed: int, device: torch.device) -> nn.Sequential:
    """Eight hidden layers, He initialisation; ``"noisy"``: with noisy BatchNorms."""
    torch.manual_seed(seed)
    net = mlp([64, *[32] * 8, 10], "none" if kind == "none" else "bn", he=True, device=device).train()
    if kind == "noisy":
        net = nn.Sequential(*(NoisyBatchNorm(m.num_features) if isinstance(m, nn.BatchNorm1d) else m for m in net))
    return net.to(device)


def fewest_steps(kind: str, seed: int, data: Batch, most: int) -> int:
    """Steps to 90 % at the best of a few learning rates."""
    rates = (0.03, 0.1, 0.3) if kind == "none" else (0.3, 1.0)
    device = data[0].device
    return min(steps_to(deep(kind, seed, device), data, 0.9, lr, most=most, seed=seed) for lr in rates)


def noisy_rows(run: Run, seeds: list[int], most: int) -> list[Row]:
    """W9, G12; each kind at its best learning rate. Control: standardised inputs."""
    raw = {seed: digits(None, seed, device=run.device) for seed in seeds}
    steps: dict[str, list[int]] = {}
    control, moves = {}, {}
    for kind in ("bn", "noisy", "none"):
        steps[kind] = [fewest_steps(kind, seed, data, most) for seed, data in raw.items()]
        control[kind] = fewest_steps(kind, run.seed, digits(None, run.seed, standardised=True, device=run.device), most)
        moves[kind] = movement(deep(kind, run.seed, run.device), raw[run.seed], 0.1)
        run.tick(len(seeds) + 1)
    average = {kind: mean(taken) for kind, taken in steps.items()}
    said = "steps to 90 %, best learning rate: " + "; ".join(f"{k} {listed(v, 'd')}" for k, v in steps.items())
    said += "; control, standardised pixels: " + ", ".join(f"{k} {v}" for k, v in control.items())
    holds = average["noisy"] <= 2 * average["bn"] and average["noisy"] < average["none"] / 2
    rows = [check("W9", holds, said, steps=steps, standardised=control)]
    said = (
        "moments move per step by " + ", ".join(f"{k} {v:.2g}" for k, v in moves.items()) + " of their size; steps to "
    )
    said += "90 %: " + ", ".join(f"{k} {v:.0f}" for k, v in average.items()) + ": de-stabilised, and it still trained"
    rows.append(refute("G12", holds and moves["noisy"] > moves["none"], said, movement=moves, steps=average))
    return rows


def picture(
    drifts: dict[str, list[dict[str, list[float]]]],
    paths: dict[str, tuple[Tensor, float]],
    cosines: dict[str, list[float]],
    noisy: Row,
) -> figures.Figure:
    """Two measures that disagree; quantiles over training; movement against speed."""
    figure, axes = figures.panels(2, 2, size=(11, 8))
    first, second, third, fourth = axes.flat
    for kind, each in drifts.items():
        look = figures.look(kind)
        for one in each:
            first.semilogy([1, 2, 3], one["kl"], **look)
            look["label"] = None
        second.plot(range(1, len(cosines[kind]) + 1), cosines[kind], **figures.look(kind, linestyle="", markersize=10))
        colour = figures.LOOK[kind]["color"]
        quantiles = paths[kind][0][:, :, 0].cpu()
        share = torch.linspace(0, 1, len(quantiles))
        third.plot(share, quantiles[:, 1], color=colour, linewidth=2.5, label=figures.LOOK[kind]["label"])
        third.plot(share, quantiles[:, [0, 2]], color=colour, linewidth=1)
    first.set(xlabel="layer", ylabel="KL(start ‖ end)", title="Distributions: BatchNorm shifts less")
    first.set_xticks([1, 2, 3])
    second.set(xlabel="network", ylabel="cos(G, G')", title="Gradients: BatchNorm shifts more", ylim=(0, 1.05))
    second.set_xticks(range(1, len(cosines["bn"]) + 1))
    third.set(xlabel="share of training", ylabel="input of one sigmoid unit", title="Its 15, 50 and 85 % quantiles")
    moves, steps = noisy.numbers["movement"], noisy.numbers["steps"]
    looks = {
        "bn": (figures.BLUE, "BatchNorm"),
        "noisy": (figures.ORANGE, "noisy BatchNorm"),
        "none": (figures.GREY, "no BN"),
    }
    for kind, (colour, label) in looks.items():
        fourth.plot(moves[kind], steps[kind], "o", color=colour, markersize=11, label=label)
    fourth.set(xlabel="movement of the moments per step", ylabel="steps to 90 %", title="Noise moves most, trains fast")
    fourth.set(xlim=(-0.01, 1.2 * max(moves.values())), ylim=(0, 1.15 * max(steps.values())))
    for ax in axes.flat:
        ax.legend(fontsize=9, loc=(0.35, 0.62) if ax is third else "best")
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    seeds, fewer, steps = run.seeds(3), run.seeds(3), 20
    run.expect(2 * len(fewer) + 4 + 2 * (len(seeds) * steps + 2 * 5) / 5 + 3 * (len(fewer) + 1))
    drifts = {kind: [drift(run, seed, kind, 300) for seed in fewer] for kind in KINDS}
    paths = {kind: quantiles(run, kind, run.pick(600, 300)) for kind in KINDS}
    found = [shifted(run, seed, steps, 0.01, nn.init.xavier_normal_) for seed in seeds]
    controls = {
        "lr 0.001": shifted(run, run.seed, 5, 0.001, nn.init.xavier_normal_),
        "orthogonal start, lr 0.001": shifted(run, run.seed, 5, 0.001, nn.init.orthogonal_),
    }
    by_gradient = gradient_rows(found, controls)
    noisy = noisy_rows(run, fewer, run.pick(400, 250))
    run.save(
        picture(drifts, paths, by_gradient[0].numbers["cosines"], noisy[1]),
        "Whether BatchNorm reduces covariate shift depends on what one calls shift; shift put in on purpose does not "
        "keep it from training.",
    )
    yield from [
        *drift_rows(drifts),
        quantile_row(paths),
        *by_gradient,
        disagreement_row(drifts, by_gradient[0]),
        *noisy,
    ]


if __name__ == "__main__":
    sys.exit(main(experiment))
