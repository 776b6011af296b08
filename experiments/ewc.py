"""Two tasks, one after the other: elastic weight consolidation with the diagonal of train mode, of eval mode, of none.

    python experiments/ewc.py [--quick] [--seed S] [--device D] [--out DIR] [--write]

Task A: digits. Task B: the same with their pixels permuted. While B is learnt, ½ λ Σ h (θ - θ_A)² holds what A needs,
h the GGN's diagonal at the end of A; beside it h = 1. For each λ both accuracies, with the task's own batch statistics.
"""

from __future__ import annotations

import copy
import sys

import torch
from lib import figures
from lib.command import Run
from lib.gallery import show, table
from lib.systems import Batch, accuracy, digits, estimate_population, evaluated, mlp, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bncurv

LOSS = nn.CrossEntropyLoss()
FACTORS = tuple(10**e for e in (-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5))  # λ
LOOKS = {
    "train-mode diagonal": figures.look("train", label="h in train mode"),
    "eval-mode diagonal": figures.look("eval", label="h in eval mode"),
    "h = mean (no curvature)": {"color": figures.GREY, "marker": "D", "label": "the same h for all weights"},
}


def importances(net: nn.Module, data: Batch) -> dict[str, dict[str, Tensor]]:
    """h by way, each of mean 1 over all parameters, so that λ means the same."""
    loader = DataLoader(TensorDataset(*data), batch_size=128, drop_last=True)
    ways = [
        bncurv.curvature(model, LOSS, loader, bncurv.DiagGGNExact()).diag_ggn_exact for model in (net, evaluated(net))
    ]
    ways.append({name: torch.ones_like(p) for name, p in net.named_parameters()})
    means = [torch.cat([h.flatten() for h in way.values()]).mean() for way in ways]
    scaled = [{name: h / mean for name, h in way.items()} for way, mean in zip(ways, means, strict=True)]
    return dict(zip(LOOKS, scaled, strict=True))


def consolidated(net: nn.Module, data: Batch, h: dict[str, Tensor], factor: float, steps: int, seed: int) -> nn.Module:
    """A copy that has learnt task B, held back by ½ λ Σ h (θ - θ_A)²."""
    new = copy.deepcopy(net).train()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer, generator = torch.optim.Adam(new.parameters(), 3e-3), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randperm(len(data[0]), generator=generator)[:128]
        penalty = sum((h[name] * (p - start[name]) ** 2).sum() for name, p in new.named_parameters())
        optimizer.zero_grad()
        (LOSS(new(data[0][batch]), data[1][batch]) + factor / 2 * penalty).backward()
        optimizer.step()
    return new


def both(net: nn.Module, tasks: dict[str, tuple[Batch, Batch]]) -> tuple[float, float]:
    """Test accuracy on A and on B, each with batch statistics of its own training data."""
    found = []
    for data, test in tasks.values():
        copied = copy.deepcopy(net).train()
        estimate_population(copied, data[0])
        found.append(accuracy(copied.eval(), test))
    return found[0], found[1]


def one(run: Run, seed: int) -> tuple[dict[str, list[tuple[float, float]]], tuple[float, float], tuple[float, float]]:
    """Accuracies by way and λ; without a penalty; before task B."""
    torch.manual_seed(seed)
    X, y = digits(seed=seed, standardised=True, device=run.device)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    pairs = {"A": (X, y), "B": (X[:, order], y)}
    tasks = {task: ((x[:1280], y[:1280]), (x[1280:], y[1280:])) for task, (x, y) in pairs.items()}
    net = mlp((64, 64, 64, 10), device=run.device).train()
    train(net, tasks["A"][0], run.pick(300, 20), 0.1, batch_size=128, momentum=0.9, seed=seed)
    steps, found = run.pick(200, 5), {}
    for way, h in importances(net, tasks["A"][0]).items():
        found[way] = []
        for factor in FACTORS:
            found[way].append(both(consolidated(net, tasks["B"][0], h, factor, steps, seed), tasks))
            run.tick()
    free = both(consolidated(net, tasks["B"][0], h, 0.0, steps, seed), tasks)
    return found, free, both(net, tasks)


def picture(mean: dict[str, Tensor], free: Tensor, before: Tensor) -> figures.Figure:
    """Accuracy on B against that on A, λ along each line."""
    figure, ax = figures.panels()
    for way, look in LOOKS.items():
        ax.plot(100 * mean[way][:, 0], 100 * mean[way][:, 1], linewidth=2, **look)
    ax.plot(*(100 * free), "*", color=figures.BLACK, markersize=12)
    ax.annotate("no penalty", tuple(100 * free), (8, -14), textcoords="offset points")
    figures.reference_line(ax, "A before B", x=float(100 * before[0]))
    ax.set(xlabel="test accuracy on task A [%]", ylabel="test accuracy on task B [%]", title="Learning B, keeping A")
    ax.set(xlim=(None, 100.5), ylim=(60, 100) if free[1] > 0.6 else None)
    ax.legend(loc="lower left")
    return figure


def application(run: Run) -> str:
    """The best mean of both accuracies, by way."""
    seeds = run.seeds(3)
    run.expect(len(seeds) * len(LOOKS) * len(FACTORS))
    found = [one(run, seed) for seed in seeds]
    each = {way: torch.tensor([f[0][way] for f in found]) for way in LOOKS}  # [seed, λ, task]
    free, before = (torch.tensor([f[i] for f in found]).mean(0) for i in (1, 2))
    run.save(
        picture({way: values.mean(0) for way, values in each.items()}, free, before),
        f"Up and right is better; along each line the penalty grows from left to right. Mean of {len(seeds)} networks.",
    )
    rows = [["no penalty", "-", *(f"{100 * a:.1f}" for a in free), f"{100 * free.mean():.1f}"]]
    for way, values in each.items():
        best = int(values.mean((0, 2)).argmax())
        a, b = values.mean(0)[best]
        spread = values.mean(2)[:, best].std(correction=0)
        rows.append([way, f"{FACTORS[best]:.1g}", f"{100 * a:.1f}", f"{100 * b:.1f}",
                     f"{100 * values.mean(2).mean(0)[best]:.1f} ± {100 * spread:.1f}"])  # fmt: skip
    return table(["penalty", "best λ", "accuracy on A [%]", "on B [%]", "mean [%]"], rows)


if __name__ == "__main__":
    sys.exit(show(application))
