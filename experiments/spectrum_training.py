"""The whole GGN spectrum over training: with batch statistics, with them frozen, in eval mode, without BatchNorm.

    python experiments/spectrum_training.py [--quick] [--seed S] [--device D] [--out DIR]

One BatchNorm network has three curvatures. The one it trains in is several times flatter than the other two, and only
there the gradient does not hide in the leading eigenspace. (Late in training the eval-mode matrix may fall below: the
running statistics make another function, of lower loss.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import mean

import torch
from lib import figures
from lib.command import Run, main
from lib.resnet import SmallResNet
from lib.statements import Row, check, untestable
from lib.systems import Batch, digits, estimate_population, ggn, mlp, modes, participation, train
from torch import nn

import bncurv

WIDTHS = (64, 32, 32, 32, 10)
CE = nn.CrossEntropyLoss()


def described(model: nn.Module, data: Batch, top: int | None) -> dict[str, object]:
    """Eigenvalues (all, or the leading ones), and the gradient's share in the nine leading directions."""
    G = ggn(model, data, top=top)
    e, gradient = G.eigenvalues, G.gradient
    inside = G.unit_vectors(9).T @ gradient
    return {
        "eigenvalues": e.cpu(),
        "largest": float(e[0]),
        "ratio": float(e[0] / e[9]),
        "spread": participation(e),
        "share": float(inside.square().sum() / gradient.square().sum()),
    }


def trajectory(
    run: Run, seed: int, stops: list[int], n: int, top: int | None
) -> dict[int, dict[str, dict[str, object]]]:
    """``{step: {mode: description}}`` of one seed; both networks see the same batches."""
    torch.manual_seed(seed)
    X, y = digits(seed=seed, device=run.device)
    nets = {kind: mlp(WIDTHS, kind, device=run.device).train() for kind in ("bn", "none")}
    estimate_population(nets["bn"], X)
    found = {}
    for start, stop in zip([0, *stops], stops, strict=False):
        for net in nets.values():
            train(net, (X, y), stop - start, 0.1, batch_size=128, seed=seed + start)
        batch = X[:n], y[:n]
        kinds = modes(nets["bn"], batch[0]) | {"none": nets["none"]}
        found[stop] = {kind: described(net, batch, top) for kind, net in kinds.items()}
        run.tick()
    return found


def spectrum_rows(paths: dict[int, dict], n: int, stops: list[int]) -> Iterator[Row]:
    """X1, W17, from all seeds."""

    def values(step: int, mode: str, key: str) -> list[float]:
        return [path[step][mode][key] for path in paths.values()]

    def quotient(step: int, over: str, under: str, key: str = "largest") -> float:
        pairs = zip(values(step, over, key), values(step, under, key), strict=True)
        return min(a / b for a, b in pairs)

    flatter = min(quotient(step, mode, "train") for step in (0, 20) for mode in ("eval", "frozen"))
    eval_flatter = min(quotient(step, "eval", "train") for step in (0, 20))
    sharper = quotient(0, "none", "train", "ratio")
    train_share, eval_share = (values(20, mode, "share") for mode in ("train", "eval"))
    largest = {step: {mode: mean(values(step, mode, "largest")) for mode in figures.MODES} for step in stops}
    said = "; ".join(
        f"step {step}: λ_max " + ", ".join(f"{mode} {value:.2g}" for mode, value in by_mode.items())
        for step, by_mode in largest.items()
    )
    said += f" (mean of {len(paths)} seeds); eval ÷ train ≥ {eval_flatter:.1f} up to step 20; λ_1/λ_10 none ÷ train ≥ "
    said += (
        f"{sharper:.0f}; gradient's share at step 20: train {mean(train_share):.2f} (≤ {max(train_share):.2f}), eval "
    )
    said += f"{mean(eval_share):.2f} (≥ {min(eval_share):.2f})"
    holds = flatter > 5 and sharper > 5 and mean(train_share) < 0.35 and mean(eval_share) > 0.7
    yield check("X1", holds, said, largest=largest, shares={"train": train_share, "eval": eval_share})

    first = next(iter(paths.values()))[0]
    complete = all(len(first[mode]["eigenvalues"]) == n * 9 for mode in figures.MODES)
    by_largest, by_spread = (first["train"][key] / first["none"][key] for key in ("largest", "spread"))
    by_ratio = first["none"]["ratio"] / first["train"]["ratio"]
    said = f"{n * 9} eigenvalues each; at initialisation BatchNorm ÷ none: λ_max {by_largest:.1f}, λ_1/λ_10 "
    said += f"{1 / by_ratio:.3f}, participation ratio {by_spread:.0f}"
    holds = complete and by_largest > 1 and by_ratio > 1 and by_spread > 1
    yield check("W17", holds, said, largest=by_largest, ratio=1 / by_ratio, spread=by_spread)


def batch_size_row(run: Run, sizes: list[int], repeats: int) -> Row:
    """X12: λ_max at initialisation against the batch size, mean over disjoint batches."""
    torch.manual_seed(run.seed)
    X, y = digits(seed=run.seed, device=run.device)
    largest: dict[str, dict[int, float]] = {}
    for kind in ("bn", "none"):
        net = mlp((64, 32, 32, 10), kind, device=run.device).train()
        largest[kind] = {}
        for n in sizes:
            batches = zip(X.split(n)[:repeats], y.split(n)[:repeats], strict=True)
            largest[kind][n] = mean(float(ggn(net, batch, top=1).eigenvalues[0]) for batch in batches)
        run.tick()
    falls = {kind: found[sizes[0]] / found[sizes[-1]] for kind, found in largest.items()}
    said = "; ".join(f"{kind}: " + ", ".join(f"{v:.3g}" for v in found.values()) for kind, found in largest.items())
    said += f" at N = {sizes}; first ÷ last {falls['bn']:.2f} (BatchNorm), {falls['none']:.2f} (none)"
    return check("X12", falls["bn"] > 1.5 and abs(falls["none"] - 1) < 0.2, said, largest=largest)


def cifar_size_row(device: torch.device, n: int = 128, width: int = 16, size: int = 32, draws: int = 40) -> Row:
    """X15: the exact spectrum of a residual network on 32 × 32 images, float32, against the Monte-Carlo trace."""
    X, y = digits(n, device=device)
    images = nn.functional.interpolate(X.view(-1, 1, 8, 8), size=size, mode="bilinear").float()
    net = SmallResNet(width).to(device).float().train()
    top = {mode: ggn(model, (images, y)) for mode, model in modes(net, images).items() if mode != "eval"}
    quantity = bncurv.DiagGGNMC(generator=torch.Generator(device).manual_seed(0))
    diagonals = [bncurv.curvature(net, CE, (images, y), quantity).diag_ggn_mc for _ in range(draws)]
    estimates = torch.tensor([sum(float(t.sum()) for t in diagonal.values()) for diagonal in diagonals])
    trace = float(top["train"].trace)
    z = float((estimates.mean() - trace) / (estimates.std() / draws**0.5))
    largest = {mode: float(G.eigenvalues[0]) for mode, G in top.items()}
    said = f"{device}: N = {n}, D = {top['train'].dim}, rank {top['train'].rank}; λ_max train {largest['train']:.3g}, "
    said += f"frozen {largest['frozen']:.3g}; Monte-Carlo trace z = {z:.1f}"
    return check("X15", abs(z) < 4, said, largest=largest, z=z)


def picture(path: dict[int, dict], paths: dict[int, dict], stops: list[int]) -> figures.Figure:
    """Leading eigenvalues at step 20; λ_max and the gradient's share over training."""
    figure, axes = figures.panels(3, size=(14, 4.5))
    for mode in figures.MODES:
        values = path[20][mode]["eigenvalues"][:60]
        axes[0].semilogy(range(1, len(values) + 1), values, **figures.look(mode, markersize=3))
        for ax, key in ((axes[1], "largest"), (axes[2], "share")):
            by_step = [[p[step][mode][key] for p in paths.values()] for step in stops]
            look = figures.look(mode)
            ax.plot(range(len(stops)), [mean(v) for v in by_step], **look)
            low, high = ([pick(v) for v in by_step] for pick in (min, max))
            ax.fill_between(range(len(stops)), low, high, color=look["color"], alpha=0.15)
    axes[0].set(xlabel="index", ylabel="eigenvalue of the GGN", title="Spectrum at step 20")
    axes[0].legend(fontsize=9)
    axes[1].set(yscale="log", ylabel="largest eigenvalue", title="Sharpness over training")
    axes[2].set(ylim=(0, 1.02), ylabel="share of ‖∇L‖²", title="Gradient in the 9 leading directions")
    for ax in axes[1:]:
        ax.set_xticks(range(len(stops)), [str(s) for s in stops])
        ax.set_xlabel("training step")
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """All rows."""
    stops, n = run.pick([0, 20, 200, 600], [0, 20]), 128
    seeds = run.seeds(3, 3)
    run.expect(len(stops) * len(seeds) + 2)
    paths = {seed: trajectory(run, seed, stops, n, run.pick(None, None if seed == run.seed else 10)) for seed in seeds}
    yield from spectrum_rows(paths, n, stops)
    yield batch_size_row(run, [16, 64, 256], run.pick(6, 3))
    if run.device.type == "cpu":
        yield untestable("X15", "needs a GPU: python experiments/spectrum_training.py --device cuda")
    else:
        yield cifar_size_row(run.device)
    run.save(
        picture(paths[seeds[0]], paths, stops),
        "Train mode (blue) is the flattest of the three matrices of one BatchNorm network while it learns, and early "
        "on its gradient does not lie in the leading eigenspace. Lines: mean of the seeds; bands: their range.",
    )


if __name__ == "__main__":
    sys.exit(main(experiment))
