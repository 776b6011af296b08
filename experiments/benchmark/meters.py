"""Meters: time with a gate for busy neighbours, peak memory, counted FLOPs, the GEMM rate."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

QUIET = 0.12  # share of the CPUs that other processes may use in a sample that counts


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, its CPU seconds, and the share of the CPUs that others used."""

    seconds: float
    foreign: float
    cpu: float

    def on(self, clock: str) -> float:
        """Seconds on the wall's clock or on the CPU's (fair with one thread only)."""
        return self.cpu if clock == "cpu" else self.seconds


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
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(inner):
        call()
    synchronize(device)
    wall = time.perf_counter() - start
    cpu = time.process_time() - own
    foreign = max(0.0, _busy_seconds() - busy - cpu)
    return Sample(wall / inner, foreign / (wall * (os.cpu_count() or 1)), cpu / inner)


@dataclass
class Gate:
    """Waits for busy neighbours to stop, as long as its patience lasts; keeps the clock."""

    patience: float = 0.0
    clock: str = "wall"

    def now(self) -> float:
        """The time on the clock that counts."""
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def wait(self) -> None:
        """Return when other processes are quiet, or when the patience is used up."""
        while self.patience > 0:
            busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
            time.sleep(0.15)
            wall = time.perf_counter() - start
            foreign = _busy_seconds() - busy - (time.process_time() - own)
            if foreign <= QUIET * wall * (os.cpu_count() or 1):
                return
            self.patience -= wall

    def charge(self, sample: Sample, usual: float) -> float:
        """Seconds to count: what a busy neighbour cost comes out of the patience, if it lasts."""
        if sample.foreign <= QUIET or self.patience <= 0:
            return sample.seconds
        self.patience -= sample.seconds - usual
        return usual


def quiet_median(samples: list[Sample], clock: str = "wall") -> tuple[float, int]:
    """Median of the quiet samples (of all of them if none is), and how many are.

    On the CPU's clock all of them count: it is for a machine that is never quiet.
    """
    quiet = [s for s in samples if s.foreign <= QUIET]
    counted = quiet if clock == "wall" and quiet else samples
    return median(s.on(clock) for s in counted), len(quiet)


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
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
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
    """Counts FLOPs (two per multiply-add) of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet is aten.convolution:
            self.flops += _convolution_flops(out, args[0], args[1], args[6])
        elif packet is aten.convolution_backward:
            grad, x, weight, mask = args[0], args[1], args[2], args[10]
            self.flops += (mask[0] + mask[1]) * _convolution_flops(grad, x, weight, args[7])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def _convolution_flops(out: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> int:
    """FLOPs of a convolution, as of either half of its backward pass (any groups)."""
    positions = (x if transposed else out).numel()
    return 2 * positions * math.prod(weight.shape[1:])


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in one call."""
    with FlopMeter() as meter:
        call()
    return meter.flops


def gemm_rate(
    device: torch.device, clock: str = "wall", size: int = 4096, repeats: int = 5
) -> float:
    """FLOP/s of a square float32 matrix product, median after one warm-up."""
    a, b = torch.randn(2, size, size, device=device)
    torch.mm(a, b)
    samples = [time_call(lambda: torch.mm(a, b), device) for _ in range(repeats)]
    return 2 * size**3 / quiet_median(samples, clock)[0]
