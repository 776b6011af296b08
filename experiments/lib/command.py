"""The one command line of all experiments, and what they write.

    python experiments/NAME.py [--quick] [--seed S] [--device D] [--out DIR]

A script defines ``experiment(run)``, which yields the rows of its statements, and ends with
``if __name__ == "__main__": sys.exit(main(experiment))``. Rows are printed as
``id · statement · measured · acceptance · verdict`` and written with the environment to ``NAME.json``.
The exit status is 1 if an acceptance fails.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import bncurv
from lib import figures
from lib.defaults import defaults
from lib.statements import CATALOGUE, Row, statements_of

T = TypeVar("T")
OUT = Path(__file__).parents[1] / "output"


@dataclass
class Run:
    """What an experiment is given: its options, a progress bar, a place for figures.

    Attributes:
        name: of the script.
        quick: whether to take the small sizes.
        seed: of all randomness; torch's generator starts from it.
        device: where tensors live.
        out: folder for results.
        plots: figures saved so far, ``{"file", "caption"}``.
    """

    name: str
    quick: bool
    seed: int
    device: torch.device
    out: Path
    plots: list[dict[str, str]] = field(default_factory=list)
    bar: tqdm | None = None

    def pick(self, full: T, quick: T) -> T:
        """The full size, or with ``--quick`` the small one."""
        return quick if self.quick else full

    def seeds(self, count: int, quick: int = 1) -> list[int]:
        """So many seeds, from this run's own."""
        return list(range(self.seed, self.seed + self.pick(count, quick)))

    def expect(self, units: float) -> None:
        """So many more units of work: seconds by a rough guess, or steps of about equal length."""
        if self.bar is not None:
            self.bar.total = (self.bar.total or 0) + units
            self.bar.refresh()

    def tick(self, units: float = 1) -> None:
        """So many units are done."""
        if self.bar is not None:
            self.bar.update(units)

    def save(self, figure: Figure, caption: str, suffix: str = "") -> None:
        """Write a figure as ``NAME.png`` (or ``NAME_suffix.png``), what to see below it."""
        path = self.out / f"{self.name}{suffix and '_'}{suffix}.png"
        figures.save(figure, path, caption)
        self.plots.append({"file": path.name, "caption": caption})


Experiment = Callable[[Run], Iterable[Row]]


def main(experiment: Experiment, arguments: list[str] | None = None) -> int:
    """Run an experiment from the command line; returns the exit status."""
    source = Path(inspect.getfile(experiment))
    doc = inspect.getmodule(experiment).__doc__ or ""
    run = parse(source.stem, doc.strip().splitlines()[0], arguments)
    matplotlib.use("Agg")
    start = time.perf_counter()
    with defaults(run.seed), figures.style(), tqdm(desc=run.name, unit="", bar_format=BAR) as run.bar:
        rows = list(experiment(run))
    complain(run.name, rows)
    rows.sort(key=lambda row: list(CATALOGUE).index(row.id))
    for row in rows:
        print(row)
    path = write(run, rows, time.perf_counter() - start)
    failed = [row.id for row in rows if row.verdict == "fails"]
    print(f"wrote {path}" + "".join(f", {run.out / plot['file']}" for plot in run.plots))
    if failed:
        print(f"acceptance not met: {', '.join(failed)}")
    return int(bool(failed))


BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def options(name: str, description: str) -> argparse.ArgumentParser:
    """Those that every experiment has."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, under 20 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="e.g. cpu, cuda")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for results and plots")
    return parser


def parse(name: str, description: str, arguments: list[str] | None) -> Run:
    """A run as the command line wants it."""
    args = options(name, description).parse_args(arguments)
    return Run(name, args.quick, args.seed, args.device, args.out)


def complain(name: str, rows: list[Row]) -> None:
    """Raise unless the rows are exactly those that the catalogue gives to this script."""
    got, expected = [row.id for row in rows], statements_of(name)
    if sorted(got) != sorted(expected):
        raise ValueError(f"{name} gave the rows {got}; the catalogue expects {expected}, each once.")


def write(run: Run, rows: list[Row], seconds: float) -> Path:
    """NAME.json: rows, environment, plots."""
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bncurv": bncurv.__version__,
        "machine": platform.machine(),
        "device": str(run.device),
        "seed": run.seed,
        "quick": run.quick,
        "seconds": round(seconds, 1),
    }
    path = run.out / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"rows": [row.as_json() for row in rows], "environment": environment, "plots": run.plots}
    path.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def plain(value: Any) -> Any:
    """What JSON knows: tensors and arrays as lists, keys as strings, NaN and infinities as words."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return plain(value.tolist()) if hasattr(value, "tolist") else value


__all__ = ["Experiment", "Run", "main"]

if __name__ == "__main__":
    sys.exit("this is a library; run one of the experiments, e.g. python experiments/identities.py")
