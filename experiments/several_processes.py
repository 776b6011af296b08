"""One batch on several processes: a SyncBatchNorm ResNet under DistributedDataParallel, and its exact curvature.

    torchrun --standalone --nproc-per-node 2 experiments/several_processes.py [--samples 128] [--epochs 4]
        [--device cpu] [--quick] [--out experiments/output]

Every process (rank) trains on its share of scikit-learn's digits and calls `bncurv.curvature` with its share of one
batch. Rank 0 prints the results beside those of one process that has the whole batch, with passes, messages and
seconds, and saves a plot: what the ranks' own batch statistics make of it. The exit status is 1 where numbers differ
from one process' by more than 1e-12 (float64).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lib.figures import BLUE, ORANGE, panels, save, style
from lib.resnet import Digits, SmallResNet, accuracy, load_data
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bncurv
from bncurv import ComponentL2Grad, DiagGGNExact, LowRankGGN, curvature

LIMIT = 1e-12
LOSS = nn.CrossEntropyLoss()
CAPTION = (
    "The GGN of one batch on several ranks, same weights. With SyncBatchNorm the ranks share their statistics: it is "
    "the matrix of one process with the whole batch. With plain BatchNorm each rank normalises by its own samples, and "
    "the mean of the ranks' matrices is another one: the further off, the fewer samples a rank has."
)


def synchronised(model: nn.Module) -> DistributedDataParallel:
    """The model as it is trained on several processes."""
    if next(model.parameters()).device.type == "cpu":
        # PyTorch's own SyncBatchNorm runs on GPUs only, which this check says; that of an extended model runs anywhere
        DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None  # type: ignore
    return DistributedDataParallel(bncurv.extend(nn.SyncBatchNorm.convert_sync_batchnorm(model)))


def train(ddp: nn.Module, digits: Digits, epochs: int, batch_size: int = 64) -> None:
    """AdamW; every rank takes its share of each mini-batch, in an order that all of them draw alike."""
    rank, size = dist.get_rank(), dist.get_world_size()
    optimizer, order = torch.optim.AdamW(ddp.parameters(), 0.005), torch.Generator().manual_seed(0)
    for _ in range(epochs):
        whole = torch.randperm(len(digits.train_x), generator=order)
        for batch in whole[: len(whole) // batch_size * batch_size].split(batch_size):
            mine = batch[rank::size]
            optimizer.zero_grad()
            LOSS(ddp(digits.train_x[mine]), digits.train_y[mine]).backward()
            optimizer.step()


def measured(model: nn.Module, X: Tensor, y: Tensor, *quantities: Any, repeats: int = 3) -> tuple[Any, float]:
    """Results, and the median of some seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        res = curvature(model, LOSS, (X, y), *quantities, method="coupled")
        seconds.append(time.perf_counter() - start)
    return res, statistics.median(seconds)


def apart(got: dict[str, Tensor], want: dict[str, Tensor], prefix: str = "module.") -> float:
    """Largest difference of a parameter's results, relatively to their norm over all parameters."""
    whole = sum(float(t.square().sum()) for t in want.values()) ** 0.5
    return max(float((got[prefix + name] - t).norm()) for name, t in want.items()) / whole


def own_statistics(trained: nn.Module, digits: Digits, samples: int) -> tuple[float, float]:
    """How far off the diagonal and the trace are, relatively, where each rank normalises by its own samples."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * samples // size, (rank + 1) * samples // size)
    X, y = digits.train_x[mine].double(), digits.train_y[mine]
    one, two = (
        torch.cat([t.flatten() for t in curvature(m, LOSS, (X, y), DiagGGNExact()).diag_ggn_exact.values()])
        for m in (synchronised(copy.deepcopy(trained)), DistributedDataParallel(plain_batchnorm(trained)))
    )
    return float((two - one).norm() / one.norm()), float((two.sum() - one.sum()).abs() / one.sum())


def plot(by_samples: dict[int, tuple[float, float]], path: Path) -> Path:
    """Differences against the samples of a rank."""
    with style():
        figure, axes = panels(size=(7, 4.6))
        diagonal, trace = ([100 * d for d in column] for column in zip(*by_samples.values(), strict=True))
        axes.semilogx(list(by_samples), diagonal, color=BLUE, marker="o", label="diagonal (Euclidean norm)")
        axes.semilogx(list(by_samples), trace, color=ORANGE, marker="s", label="trace")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("difference from SyncBatchNorm, %")
        axes.set_xlabel("samples on each rank")
        axes.set_xticks(list(by_samples), [str(n) for n in by_samples])
        axes.minorticks_off()
        axes.legend()
        return save(figure, path, CAPTION)


def main() -> int:
    """Train, compute, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="of the whole batch")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="one epoch, a small batch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun --standalone --nproc-per-node 2 experiments/several_processes.py")
    samples, epochs = (24, 1) if args.quick else (args.samples, args.epochs)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    samples -= samples % dist.get_world_size()  # shares of equal size: then it is the mean over all samples
    try:
        return compare(samples, epochs, args)
    finally:
        dist.destroy_process_group()


def compare(samples: int, epochs: int, args: argparse.Namespace) -> int:
    """On every rank; rank 0 prints."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    torch.manual_seed(0)
    digits = load_data(device=args.device)
    ddp = synchronised(SmallResNet(8).to(args.device))
    train(ddp, digits, epochs)
    trained = copy.deepcopy(bncurv.unextend(ddp.module)).double()
    X, y = digits.train_x[:samples].double(), digits.train_y[:samples]
    mine = slice(rank * samples // size, (rank + 1) * samples // size)

    asked = DiagGGNExact(), ComponentL2Grad(), LowRankGGN(top=5, matrix_free=False)
    model = synchronised(copy.deepcopy(trained))
    res, seconds = measured(model, X[mine], y[mine], *asked)
    plain = plain_batchnorm(trained)
    divided = curvature(plain, LOSS, (X, y), *asked, method="coupled", process_group=dist.group.WORLD)
    totals = [size * n for n in (4, 8, 16, 32, 64) if size * n <= samples]
    by_samples = {n // size: own_statistics(trained, digits, n) for n in totals}
    if rank:
        dist.barrier()
        return 0
    want, alone = measured(plain, X, y, *asked)
    norms = {n: res.l2_component[f"module.{n}"] - t[mine] for n, t in want.l2_component.items()}
    found = {
        "GGN diagonal": apart(res.diag_ggn_exact, want.diag_ggn_exact),
        "GGN diagonal, the whole batch on every rank": apart(divided.diag_ggn_exact, want.diag_ggn_exact, ""),
        "norms of rank 0's component gradients": max(
            float(t.norm() / want.l2_component[n][mine].norm()) for n, t in norms.items()
        ),
        "five largest eigenvalues": float((res.ggn.eigenvalues / want.ggn.eigenvalues - 1).abs().max()),
    }
    print(f"{size} processes, {samples} samples, accuracy {accuracy(plain, digits.test_x.double(), digits.test_y):.1%}")
    print("\n| quantity | largest relative difference from one process |\n| --- | --- |")
    for name, difference in found.items():
        print(f"| {name} | {difference:.1e} |")
    print(f"\npasses: {res.passes} on every rank, {want.passes} on one process")
    print(f"passes with the whole batch on every rank, divided: {divided.passes}")
    print("\n| messages of rank 0 | number | kB |\n| --- | --- | --- |")
    for purpose, sent in res.messages.items():
        print(f"| {purpose} | {sent.number} | {sent.bytes / 1e3:.1f} |")
    print(f"\nseconds (median of 3): {seconds:.2f} on {size} processes, {alone:.2f} on one with a rank's threads")
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"wrote {plot(by_samples, args.out / 'several_processes.png')}")
    dist.barrier()
    return int(max(found.values()) > LIMIT)


def plain_batchnorm(model: nn.Module) -> nn.Module:
    """A copy with PyTorch's ordinary BatchNorm."""
    plain = SmallResNet(8).to(next(model.parameters()))
    plain.load_state_dict(model.state_dict())
    return plain


if __name__ == "__main__":
    sys.exit(main())
