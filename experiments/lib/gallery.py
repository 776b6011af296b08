"""The command line of the gallery's scripts: what curvature is good for, a picture and a few figures each.

    python experiments/NAME.py [--quick] [--seed S] [--device D] [--out DIR] [--write]

A script defines ``application(run)``, which saves pictures and returns its figures as Markdown, and ends with
``if __name__ == "__main__": sys.exit(show(application))``. ``--write`` puts both where the gallery shows them:
experiments/figures/NAME.png, and the place of the figures in docs/gallery/NAME.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from lib import figures
from lib.command import BAR, Run, options
from lib.defaults import defaults
from lib.pages import ROOT, insert


def show(application: Callable[[Run], str], arguments: list[str] | None = None) -> int:
    """Run a script of the gallery from the command line; returns the exit status."""
    name = Path(inspect.getfile(application)).stem
    doc = inspect.getmodule(application).__doc__ or ""
    parser = options(name, doc.strip().splitlines()[0])
    parser.add_argument("--write", action="store_true", help="picture and figures into the documentation")
    args = parser.parse_args(arguments)
    out = ROOT / "experiments/figures" if args.write else args.out
    run = Run(name, args.quick, args.seed, args.device, out)
    matplotlib.use("Agg")
    with defaults(run.seed), figures.style(), tqdm(desc=name, unit="", bar_format=BAR) as run.bar:
        text = application(run)
    print(f"{text}\nwrote " + ", ".join(str(run.out / plot["file"]) for plot in run.plots))
    if args.write:
        insert(ROOT / f"docs/gallery/{name}.md", name, text)
    return 0


def descent(net: nn.Module, loss_fn: Callable, data: Any, optimizer: Optimizer, steps: int) -> list[float]:
    """Losses on one batch before each step and after the last, ``steps + 1`` numbers."""
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = loss_fn(net(data[0]), data[1])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(header), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
