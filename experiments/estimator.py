"""The GGN diagonal in few passes: loud directions exact, the quiet rest random, beside draws alone and curvlinops.

    python experiments/estimator.py [--batch-size 64] [--epochs 10] [--repeats 20] [--large] [--seed 0] [--device D]
    python experiments/estimator.py --resnet18      # ResNet-18 at 32x32, N = 128, rtol = 0.05: minutes

Three tables: the error that so many passes leave; the passes and seconds that an error takes; how often limits hold.
Errors are relative, ‖estimate - exact‖ / ‖exact‖, root mean square over the parameter tensors; "met" counts repeats in
which every tensor's diagonal and trace are within rtol. ``--large``: a network with K and R in the thousands (minutes).
Exit status 1 if a goal is missed in more than 5 % of the repeats, or limits hold in less than 93 or more than 97 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lib import figures
from lib.estimates import (
    BUILDERS,
    CE,
    Case,
    Diagonal,
    alive,
    cases,
    curvlinops_diagonal,
    estimate,
    mean,
    rms,
    timed,
    worst,
)
from lib.networks import resnet
from lib.resnet import SmallResNet
from tqdm import tqdm

from bncurv import DiagGGNMC, curvature

BUDGETS = 60, 100, 200
GOALS = 0.1, 0.03, 0.01
FEW = 3  # repeats of the others, whose error is known by theory


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--large", action="store_true", help="K = 2304, R = 1728 instead")
    parser.add_argument("--resnet18", action="store_true", help="ResNet-18 on 32x32 images instead: time beside exact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, help="where to save a plot of error against passes")
    return parser.parse_args()


def budgets(found: list[Case], repeats: int, bar: tqdm) -> dict[str, dict[str, list[float]]]:
    """Error by case, by way, at each budget."""
    ways: dict[str, Callable[[Case, int], Diagonal | None]] = {
        "deflated": lambda case, B: estimate(case, DiagGGNMC(passes=B))[1].diag_ggn_mc,
        "draws alone": lambda case, B: estimate(case, DiagGGNMC(B))[1].diag_ggn_mc,
        "curvlinops Hutchinson": lambda case, B: curvlinops_diagonal(case, B, "hutchinson_diag"),
        "curvlinops XDiag": lambda case, B: curvlinops_diagonal(case, B, "xdiag"),
    }
    table: dict[str, dict[str, list[float]]] = {}
    for case in found:
        for way, call in ways.items():
            for B in BUDGETS:
                got = []
                for _ in range(min(repeats, 10) if way == "deflated" else FEW):
                    got.append(call(case, B))
                    bar.update()
                known = [rms(g, case.exact) for g in got if g is not None]
                if known:
                    table.setdefault(case.name, {}).setdefault(way, []).append(mean(known))
    return table


def goals(case: Case, repeats: int, bar: tqdm) -> tuple[list[str], bool]:
    """A row for each goal; whether it was met in 95 of 100."""
    rows, good = [], True
    draws = 200
    alone = worst(estimate(case, DiagGGNMC(draws))[1].diag_ggn_mc, case.exact)
    for rtol in GOALS:
        done = []
        for _ in range(repeats):
            done.append(estimate(case, DiagGGNMC(rtol=rtol)))
            bar.update()
        met = sum(worst(res.diag_ggn_mc, case.exact) <= rtol for _, res in done)
        passes = sorted(res.passes for _, res in done)[repeats // 2]
        seconds = sorted(s for s, _ in done)[repeats // 2]
        plain = round(draws * (alone / rtol) ** 2)
        rows.append(
            f"| {case.name} | {rtol:g} | {passes} | {seconds:.2f} s | {met}/{repeats} | {plain} | "
            f"{case.passes}, {case.seconds:.2f} s |"
        )
        good &= met >= 0.95 * repeats
    return rows, good


def coverage(case: Case, repeats: int, bar: tqdm) -> tuple[float, float]:
    """How often a limit of 95 % holds an entry: χ² after deflation; ± 1.96 standard errors of draws alone."""
    inside, plain = [], []
    for _ in range(repeats):
        res = estimate(case, DiagGGNMC(passes=BUDGETS[0]))[1]
        few = estimate(case, DiagGGNMC(12))[1]
        for n in alive(case.exact):
            want, low, high = case.exact[n], res.diag_ggn_mc_lower[n], res.diag_ggn_mc_upper[n]
            counts = want > 1e-6 * want.max()  # not of dead pixels
            inside.append(((low <= want) & (want <= high))[counts].double())
            off = (few.diag_ggn_mc[n] - want).abs()
            plain.append((off <= 1.96 * few.diag_ggn_mc_stderr[n])[counts].double())
        bar.update()
    return float(torch.cat(inside).mean()), float(torch.cat(plain).mean())


def show(table: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Error against passes, by way, for the first case."""
    name, ways = next(iter(table.items()))
    colours = dict(zip(ways, (figures.BLUE, figures.ORANGE, figures.GREY, figures.GREEN), strict=False))
    with figures.style():
        figure, axes = figures.panels()
        for way, values in ways.items():
            axes.loglog(BUDGETS, [100 * v for v in values], "o-", color=colours[way], label=way)
        axes.set(xlabel="backward passes", ylabel="error of the diagonal [%]", title=name, xticks=BUDGETS)
        axes.set_xticklabels([str(B) for B in BUDGETS])
        axes.minorticks_off()
        axes.legend()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def resnet18(args: argparse.Namespace, steps: int = 25, columns: int = 8, rtol: float = 0.05) -> int:
    """A ResNet-18 that has learnt 128 random images: seconds to an error, beside those of the plain passes."""
    torch.manual_seed(args.seed)
    model, count = resnet(10, (64, 128, 256, 512), 2).to(args.device).train(), 128
    X, y = torch.randn(count, 3, 32, 32, device=args.device), torch.randint(10, (count,), device=args.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in tqdm(range(steps), desc="training", unit="step"):
        loss = CE(model(X), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds, res = timed(partial(curvature, model, CE, (X, y), DiagGGNMC(rtol=rtol), progress=True))
    some, _ = timed(partial(curvature, model, CE, (X, y), DiagGGNMC(columns)))
    K = count * 9
    exact = some / columns * K
    print(f"ResNet-18, N = {count}, loss {float(loss.detach()):.1e}, rtol = {rtol}")
    print(f"sampled ({res.method}): {res.passes} passes, {seconds:.0f} s")
    print(f"exact: {K} passes, {exact:.0f} s from {columns} of them; {exact / seconds:.1f} times as long")
    return int(seconds > exact / 5)


def main() -> int:
    """Measure, print Markdown."""
    args = parse()
    if args.resnet18:
        return resnet18(args)
    networks = {"ResNet, 96 channels": partial(SmallResNet, 96)} if args.large else BUILDERS
    found = list(cases(networks, 256 if args.large else args.batch_size, args.epochs, args.seed, args.device))
    calls = len(BUDGETS) * (min(args.repeats, 10) + 3 * FEW) + len(GOALS) * args.repeats + 2 * args.repeats
    bar = tqdm(total=len(found) * calls, desc="estimates", unit="call")
    table = budgets(found, args.repeats, bar)
    print("| error in % at | " + " | ".join(f"{B} passes" for B in BUDGETS) + " |")
    print("|---|" + "---|" * len(BUDGETS))
    for name, ways in table.items():
        for way, values in ways.items():
            print(f"| {name}: {way} | " + " | ".join(f"{100 * v:.2g}" for v in values) + " |")
    print("\n| network | rtol | passes | seconds | met | draws alone: passes | exact: passes, seconds |")
    print("|---|---|---|---|---|---|---|")
    reached = [goals(case, args.repeats, bar) for case in found]
    for rows, _ in reached:
        print("\n".join(rows))
    print("\n| network | 95 % limits hold | ± 1.96 standard errors of 12 draws |\n|---|---|---|")
    held = [coverage(case, 2 * args.repeats, bar) for case in found]
    for case, (limits, symmetric) in zip(found, held, strict=True):
        print(f"| {case.name} | {100 * limits:.1f} % | {100 * symmetric:.1f} % |")
    bar.close()
    if args.figure:
        show(table, args.figure)
        print(f"wrote {args.figure}")
    return int(not all(good for _, good in reached) or not all(0.93 <= limits <= 0.97 for limits, _ in held))


if __name__ == "__main__":
    sys.exit(main())
