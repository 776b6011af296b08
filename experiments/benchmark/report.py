"""Rows of ``results.json`` from what was measured, and the environment they belong to."""

from __future__ import annotations

import datetime
import platform

import torch
from cell import Cell, Row
from meters import count_flops, gemm_rate, quiet_median
from tuning import Entry


def _head(cell: Cell, entry: Entry) -> Row:
    """What identifies a row."""
    problem, competitor = cell.problem, entry.competitor
    return {
        "job": cell.job.name,
        "net": problem.net,
        "n": problem.n,
        "classes": problem.classes,
        "parameters": problem.D,
        "components": cell.K,
        "competitor": competitor.name,
        "kind": competitor.kind,
        "chunk": entry.chunk,
    }


def skipped_row(cell: Cell, entry: Entry) -> Row:
    """A competitor that was not timed, and why."""
    return _head(cell, entry) | {"seconds": None, "note": entry.skipped}


def finished_row(cell: Cell, entry: Entry) -> Row:
    """Time, memory, passes, FLOPs and error of one competitor."""
    seconds, quiet = quiet_median(entry.samples, cell.clock)
    scale = 1.0
    if entry.columns is not None:  # linear in the columns; the forward pass is paid once
        scale = cell.K / entry.columns
        forward = min(cell.forward, seconds / 2)
        seconds = forward + (seconds - forward) * scale + cell.finish
    outcome, peak = cell.peak(entry)
    passes = None if outcome.passes is None else round(outcome.passes * scale)
    flops, counted = _flops(cell, entry, passes)
    keeps = cell.job.stored or entry.competitor.name == "func jacrev"
    row = _head(cell, entry) | {
        "seconds": seconds,
        "fastest": min(s.on(cell.clock) for s in entry.samples) if scale == 1.0 else None,
        "samples": len(entry.samples),
        "quiet": quiet,
        "extrapolated": entry.columns is not None,
        "columns_timed": entry.columns or cell.K,
        "peak_mib": None if peak is None or (keeps and entry.columns) else peak / 2**20,
        "passes": passes,
        "flops": flops,
        "flops_counted": counted,
        "gflops": None if flops is None else flops / seconds / 1e9,
        "plain_flops": cell.forward_flops + cell.K * cell.backward_flops,
        "gemm_gflops": cell.gemm / 1e9,
        "gemm_fraction": None if flops is None else flops / seconds / cell.gemm,
        "note": outcome.note,
        "tuned": {str(c): s for c, s in entry.tuned.items()},
    }
    return row | cell.check(entry.competitor, entry, outcome)


def _flops(cell: Cell, entry: Entry, passes: int | None) -> tuple[int | None, bool]:
    """FLOPs of a whole run: counted on a run, else on paper for a plain way; and which."""
    if entry.columns is None and entry.single < cell.share / 2:
        try:
            return count_flops(lambda: entry.call(cell.problem)), True
        except Exception:  # an operation that the meter cannot look into
            pass
    if not entry.competitor.partial or passes is None:
        return None, False
    return cell.forward_flops + passes * cell.backward_flops, False


def _cpu_name() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    """A package's version, if it is there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device, clock: str) -> Row:
    """Where and with what the numbers were taken."""
    packages = ("curvlinops-for-pytorch", "backpack-for-pytorch", "numpy", "scipy")
    cuda = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": "float32",
        "tf32": torch.backends.cuda.matmul.allow_tf32 if cuda else None,
        "gemm_gflops": gemm_rate(device, clock) / 1e9,
        "packages": {name: _version(name) for name in packages},
    }
