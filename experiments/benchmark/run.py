"""Measure bncurv and its peers in one process: ``python experiments/benchmark/run.py --quick``.

Writes one JSON object per line into ``--out`` after every cell (a line with environment and settings, then rows, which
``table.py`` and ``plot.py`` read), and prints the table. ``--resume`` keeps the cells that the file already holds.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# numpy's own threads would wait for torch's (and the other way round): eigsh 2-3 times slower
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from jobs import JOBS  # noqa: E402
from lib.networks import NETWORKS  # noqa: E402
from measure import Row, measure_cell  # noqa: E402
from meters import gemm_rate  # noqa: E402
from table import everything, load, report  # noqa: E402

# options: quick, full
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "nets": (["mlp", "cnn"], ["mlp", "cnn", "vgg"]),
    "sizes": ([32], [32, 64, 128, 256, 512, 1024]),
    "budget": (8.0, 120.0),
    "patience": (2.0, 60.0),
    "repeats": (3, 7),
    "chunks": ([16, 64], [4, 8, 16, 32, 64, 128, 256, 512]),
    "min_time": (0.02, 0.1),
}


def parse() -> argparse.Namespace:
    """The command line; what is not given comes from ``DEFAULTS``."""
    words, numbers = (lambda s: s.split(",")), (lambda s: [int(x) for x in s.split(",")])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a small grid, a few minutes")
    parser.add_argument("--jobs", type=words, default=[*JOBS, "accuracy"], help=",".join([*JOBS, "accuracy"]))
    parser.add_argument("--nets", type=words, help=",".join(NETWORKS) + "; with -cC at the end: of C classes")
    parser.add_argument("--sizes", type=numbers, help="batch sizes N")
    parser.add_argument("--chunks", type=numbers, help="chunk sizes to try")
    parser.add_argument("--repeats", type=int, help="quiet samples wanted per competitor")
    parser.add_argument("--budget", type=float, help="seconds per cell, all competitors together")
    parser.add_argument("--patience", type=float, help="seconds of waiting per cell")
    parser.add_argument("--min-time", type=float, help="seconds per sample at least")
    parser.add_argument("--only", type=words, default=[], help="parts of competitor names")
    parser.add_argument("--mc-samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: 1 thread")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 products on a GPU")
    parser.add_argument("--out", type=Path, default=HERE.parent / "output" / "benchmark.jsonl", help="the results file")
    parser.add_argument("--resume", action="store_true", help="keep the cells already measured")
    args = parser.parse_args()
    args.device, args.known = torch.device(args.device), {}  # chunks found best
    if args.clock == "cpu" and (args.threads != 1 or args.device.type != "cpu"):
        parser.error("CPU seconds are a fair clock with --threads 1 --device cpu only")
    for name, (quick, full) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    return args


def environment(args: argparse.Namespace) -> Row:
    """Where and with what the numbers are taken."""
    cpus, cuda = Path("/proc/cpuinfo"), args.device.type == "cuda"
    names = re.findall(r"^model name\s*: (.*)$", cpus.read_text() if cpus.exists() else "", re.MULTILINE)
    packages = "curvlinops-for-pytorch", "numpy", "scipy"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": names[0] if names else platform.processor() or "unknown",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": "float32",
        "tf32": args.tf32 if cuda else None,
        "gemm_gflops": gemm_rate(args.device, args.clock) / 1e9,
        "packages": {found.name: found.version for found in distributions() if found.name in packages},
    }


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, int, Callable[[], list[Row]]]]:
    """Job, network, N and how it is measured."""
    for net in args.nets:
        for n in args.sizes:
            for job in (job for job in args.jobs if job in JOBS):
                yield job, net, n, partial(measure_cell, net, n, JOBS[job], args)
    if "accuracy" in args.jobs:  # scikit-learn's digits
        from accuracy import measure_accuracy
        from lib.estimates import BUILDERS, cases

        builders = {"MLP": BUILDERS["MLP"]} if args.quick else BUILDERS
        for case in cases(builders, 64, epochs=10, device=args.device):
            yield "accuracy", case.name, 64, partial(measure_accuracy, case, args)


def main() -> None:
    """Walk the grid."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    warnings.filterwarnings("ignore")
    have = {(r["job"], r["net"], r["n"]) for run in load(args.out) for r in run.rows} if args.resume else set()
    if not have:
        settings = {k: v for k, v in vars(args).items() if k not in ("device", "known", "out", "resume")}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": environment(args), "settings": settings}) + "\n")
    for job, net, n, measure in cells(args):
        if (job, net, n) not in have:
            start, rows = time.perf_counter(), measure()
            print(f"{job}  {net}  N={n}  ({time.perf_counter() - start:.0f} s)\n{everything([rows])}", flush=True)
            with args.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            gc.collect()
    print(f"\n{report(load(args.out))}\n\nwrote {args.out}")


if __name__ == "__main__":
    main()
