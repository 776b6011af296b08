"""Measure bncurv and its peers in one process: ``python experiments/benchmark/run.py --quick``.

Writes ``results.json`` (environment and rows) into ``--out`` after every cell; ``table.py`` and
``plot.py`` read it. ``--resume`` keeps the cells that the file already holds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# numpy's own threads would wait for torch's (and the other way round): eigsh 2-3 times slower
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from measure import Settings, measure_cell  # noqa: E402
from networks import NETWORKS  # noqa: E402
from problem import JOBS, Problem  # noqa: E402
from report import environment  # noqa: E402

QUICK: dict[str, Any] = {
    "nets": ["mlp", "cnn"],
    "sizes": [32],
    "budget": 8.0,
    "patience": 2.0,
    "repeats": 3,
    "chunks": [16, 64],
    "min_time": 0.02,
}
FULL: dict[str, Any] = {
    "nets": ["mlp", "cnn", "vgg"],
    "sizes": [32, 64, 128, 256, 512, 1024],
    "budget": 120.0,
    "patience": 60.0,
    "repeats": 7,
    "chunks": [4, 8, 16, 32, 64, 128, 256, 512],
    "min_time": 0.1,
}


def parse() -> argparse.Namespace:
    """The command line; what is not given comes from ``FULL`` or ``QUICK``."""
    words, numbers = (lambda s: s.split(",")), (lambda s: [int(x) for x in s.split(",")])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a small grid, one or two minutes")
    parser.add_argument("--jobs", type=words, default=list(JOBS), help=",".join(JOBS))
    parser.add_argument("--nets", type=words, help=",".join(NETWORKS))
    parser.add_argument("--sizes", type=numbers, help="batch sizes N")
    parser.add_argument("--chunks", type=numbers, help="chunk sizes to try")
    parser.add_argument("--repeats", type=int, help="quiet samples wanted per competitor")
    parser.add_argument("--budget", type=float, help="seconds per cell, all competitors together")
    parser.add_argument("--patience", type=float, help="seconds of waiting per cell")
    parser.add_argument("--min-time", type=float, help="seconds per sample at least")
    parser.add_argument("--only", type=words, default=[], help="parts of competitor names")
    parser.add_argument("--factor", default="c-1", choices=("c", "c-1"), help="columns per sample")
    parser.add_argument("--mc-samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: 1 thread")
    parser.add_argument("--malloc", default="default", choices=("default", "tuned"))
    parser.add_argument("--tf32", action="store_true", help="allow TF32 products on a GPU")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--resume", action="store_true", help="keep the cells already measured")
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("CPU seconds are a fair clock with --threads 1 --device cpu only")
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def configure(args: argparse.Namespace) -> torch.device:
    """Threads, allocator and precision, the same for every competitor."""
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32
    if args.malloc == "tuned":  # glibc keeps freed memory instead of returning every big block
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    warnings.filterwarnings("ignore")
    return torch.device(args.device)


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    head = f"  {row['competitor']:22s} chunk {row['chunk'] or '-':>4}"
    if row["seconds"] is None:
        return f"{head}  skipped: {row['note']}"
    sign = "~" if row["extrapolated"] else " "
    memory = "     -" if row["peak_mib"] is None else f"{row['peak_mib']:6.0f}"
    rate = "" if row["gflops"] is None else f"  {row['gflops']:6.1f} GFLOP/s"
    error = "" if row.get("error") is None else f"  error {row['error']:.1e}"
    return (
        f"{head} {sign}{row['seconds']:9.4f} s  {memory} MiB  passes {row['passes']}"
        f"{rate}{error}  ({row['quiet']}/{row['samples']} quiet)  {row['note']}"
    )


def save(args: argparse.Namespace, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the results file."""
    hidden = ("out", "resume")
    settings = {k: v for k, v in vars(args).items() if k not in hidden}
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"environment": env, "settings": settings, "rows": rows}
    (args.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Walk the grid."""
    args = parse()
    device = configure(args)
    file = args.out / "results.json"
    rows = json.loads(file.read_text())["rows"] if args.resume and file.exists() else []
    have = {(r["job"], r["net"], r["n"]) for r in rows}
    env = environment(device, args.clock)
    print(json.dumps(env))
    settings = Settings(
        repeats=args.repeats,
        budget=args.budget,
        min_time=args.min_time,
        patience=args.patience,
        clock=args.clock,
        chunks=tuple(args.chunks),
        only=tuple(args.only),
    )
    cells = [(net, n, job) for net in args.nets for n in args.sizes for job in args.jobs]
    for net, n, job in cells:
        if (job, net, n) in have:
            continue
        start = time.perf_counter()
        problem = Problem(net, n, device, args.factor, args.mc_samples)
        found = measure_cell(problem, job, settings)
        print(f"{job}  {net}  N={n}  ({time.perf_counter() - start:.0f} s)")
        print("\n".join(describe(row) for row in found), flush=True)
        rows += found
        save(args, env, rows)
        print(f"wrote {file}")
        del problem
        gc.collect()


if __name__ == "__main__":
    main()
