"""Whether ``memory=`` is kept: the measured peak above the model's own graph, for six networks at three budgets each.

    python experiments/memory.py [--device cpu] [--only cnn vgg] [--write]

Every row is a process of its own: the network's graph is measured alone, then the peak of ``curvature(..., memory=)``
(resident memory on CPUs, the allocator's on CUDA), then the same without a limit, for its results, time and peak. The
budgets are the smallest that does, taken from the error that names it, and twice and five times as much. Exit status 1
if a peak is more than 1.2 times its budget, or results differ.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from typing import Any

import torch
from benchmark.meters import peak_memory, synchronize
from lib.networks import make_problem
from lib.pages import ROOT, insert

import bncurv

# network, samples, the way
CELLS = (
    ("mlp", 4096, "coupled"),
    ("cnn", 1024, "coupled"),
    ("vgg", 256, "coupled"),
    ("resnet20", 16, "auto"),
    ("vit", 512, "coupled"),
    ("convnext", 512, "coupled"),
)
TIMES = 1, 2, 5
MOST = 1.2  # of the budget
APART = {torch.float32: 1e-5, torch.float64: 1e-12}  # of results, relatively
HEAD = ["network", "N", "way", "its graph", "budget", "peak", "peak / budget", "passes", "s", "no limit: peak", "s"]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in CELLS], help="some of the networks")
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    parser.add_argument("--cell", nargs=4, help="one row: network, samples, way, times the smallest budget")
    return parser.parse_args()


def smallest(message: str) -> int:
    """The budget that an error names."""
    found = re.search(r"memory=(\d+) \([\d.]+ MiB\), by", message)
    assert found, message
    return int(found[1])


def measure(name: str, samples: int, method: str, times: float, device: torch.device) -> dict[str, Any]:
    """One row."""
    model, loss_fn, X, y = make_problem(name, samples, device)

    def diagonal(memory: int | None, n: int = samples) -> Any:
        start = time.perf_counter()
        res = bncurv.curvature(model, loss_fn, (X[:n], y[:n]), bncurv.DiagGGNExact(), method=method, memory=memory)
        synchronize(device)
        return res, time.perf_counter() - start

    diagonal(None, 4)  # libraries that are loaded, and their workspaces
    _, graph = peak_memory(lambda: model(X), device)
    try:
        diagonal(1)
    except ValueError as error:
        budget = int(times * smallest(str(error)))
    (res, seconds), peak = peak_memory(lambda: diagonal(budget), device)
    (free, fast), most = peak_memory(lambda: diagonal(None), device)
    assert graph is not None and peak is not None and most is not None, "this system does not tell resident memory"
    found, expected = (torch.cat([t.flatten() for t in r.diag_ggn_exact.values()]) for r in (res, free))
    return {
        "graph": graph, "budget": budget, "peak": peak - graph, "way": res.method, "passes": res.passes,
        "seconds": seconds, "free": most - graph, "free_seconds": fast,
        "apart": float((found - expected).norm() / expected.norm()),
    }  # fmt: skip


def line(name: str, samples: int, row: dict[str, Any]) -> list[str]:
    """A row of the table, in MiB."""
    graph, budget, peak, free = (f"{row[key] / 2**20:.0f}" for key in ("graph", "budget", "peak", "free"))
    share = f"{row['peak'] / row['budget']:.2f}"
    seconds, fast = (f"{row[key]:.2g}" for key in ("seconds", "free_seconds"))
    return [name, str(samples), row["way"], graph, budget, peak, share, str(row["passes"]), seconds, free, fast]


def main() -> int:
    """Measure, print a Markdown table."""
    args = parse()
    if args.cell:
        name, samples, method, times = args.cell
        print(json.dumps(measure(name, int(samples), method, float(times), torch.device(args.device))))
        return 0
    table, failed = [HEAD, ["---"] * len(HEAD)], False
    for name, samples, method in CELLS:
        for times in TIMES if name in (args.only or [name]) else ():
            command = [sys.executable, __file__, "--device", args.device, "--cell", name, samples, method, times]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            row = json.loads(done.stdout)
            failed |= row["peak"] > MOST * row["budget"] or row["apart"] > APART[torch.float32]
            table.append(line(name, samples, row))
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    print(text)
    if args.write:
        insert(ROOT / "docs/memory.md", "memory", text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
