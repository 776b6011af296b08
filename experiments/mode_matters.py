"""Does BatchNorm flatten or sharpen? It depends on the mode one measures in.

    python experiments/mode_matters.py [--quick] [--seed S] [--device D] [--out DIR]

Widely used Hessian tools put the model into eval mode by themselves, and conclusions were drawn with them: BatchNorm
does not smooth shallow residual networks (Yao et al. 2020). Here λ_max and trace of the GGN over training, for residual
networks of two depths with and without BatchNorm, He initialisation for both, in every mode. float32.

At three blocks the network without BatchNorm does not learn for every seed (the row prints accuracies). Where it stays
at chance its λ_max may be below all others and the order breaks: with --seed 3 it holds in five of six runs, and X17
fails.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from statistics import geometric_mean

import torch
from lib import figures
from lib.command import Run, main
from lib.statements import Row, check
from lib.systems import Batch, accuracy, digits, evaluated, ggn, he_init, modes, residual_net, train
from torch import nn

import bncurv

CE = nn.CrossEntropyLoss()
Found = dict[str, dict[str, float]]


def measured(model: nn.Module, batch: Batch) -> dict[str, float]:
    """λ_max and trace of the GGN."""
    diagonal = bncurv.curvature(model, CE, batch, bncurv.DiagGGNExact()).diag_ggn_exact
    return {
        "largest": float(ggn(model, batch, top=1).eigenvalues[0]),
        "trace": sum(float(t.sum()) for t in diagonal.values()),
    }


def path(run: Run, blocks: int, seed: int, stops: list[int], n: int = 96) -> dict[int, Found]:
    """``{step: {mode: figures}}``; both networks see the same batches."""
    torch.manual_seed(seed)
    data = digits(seed=seed, device=run.device)
    batch = data[0][:n], data[1][:n]
    nets = {kind: he_init(residual_net(blocks, 8, kind, run.device)).train() for kind in ("bn", "none")}
    found: dict[int, Found] = {}
    for start, stop in itertools.pairwise([0, *stops]):
        for net in nets.values():
            train(net, data, stop - start, 0.05, batch_size=n, momentum=0.9, seed=seed + start)
        kinds = modes(nets["bn"], batch[0]) | {"none": nets["none"]}
        found[stop] = {mode: measured(model, batch) for mode, model in kinds.items()}
        found[stop]["accuracy"] = {kind: accuracy(evaluated(net), data) for kind, net in nets.items()}
        run.tick(blocks + 1)
    return found


def row(paths: dict[int, list[dict[int, Found]]], end: int) -> Row:
    """X17, and how often each order holds at the end."""
    final = [one[end] for found in paths.values() for one in found]
    full = sum(f["eval"]["largest"] > f["none"]["largest"] > f["train"]["largest"] for f in final)
    by_trace = sum(f["eval"]["trace"] > f["none"]["trace"] > f["train"]["trace"] for f in final)
    said = []
    for blocks, found in paths.items():
        largest = {mode: [f"{one[end][mode]['largest']:.3g}" for one in found] for mode in figures.MODES}
        values = "; ".join(f"{mode} {', '.join(each)}" for mode, each in largest.items())
        right = {kind: ", ".join(f"{one[end]['accuracy'][kind]:.0%}" for one in found) for kind in ("bn", "none")}
        said.append(f"{blocks} blocks, λ_max at step {end}: {values} (right: BN {right['bn']}; none {right['none']})")
    said.append(f"order eval > none > train in {full} of {len(final)} (λ_max), {by_trace} (trace)")
    return check("X17", full == len(final), "; ".join(said), paths=paths)


def picture(paths: dict[int, list[dict[int, Found]]], stops: list[int]) -> figures.Figure:
    """λ_max over training by mode, one panel per depth."""
    figure, axes = figures.panels(len(paths), size=(5.8 * len(paths), 4.6))
    for ax, (blocks, found) in zip(axes, paths.items(), strict=True):
        for mode in figures.MODES:
            values = [[one[step][mode]["largest"] for one in found] for step in stops]
            look = figures.look(mode)
            ax.semilogy(range(len(stops)), [geometric_mean(v) for v in values], **look)
            ax.fill_between(
                range(len(stops)), [min(v) for v in values], [max(v) for v in values], color=look["color"], alpha=0.15
            )
        ax.set_xticks(range(len(stops)), [str(step) for step in stops])
        ax.set(xlabel="training step", ylabel="largest eigenvalue of the GGN", title=f"residual blocks: {blocks}")
    axes[0].legend(fontsize=9)
    return figure


def experiment(run: Run) -> Iterator[Row]:
    """The one row."""
    torch.set_default_dtype(torch.float32)
    stops, seeds = run.pick([0, 40, 120, 400], [0, 400]), run.seeds(3)
    depths = (1, 3)
    run.expect(len(seeds) * len(stops) * sum(blocks + 1 for blocks in depths))
    paths = {blocks: [path(run, blocks, seed, stops) for seed in seeds] for blocks in depths}
    run.save(
        picture(paths, stops),
        "At the end BatchNorm is flatter than none in the mode in which it trains (blue), and many times sharper in "
        "eval mode (green). Before, the network without BatchNorm has hardly learned; at three blocks perhaps never. "
        f"Lines: mean of {len(seeds)} seeds; bands: their range.",
    )
    yield row(paths, stops[-1])


if __name__ == "__main__":
    sys.exit(main(experiment))
