"""Numbers that the host reads from the device: each is a wait, and none of them is in a loop over chunks."""

import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from cases import seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bncurv
from bncurv import curvature

READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")
RANGES = {"within_range", "sum_squares"}  # of sums of squares from factors, for each chunk of columns


class Reads(TorchDispatchMode):
    """Counts them, by the function of bncurv that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.by = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if str(func) in READS:
            frames = traceback.extract_stack()
            self.by[next(f.name for f in reversed(frames) if "bncurv" in f.filename and "tests" not in f.filename)] += 1
        return func(*args, **(kwargs or {}))


def net() -> nn.Module:
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 3))


def reads(quantity: bncurv.quantities.Quantity, **options: Any) -> Counter[str]:
    model = seeded(net, 0)()
    X, y = seeded(lambda: torch.randn(12, 1, 6, 6), 1)(), torch.arange(12) % 3
    torch.manual_seed(0)
    with Reads() as found:
        curvature(model, nn.CrossEntropyLoss(), (X, y), quantity, **options)
    return found.by


@pytest.mark.parametrize(
    ("quantity", "options"),
    [
        (bncurv.DiagGGNExact(), {"method": "coupled"}),
        (bncurv.DiagGGNExact(), {"method": "dense"}),
        (bncurv.DiagGGNExact(), {"method": "coupled", "tol": 1e-3}),
        (bncurv.ComponentGrad(), {"method": "coupled"}),
        (bncurv.CouplingReport(), {}),
        (bncurv.InfluenceGrad(), {}),
        (bncurv.DiagGGNMC(20), {}),
        (bncurv.DiagGGNMC(passes=14), {"method": "dense"}),
        (bncurv.DiagGGNMC(rtol=0.9), {"method": "dense"}),
    ],
    ids=str,
)
def test_none_in_a_loop(quantity: bncurv.quantities.Quantity, options: dict[str, Any]) -> None:
    """As many with one vector at a time as with all at once."""
    one, all_of_them = reads(quantity, chunk_size=1, **options), reads(quantity, **options)
    assert sum(all_of_them.values()) > 10
    assert set(one - all_of_them) <= RANGES
