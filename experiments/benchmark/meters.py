"""Meters: time beside busy neighbours, peak memory, counted FLOPs, the rate of a matrix product.

`torch.utils.benchmark.Timer` takes the matrix product's time. Samples it does not take: it warms up before each, twice
the work for calls of a minute, and knows nothing of neighbours. `FlopCounterMode` does not count either: it hooks every
module and gradient, which bncurv must take for code of the user's, and gradients at leaves refuse; its table of
formulas is used under a bare dispatch mode.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

QUIET = 0.12  # share of the CPUs that other processes may use in a sample that counts
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # CPU seconds: fair with one thread


class Sample(NamedTuple):
    """Seconds of one call by each clock, and the share of the CPUs that others used meanwhile."""

    wall: float
    cpu: float
    foreign: float


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used (0 where unknown)."""
    try:
        with open("/proc/stat") as file:
            fields = [int(x) for x in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def time_call(call: Callable[[], Any], device: torch.device, inner: int = 1) -> Sample:
    """Mean seconds of ``inner`` calls."""
    synchronize(device)
    busy, cpu, wall = _busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(inner):
        call()
    synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    foreign = max(0.0, _busy_seconds() - busy - cpu) / (wall * (os.cpu_count() or 1))
    return Sample(wall / inner, cpu / inner, foreign)


def wait_for_quiet(patience: float) -> float:
    """Return when other processes are quiet or the patience [s] is used up; what is left of it."""
    while patience > 0:
        sample = time_call(lambda: time.sleep(0.15), torch.device("cpu"))
        if sample.foreign <= QUIET:
            break
        patience -= sample.wall
    return patience


def quiet_median(samples: list[Sample], clock: str = "wall") -> tuple[float, int]:
    """Median of the quiet samples (of all if none is), and how many are: all of them by the CPU's clock."""
    quiet = [s for s in samples if clock == "cpu" or s.foreign <= QUIET]
    return median(getattr(s, clock) for s in quiet or samples), len(quiet)


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _status_bytes(key: str) -> int:
    """One memory entry of this process' status."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """The call's result and the bytes that it held at its peak above what was held before.

    CPU: the kernel's high-water mark of resident memory, after freed memory was handed back.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the high-water mark
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, max(0, _status_bytes("VmHWM") - before)


aten = torch.ops.aten
IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}


class FlopMeter(TorchDispatchMode):
    """Counts FLOPs (two per multiply-add) of matrix products and convolutions, by PyTorch's table of formulas."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet is aten.convolution_backward:  # the table takes groups for one here: each half as the forward pass
            grad, x, weight, _, *options, mask = args
            forward = flop_registry[aten.convolution](x, weight, None, *options, out_val=grad)
            self.flops += (mask[0] + mask[1]) * forward
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in one call."""
    with FlopMeter() as meter:
        call()
    return meter.flops


def gemm_rate(device: torch.device, clock: str = "wall", size: int = 2048) -> float:
    """FLOP/s of a square float32 matrix product."""
    a, b = torch.randn(2, size, size, device=device)
    wall = {} if clock == "wall" else {"timer": CLOCKS[clock]}
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads(), **wall)
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.2).median
